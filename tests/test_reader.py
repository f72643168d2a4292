"""The reader of byte ranges against plain slicing of mapped tensors: every cut from every cut, to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from megatron_lite.checkpoint import reader as reading
from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.checkpoint.load import open_source
from megatron_lite.checkpoint.reader import Range, Reader, mappings, range_of
from megatron_lite.errors import CheckpointError
from megatron_lite.models.neox import ARCHITECTURE
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh, single_mesh
from megatron_lite.parallel.shards import Rule, take
from tests.models import SMALL, load, write_random
from tests.worlds import in_world

CPU = torch.device("cpu")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few rows, so that a small matrix takes many of them."""
    monkeypatch.setattr(reading, "BLOCK", 4096)
    monkeypatch.setattr(reading, "WORTHWHILE", 1)


def plainly(layout: CheckpointLayout, mesh: Mesh) -> dict[str, Tensor]:
    """What load_layers must give, by `take` alone."""
    plan = ARCHITECTURE.plan(SMALL, mesh.tp)
    source = open_source(layout, ARCHITECTURE, SMALL)
    found = {}
    for number, make in plan.items():
        layer, shards = make(), source.shards(number)
        for path, _ in layer.named_parameters():
            module, _, name = path.rpartition(".")
            rules = cast(dict[str, Rule], layer.get_submodule(module).rules)
            found[f"{number}.{path}"] = take(rules[name], list(shards[path]), mesh.tp.index, mesh.tp.size).clone()
    return found


def loaded(layout: CheckpointLayout, mesh: Mesh) -> dict[str, Tensor]:
    return {f"{number}.{name}": parameter for number, layer in load(layout, SMALL, mesh).layers.items() for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("cut", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_cut_is_read_from_every_cut_to_the_bit(cut: int, size: int, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = write_random(tmp_path, SMALL, tp=cut)

    def compare(mesh: Mesh) -> tuple[list[str], int]:
        fetched = []
        fetch = Reader.fetch
        monkeypatch.setattr(Reader, "fetch", lambda self, source, target, progress: (fetched.append(source), fetch(self, source, target, progress)))
        found, expected = loaded(layout, mesh), plainly(layout, mesh)
        return [name for name in expected if not torch.equal(found[name], expected[name])], len(fetched)

    for different, fetched in in_world(Layout(tp=size), compare):
        assert different == []
        assert fetched >= 4 * SMALL.layers  # the matrices of every block came through the reader


@pytest.mark.parametrize("rows", [slice(0, 40), slice(7, 23)])
@pytest.mark.parametrize("columns", [slice(0, 64), slice(8, 40)])
def test_a_range_names_the_bytes_of_a_slice(rows: slice, columns: slice, tmp_path: Path, small_blocks: None) -> None:
    matrix = torch.randn(40, 64)
    torch.save({"before": torch.randn(3), "matrix": matrix}, tmp_path / "file.pt")
    mapped = torch.load(tmp_path / "file.pt", mmap=True)["matrix"]
    place = range_of(mapped[rows, columns], mappings())
    assert place is not None
    target = torch.zeros(place.shape)
    done = []
    with Reader(CPU) as reader:
        reader.fetch(place, target, done.append)
        reader.wait()
    assert torch.equal(target, matrix[rows, columns])
    assert sum(done) == target.nbytes


def test_numbers_are_converted_on_the_way(tmp_path: Path, small_blocks: None) -> None:
    torch.save(matrix := torch.randn(30, 30).half(), tmp_path / "file.pt")
    place = range_of(torch.load(tmp_path / "file.pt", mmap=True), mappings())
    assert place is not None
    target = torch.zeros(30, 30)
    with Reader(CPU) as reader:
        reader.fetch(place, target, lambda count: None)
        reader.wait()
    assert torch.equal(target, matrix.float())


def test_what_is_not_in_a_file_is_left_to_the_plain_way() -> None:
    assert range_of(torch.randn(1000, 1000), mappings()) is None


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "short.pt").write_bytes(b"\0" * 1000)
    place = Range(str(tmp_path / "short.pt"), 500, (100, 10), 10, torch.float32)
    with Reader(CPU) as reader:
        reader.fetch(place, torch.zeros(100, 10), lambda count: None)
        with pytest.raises(CheckpointError, match=r"short.pt ends 3500 bytes before a tensor does"):
            reader.wait()


def test_a_padded_vocabulary_is_left_to_the_plain_way_where_rows_are_missing(tmp_path: Path, small_blocks: None) -> None:
    layout = write_random(tmp_path, replace(SMALL, vocab=157), tp=1)
    [stage] = in_world(Layout(), lambda mesh: load(layout, replace(SMALL, vocab=157), single_mesh()).layers[0].state_dict()["word_embeddings.weight"])
    assert stage.shape == (157, 64)


@pytest.mark.gpu
def test_a_gpu_gets_the_bits_of_the_file(tmp_path: Path) -> None:
    torch.save(matrix := torch.randn(9000, 1024).half(), tmp_path / "file.pt")
    mapped, device = torch.load(tmp_path / "file.pt", mmap=True), torch.device("cuda", 0)
    for part in (mapped, mapped[:, 100:700], mapped[11:5000]):
        place = range_of(part, mappings())
        assert place is not None
        target = torch.zeros(place.shape, dtype=torch.half, device=device)
        with Reader(device) as reader:
            reader.fetch(place, target, lambda count: None)
            reader.wait()
        assert torch.equal(target.cpu(), part)
    assert torch.equal(mapped, matrix)
