"""Keeps ranks from waiting for each other for ever: each tells the others where it is, and whoever sees one hang ends its own process with the name."""

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch.distributed import distributed_c10d as groups

from megatron_lite.errors import TrainingError, UserError
from megatron_lite.log import logger
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.hang import REMEDY, History, Report, Verdict
from megatron_lite.training.report import clock

T = TypeVar("T")
GiveUp = Callable[[UserError], object]
"""Says why and ends this process at once, from whatever thread: the main one may never come back from waiting."""

MOST = 5.0  # seconds between looks


def give_up(error: UserError) -> None:
    logger.error(str(error))
    os._exit(2)


class Watch:
    """Watches the ranks of a training from a thread. One process alone, or a limit of 0 seconds, needs no watch. Every rank enters one and leaves it."""

    def __init__(self, mesh: Mesh, limit: float, give_up: GiveUp = give_up) -> None:
        self.mesh, self.limit, self.give_up = mesh, limit, give_up
        self.pace = min(MOST, limit / 6)
        self._place, self._moves, self._beat = (0, "starting"), 0, 0
        self._seen: dict[int, Report] = {}
        self._answers = 0  # rounds of reports that have come in
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []
        if limit and mesh.layout.size > 1:
            self._begin()

    def _begin(self) -> None:
        _let_groups_wait(2 * self.limit + 60)
        self._names = [f"rank{rank}" for rank in range(self.mesh.layout.size)]
        store: Any = groups._get_default_store()
        own = store.clone() if hasattr(store, "clone") else store  # a connection of its own, for the other one may be waiting; not in older torch
        self._store = groups.PrefixStore("watch", own)
        self._publish()
        self.mesh.wait()  # now all have reported
        for work in (self._exchange, self._look):
            self._threads.append(threading.Thread(target=work, name="watch", daemon=True))
            self._threads[-1].start()

    def at(self, step: int, doing: str) -> None:
        """This rank now does that."""
        self._place, self._moves = (step, doing), self._moves + 1

    def reading(self, items: Iterator[T]) -> Iterator[T]:
        """The same items. Getting one is work of its own, which may be what hangs."""
        while True:
            (step, doing), self._place = self._place, (self._place[0], "reading data")
            item = next(items, None)
            self.at(step, doing)
            if item is None:
                return
            yield item

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Tells the others that nobody need wait for this rank, if it has ended in order."""
        self._end.set()
        for thread in self._threads:
            thread.join(timeout=self.pace)
        if self._threads and kind in (None, SystemExit):
            self._place = (self._place[0], "")
            with suppress(RuntimeError):  # who keeps the store may have left already
                self._publish()

    def _publish(self) -> None:
        self._beat += 1
        (step, doing), frame = self._place, sys._current_frames().get(threading.main_thread().ident or 0)
        where = f"{Path(frame.f_code.co_filename).name} line {frame.f_lineno}" if frame else "nowhere"
        report = Report(self.mesh.rank, socket.gethostname(), os.getpid(), self._beat, self._moves, step, doing, where, _calls())
        self._store.set(self._names[self.mesh.rank], json.dumps(asdict(report)))

    def _exchange(self) -> None:
        while not self._end.wait(self.pace):
            with suppress(RuntimeError):  # a store that does not answer; `_look` sees that nothing comes
                self._publish()
                self._seen = {report.rank: report for report in (Report(**json.loads(text)) for text in self._store.multi_get(self._names))}
                self._answers += 1

    def _look(self) -> None:
        """Counts its own rounds, not the clock: a whole job that was stopped and goes on has lost no time."""
        history, answers, unanswered = History(), 0, 0.0
        while not self._end.wait(self.pace):
            unanswered = 0.0 if self._answers > answers else unanswered + self.pace
            if self._answers > answers:
                history.take(self._seen, (self._answers - answers) * self.pace)
                answers = self._answers
            verdict = history.verdict(self.limit) or (self._lost(history) if unanswered >= self.limit else None)
            if verdict and not self._end.wait(4 * self.pace if self.mesh.rank in verdict.ranks else 0):  # the others speak first
                self.give_up(TrainingError(verdict.sentence))
                return

    def _lost(self, history: History) -> Verdict | None:
        """Rank 0 keeps the reports where no launcher does. A launcher that stands still harms nobody."""
        first = history.reports.get(0)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or self.mesh.rank == 0 or first is None or first.done:
            return None
        return Verdict((0,), f"{first.name}, last seen {first.place}, has not answered for {clock(self.limit)}; {REMEDY}")


def _calls() -> dict[str, int]:
    """How often each group of ranks was asked for something by this one."""
    found: dict[str, int] = {}
    for group, name in list(groups._world.pg_names.items()):
        known: Any = group
        with suppress(RuntimeError):
            found[str(name)] = known._get_sequence_number_for_group()
    return found


def _let_groups_wait(seconds: float) -> None:
    """Communication gives up later than we do (NCCL would after ten minutes), and with fewer words."""
    for group in list(groups._world.pg_names):
        groups._set_pg_timeout(timedelta(seconds=seconds), group)
