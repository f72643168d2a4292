"""The order of the data is a function of the seed and the samples consumed: the same for every layout, and after every resumption."""

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lite.data.batches import Batches, TokenBatch, sample_numbers
from megatron_lite.data.index_writer import token_writer
from megatron_lite.data.indexed import MASKED, Corpus, IndexedDataset
from megatron_lite.data.packing import Packing
from megatron_lite.data.samples import Row, Samples
from megatron_lite.errors import DataError

STEP = 12  # samples that a step consumes, in all layouts

# (micro batch, processes that share the data, micro batches in a step)
LAYOUTS = [(12, 1, 1), (3, 1, 4), (3, 2, 2), (1, 4, 3), (2, 6, 1)]


class Rows:
    """Samples written in the test: tokens, and labels or None for the tokens themselves."""

    def __init__(self, *rows: tuple[list[int], list[int] | None]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> Row:
        tokens, labels = self.rows[number]
        return Row(np.array(tokens), np.array(labels or tokens))

    def where(self, number: int) -> str:
        return f"rows, sample {number}"


class Counting(Rows):
    """Sample n is n, n + 1, n + 2."""

    def __len__(self) -> int:
        return 10_000

    def row(self, number: int) -> Row:
        return Row(np.arange(number, number + 3), np.arange(number, number + 3))


def steps(layout: tuple[int, int, int], consumed: int, count: int) -> Iterator[list[int]]:
    """The samples of each step, of all processes, in the order of micro batches and processes."""
    micro_batch, size, accumulated = layout
    batches = Batches(Counting(), vocab=20_000)
    for _ in range(count):
        step: list[int] = []
        for _ in range(accumulated):
            for index in range(size):
                step += batches.at(consumed, micro_batch, index=index, size=size).tokens[:, 0].tolist()
            consumed += micro_batch * size
        yield step


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_sees_the_same_samples_in_every_step(layout: tuple[int, int, int]) -> None:
    assert list(steps(layout, 0, 5)) == [list(range(step * STEP, (step + 1) * STEP)) for step in range(5)]


@pytest.mark.parametrize("before", LAYOUTS)
@pytest.mark.parametrize("after", LAYOUTS)
def test_a_resumed_run_goes_on_where_it_stopped_in_any_layout(before: tuple[int, int, int], after: tuple[int, int, int]) -> None:
    resumed = [*steps(before, 0, 3), *steps(after, 3 * STEP, 2)]
    assert resumed == list(steps((STEP, 1, 1), 0, 5))


def test_each_process_has_a_contiguous_part_as_from_neoxs_sampler() -> None:
    # A global micro batch of 8 after 16 samples, on 4 processes: 16 17 | 18 19 | 20 21 | 22 23
    assert [list(sample_numbers(16, 2, index=index, size=4)) for index in range(4)] == [[16, 17], [18, 19], [20, 21], [22, 23]]


def test_the_stream_is_the_batches_one_after_the_other() -> None:
    batches = Batches(Counting(), vocab=20_000)
    for number, batch in enumerate(islice(batches.stream(24, 3, index=1, size=2, ahead=3), 20)):
        assert torch.equal(batch.tokens, batches.at(24 + 6 * number, 3, index=1, size=2).tokens)


def test_the_stream_reads_ahead() -> None:
    seen: list[int] = []

    class Watched(Counting):
        def row(self, number: int) -> Row:
            seen.append(number)
            return super().row(number)

    stream = Batches(Watched(), vocab=20_000).stream(0, 1, ahead=3)
    next(stream)
    deadline = time.monotonic() + 10
    while len(seen) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(seen) == [0, 1, 2, 3]
    stream.close()  # type: ignore[attr-defined]


def test_a_batch_has_tokens_and_what_follows_them() -> None:
    batch = Batches(Rows(([5, 6, 7, 8], None), ([1, 2, 3, 4], None)), vocab=10).at(0, 2)
    assert batch.tokens.tolist() == [[5, 6, 7], [1, 2, 3]]
    assert batch.labels.tolist() == [[6, 7, 8], [2, 3, 4]]
    assert batch.loss_mask.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (torch.int64, torch.int64, torch.float32)


def test_masked_labels_bring_no_loss_and_are_valid_ids() -> None:
    batch = Batches(Rows(([5, 6, 7, 8], [MASKED, MASKED, 7, MASKED])), vocab=10).at(0, 1)
    assert batch.labels.tolist() == [[0, 7, 0]]
    assert batch.loss_mask.tolist() == [[0, 1, 0]]


def test_eod_mask_loss_spares_what_follows_the_end_of_a_document() -> None:
    rows = Rows(([5, 9, 6, 9], None))
    assert Batches(rows, vocab=10, unlearned_after=9).at(0, 1).loss_mask.tolist() == [[1, 0, 1]]  # the end itself is learned
    assert Batches(rows, vocab=10).at(0, 1).loss_mask.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("wrong", [10, -1])
def test_an_id_that_the_model_does_not_know_is_traced_to_its_sample(wrong: int) -> None:
    rows = Rows(([1, 2, 3], None), ([1, wrong, 3], None))
    with pytest.raises(DataError, match=rf"rows, sample 1, has the token id {wrong}, but the model's vocabulary ends at 9; the data was made with another"):
        Batches(rows, vocab=10).at(0, 2)


def test_a_label_that_the_model_does_not_know_is_traced_to_its_sample() -> None:
    rows = Rows(([1, 2, 3], [MASKED, 2, 3]), ([1, 2, 3], [MASKED, MASKED, 10]))
    with pytest.raises(DataError, match=r"rows, sample 1, has the label id 10, but the model's vocabulary ends at 9; the data was made with another"):
        Batches(rows, vocab=10).at(0, 2)


def test_the_end_of_the_data_gets_a_sentence_only_when_it_is_reached() -> None:
    stream = Batches(Rows(([1, 2, 3], None), ([4, 5, 6], None)), vocab=10).stream(0, 1, ahead=4)
    assert [batch.tokens[0, 0].item() for batch in islice(stream, 2)] == [1, 4]
    with pytest.raises(DataError, match=r"the data ends after 2 samples \(rows, sample 1\), but sample 2 was asked for; it was prepared for fewer steps"):
        next(stream)


def test_a_batch_moves_to_a_device_as_a_whole() -> None:
    batch = Batches(Counting(), vocab=100).at(0, 1).to(torch.device("meta"))
    assert isinstance(batch, TokenBatch)
    assert {part.device.type for part in (batch.tokens, batch.labels, batch.loss_mask)} == {"meta"}


def test_batches_of_a_data_set_follow_neoxs_shuffling(tmp_path: Path) -> None:
    with token_writer(tmp_path / "mine", vocab_size=100) as writer:
        for first, size in ((0, 5), (5, 3), (8, 7), (15, 1), (16, 4)):
            writer.add_sequence(range(first, first + size))
        writer.finish()
    samples = Samples(Corpus(IndexedDataset(tmp_path / "mine")), range(5), purpose="train", count=8, packing=Packing(4, 1234))
    # The table of test_samples.py: documents 2 2 4 1 0 3 4 0 1 3 on end, 4 tokens a sample, in the order 7 3 5 ...
    assert Batches(samples, vocab=100).at(0, 3).tokens.tolist() == [[17, 18, 19, 0], [13, 14, 16, 17], [7, 0, 1, 2]]
