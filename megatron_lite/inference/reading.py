"""Reading short prompts from a captured graph: what a launch costs the host would take longer than the work itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.inference.paged import FilledPast
from megatron_lite.inference.segments import FlashSegments

LENGTHS = (128, 256, 512, 768, 1024, 1536, 2048)
"""Tokens in a captured row; others run in the next longer one, filled up with a prompt that nobody asked for."""
COUNTS = (1, 16)
"""Prompts in a captured row."""


def size_of(tokens: int, prompts: int, *, most: int) -> tuple[int, int] | None:
    """The captured row of up to `most` tokens that takes so many; None where there is none."""
    if tokens > max((length for length in LENGTHS if length <= most), default=0) or prompts > COUNTS[-1]:
        return None
    return next(length for length in LENGTHS if length >= tokens), next(count for count in COUNTS if count >= prompts)


@dataclass(frozen=True)
class Reading:
    """Packed prompts at fixed addresses."""

    tokens: Tensor  # [s]
    pages: Tensor  # [s]
    places: Tensor  # [s]
    positions: Tensor  # [1 s]
    starts: Tensor  # [n + 2] with the end of the last prompt, and of the row
    last: Tensor  # [n]

    @classmethod
    def empty(cls, length: int, count: int, device: torch.device) -> "Reading":
        tokens, pages, places = (torch.zeros(length, dtype=torch.long, device=device) for _ in range(3))
        positions = torch.zeros(1, length, dtype=torch.long, device=device)
        starts = torch.full((count + 2,), length, dtype=torch.int32, device=device)
        return cls(tokens, pages, places, positions, starts, torch.zeros(count, dtype=torch.long, device=device))

    def fill(self, tokens: Tensor, past: FilledPast, segments: FlashSegments, last: Tensor) -> None:
        """What is behind the prompts goes to page 0, which nobody reads; each of its tokens is a text of its own."""
        count = len(tokens)
        self.tokens[:count] = tokens
        self.pages[:count], self.places[:count] = past.pages, past.places
        self.pages[count:] = 0
        self.positions[:, :count] = segments.positions
        self.positions[:, count:] = 0
        self.starts[: len(segments.starts)] = segments.starts
        self.starts[len(segments.starts) :] = len(self.tokens)
        self.last[: len(last)] = last

    def pasts(self, kept: Mapping[int, FilledPast]) -> dict[int, FilledPast]:
        """The blocks' view of these prompts, in the cache of the given ones."""
        length = len(self.tokens)
        segments = FlashSegments(self.positions, len(self.last), self.starts, length, None, self.starts, length)
        return {number: FilledPast(past.keys, past.values, segments, self.pages, self.places) for number, past in kept.items()}


Behind = Callable[[Tensor, Mapping[int, FilledPast], Tensor], Tensor]
"""What follows the tokens at `last` of packed prompts."""


class Readings:
    """Captures a row when its size comes for the second time. `behind` is what is captured, `capture` how. With more than `most` tokens the work takes longer
    than its launches, and nothing is captured."""

    def __init__(self, behind: Behind, capture: Callable[[Callable[[], Tensor]], Callable[[], Tensor]], device: torch.device, *, most: int) -> None:
        self.behind = behind
        self.capture = capture
        self.device = device
        self.most = most
        self.rows: dict[tuple[int, int], Reading] = {}
        self.replays: dict[tuple[int, int], Callable[[], Tensor]] = {}

    def read(self, tokens: Tensor, pasts: Mapping[int, FilledPast], last: Tensor) -> Tensor:
        size = size_of(len(tokens), len(last), most=self.most)
        first = next(iter(pasts.values()), None)
        if size is None or first is None or not isinstance(first.inner, FlashSegments):
            return self.behind(tokens, pasts, last)
        if size not in self.rows:
            self.rows[size] = Reading.empty(*size, self.device)
            return self.behind(tokens, pasts, last)
        row = self.rows[size]
        row.fill(tokens, first, first.inner, last)
        if size not in self.replays:
            self.replays[size] = self.capture(lambda: self.behind(row.tokens, row.pasts(pasts), row.last))
        return self.replays[size]()[: len(last)]
