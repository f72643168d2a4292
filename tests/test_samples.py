"""Samples are cut from documents exactly as GPT-NeoX cuts them: against a table, and against loops written from the definition."""

from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data import packing
from megatron_lite.data.indexed import MASKED
from megatron_lite.data.packing import Packing, pack
from megatron_lite.data.samples import Samples, split
from megatron_lite.errors import DataError
from tests.corpora import DOC_IDX, SAMPLE_IDX, SHUFFLE_IDX, SIZES, corpus, documents, overflowing_slowly, packed_slowly, samples, shown


def test_packed_samples_are_those_of_the_table() -> None:
    maps = pack(documents(SIZES), 8, Packing(seq_length=4, seed=1234))
    assert shown(maps) == (DOC_IDX, SAMPLE_IDX, SHUFFLE_IDX)
    assert (maps.documents.dtype, maps.starts.dtype, maps.order.dtype) == (np.int32, np.int32, np.uint32)


@pytest.mark.parametrize("seed", range(30))
def test_packed_samples_are_those_of_the_definition(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    monkeypatch.setattr(packing, "AT_ONCE", int(random.integers(1, 50)))
    sizes = random.integers(0, 12 if seed % 2 else 60, random.integers(1, 40)).tolist()
    sizes[-1] += 1
    first, samples, seq_length = (int(random.integers(low, high)) for low, high in ((0, 100), (1, 300), (2, 20)))
    assert shown(pack(documents(sizes, first), samples, Packing(seq_length, seed))) == packed_slowly(sizes, first, samples, seq_length, seed)


@pytest.mark.parametrize("seed", range(30))
def test_samples_of_whole_documents_are_those_of_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = random.integers(0 if seed % 3 == 0 else 1, 25, random.integers(1, 30)).tolist()
    usable = (random.random(len(sizes)) < 0.8).tolist()
    sizes[0], usable[0] = 3, True
    samples, seq_length = int(random.integers(1, 100)), int(random.integers(2, 30))
    packing = Packing(seq_length, seed, "pack_until_overflow")
    assert shown(pack(documents(sizes, 0, usable), samples, packing)) == overflowing_slowly(sizes, usable, samples, seq_length, seed)


def test_unpacked_samples_are_the_usable_documents_in_turn() -> None:
    maps = pack(documents(SIZES, 10, [True, False, True, True, False]), 4, Packing(4, 1234, "unpacked"))
    assert maps.documents.tolist() == [10, 12, 13, 10, 12]
    assert maps.starts.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [4, 0]]
    order = np.arange(4)
    np.random.RandomState(1234).shuffle(order)
    assert maps.order.tolist() == order.tolist()


@pytest.mark.parametrize(
    ("text", "size", "bounds"),
    [
        ("969, 30, 1", 1000, (969, 999, 1000)),
        ("995,4,1", 1244, (1238, 1243, 1244)),
        ("969/30/1", 10, (10, 10, 10)),
        ("8,1", 9, (8, 9, 9)),
        ("100", 7, (7, 7, 7)),
        ("1,1,1", 5, (1, 3, 5)),  # 2 + 2 + 2 is one too many, and every bound but the first gives way
        ("0,50,50", 3, (0, 1, 3)),
    ],
)
def test_split_follows_neoxs_rounding(text: str, size: int, bounds: tuple[int, int, int]) -> None:
    parts = split(text, size)
    assert tuple(part.stop for part in parts) == bounds
    assert [number for part in parts for number in part] == list(range(size))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("many", "split is 'many'; it must be one to three numbers such as 969,30,1"),
        ("0,0", "split is '0,0'; its numbers must not be negative, and one must be above 0"),
        ("1,-1", "split is '1,-1'; its numbers must not be negative"),
    ],
)
def test_a_split_that_is_none_gets_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(DataError) as error:
        split(text, 10)
    assert sentence in str(error.value)


def test_packed_rows_are_the_stream_of_the_shuffled_documents(tmp_path: Path) -> None:
    whole = corpus(tmp_path)
    stream = np.concatenate([whole.tokens.read(number) for number in DOC_IDX])
    made = samples(whole)
    assert len(made) == 9
    for seen, number in enumerate(SHUFFLE_IDX):
        row = made.row(seen)
        assert row.tokens.tolist() == row.labels.tolist() == stream[number * 4 : number * 4 + 5].tolist()


def test_a_document_fills_a_row_of_its_own_cut_or_padded(tmp_path: Path) -> None:
    made = samples(corpus(tmp_path), 5, pack_impl="unpacked")
    rows = {number: made.row(seen) for seen, number in enumerate(made._maps.order.tolist())}
    assert [rows[number].tokens.tolist() for number in range(4)] == [[0, 1, 2, 3, 4], [5, 6, 7, 0, 0], [8, 9, 10, 11, 12], [15, 0, 0, 0, 0]]
    assert [rows[number].labels.tolist() for number in (1, 3)] == [[5, 6, 7, MASKED, MASKED], [15] + [MASKED] * 4]


def test_whole_documents_share_a_row_while_they_fit(tmp_path: Path) -> None:
    whole = corpus(tmp_path)
    made = samples(whole, 6, seq_length=7, pack_impl="pack_until_overflow")
    listed, starts, order = overflowing_slowly(SIZES, [True] * 5, 6, 7, 1234)
    for seen, number in enumerate(order):
        text = np.concatenate([whole.tokens.read(listed[place]) for place in range(starts[number][0], starts[number + 1][0])]).tolist()
        row = made.row(seen)
        assert row.tokens.tolist() == text + [0] * (8 - len(text))
        assert row.labels.tolist() == text + [MASKED] * (8 - len(text))


LABELS = [[-100, -100, 2, 3, 4], [-100] * 3, [-100] * 5 + [13, 14], [15], [16, -100, 18, -100]]


def test_rows_have_the_labels_of_the_label_data_set(tmp_path: Path) -> None:
    made = samples(corpus(tmp_path, labels=LABELS))
    stream = [label for number in DOC_IDX for label in LABELS[number]]
    for seen, number in enumerate(SHUFFLE_IDX):
        assert made.row(seen).labels.tolist() == stream[number * 4 : number * 4 + 5]


def test_documents_without_a_label_within_their_sample_are_left_out(tmp_path: Path) -> None:
    made = samples(corpus(tmp_path, labels=LABELS), 5, pack_impl="unpacked")
    assert made._maps.documents.tolist() == [0, 3, 4, 0, 3, 4]  # 1 has none, and 2 only beyond its sample


def test_documents_that_would_be_chopped_are_left_out_on_demand(tmp_path: Path) -> None:
    made = samples(corpus(tmp_path), 5, pack_impl="unpacked", allow_chopped=False)
    assert made._maps.documents.tolist() == [0, 1, 3, 4, 0, 1]


def test_data_of_which_no_sample_can_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mine \(train\) has no document that can be used: of 2 the shortest has 9 tokens and a sample 5 \(allow_ch"):
        samples(corpus(tmp_path, [9, 10]), 5, pack_impl="pack_until_overflow", allow_chopped=False)
    with pytest.raises(DataError, match=r"mine \(valid\) has no token in its 2 documents"):
        Samples(corpus(tmp_path, [3, 0, 0]), range(1, 3), purpose="valid", count=1, packing=Packing(4, 1234))
