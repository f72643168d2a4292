"""Rows of packed prompts at fixed addresses, which are captured where launches would take longer than the work."""

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from megatron_lite.inference.packing import Segment
from megatron_lite.inference.paged import FilledPast
from megatron_lite.inference.reading import Readings
from megatron_lite.inference.segments import FlashSegments

CPU = torch.device("cpu")
CACHE = torch.zeros(9, 1, 64, 4)


class Graphs:
    """Instead of a GPU's: what was captured is gone through again."""

    count = 0

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.count += 1
        return work


def read(readings: Readings, lengths: Sequence[int]) -> list[float]:
    """What is behind prompts of these lengths, whose tokens are 1, 2, 3, ... through all of them."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    inner = FlashSegments.of([Segment(start, length, ()) for start, length in zip(starts, lengths, strict=True)], CPU)
    tokens, last = torch.arange(1, sum(lengths) + 1), torch.tensor([start + length - 1 for start, length in zip(starts, lengths, strict=True)])
    past = FilledPast(CACHE, CACHE, inner, torch.full_like(tokens, 3), torch.arange(len(tokens)) % 64)
    return readings.read(tokens, {1: past}, last).tolist()


def behind(tokens: Tensor, pasts: Mapping[int, FilledPast], last: Tensor) -> Tensor:
    """The sum of each prompt's tokens: what a block would see, by the bounds of segments and by the positions alike."""
    inner = pasts[1].inner
    assert isinstance(inner, FlashSegments)
    assert pasts[1].pages[: int(last.max()) + 1].eq(3).all()
    number, places = torch.searchsorted(inner.starts, last.int(), right=True), torch.arange(len(tokens))
    begins = places - inner.positions[0]
    assert begins[last].equal(inner.starts[number - 1].long())
    assert begins.diff().ge(0).all(), "a place behind others belongs to no text that began before theirs"
    sums = torch.cat([torch.zeros(1), tokens.cumsum(0)])
    return sums[inner.starts[number].long()] - sums[inner.starts[number - 1].long()]


@pytest.fixture
def graphs() -> Graphs:
    return Graphs()


@pytest.mark.parametrize("lengths", [[1], [130], [100, 27, 3], [1] * 16], ids=str)
def test_a_captured_row_reads_what_the_prompts_say_however_much_it_is_filled_up(lengths: list[int], graphs: Graphs) -> None:
    readings, ends = Readings(behind, graphs.capture, CPU, most=2048), [sum(lengths[: index + 1]) for index in range(len(lengths))]
    expected = [end * (end + 1) / 2 - (end - length) * (end - length + 1) / 2 for end, length in zip(ends, lengths, strict=True)]
    for _ in range(3):
        for others in ([2] * len(lengths), [128 // len(lengths)] * len(lengths)):  # leaves other prompts in the row
            read(readings, others)
        assert read(readings, lengths) == expected
    assert graphs.count == (1 if sum(lengths) <= 128 else 2)


def test_a_captured_row_of_one_prompt_counts_as_one_text(graphs: Graphs) -> None:
    seen: list[int] = []

    def behind(tokens: Tensor, pasts: Mapping[int, FilledPast], last: Tensor) -> Tensor:
        inner = pasts[1].inner
        assert isinstance(inner, FlashSegments)
        seen.append(inner.texts)
        return tokens

    readings = Readings(behind, graphs.capture, CPU, most=2048)
    for _ in range(2):
        read(readings, [2000])
        read(readings, [900, 900])
    assert seen == [1, 2, 1, 16]  # as they are, and then captured


@pytest.mark.parametrize(
    ("most", "lengths", "captured"), [(600, [512], 1), (600, [513], 0), (127, [5], 0), (2048, [2048], 1), (9999, [2049], 0), (2048, [2] * 17, 0)]
)
def test_long_rows_and_those_of_many_prompts_are_not_captured(most: int, lengths: list[int], captured: int, graphs: Graphs) -> None:
    readings = Readings(behind, graphs.capture, CPU, most=most)
    assert read(readings, lengths) == read(readings, lengths)
    assert graphs.count == captured
