"""Loading takes little more memory than the weights themselves, and reads little more than what a rank holds."""

import ctypes
import json
import mmap
import os
import resource
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_lite.checkpoint.find import CheckpointLayout, find_checkpoint
from megatron_lite.checkpoint.load import load_layers, open_source
from megatron_lite.config.load import load_config
from megatron_lite.models.neox import ARCHITECTURE
from megatron_lite.models.spec import ModelSpec, spec_of
from megatron_lite.models.weights import Same
from megatron_lite.parallel.layout import stage_numbers
from megatron_lite.parallel.mesh import Axis
from tests.runs import BYTES, write_config
from tools.synthesize_checkpoint import main as synthesize

GIGABYTE = 10**9


def spec_in(config: Path) -> ModelSpec:
    return spec_of(load_config([config]).model, vocab=BYTES.vocab, dtype="float16")


def load(folder: Path, spec: ModelSpec, *, index: int, size: int, numbers: Iterable[int] | None = None) -> int:
    """Loads what one rank of a cut holds; returns its bytes."""
    axis = Axis("tp", index, tuple(range(size)))
    source = open_source(find_checkpoint(folder), ARCHITECTURE, spec)
    numbers = stage_numbers(spec.layers, 1)[0] if numbers is None else numbers
    cpu = torch.device("cpu")
    layers = load_layers(ARCHITECTURE.plan(spec, axis), numbers, source, tp=axis, dtype=torch.float16, device=cpu, progress=lambda count: None)
    return sum(parameter.nbytes for layer in layers.values() for parameter in layer.parameters())


def measured(config: Path, folder: Path, tp: int) -> tuple[int, int]:
    """Bytes that a process holds after loading the part of rank 0, and the most it had beside them meanwhile."""
    with get_context("fork").Pool(1) as pool:
        return pool.apply(_measure, (folder, spec_in(config), tp))


def _measure(folder: Path, spec: ModelSpec, tp: int) -> tuple[int, int]:
    before = most_memory()
    held = load(folder, spec, index=0, size=tp)
    return held, most_memory() - before - held


def most_memory() -> int:
    """The most bytes that this process has had at any time; a forked one begins with what it has then."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def write(folder: Path, *, layers: int, hidden: int, tp: int) -> Path:
    """A synthetic checkpoint in folder/checkpoint; returns its configuration."""
    config = write_config(folder, BYTES, num_layers=layers, hidden_size=hidden, num_attention_heads=8, rotary_pct=0.25)
    words = [str(config), str(folder / "checkpoint"), "--model-parallel-size", str(tp), "--vocab", str(BYTES.vocab), "--workers", "2"]
    assert synthesize(words) == 0
    return config


def as_rank_files(layout: CheckpointLayout, folder: Path) -> None:
    """The same weights as a save without a pipeline."""
    folder.mkdir()
    for part in range(layout.tp):
        files = {number: torch.load(layout.layer_file(number, part), mmap=True) for number in layout.numbers}
        module = {f"sequential.{number}.{name}": tensor for number, tensors in files.items() for name, tensor in tensors.items()}
        torch.save({"module": module}, folder / f"mp_rank_{part:02d}_model_states.pt")


def as_hugging_face(layout: CheckpointLayout, folder: Path, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Begins a Hugging Face folder with its config.json; returns the same weights under their names there."""
    folder.mkdir()
    stated = {"hidden_size": spec.hidden, "num_hidden_layers": spec.layers, "num_attention_heads": spec.heads, "intermediate_size": spec.ffn}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "hidden_act": "gelu_fast", **stated}))
    names = {place: made.names[0] for place, made in ARCHITECTURE.huggingface(spec).items() if isinstance(made, Same)}
    return {stored: torch.load(layout.layer_file(number, 0), mmap=True)[name] for (number, name), stored in names.items()}


def as_bin_files(layout: CheckpointLayout, folder: Path, spec: ModelSpec) -> None:
    """Three .bin files with an index."""
    tensors = as_hugging_face(layout, folder, spec)
    files = {name: f"pytorch_model-{1 + position * 3 // len(tensors):05d}-of-00003.bin" for position, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))


def largest(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_layer_files_of_a_gigabyte_and_a_half_take_no_gigabyte_more_than_the_weights(tmp_path: Path) -> None:
    config = write(tmp_path, layers=14, hidden=2048, tp=1)
    held, beside = measured(config, tmp_path / "checkpoint", 1)
    assert held == pytest.approx(1.41 * GIGABYTE, rel=0.02)
    assert beside < min(largest(tmp_path) + GIGABYTE, 0.7 * GIGABYTE)


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a checkpoint of 0.2 GB that is not cut; beside it the same in every other format."""
    folder = tmp_path_factory.mktemp("middling")
    config = write(folder, layers=8, hidden=1024, tp=1)
    layout, spec = find_checkpoint(folder / "checkpoint"), spec_in(config)
    as_rank_files(layout, folder / "ranks")
    as_bin_files(layout, folder / "bins", spec)
    save_file(as_hugging_face(layout, folder / "safetensors", spec), folder / "safetensors" / "model.safetensors")
    return config


@pytest.mark.parametrize("kind", ["checkpoint", "ranks", "bins", "safetensors"])
def test_no_format_takes_the_memory_of_its_largest_file_and_a_gigabyte_beside_the_weights(kind: str, middling: Path) -> None:
    for tp in (1, 4):
        held, beside = measured(middling, middling.parent / kind, tp)
        assert held == pytest.approx(0.204 * GIGABYTE / tp, rel=0.05)
        assert beside < largest(middling.parent / kind) + 0.3 * GIGABYTE


class Residency:
    """How much of files lies in the system's memory, which is what was read of them since they were put out of it."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(paths)
        for path in self.paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if self.share(self.paths) > 0.01:
            pytest.skip("this file system keeps files in memory, so what is read cannot be told from what is not")

    def share(self, paths: Iterable[Path]) -> float:
        """The part of these files that is there."""
        found = [self._pages(path) for path in paths]
        return sum(int(pages.sum()) for pages in found) / sum(len(pages) for pages in found)

    @staticmethod
    def _pages(path: Path) -> np.ndarray:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            content = np.frombuffer(mapped, dtype=np.uint8)
            pages = np.zeros(-(-len(content) // resource.getpagesize()), dtype=np.uint8)
            failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(len(content)), ctypes.c_void_p(pages.ctypes.data))
            assert not failed
            del content
            return pages & 1


def test_of_files_of_the_same_cut_a_rank_reads_its_own(tmp_path: Path) -> None:
    spec = spec_in(write(tmp_path, layers=2, hidden=1024, tp=2))
    layout = find_checkpoint(tmp_path / "checkpoint")
    mine, others = ([layout.layer_file(number, part) for number in (2, 3)] for part in (0, 1))
    read = Residency([*mine, *others])
    load(tmp_path / "checkpoint", spec, index=0, size=2)
    assert read.share(mine) > 0.95
    assert read.share(others) < 0.15  # what the system reads ahead of the names at both ends of a file


def test_a_pipeline_stage_does_not_read_the_layers_of_other_stages(tmp_path: Path) -> None:
    spec = spec_in(write(tmp_path, layers=4, hidden=1024, tp=1))
    layout = find_checkpoint(tmp_path / "checkpoint")
    first, second = ([layout.layer_file(number, 0) for number in numbers] for numbers in ((2, 3), (4, 5)))
    read = Residency([*first, *second])
    load(tmp_path / "checkpoint", spec, index=0, size=1, numbers=(4, 5, 7, 8))
    assert read.share(second) > 0.95
    assert read.share(first) == 0


def bytes_read() -> int:
    """What this process has asked the system to read from files so far."""
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].split()[0])


def test_of_uncut_files_a_rank_leaves_out_the_rows_of_others(tmp_path: Path) -> None:
    """Of matrices cut by rows it reads a quarter, of matrices cut by columns everything: 0.75 + 1 + 1 + 4 of 12 parts."""
    spec = spec_in(write(tmp_path, layers=1, hidden=1024, tp=1))
    block = find_checkpoint(tmp_path / "checkpoint").layer_file(2, 0)
    before = bytes_read()
    load(tmp_path / "checkpoint", spec, index=1, size=4, numbers=[2])
    assert (bytes_read() - before) / block.stat().st_size == pytest.approx(6.75 / 12, abs=0.02)
