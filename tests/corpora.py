"""A small data set, the samples that GPT-NeoX makes of it, and the definition of samples as plain loops."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_lite.data.index_writer import label_writer, token_writer
from megatron_lite.data.indexed import Corpus, IndexedDataset
from megatron_lite.data.packing import Documents, Packing, SampleMaps
from megatron_lite.data.samples import Samples

# Five documents of 5, 3, 7, 1 and 4 tokens; 8 samples of 4 tokens, seed 1234. 20 tokens hold (20 - 1) // 4 = 4 samples, so two epochs are needed,
# whose 40 tokens hold 9. Sample i begins at token 4 i: the second one in the first document, which is number 2, at its token 4.
SIZES = [5, 3, 7, 1, 4]
DOC_IDX = [2, 2, 4, 1, 0, 3, 4, 0, 1, 3]
SAMPLE_IDX = [(0, 0), (0, 4), (1, 1), (1, 5), (2, 2), (3, 2), (4, 3), (6, 1), (7, 1), (8, 0)]
SHUFFLE_IDX = [7, 3, 5, 1, 4, 8, 0, 2, 6]

Lists = tuple[list[int], list[tuple[int, ...]], list[int]]


def documents(sizes: Sequence[int], first: int = 0, usable: Sequence[bool] | None = None) -> Documents:
    return Documents(first, np.array(sizes, np.int32), lambda: np.array(usable or [True] * len(sizes)))


def shown(maps: SampleMaps) -> Lists:
    return maps.documents.tolist(), [tuple(start) for start in maps.starts.tolist()], maps.order.tolist()


def packed_slowly(sizes: Sequence[int], first: int, samples: int, seq_length: int, seed: int) -> Lists:
    """The definition, token by token: all epochs' documents shuffled as one list, a sample every seq_length tokens of it."""
    epochs = 1
    while (epochs * sum(sizes) - 1) // seq_length < samples:
        epochs += 1
    random = np.random.RandomState(seed)
    listed = np.array([first + number for _ in range(epochs) for number in range(len(sizes))])
    random.shuffle(listed)
    tokens = [(place, offset) for place, number in enumerate(listed) for offset in range(sizes[number - first])]
    held = (len(tokens) - 1) // seq_length
    order = np.arange(held)
    random.shuffle(order)
    return listed.tolist(), [(0, 0)] + [tokens[sample * seq_length] for sample in range(1, held + 1)], order.tolist()


def overflowing_slowly(sizes: Sequence[int], usable: Sequence[bool], samples: int, seq_length: int, seed: int) -> Lists:
    """The definition, document by document: each goes into the open sample if it fits, else opens the next; the last one to open ends it all."""
    random = np.random.RandomState(seed)
    order, epoch = np.arange(samples), np.arange(len(sizes))
    random.shuffle(order)
    listed: list[int] = []
    starts: list[tuple[int, int]] = []
    filled = 0
    while len(starts) < samples:
        random.shuffle(epoch)
        for number in epoch.tolist():
            if not usable[number] or len(starts) == samples:
                continue
            if filled == 0 or filled + sizes[number] > seq_length + 1:
                starts.append((len(listed), 0))
                filled = 0
            filled += sizes[number]
            listed.append(number)
    return listed, [*starts, (len(listed), 0)], order.tolist()


def corpus(folder: Path, sizes: Sequence[int] = SIZES, *, labels: Sequence[Sequence[int]] | None = None) -> Corpus:
    """Documents whose tokens count on: the first has 0 ... 4, the second 5 ... 7."""
    ends = np.cumsum(sizes)
    with token_writer(folder / "mine", vocab_size=5000) as writer:
        for end, size in zip(ends, sizes, strict=True):
            writer.add_sequence(np.arange(end - size, end))
            writer.end_document()
        writer.finish()
    if labels is None:
        return Corpus(IndexedDataset(folder / "mine"))
    with label_writer(folder / "labels", vocab_size=5000) as writer:
        for numbers in labels:
            writer.add_sequence(numbers)
        writer.finish()
    return Corpus(IndexedDataset(folder / "mine"), IndexedDataset(folder / "labels"))


def samples(whole: Corpus, count: int = 8, *, seq_length: int = 4, pack_impl: str = "packed", allow_chopped: bool = True) -> Samples:
    packing = Packing(seq_length, 1234, pack_impl, allow_chopped)  # type: ignore[arg-type]
    return Samples(whole, range(len(whole.tokens)), purpose="train", count=count, packing=packing)
