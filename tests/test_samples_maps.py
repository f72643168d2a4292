"""Sample maps are kept beside the data under GPT-NeoX's names, made once, and made again when they cannot be right."""

import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data.index_writer import label_writer
from megatron_lite.data.indexed import MASKED, Corpus, IndexedDataset
from megatron_lite.data.packing import Packing, pack
from megatron_lite.data.samples import Samples
from tests.corpora import DOC_IDX, SAMPLE_IDX, SHUFFLE_IDX, SIZES, corpus, documents, samples, shown
from tests.disks import no_file_beyond

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


@pytest.mark.parametrize("pack_impl", ["unpacked", "pack_until_overflow"])
def test_whole_documents_are_mapped_again_for_another_part_or_other_labels(tmp_path: Path, pack_impl: str) -> None:
    def seen(part: range) -> set[int]:
        whole = Corpus(IndexedDataset(tmp_path / "mine"), IndexedDataset(tmp_path / "labels"))
        packing = Packing(8, 1234, pack_impl)  # type: ignore[arg-type]
        return set(Samples(whole, part, purpose="train", count=20, packing=packing)._maps.documents.tolist())

    learned = [[1] * size for size in SIZES]
    corpus(tmp_path, labels=learned)
    assert (seen(range(3)), seen(range(5)), seen(range(3))) == ({0, 1, 2}, {0, 1, 2, 3, 4}, {0, 1, 2})
    before = sorted(tmp_path.glob("*.npy"))
    seen(range(3))
    assert sorted(tmp_path.glob("*.npy")) == before
    masked = [[MASKED] * SIZES[0], *learned[1:]]
    with label_writer(tmp_path / "labels", vocab_size=5000) as writer:
        for numbers in masked:
            writer.add_sequence(numbers)
        writer.finish()
    assert seen(range(3)) == {1, 2}


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
