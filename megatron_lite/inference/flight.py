"""Tokens on their way from the device to the host, beside whatever the device does next."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from megatron_lite.inference.step import Arrival

R = TypeVar("R")


@dataclass(frozen=True)
class Flight(Generic[R]):
    """A step that the device works on: whose tokens these are, and when they are there."""

    rows: Sequence[R]
    arrival: Arrival
    copied: Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def land(self) -> list[int]:
        """The tokens, as soon as they are there."""
        if self.arrived is None or self.copied is None:
            return self.arrival.ready().tolist()
        self.arrived.synchronize()
        return self.copied.tolist()


class Courier:
    """Brings tokens to the host. Those of another stage wait on a stream of their own: what this device computes next does not depend on them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, rows: Sequence[R], arrival: Arrival) -> Flight[R]:
        if self.stream is None or (arrival.later is not None and arrival.later.keeps_host_waiting):
            return Flight(rows, arrival)
        copied = torch.empty(arrival.tokens.shape, dtype=arrival.tokens.dtype, pin_memory=True)
        stream = torch.cuda.current_stream(self.device) if arrival.later is None else self.stream
        with torch.cuda.stream(stream):
            copied.copy_(arrival.ready(), non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(stream)
        return Flight(rows, arrival, copied, arrived)
