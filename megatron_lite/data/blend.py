"""Several data sets as one: which of them the i-th sample comes from, so that at every moment their shares are as near to the weights as can be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.samples import Row, SampleSource

SLACK = 1.005
"""Every data set is asked for this much more than its share, for the shares of a beginning are not exact."""

MOST = 255  # data sets in a blend: 8 bits number them
CHUNK = 1024  # samples

# p chunks, k data sets


@dataclass(frozen=True)
class Picks:
    """The data set of every sample [p CHUNK], and how many samples each had given before each chunk [p k]."""

    chosen: NDArray[np.uint8]
    given: NDArray[np.int64]


def pick(weights: Sequence[float], samples: int) -> Picks:
    """NeoX's blending: sample i comes from the data set that lags most behind weight * i, the first of equals.

    Each choice depends on all before. So every chunk is worked out from a guess of what was given before it, all chunks at once, and again
    from what the chunk before it in fact arrives at, until nothing changes. A lag is soon made up: two or three rounds settle it.
    """
    shares = np.asarray(weights, np.float64)
    shares /= shares.sum()
    chunks = -(-samples // CHUNK)
    given = _rounded(np.arange(chunks + 1)[:, None] * CHUNK * shares)
    chosen = np.empty((chunks, CHUNK), np.uint8)
    pending = np.arange(chunks)
    while len(pending):
        reached = _follow(shares, pending, given[pending], chosen)
        differs = (given[pending + 1] != reached).any(axis=1)
        given[pending + 1] = reached
        pending = pending[differs] + 1
        pending = pending[pending < chunks]
    return Picks(chosen, given)


def _rounded(ideal: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers near the ideal ones, with the same sum in every row: largest remainders first."""
    whole = np.floor(ideal)
    missing = np.rint(ideal.sum(axis=1) - whole.sum(axis=1))
    rank = np.argsort(np.argsort(whole - ideal, axis=1, kind="stable"), axis=1)
    return (whole + (rank < missing[:, None])).astype(np.int64)


def _follow(shares: NDArray[np.float64], chunks: NDArray[np.int64], given: NDArray[np.int64], chosen: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Fills these chunks of `chosen` step by step, all of them side by side, and returns what was given after each."""
    counts = given.astype(np.float64)
    rows = np.arange(len(chunks))
    for step in range(CHUNK):
        seen = np.maximum(chunks * CHUNK + step, 1)  # NeoX counts from 1, so that the first choice is the largest weight
        lagging = (shares * seen[:, None] - counts).argmax(axis=1)
        chosen[chunks, step] = lagging
        counts[rows, lagging] += 1
    return counts.astype(np.int64)


class Blend:
    """The first `samples` samples of a blend of sources."""

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[float], samples: int) -> None:
        self._sources, self._samples = sources, samples
        self._picks = pick(weights, samples)

    def __len__(self) -> int:
        return self._samples

    def find(self, number: int) -> tuple[int, int]:
        """The source of a sample, and its number there."""
        chunk, step = divmod(number, CHUNK)
        row = self._picks.chosen[chunk]
        source = int(row[step])
        return source, int(self._picks.given[chunk, source] + np.count_nonzero(row[:step] == source))

    def row(self, number: int) -> Row:
        source, inner = self.find(number)
        return self._sources[source].row(inner)

    def where(self, number: int) -> str:
        source, inner = self.find(number)
        return self._sources[source].where(inner)


def normalized(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def sample_counts(weights: Sequence[float], samples: int) -> list[int]:
    """How many samples each data set must be able to give."""
    return [math.ceil(samples * weight * SLACK) for weight in weights]


def weights_by_size(sizes: Sequence[int], alpha: float) -> list[float]:
    """NeoX's weight_by_num_documents: p = share ** alpha, normalized, times 1 - share, which favours small data sets more than p alone would."""
    if len(sizes) == 1:
        return [1.0]
    shares = normalized(sizes)
    favoured = normalized([share**alpha for share in shares])
    return normalized([favour * (1 - share) for favour, share in zip(favoured, shares, strict=True)])
