"""Which rank keeps the others waiting: what the ranks report of themselves, for how long nothing of it has changed, and the sentence made of that."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_lite.training.report import clock

REMEDY = "look at that process and its machine; hang_timeout_minutes says how long ranks wait for each other"

SAVING = "saving"


@dataclass(frozen=True)
class Report:
    """What a rank says of itself. `beat` grows with every report, `moves` with every piece of work; `calls` counts what it has asked of each group of ranks."""

    rank: int
    host: str
    pid: int
    beat: int
    moves: int
    step: int
    doing: str
    where: str
    calls: Mapping[str, int]

    @property
    def done(self) -> bool:
        return not self.doing

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def place(self) -> str:
        return f"at step {self.step}, {self.doing} ({self.where})"

    def is_ahead_of(self, other: "Report") -> bool:
        """Whether this rank has asked a group for something that the other has not come to yet."""
        return any(count > other.calls[group] for group, count in self.calls.items() if group in other.calls)


@dataclass
class History:
    """The reports as they come in, and for how many seconds of watching each rank has been silent, and all of them have stood still."""

    reports: dict[int, Report] = field(default_factory=dict)
    silent: dict[int, float] = field(default_factory=dict)
    still: float = 0.0

    def take(self, reports: Mapping[int, Report], seconds: float) -> None:
        """Takes in the reports as they are now, so many seconds after those before."""
        moved = False
        for rank, report in reports.items():
            before = self.reports.get(rank)
            self.silent[rank] = 0.0 if before is None or report.beat > before.beat else self.silent[rank] + seconds
            moved |= before is None or (report.moves, report.calls) != (before.moves, before.calls)
        self.reports = dict(reports)
        self.still = 0.0 if moved else self.still + seconds

    def verdict(self, limit: float) -> "Verdict | None":
        """What ends the training, if nothing has happened for so many seconds."""
        running = [report for report in self.reports.values() if not report.done]
        patience = limit if self.still < limit else limit / 2  # where all stand still, a rank that is silent too is the reason
        frozen = [report for report in running if self.silent[report.rank] >= patience]
        if frozen:
            return _frozen(frozen, max(report.step for report in running), limit)
        if len(running) == len(self.reports) and self.still >= limit and all(report.moves for report in running):
            return _stalled(running, limit)
        return None


@dataclass(frozen=True)
class Verdict:
    """Who keeps the others waiting, nobody where that cannot be told, and the sentence to say."""

    ranks: tuple[int, ...]
    sentence: str


def _frozen(frozen: list[Report], step: int, limit: float) -> Verdict:
    who = " and ".join(f"{report.name}, last seen {report.place}," for report in frozen)
    verb = "has" if len(frozen) == 1 else "have"
    sentence = f"{who} {verb} not given a sign of life for {clock(limit)}; the others wait at step {step}; {REMEDY}"
    return Verdict(tuple(report.rank for report in frozen), sentence)


def _stalled(running: list[Report], limit: float) -> Verdict | None:
    """Names who is waited for and waits for nobody. Where each is alone in its own work there is no such rank: then all are told, but for a slow disk."""
    late = [report for report in running if _is_waited_for(report, running) and not any(report.is_ahead_of(other) for other in running)]
    if not late and any(report.doing == SAVING for report in running):
        return None
    if not late:
        places = "; ".join(f"{report.name} {report.place}" for report in running)
        return Verdict((), f"no rank has got on for {clock(limit)}, and none is behind the others: {places}; {REMEDY}")
    who = " and ".join(f"{report.name}, {report.place}" for report in late)
    return Verdict(tuple(report.rank for report in late), f"the other ranks have waited for {clock(limit)} for {who}; {REMEDY}")


def _is_waited_for(report: Report, running: list[Report]) -> bool:
    return any(other.is_ahead_of(report) for other in running)
