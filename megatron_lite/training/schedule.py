"""The learning rate of every step, by NeoX's rules. Pure Python."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_lite.config.sections import TrainingSection

Style = Literal["constant", "linear", "cosine", "exponential"]
HALVED = 0.693
"""NeoX's exponential style halves the rate once, with this for the logarithm of 2."""


@dataclass(frozen=True)
class Schedule:
    """A rise from 0 to `peak` in `warmup` steps, then a fall until step `end`, never below `floor`; the rate stays where it is at `end`."""

    peak: float
    floor: float
    style: Style
    warmup: float
    end: int

    def __call__(self, done: int) -> float:
        """The rate of the step that comes after `done` steps. The very first has rate 0 where there is a warmup, as in NeoX."""
        if self.warmup > 0 and done <= self.warmup:
            return self.peak * done / self.warmup
        way = max(0.0, min(done, self.end) - self.warmup) / max(self.end - self.warmup, 1e-9)
        return max(self._fallen(min(way, 1.0)), self.floor)

    def _fallen(self, way: float) -> float:
        if self.style == "linear":
            return self.peak * (1 - way)
        if self.style == "cosine":
            return self.floor + (self.peak - self.floor) / 2 * (math.cos(math.pi * way) + 1)
        if self.style == "exponential":
            return self.peak * math.exp(-HALVED * way)
        return self.peak


def schedule_of(training: TrainingSection, *, peak: float, steps: int) -> Schedule:
    """The schedule that the settings describe for a training of so many steps."""
    end = training.lr_decay_iters or (round(training.lr_decay_fraction * steps) if training.lr_decay_fraction else steps)
    return Schedule(peak, training.min_lr, training.lr_decay_style, training.warmup * end, end)
