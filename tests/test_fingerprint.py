"""Weights have a name that is theirs alone: not their folder's, nor that of the cut they are loaded with."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from megatron_lite.checkpoint.find import CheckpointLayout, find_checkpoint
from megatron_lite.checkpoint.fingerprint import fingerprint
from tests.models import SMALL, write_random


def test_copies_have_the_same_name_and_other_weights_another(tmp_path: Path) -> None:
    layout = write_random(tmp_path / "one", SMALL, tp=2)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    copy = find_checkpoint(tmp_path / "two")
    assert fingerprint(copy) == fingerprint(layout)
    assert len(fingerprint(layout)) == 64
    assert fingerprint(write_random(tmp_path / "three", SMALL, tp=2, seed=1)) != fingerprint(layout)
    assert fingerprint(write_random(tmp_path / "four", replace(SMALL, layers=3), tp=2)) != fingerprint(layout)


def changed(layout: CheckpointLayout, number: int, name: str, place: int) -> CheckpointLayout:
    """The checkpoint with one number of one tensor moved a little."""
    path = layout.layer_file(number, 1)
    tensors = {key: tensor.clone() for key, tensor in torch.load(path).items()}
    tensors[name].view(-1)[place] += 1e-3
    torch.save(tensors, path)
    return layout


def test_a_single_number_of_a_small_tensor_changes_the_name(tmp_path: Path) -> None:
    layout = write_random(tmp_path, SMALL, tp=2)
    before = fingerprint(layout)
    assert fingerprint(changed(layout, 3, "attention.dense.bias", 5)) != before


def test_of_a_large_tensor_samples_from_its_first_to_its_last_byte_count(tmp_path: Path) -> None:
    large = replace(SMALL, layers=1, vocab=2048)  # 1024 x 64 fp32 on each of two ranks: 256 KB
    for place in (0, -1):
        layout = write_random(tmp_path / str(place), large, tp=2)
        before = fingerprint(layout)
        assert fingerprint(changed(layout, 0, "word_embeddings.weight", place)) != before
