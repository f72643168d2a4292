"""A request to stop, such as a scheduler's SIGTERM, heard by any process and obeyed by all at the end of the same step; and Ctrl-C, which ends it at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import torch

from megatron_lite.errors import INTERRUPTED
from megatron_lite.parallel.mesh import Mesh


class Interruption:
    """Listens for SIGTERM and SIGUSR1 while training runs."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._asked = False
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def asked(self) -> bool:
        """Whether any process was asked to stop; all must ask together."""
        flag = torch.tensor(float(self._asked), device=self.mesh.device)
        for axis in (self.mesh.tp, self.mesh.dp, self.mesh.pp):
            flag = axis.maximum(flag)
        return bool(flag)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def last_words(say: Callable[[], object]) -> Iterator[None]:
    """Calls `say` where Ctrl-C ends what is done meanwhile, whatever the other processes' end breaks first."""
    asked = False

    def note(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        with suppress(KeyboardInterrupt):  # which may have been waiting for us to come back from a library
            signal.signal(signal.SIGINT, before)
        if asked:
            say()
            raise KeyboardInterrupt


def stop() -> NoReturn:
    """Ends the program so that whoever started it knows it may start it again."""
    raise SystemExit(INTERRUPTED)
