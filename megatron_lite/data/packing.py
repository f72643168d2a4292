"""How documents fill samples, by NeoX's definition to the last number: the same seed gives the same maps, without a compiled helper."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_lite.errors import DataError

# n samples, d entries of the list of documents, S tokens in a sample (and one more, the last label)

AT_ONCE = 1 << 18
"""Entries of that list whose samples are found together."""


@dataclass(frozen=True)
class Packing:
    """`packed` cuts the concatenated documents every S tokens; `pack_until_overflow` fills a sample with whole documents; `unpacked` takes one."""

    seq_length: int
    seed: int
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = "packed"
    allow_chopped: bool = True

    @property
    def capacity(self) -> int:
        """Tokens of a sample: as many inputs as labels, shifted by one."""
        return self.seq_length + 1


@dataclass(frozen=True)
class SampleMaps:
    """NeoX's doc_idx [d], sample_idx [n+1 2] and shuffle_idx [n].

    The i-th sample to be seen is number order[i]; it begins at starts[number] = (place in documents, token) and reaches to starts[number + 1].
    """

    documents: NDArray[np.integer]
    starts: NDArray[np.integer]
    order: NDArray[np.integer]


@dataclass(frozen=True)
class Documents:
    """A contiguous part of a data set: its first number, its lengths, and which of it whole samples may be made of."""

    first: int
    sizes: NDArray[np.integer]
    usable: Callable[[], NDArray[np.bool_]]

    @property
    def tokens(self) -> int:
        return int(self.sizes.sum(dtype=np.int64))


def pack(documents: Documents, samples: int, packing: Packing) -> SampleMaps:
    """Maps for at least `samples` samples."""
    return PACKERS[packing.pack_impl](documents, samples, packing)


def epochs_for(tokens: int, samples: int, seq_length: int) -> int:
    """Smallest number of passes whose tokens hold `samples` overlapping samples."""
    return max(1, -(-(samples * seq_length + 1) // tokens))


def samples_in(tokens: int, epochs: int, seq_length: int) -> int:
    return (epochs * tokens - 1) // seq_length


def _packed(documents: Documents, samples: int, packing: Packing) -> SampleMaps:
    random = np.random.RandomState(packing.seed)
    epochs = epochs_for(documents.tokens, samples, packing.seq_length)
    held = samples_in(documents.tokens, epochs, packing.seq_length)
    order = np.tile(np.arange(len(documents.sizes), dtype=np.int32), epochs)
    random.shuffle(order)
    starts = _packed_starts(documents.sizes, order, held, packing.seq_length)
    order += np.int32(documents.first)
    return SampleMaps(order, starts, _shuffled(held, random))


def _packed_starts(sizes: NDArray[np.integer], order: NDArray[np.integer], samples: int, seq_length: int) -> NDArray[np.integer]:
    """Sample i begins at token i * S of the concatenation: which document is that, and which of its tokens? Some documents at a time, so that what is
    computed of them stays in the processor's cache."""
    starts = np.empty((samples + 1, 2), np.int32 if 2 * (samples + 1) < np.iinfo(np.int32).max else np.int64)
    token = first = 0  # where the documents at hand begin, and the first sample that begins in them
    for entry in range(0, len(order), AT_ONCE):
        lengths = sizes[order[entry : entry + AT_ONCE]]
        ends = np.cumsum(lengths, dtype=np.int64) + token
        begun = np.minimum(-(-ends // seq_length), samples + 1)  # samples that begin before each document's end
        place, last = np.repeat(np.arange(len(ends)), np.diff(begun, prepend=first)), int(begun[-1])
        starts[first:last, 0] = place + entry
        starts[first:last, 1] = np.arange(first, last) * seq_length - (ends - lengths)[place]
        token, first = int(ends[-1]), last
    starts[0] = 0  # also where the first documents are empty
    return starts


def _shuffled(samples: int, random: np.random.RandomState) -> NDArray[np.integer]:
    order = np.arange(samples, dtype=np.uint32 if samples < np.iinfo(np.uint32).max - 1 else np.int64)
    random.shuffle(order)
    return order


def _unpacked(documents: Documents, samples: int, packing: Packing) -> SampleMaps:
    """Document after document, in the order of the file, again from the front as often as needed."""
    order = np.arange(samples)
    np.random.RandomState(packing.seed).shuffle(order)
    chosen = np.flatnonzero(documents.usable()) + documents.first
    starts = np.zeros((samples + 1, 2), np.int64)
    starts[:, 0] = np.arange(samples + 1)
    return SampleMaps(chosen[starts[:, 0] % len(chosen)], starts, order)


def _until_overflow(documents: Documents, samples: int, packing: Packing) -> SampleMaps:
    """Every epoch takes the documents in another order; a sample may hold the end of one epoch and the beginning of the next."""
    random = np.random.RandomState(packing.seed)
    order = np.arange(samples)
    random.shuffle(order)
    epoch, usable = np.arange(len(documents.sizes)), documents.usable()
    closed, begins, opened = [], [], np.empty(0, np.int64)  # documents of whole samples, where these begin; documents of the unfinished one
    length, count = 0, 1  # the unfinished sample counts: NeoX stops as soon as the last one has begun
    while count < samples or not begins:
        random.shuffle(epoch)
        pending = np.concatenate([opened, epoch[usable[epoch]]])
        begin = _overflows(documents.sizes[pending], packing.capacity)
        begins.append(begin[:-1] + length)
        closed.append(pending[: begin[-1]])
        opened = pending[begin[-1] :]
        length += len(closed[-1])
        count += len(begins[-1])
    begin = np.append(np.concatenate(begins), length)[:samples]
    chosen = np.concatenate([*closed, opened])[: begin[-1] + 1]
    starts = np.zeros((samples + 1, 2), np.int64)
    starts[:, 0] = np.append(begin, len(chosen))
    return SampleMaps(chosen + documents.first, starts, order)


def _overflows(sizes: NDArray[np.integer], capacity: int) -> NDArray[np.int64]:
    """Places where a sample begins, if each takes documents while they fit. (An empty document at its beginning is left alone in it.)"""
    ends = np.cumsum(sizes, dtype=np.int64)
    places = np.arange(len(sizes))
    following = np.maximum(np.searchsorted(ends, ends - sizes + capacity, side="right"), places + 1)
    jumps = np.where(sizes == 0, places + 1, following).data  # a memoryview: its items are plain integers
    begins, place = [], 0
    while place < len(sizes):
        begins.append(place)
        place = jumps[place]
    return np.array(begins)


PACKERS: dict[str, Callable[[Documents, int, Packing], SampleMaps]] = {
    "packed": _packed,
    "pack_until_overflow": _until_overflow,
    "unpacked": _unpacked,
}


def check_documents(documents: Documents, packing: Packing, name: str) -> None:
    """Raises DataError where no sample can be made."""
    if not documents.tokens:
        raise DataError(f"{name} has no token in its {len(documents.sizes):,} documents; look at what the data set was made from")
    if packing.pack_impl != "packed" and not documents.usable().any():
        raise DataError(
            f"{name} has no document that can be used: of {len(documents.sizes):,} the shortest has {documents.sizes.min():,} tokens and a sample "
            f"{packing.capacity:,} (allow_chopped {str(packing.allow_chopped).lower()}), or all labels are masked; allow chopping or set pack_impl to packed"
        )
