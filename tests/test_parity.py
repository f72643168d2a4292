"""Every cut of every model against transformers, in fp32, from files of every other cut."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from tests.models import SMALL, in_transformers, load, logits, write_random
from tests.worlds import in_world

SPECS = {
    "20B-like": SMALL,
    "sequential residual": replace(SMALL, parallel_residual=False),
    "tied head": replace(SMALL, tied_head=True),
    "tied head, sequential, erf": replace(SMALL, tied_head=True, parallel_residual=False, activation="gelu"),
    "erf GELU": replace(SMALL, activation="gelu"),
    "8 heads, full rotary": replace(SMALL, heads=8, kv_heads=8, head_dim=8, rotary_dim=8),
    "half rotary, 96 wide, 12 heads": replace(SMALL, hidden=96, heads=12, kv_heads=12, head_dim=8, rotary_dim=4, ffn=192, vocab=160),
    "no rotary": replace(SMALL, rotary_dim=0),
}
LAYOUTS = [Layout(pp=pp, tp=tp) for pp, tp in ((1, 1), (1, 2), (1, 4), (2, 1), (4, 1), (2, 2))]


@pytest.mark.parametrize("cut", [1, 2, 4])
@pytest.mark.parametrize("name", SPECS)
def test_one_process_agrees_with_transformers_whatever_the_cut_of_the_files(name: str, cut: int, tmp_path: Path) -> None:
    spec = SPECS[name]
    layout = write_random(tmp_path, spec, tp=cut)
    tokens = torch.randint(spec.vocab, (2, 33), generator=torch.Generator().manual_seed(1))
    [found] = in_world(Layout(), lambda mesh: logits(load(layout, spec, mesh), tokens, spec.vocab))
    expected = in_transformers(layout, spec)(tokens).logits
    assert expected.std() > 0.3  # a model that says nothing agrees with everything
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_agrees_with_transformers_from_files_of_every_cut(layout: Layout, tmp_path: Path) -> None:
    saved = {(name, cut): write_random(tmp_path / f"{name}{cut}", spec, tp=cut) for name, spec in SPECS.items() for cut in (1, 2, 4)}
    tokens = torch.randint(160, (2, 33), generator=torch.Generator().manual_seed(1))
    found = in_world(layout, lambda mesh: {key: logits(load(found, SPECS[key[0]], mesh), tokens, 160) for key, found in saved.items()})
    for key, where in saved.items():
        expected = in_transformers(where, SPECS[key[0]])(tokens).logits.detach()
        for rank, answers in enumerate(found):
            torch.testing.assert_close(answers[key], expected, atol=1e-4, rtol=0, msg=lambda text, key=key, rank=rank: f"{key} on rank {rank}: {text}")


def test_the_same_cut_holds_the_bits_of_the_files(tmp_path: Path) -> None:
    layout = write_random(tmp_path, SMALL, tp=2)

    def held(mesh: Mesh) -> dict[int, dict[str, Tensor]]:
        return {number: dict(layer.state_dict()) for number, layer in load(layout, SMALL, mesh).layers.items()}

    for part, layers in enumerate(in_world(Layout(tp=2), held)):
        for number, state in layers.items():
            for name, tensor in torch.load(layout.layer_file(number, part)).items():
                assert torch.equal(state[name], tensor), (number, name)


def test_a_vocabulary_that_does_not_divide_is_padded(tmp_path: Path) -> None:
    spec: ModelSpec = replace(SMALL, vocab=157)
    layout = write_random(tmp_path, spec, tp=1)
    tokens = torch.randint(157, (1, 20), generator=torch.Generator().manual_seed(2))
    expected = in_transformers(layout, spec)(tokens).logits.detach()
    for found in in_world(Layout(tp=4), lambda mesh: logits(load(layout, spec, mesh), tokens, 157)):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
