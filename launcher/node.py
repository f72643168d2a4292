"""Runs one host's share of a job over several hosts: python -P node.py ORDER, the order or a file of it, or with it as the first line of standard input.

An order holds all that the host needs by value, for it may share no file system with the host that sent it; the project and its packages must be installed.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [*(folder for folder in sys.path if folder != str(ROOT)), str(ROOT)]

from launcher.job import Job, Meeting  # noqa: E402
from launcher.worker import PARENT, die_with_launcher  # noqa: E402
from megatron_lite.errors import LayoutError, UserError  # noqa: E402

NODE_VARIABLES = ("OMPI_COMM_WORLD_RANK", "SLURM_NODEID")  # where mpirun, which may itself use srun, or srun started us


@dataclass(frozen=True)
class Order:
    """A job over several hosts. `hosts` are their names and devices; `files` the configuration files by the names they had; `node` which host this is."""

    name: str
    script: str
    files: dict[str, str]
    settings: list[str]
    hosts: list[tuple[str, list[int]]]
    address: str
    port: int
    folder: str
    logs: str
    environment: dict[str, str]
    node: int | None = None

    def as_text(self) -> str:
        return json.dumps(asdict(self))


def main() -> int:
    """Carries out the order and returns the exit code of this host's processes."""
    if len(sys.argv) > 1:
        word = sys.argv[1]
        order = Order(**json.loads(word if word.startswith("{") else Path(word).read_text(encoding="utf-8")))
        if PARENT in os.environ:
            die_with_launcher()
    else:
        order = Order(**json.loads(sys.stdin.readline()))
        end_with_stdin()
    node = order.node
    try:
        node = node_number(os.environ) if node is None else node
        return carry_out(order, node)
    except UserError as error:
        if node:
            time.sleep(1)  # where all fail alike the first host speaks for all
        print(error, file=sys.stderr)
        return 2


def node_number(environment: Mapping[str, str]) -> int:
    for name in NODE_VARIABLES:
        if name in environment:
            return int(environment[name])
    raise LayoutError(f"none of {', '.join(NODE_VARIABLES)} says which of the hosts this is; is it srun or mpirun that was started?")


def end_with_stdin() -> None:
    """Ends this host's processes when the sender of the order is gone: its end of our standard input is closed then, however it went."""

    def wait() -> None:
        while sys.stdin.read(1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def carry_out(order: Order, node: int) -> int:
    from launcher.hardware import find_hardware
    from launcher.spawn import make_log_folder, spawn

    if Path(order.folder).is_dir():
        os.chdir(order.folder)
    name, devices = order.hosts[node]
    chosen = find_hardware().only(devices, where=f"the hostfile's line of {name}")
    environment = {**order.environment, **chosen.environment()}
    logs = Path(order.logs)
    if not logs.is_dir():  # it is there where hosts share a file system
        make_log_folder(logs)
    with tempfile.TemporaryDirectory(prefix="deepy-") as folder:
        words = (*configs_here(order.files, Path(folder)), *order.settings)
        meeting = Meeting(logs.name, order.address, order.port, len(order.hosts), node)
        return spawn(Job(order.name, Path(order.script), words, len(devices), logs, meeting, environment))


def configs_here(files: Mapping[str, str], folder: Path) -> list[str]:
    """Paths of the configuration files on this host: their own where they are there unchanged, else of copies in `folder`."""
    paths: list[str] = []
    for number, (name, text) in enumerate(files.items()):
        path = Path(name)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path = folder / str(number) / path.name
            path.parent.mkdir()
            path.write_text(text, encoding="utf-8")
        paths.append(str(path))
    return paths


if __name__ == "__main__":
    sys.exit(main())
