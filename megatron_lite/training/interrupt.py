"""A request to stop, such as a scheduler's SIGTERM, heard by any process and obeyed by all at the end of the same step."""

import signal
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


def stop() -> NoReturn:
    """Ends the program so that whoever started it knows it may start it again."""
    raise SystemExit(INTERRUPTED)
