"""Data sets are read and written in GPT-NeoX's formats, byte for byte; damaged ones are refused with the numbers."""

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data.index_writer import IndexWriter, label_writer, token_writer
from megatron_lite.data.indexed import MASKED, Corpus, IndexedDataset
from megatron_lite.errors import DataError, OutputError
from tests.disks import no_file_beyond

# Three sequences of 16-bit tokens, the first two of them a document, laid out by hand from the format's table.
SEQUENCES = [[7, 8, 9], [258], [1, 2]]
INDEX = bytes.fromhex(
    "4d4d4944494458 0000"  # MMIDIDX
    "0100000000000000 08"  # version 1, format 8: unsigned 16 bits
    "0300000000000000 0300000000000000"  # 3 sequences, 3 document boundaries
    "03000000 01000000 02000000"  # sizes
    "0000000000000000 0600000000000000 0800000000000000"  # where they begin, in bytes
    "0000000000000000 0200000000000000 0300000000000000"  # sequences before each boundary
)
DATA = bytes.fromhex("0700 0800 0900 0201 0100 0200")


def place(folder: Path, index: bytes = INDEX, data: bytes = DATA) -> Path:
    (folder / "mine.idx").write_bytes(index)
    (folder / "mine.bin").write_bytes(data)
    return folder / "mine"


def write(prefix: Path, documents: list[list[list[int]]], vocab_size: int = 1000) -> Path:
    with token_writer(prefix, vocab_size=vocab_size) as writer:
        for sequences in documents:
            for sequence in sequences:
                writer.add_sequence(sequence)
            writer.end_document()
        writer.finish()
    return prefix


def legacy(folder: Path) -> Path:
    """The same data set as older releases wrote it: magic, six numbers, and four tables of 64-bit numbers; begins count tokens."""
    header = struct.pack("<8s6Q", b"TNTIDX\0\0", 1, 8, 2, 3, 3, 3)
    tables = ([0, 1, 2, 3], [0, 3, 4, 6], [3, 1, 2], [0, 2, 3])
    return place(folder, header + b"".join(np.array(table, "<i8").tobytes() for table in tables))


def test_a_data_set_written_by_hand_is_read(tmp_path: Path) -> None:
    dataset = IndexedDataset(place(tmp_path))
    assert [dataset.read(number).tolist() for number in range(len(dataset))] == SEQUENCES
    assert dataset.read(0, 1, 3).tolist() == [8, 9]
    assert dataset.documents.tolist() == [0, 2, 3]
    assert dataset.dtype == np.uint16


def test_what_is_written_are_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "mine", [SEQUENCES[:2], SEQUENCES[2:]])
    assert (tmp_path / "mine.idx").read_bytes() == INDEX
    assert (tmp_path / "mine.bin").read_bytes() == DATA


def test_the_format_of_older_releases_is_read(tmp_path: Path) -> None:
    dataset = IndexedDataset(legacy(tmp_path))
    assert [dataset.read(number).tolist() for number in range(len(dataset))] == SEQUENCES
    assert dataset.documents.tolist() == [0, 2, 3]


@pytest.mark.parametrize("name", ["mine", "mine.bin", "mine.idx"])
def test_either_file_stands_for_the_pair(tmp_path: Path, name: str) -> None:
    place(tmp_path)
    assert len(IndexedDataset(tmp_path / name)) == 3


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_tokens_take_16_bits_where_neox_gives_them_16(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    assert IndexedDataset(write(tmp_path / "mine", [[[vocab_size - 1]]], vocab_size)).read(0).tolist() == [vocab_size - 1]
    assert IndexedDataset(tmp_path / "mine").dtype == dtype


def test_a_document_without_a_sequence_is_none(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "mine", [[], [[1]], [], [[2]]]))
    assert dataset.documents.tolist() == [0, 1, 2]


def test_labels_may_be_masked(tmp_path: Path) -> None:
    with label_writer(tmp_path / "mine", vocab_size=10) as writer:
        writer.add_sequence([MASKED, 9])
        writer.finish()
    assert IndexedDataset(tmp_path / "mine").read(0).tolist() == [-100, 9]


@pytest.mark.parametrize(
    ("index", "data", "sentence"),
    [
        (INDEX, DATA[:-2], "mine.bin has 10 bytes, but mine.idx needs 12 (3 sequences, 6 tokens of 2 bytes); one of the two is cut short"),
        (INDEX, DATA + b"\0", "mine.bin has 13 bytes, but mine.idx needs 12"),
        (INDEX[:-1], DATA, "mine.idx has 93 bytes, but its header announces 94; it is cut short or damaged: copy or make it again"),
        (INDEX[:20], DATA, "mine.idx is no index of a data set: it begins with b'MMIDIDX\\x00\\x00'"),
        (b"PK\x03\x04" + INDEX, DATA, "mine.idx is no index of a data set: it begins with b'PK\\x03\\x04MMIDI'; GPT-NeoX's begin with b'MMIDIDX"),
        (INDEX[:9] + b"\x02" + INDEX[10:], DATA, "mine.idx has version 2 of its format; only version 1 is known"),
        (INDEX[:17] + b"\x06" + INDEX[18:], DATA, "mine.idx holds numbers of the format 6, which are no tokens; the formats of tokens are 1, 2, 3, 4, 5, 8"),
        (INDEX[:18] + bytes(8) + b"\1" + bytes(7) + bytes(8), b"", "mine.idx holds no document; look at what it was made from and make it again"),
    ],
)
def test_a_damaged_data_set_is_refused_with_the_numbers(tmp_path: Path, index: bytes, data: bytes, sentence: str) -> None:
    with pytest.raises(DataError) as error:
        IndexedDataset(place(tmp_path, index, data))
    assert sentence in str(error.value)


def test_a_data_set_of_empty_documents_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "mine", [[[]], [[]]])
    with pytest.raises(DataError, match=r"mine.bin holds no token; look at what it was made from"):
        IndexedDataset(tmp_path / "mine")


@pytest.mark.parametrize("missing", ["mine.bin", "mine.idx"])
def test_a_missing_file_of_the_pair_is_named(tmp_path: Path, missing: str) -> None:
    prefix = place(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(DataError, match=rf"{missing} does not exist; a data set is a pair PREFIX.bin and PREFIX.idx, made by tools/preprocess_data.py"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(("token", "written"), [(10, "10"), (-1, "-1")])
def test_an_id_beyond_the_vocabulary_is_refused_and_nothing_is_left(tmp_path: Path, token: int, written: str) -> None:
    sentence = f"document 2 of .*mine has the token id {written}, but the vocabulary ends at 9"
    with pytest.raises(DataError, match=sentence):
        write(tmp_path / "mine", [[[9]], [[3, token]]], vocab_size=10)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writer_leaves_the_older_data_set_as_it_was(tmp_path: Path) -> None:
    place(tmp_path)
    with suppress(KeyboardInterrupt), token_writer(tmp_path / "mine", vocab_size=10) as writer:
        writer.add_sequence([1])
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.bin", "mine.idx"]
    assert len(IndexedDataset(tmp_path / "mine")) == 3


def test_a_full_disk_gets_a_sentence_and_nothing_is_left(tmp_path: Path) -> None:
    sentence = r"mine cannot be written: File too large; nothing of it was kept: free some space or choose another place"
    with no_file_beyond(1 << 20), pytest.raises(OutputError, match=sentence):
        write(tmp_path / "mine", [[[1] * 600_000]])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written: (File exists|Not a directory)"):
        IndexWriter(tmp_path / "file" / "mine", dtype="<u2", vocab_size=10)


def test_labels_belong_to_their_tokens(tmp_path: Path) -> None:
    tokens = IndexedDataset(write(tmp_path / "tokens", [[[1, 2]], [[3, 4, 5]]]))
    assert Corpus(tokens, IndexedDataset(write(tmp_path / "labels", [[[1, 2]], [[3, 4, 5]]]))).labels is not None
    with pytest.raises(DataError, match=r"fewer labels 1 sequences, but .*tokens has 2; they do not belong together"):
        Corpus(tokens, IndexedDataset(write(tmp_path / "fewer", [[[1, 2]]])))
    with pytest.raises(DataError, match=r"shorter has 2 labels for sequence 1 of .*tokens, which has 3 tokens; they do not belong together"):
        Corpus(tokens, IndexedDataset(write(tmp_path / "shorter", [[[1, 2]], [[3, 4]]])))


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    with (tmp_path / "mine.bin").open("wb") as file:
        file.truncate(40 << 30)  # 40 GB of zeros that take no disk
    sizes = np.full(20, 1 << 30, "<i4")
    pointers = np.arange(20, dtype="<i8") << 31
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 20, 21)
    (tmp_path / "mine.idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + np.arange(21, dtype="<i8").tobytes())
    dataset = IndexedDataset(tmp_path / "mine")
    assert dataset.read(19, (1 << 30) - 2).tolist() == [0, 0]
