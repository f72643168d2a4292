"""What a launcher has to run on one host."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIG_IGN, Signals, getsignal


@dataclass(frozen=True)
class Meeting:
    """Where the processes of several hosts meet: an address and port on the first host, and which of the hosts this one is."""

    name: str
    address: str
    port: int
    hosts: int
    host: int


GRACE = {"train": 600.0}
"""Seconds that the processes of a script have between SIGTERM and SIGKILL: a training saves first."""
LITTLE_GRACE = 4.0
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
SIGNALS_OF_SAVERS = ("SIGUSR1",)  # how schedulers tell that the time is nearly over


@dataclass(frozen=True)
class Job:
    """A script, its words, and how many processes of it run on this host. `logs` is the folder for what they say, `environment` what they see beside ours."""

    name: str
    script: Path
    words: tuple[str, ...]
    processes: int
    logs: Path
    meeting: Meeting | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def grace(self) -> float:
        return GRACE.get(self.name, LITTLE_GRACE)

    @property
    def signals(self) -> tuple[str, ...]:
        """The names of the signals that end it: under nohup a terminal that is closed does not."""
        names = (*SIGNALS, *SIGNALS_OF_SAVERS) if self.name in GRACE else SIGNALS
        return tuple(name for name in names if name != "SIGHUP" or getsignal(Signals[name]) is not SIG_IGN)
