"""Samples are cut from documents exactly as GPT-NeoX cuts them: against a table, and against loops written from the definition."""

import logging
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data.index_writer import label_writer, token_writer
from megatron_lite.data.indexed import MASKED, Corpus, IndexedDataset
from megatron_lite.data.packing import Documents, Packing, SampleMaps, pack
from megatron_lite.data.samples import Samples, split
from megatron_lite.errors import DataError
from tests.disks import no_file_beyond

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


def test_packed_samples_are_those_of_the_table() -> None:
    maps = pack(documents(SIZES), 8, Packing(seq_length=4, seed=1234))
    assert shown(maps) == (DOC_IDX, SAMPLE_IDX, SHUFFLE_IDX)
    assert (maps.documents.dtype, maps.starts.dtype, maps.order.dtype) == (np.int32, np.int32, np.uint32)


@pytest.mark.parametrize("seed", range(30))
def test_packed_samples_are_those_of_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
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


NAMES = [f"mine_train_indexmap_8ns_4sl_1234s_packedpi_ac_{part}_idx.npy" for part in ("doc", "sample", "shuffle")]


def test_maps_are_kept_under_neoxs_names(tmp_path: Path) -> None:
    samples(corpus(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == NAMES
    assert [np.load(tmp_path / name).tolist() for name in NAMES] == [DOC_IDX, [list(start) for start in SAMPLE_IDX], SHUFFLE_IDX]


def test_maps_that_neox_made_are_used(tmp_path: Path) -> None:
    whole = corpus(tmp_path)
    theirs = [np.array(DOC_IDX, np.int32), np.array(SAMPLE_IDX, np.int32), np.array(SHUFFLE_IDX[::-1], np.uint32)]  # reversed, to be told from ours
    for name, numbers in zip(NAMES, theirs, strict=True):
        np.save(tmp_path / name, numbers)
    assert samples(whole)._maps.order.tolist() == SHUFFLE_IDX[::-1]


@pytest.mark.parametrize("damage", ["older than the data", "of other data", "cut short", "of another part"])
def test_maps_that_cannot_be_right_are_made_again(tmp_path: Path, damage: str) -> None:
    whole = corpus(tmp_path)
    samples(whole)
    name = tmp_path / NAMES[0]
    match damage:
        case "older than the data":
            np.save(tmp_path / NAMES[2], np.array(SHUFFLE_IDX[::-1], np.uint32))
            os.utime(tmp_path / NAMES[2], (0, 0))
        case "of other data":
            np.save(name, np.array(DOC_IDX[:-1], np.int32))
        case "cut short":
            name.write_bytes(name.read_bytes()[:-8])
        case _:
            np.save(name, np.array(DOC_IDX, np.int32) + 1)
    assert shown(samples(whole)._maps) == (DOC_IDX, SAMPLE_IDX, SHUFFLE_IDX)
    assert np.load(name).tolist() == DOC_IDX


def test_a_full_disk_costs_only_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    whole = corpus(tmp_path)
    monkeypatch.setattr(logging.getLogger("deepy"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="deepy"), no_file_beyond(1 << 20):
        made = samples(whole, 150_000)
    assert shown(made._maps) == shown(pack(documents(SIZES), 150_000, Packing(4, 1234)))
    assert "mine (train): the maps are not kept beside the data (" in caplog.text
    assert not list(tmp_path.glob("*sample_idx*"))


def build(folder: Path) -> tuple[bool, list[int]]:
    """Whether this process made the maps, and how they begin."""
    said: list[str] = []
    logger = logging.getLogger("deepy")
    logger.setLevel(logging.INFO)
    logger.addFilter(lambda record: said.append(record.getMessage()) is None)
    order = samples(Corpus(IndexedDataset(folder / "mine")), 200_000)._maps.order
    return any("mapped in" in line for line in said), order[:100].tolist()


def test_of_several_processes_one_makes_the_maps(tmp_path: Path) -> None:
    corpus(tmp_path)
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as processes:
        answers = list(processes.map(build, [tmp_path] * 4))
    assert sum(made for made, _ in answers) == 1
    assert all(order == answers[0][1] for _, order in answers)
