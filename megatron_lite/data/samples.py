"""The samples of one data set: fixed-length rows of tokens and labels, in an order that the seed alone decides."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.indexed import MASKED, Corpus, IndexedDataset
from megatron_lite.data.maps import MapFiles, origin_of, sample_maps
from megatron_lite.data.packing import Documents, Packing
from megatron_lite.errors import DataError

PADDING = 0
"""What stands behind a text that does not fill its sample; there is no loss on it."""


class Row(NamedTuple):
    """seq_length + 1 tokens, and labels: the same, or MASKED where there is no loss."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]


class SampleSource(Protocol):
    """A numbered list of samples."""

    def __len__(self) -> int: ...
    def row(self, number: int) -> Row: ...
    def where(self, number: int) -> str: ...


class Samples:
    """At least `count` samples out of some sequences of a data set; the maps behind them are named after `purpose`."""

    def __init__(self, corpus: Corpus, part: range, *, purpose: str, count: int, packing: Packing) -> None:
        self._corpus, self._packing, self._purpose = corpus, packing, purpose
        documents = Documents(part.start, corpus.tokens.sizes[part.start : part.stop], lambda: usable(corpus, part, packing))
        self._maps = sample_maps(MapFiles(corpus.tokens.prefix, purpose, count, packing, origin_of(corpus, part)), documents)

    def __len__(self) -> int:
        return len(self._maps.order)

    def where(self, number: int) -> str:
        return f"{self._corpus.tokens.prefix} ({self._purpose}), sample {number}"

    def row(self, number: int) -> Row:
        slices = list(self._slices(int(self._maps.order[number])))
        tokens = self._joined(self._corpus.tokens, slices, PADDING)
        if self._corpus.labels is not None:
            return Row(tokens, self._joined(self._corpus.labels, slices, MASKED))
        labels = tokens.copy()
        labels[sum(stop - start for _, start, stop in slices) :] = MASKED
        return Row(tokens, labels)

    def _slices(self, number: int) -> Iterator[tuple[int, int, int]]:
        """(sequence, first token, end) of the parts of a sample, no more of them than it holds."""
        (first, offset), (last, end) = self._maps.starts[number].tolist(), self._maps.starts[number + 1].tolist()
        overlaps = self._packing.pack_impl == "packed"  # the first token of the next sample is the last label of this one
        room = self._packing.capacity
        for place in range(first, last + overlaps):
            sequence = int(self._maps.documents[place])
            stop = end + 1 if place == last else int(self._corpus.tokens.sizes[sequence])
            stop = min(stop, offset + room)
            yield sequence, offset, stop
            room -= stop - offset
            offset = 0

    def _joined(self, dataset: IndexedDataset, slices: list[tuple[int, int, int]], padding: int) -> NDArray[np.int64]:
        joined = np.full(self._packing.capacity, padding, np.int64)
        filled = 0
        for sequence, start, stop in slices:
            joined[filled : filled + stop - start] = dataset.read(sequence, start, stop)
            filled += stop - start
        return joined


def check_learned(corpus: Corpus, part: range) -> None:
    """Raises DataError where there is nothing to train on. Looks as far as the first label."""
    labels = corpus.labels
    if labels is not None and not any((labels.read(sequence) >= 0).any() for sequence in part):
        raise DataError(
            f"{labels.prefix} has no label for any token of the {len(part):,} sequences to train on, so that nothing would be learned; use other data"
        )


def usable(corpus: Corpus, part: range, packing: Packing) -> NDArray[np.bool_]:
    """Which sequences may fill samples. Where samples are whole documents, those that would be chopped may be excluded, and those without a label are."""
    chosen = np.ones(len(part), np.bool_)
    if packing.pack_impl == "packed":
        return chosen
    if not packing.allow_chopped:
        chosen &= corpus.tokens.sizes[part.start : part.stop] <= packing.capacity
    if corpus.labels is not None:
        seen = packing.capacity - (packing.pack_impl == "unpacked")  # as NeoX looks at them
        chosen &= [bool((corpus.labels.read(sequence, 0, seen) != MASKED).any()) for sequence in part]
    return chosen


def split(text: str, size: int) -> tuple[range, range, range]:
    """Sequences for training, validation and test, by NeoX's rule for `split`: "969, 30, 1" are shares of the number of sequences."""
    try:
        shares = [float(share) for share in text.replace("/", ",").split(",")]
    except ValueError as error:
        raise DataError(f"split is {text!r}; it must be one to three numbers such as 969,30,1") from error
    shares = [*shares, 0.0, 0.0][:3]
    if sum(shares) <= 0 or min(shares) < 0:
        raise DataError(f"split is {text!r}; its numbers must not be negative, and one must be above 0")
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / sum(shares) * size))
    surplus = bounds[-1] - size  # of rounding; the first bound stays
    bounds[1:] = [max(bound - surplus, 0) for bound in bounds[1:]]
    return range(bounds[0], bounds[1]), range(bounds[1], bounds[2]), range(bounds[2], bounds[3])
