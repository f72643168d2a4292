"""Jobs over several hosts, rehearsed on one: a stand-in for ssh, srun or mpirun on the path runs here what should run there."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from launcher.node import configs_here
from tests.launching import alive

ROOT = Path(__file__).resolve().parents[1]
DRIVER = f"""
import sys
sys.path.append({str(ROOT)!r})
from pathlib import Path
from launcher.hosts import find_hosts
from launcher.job import Job
from launcher.multinode import run_on_hosts
from megatron_lite.config.sections import LauncherSection
from megatron_lite.errors import UserError

section = LauncherSection(launcher=sys.argv[1], master_addr="localhost", master_port=int(sys.argv[2]))
job = Job(sys.argv[4], Path("script.py"), ("small.yml", "top_k=3"), int(sys.argv[3]), Path("logs") / "job")
job.logs.mkdir(parents=True, exist_ok=True)
try:
    sys.exit(run_on_hosts(find_hosts(Path("hosts"), section, devices=1), [Path("small.yml")], job, section))
except UserError as error:
    sys.exit(str(error))
"""
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
sys.path.append({root!r})
from launcher.worker import work
from megatron_lite.errors import DataError

rank = int(os.environ["RANK"])

def main(command):
    Path(f"here{{rank}}-{{os.getpid()}}").touch()
    while len(list(Path().glob("here*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
{body}

work(main, script="generate")
"""
# ssh drops its options, the host's name and a variable of the environment; the file `refused` names hosts that do not answer
SSH = """while [ "${1#-}" != "$1" ]; do shift 2; done
if grep -qsx "$1" refused; then echo "ssh: connect to host $1: No route to host" >&2; exit 255; fi
shift; exec env -u WANDB_API_KEY sh -c "$*"
"""
# srun starts its words once for every task
SRUN = """n=0; tasks=0
for word in "$@"; do case "$word" in --ntasks=*) tasks="${word#*=}";; esac; done
echo "$0 $*" > asked
while [ "${1#-}" != "$1" ]; do shift; done
while [ $n -lt $tasks ]; do SLURM_NODEID=$n "$@" & n=$((n+1)); done
for job in $(jobs -p); do wait "$job" || exit $?; done
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, script in (("ssh", SSH), ("srun", SRUN)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "drive.py").write_text(DRIVER)
    (tmp_path / "small.yml").write_text("{'num_layers': 2}  # 100% of it\n")
    (tmp_path / "hosts").write_text("localhost slots=1\nworker-2 slots=2\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for pid in workers():
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)


def workers() -> list[int]:
    return [int(path.name.partition("-")[2]) for path in Path().glob("here*")]


def free_port() -> int:
    """One of those that no connection is given by chance, as the ports from 32768 on are: another test's could take it before it is listened at."""
    while True:
        port = random.SystemRandom().randrange(10000, 20000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("localhost", port))
            return port


def start(body: str, launcher: str = "pdsh", port: int | None = None, name: str = "generate") -> "subprocess.Popen[str]":
    Path("script.py").write_text(SCRIPT.format(root=str(ROOT), body="\n".join("    " + line for line in body.splitlines())))
    command = [sys.executable, "drive.py", launcher, str(port or free_port()), "3", name]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(job: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = job.communicate(timeout=40)
    return job.returncode, out, err


def test_a_configuration_that_a_host_lacks_is_written_there_and_one_that_it_has_is_used(folder: Path) -> None:
    (folder / "copies").mkdir()
    text = (folder / "small.yml").read_text()
    own, other, absent = configs_here({"small.yml": text, "./small.yml": text + "#", "no/where.yml": "x: 1"}, folder / "copies")
    assert own == "small.yml"
    assert Path(other).read_text() == text + "#"
    assert (Path(absent).name, Path(absent).read_text()) == ("where.yml", "x: 1")


def test_ranks_run_through_the_hosts_and_rank_0_speaks(folder: Path) -> None:
    names = "'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'GROUP_RANK'"
    code, out, err = end(start(f"print(*(os.environ[name] for name in ({names})), *sys.argv[1:])"))
    assert (code, out) == (0, "0 0 3 0 small.yml top_k=3\n"), err
    assert (folder / "logs/job/rank1.log").read_text() == "1 0 3 1 small.yml top_k=3\n"
    assert (folder / "logs/job/rank2.log").read_text() == "2 1 3 1 small.yml top_k=3\n"


def test_a_failure_on_another_host_ends_all_and_is_told_with_the_hosts_name(folder: Path) -> None:
    code, _, err = end(start("if rank == 2: raise ValueError('shapes differ')\ntime.sleep(60)"))
    assert code == 1
    assert err.startswith("worker-2: ")
    assert f"rank 2 on {socket.gethostname()} failed with ValueError: shapes differ (log: logs/job/rank2.log)\n" in err
    assert not any(alive(pid) for pid in workers())


def test_a_user_error_on_all_hosts_is_one_sentence(folder: Path) -> None:
    assert end(start("raise DataError('prompts.txt is empty; write a prompt')")) == (2, "", "prompts.txt is empty; write a prompt\n")


def test_sigterm_ends_the_processes_of_every_host(folder: Path) -> None:
    job = start("time.sleep(60)")
    while len(workers()) < 3:
        time.sleep(0.05)
    job.terminate()
    code, _, err = end(job)
    assert (code, err.splitlines()[-1]) == (143, "stopped by SIGTERM; logs: logs/job")
    assert not any(alive(pid) for pid in workers())


SAVER = """asked = []
for number in (signal.SIGTERM, signal.SIGUSR1): signal.signal(number, lambda *_: asked.append(rank))
Path(f'ready{rank}').touch()
while not asked: time.sleep(0.01)
"""


def ask_to_stop(job: "subprocess.Popen[str]", *numbers: signal.Signals) -> None:
    """Sends the signals as soon as all ranks listen."""
    until = time.monotonic() + 40
    while len(list(Path().glob("ready*"))) < 3:
        assert time.monotonic() < until
        time.sleep(0.05)
    for number in numbers:
        job.send_signal(number)
        time.sleep(0.3)


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGTERM,), (signal.SIGUSR1, signal.SIGTERM)],
    ids=["SIGTERM", "SIGUSR1 and then SIGTERM"],
)
@pytest.mark.slow
def test_a_training_on_several_hosts_has_time_to_save_and_ends_with_75(folder: Path, numbers: tuple[signal.Signals, ...]) -> None:
    job = start(SAVER + "time.sleep(9 * (rank == 2))\nPath(f'saved{rank}').touch()\nos._exit(75)", name="train")
    ask_to_stop(job, *numbers)
    assert end(job) == (75, "", "")
    assert sorted(path.name for path in folder.glob("saved*")) == ["saved0", "saved1", "saved2"]


def test_a_host_that_cannot_save_is_told_although_the_others_wait_for_it(folder: Path) -> None:
    job = start(SAVER + "if rank == 2: raise DataError('out/: No space left on device')\ntime.sleep(60)", name="train")
    ask_to_stop(job, signal.SIGTERM)
    assert end(job) == (2, "", "worker-2: out/: No space left on device\n")
    assert not any(alive(pid) for pid in workers())


def test_keys_reach_every_host_and_stand_on_no_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-the-test")
    job = start("Path(f'key{rank}').write_text(os.environ['WANDB_API_KEY'])\nwhile not Path('seen').exists(): time.sleep(0.01)")
    while len(list(folder.glob("key*"))) < 3:
        assert job.poll() is None
        time.sleep(0.05)
    lines = subprocess.run(["ps", "-eo", "args", "-ww"], capture_output=True, text=True, check=True).stdout
    (folder / "seen").touch()
    assert end(job) == (0, "", "")
    assert "node.py" in lines
    assert "secret-of-the-test" not in lines
    assert [(folder / f"key{rank}").read_text() for rank in range(3)] == ["secret-of-the-test"] * 3


def test_no_process_on_any_host_outlives_a_launcher_killed_with_sigkill(folder: Path) -> None:
    job = start("time.sleep(60)")
    while len(workers()) < 3:
        time.sleep(0.05)
    job.kill()
    job.wait()
    until = time.monotonic() + 10
    while any(alive(pid) for pid in workers()):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_host_that_does_not_answer_is_named_before_anything_starts(folder: Path) -> None:
    (folder / "refused").write_text("worker-2\n")
    code, _, err = end(start("pass"))
    assert code == 1  # of the driver
    assert err == (
        "worker-2 does not let us in over ssh (ssh: connect to host worker-2: No route to host);"
        " it must without a password, see PDSH_SSH_ARGS_APPEND and no_ssh_check\n"
    )
    assert workers() == []


def test_a_port_that_is_taken_is_told(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = end(start("pass", port=port))
    assert code == 2
    assert err.startswith(f"the hosts cannot meet at localhost:{port} (")
    assert err.endswith("set master_addr and master_port to a free port that all of them reach\n")
    assert "Traceback" not in err


def test_srun_starts_a_node_program_on_every_host(folder: Path) -> None:
    code, out, err = end(start("print(*(os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'GROUP_RANK')))", "slurm"))
    assert (code, out) == (0, "0 3 0\n"), err
    asked = (folder / "asked").read_text()
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 --nodelist=localhost,worker-2" in asked
    order = json.loads(asked[asked.index("{") :])
    assert order["files"] == {"small.yml": "{'num_layers': 2}  # 100% of it\n"}


def test_a_way_to_start_that_is_missing_or_not_built_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "launcher mvapich is not built; use one of pdsh, slurm, openmpi, or start" in end(start("pass", "mvapich"))[2]
    monkeypatch.setenv("PATH", str(folder))
    assert "there is no mpirun here; set launcher to another way" in end(start("pass", "openmpi"))[2]
