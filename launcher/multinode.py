"""Runs a job over several hosts: a node program on each, which meet at the first host as torchrun's agents do.

`launcher: pdsh` (NeoX's default) starts them over ssh, which is what pdsh does too; `slurm` through srun, `openmpi` through mpirun.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.fleet import Node, watch
from launcher.hosts import Host
from launcher.job import GRACE, Job
from launcher.node import Order
from launcher.spawn import SAFE_PATH, hear_ctrl_c
from launcher.worker import PARENT
from megatron_lite.config.sections import LauncherSection
from megatron_lite.errors import LayoutError

PROGRAM = (sys.executable, *SAFE_PATH, str(Path(__file__).with_name("node.py")))
PASSED_ON = ("NCCL_", "GLOO_", "UCX_", "TORCH_", "WANDB_", "HF_", "OMP_", "PYTHONPATH", "LD_LIBRARY_PATH")  # beginnings of variables' names


def run_on_hosts(hosts: Sequence[Host], configs: Sequence[Path], job: Job, section: LauncherSection) -> int:
    """Runs a job of job.processes on the first devices of these hosts. Returns the exit code, after the first failure was told."""
    if section.launcher not in STARTERS:
        raise LayoutError(f"launcher {section.launcher} is not built; use one of {', '.join(STARTERS)}, or start every process with torchrun or srun")
    hear_ctrl_c()
    hosts = share(hosts, job.processes)
    order = Order(
        name=job.name,
        script=str(job.script),
        files={str(path): path.read_text(encoding="utf-8") for path in configs},
        settings=list(job.words[len(configs) :]),
        hosts=[(host.name, list(host.devices)) for host in hosts],
        address=section.master_addr or _address(hosts),
        port=section.master_port,
        folder=str(Path.cwd()),
        logs=str(job.logs),
        environment={name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)},
    )
    return watch(STARTERS[section.launcher](order, hosts, section), job)


def share(hosts: Sequence[Host], processes: int) -> tuple[Host, ...]:
    """The first hosts, with as many devices as there are processes."""
    taken: list[Host] = []
    for host in hosts:
        left = processes - sum(len(other.devices) for other in taken)
        if left > 0:
            taken.append(replace(host, devices=host.devices[:left]))
    return tuple(taken)


def _address(hosts: Sequence[Host]) -> str:
    """Where the others find the first host."""
    first, *others = hosts
    return socket.gethostname() if first.is_here and not all(host.is_here for host in others) else first.name


def over_ssh(order: Order, hosts: Sequence[Host], section: LauncherSection) -> list[Node]:
    """A node program on every host, ssh for those that are not this one. The order travels on its standard input, which then stays open as a lifeline.

    On this host it is a file without a name, and without the environment, which is inherited: keys must not stand on a command line, where all can read.
    """
    if not section.no_ssh_check:
        _try_ssh([host for host in hosts if not host.is_here])
    logs = Path(order.logs)
    return [_start_node(replace(order, node=number), host, logs / f"host{number}-{host.name}.log") for number, host in enumerate(hosts)]


def _start_node(order: Order, host: Host, log: Path) -> Node:
    first = order.node == 0
    stdin = subprocess.PIPE if not host.is_here else None if first else subprocess.DEVNULL
    with log.open("wb") as file, tempfile.TemporaryFile() as letter:
        output, number = None if first else file, letter.fileno()
        letter.write(replace(order, environment={}).as_text().encode())
        letter.flush()
        command = [*PROGRAM, f"/dev/fd/{number}"] if host.is_here else _ssh(host, shlex.join(PROGRAM))
        passed = (number,) if host.is_here else ()
        process = subprocess.Popen(command, stdin=stdin, stdout=output, stderr=output, pass_fds=passed, env=_environment(), start_new_session=True)
    if process.stdin:
        process.stdin.write(order.as_text().encode() + b"\n")
        process.stdin.flush()
    return Node(host.name, process, None if first else log)


def _ssh(host: Host, command: str) -> list[str]:
    return ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")), host.name, command]


def _environment() -> dict[str, str]:
    return {**os.environ, PARENT: str(os.getpid())}


def _try_ssh(hosts: Sequence[Host]) -> None:
    """Raises LayoutError where a host does not answer, or has no program to run."""
    try:
        tries = [
            (host, subprocess.Popen(_ssh(host, shlex.join(["test", "-f", PROGRAM[-1]])), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)) for host in hosts
        ]
    except FileNotFoundError:
        raise LayoutError("there is no ssh to start processes on other hosts with; install it, or set launcher to slurm or openmpi") from None
    for host, process in tries:
        said = process.communicate()[1].decode(errors="replace").strip()
        if process.returncode == 1 and not said:
            raise LayoutError(f"{host.name} has no file {PROGRAM[-1]}; install the project there, at the same place as here")
        if process.returncode:
            raise LayoutError(f"{host.name} does not let us in over ssh ({said}); it must without a password, see PDSH_SSH_ARGS_APPEND and no_ssh_check")


def through_srun(order: Order, hosts: Sequence[Host], section: LauncherSection) -> list[Node]:
    names = ",".join(host.name for host in hosts)
    options = [f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", f"--nodelist={names}"]
    options += [f"--{key}={value}" for key, value in (("account", section.account), ("comment", section.comment)) if value]
    return [_start_all("srun", options, order)]


def through_mpirun(order: Order, hosts: Sequence[Host], section: LauncherSection) -> list[Node]:
    exports = [word for name in order.environment for word in ("-x", name)]
    node = _start_all("mpirun", ["-n", str(len(hosts)), "--host", ",".join(f"{host.name}:1" for host in hosts), *exports], order)
    # mpirun answers SIGTERM with SIGKILL to all a second later, but passes this one on
    return [replace(node, stop=signal.SIGUSR1) if order.name in GRACE else node]


def _start_all(program: str, options: Sequence[str], order: Order) -> Node:
    """One command that starts the node program on every host, and passes the environment on by itself."""
    words = [program, *options, *PROGRAM, replace(order, environment={}).as_text()]
    try:
        return Node(program, subprocess.Popen(words, start_new_session=True))
    except FileNotFoundError:
        raise LayoutError(f"there is no {program} here; set launcher to another way to start processes on other hosts, such as pdsh (over ssh)") from None


STARTERS: dict[str, Callable[[Order, Sequence[Host], LauncherSection], list[Node]]] = {
    "pdsh": over_ssh,
    "slurm": through_srun,
    "openmpi": through_mpirun,
}
