"""Rows that are continued together, and what each of them holds on the device."""

from collections import deque
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from megatron_lite.inference.flight import Flight
from megatron_lite.inference.paged import pages_for
from megatron_lite.inference.rows import Row, uniform_numbers
from megatron_lite.inference.sample import Rules
from megatron_lite.inference.step import Slots


@dataclass(eq=False)
class Served(Row):
    """A row with what it holds on the device. `begun` counts the tokens that the device was told to find."""

    index: int = 0
    pages: list[int] = field(default_factory=list)
    begun: int = 0

    @property
    def needs(self) -> int:
        """Pages for all it may come to hold: the last token is never read."""
        return pages_for(len(self.request.tokens) + self.limit - 1)

    @property
    def length(self) -> int:
        """Tokens that the model has seen when the steps that were begun are done."""
        return len(self.request.tokens) + self.begun - 1

    @cached_property
    def draws(self) -> np.ndarray:
        return uniform_numbers(self.request, self.limit) if self.request.sampling.temperature else np.zeros(self.limit)


@dataclass
class Group:
    """Rows that take their steps together."""

    slots: Slots
    rules: Rules
    rows: list[Served] = field(default_factory=list)
    flights: deque[Flight[Served]] = field(default_factory=deque)


def in_a_group(rows: int, groups: int) -> int:
    """The most rows of one of so many groups, of which none is empty."""
    return -(-rows // min(rows, groups))
