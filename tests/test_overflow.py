"""In half precision activations may peak at a thousand, layer after layer; where a number gets too large all the same, the layer is named."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_lite.errors import CheckpointError
from megatron_lite.inference.continuous import ContinuousDecoder
from megatron_lite.inference.decode import Decoder
from megatron_lite.inference.request import Completion
from megatron_lite.inference.step import Stepper
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh, single_mesh
from megatron_lite.parallel.stage import Stage
from tests.loud import PEAK, cut, largest, make_loud
from tests.models import load, write_random
from tests.runs import BYTES, TOKENIZER, kept, random_prompts, requests
from tests.worlds import in_world

TEXT, OTHER = random_prompts((40, 7))
HALF = replace(BYTES, dtype="float16")
LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2)]


def loud(folder: Path, spec: ModelSpec, *, head_dim: int | None = None) -> Stage:
    stage = load(write_random(folder, spec, tp=1), spec, single_mesh())
    make_loud(stage, TEXT, head_dim=head_dim)
    assert min(largest(stage, TEXT)) > PEAK * 0.99
    return stage


def served(stage: Stage, spec: ModelSpec) -> tuple[list[Completion], list[Completion]]:
    """Completions by the plain path, with their logits, and those of rows that share the steps of continuous batching."""
    asked = requests([TEXT, OTHER], maximum_tokens=12)
    plain = Decoder(stage, spec, TOKENIZER, context=spec.max_positions, keep_logits=True)
    shared = ContinuousDecoder(Stepper(stage, spec, words=TOKENIZER.vocab_size, pages=8), TOKENIZER, context=spec.max_positions, rows=2, tokens=64)
    return list(plain.complete(asked)), list(shared.complete(asked))


@pytest.mark.parametrize("is_parallel", [True, False], ids=["parallel", "sequential"])
def test_activations_of_a_thousand_stay_numbers_in_fp16_at_every_cut(is_parallel: bool, tmp_path: Path) -> None:
    """A completion whose logits are no numbers would be an error."""
    spec = replace(HALF, parallel_residual=is_parallel)
    whole = loud(tmp_path, spec)
    for layout in LAYOUTS:
        for completions in in_world(layout, lambda mesh: served(cut(whole, spec, mesh, torch.float16), spec)):
            assert all(completion.length for both in completions for completion in both)


def test_logits_behind_activations_of_a_thousand_are_those_of_fp32(tmp_path: Path) -> None:
    whole = loud(tmp_path, HALF, head_dim=HALF.head_dim)
    [exact, *_] = served(whole, HALF)[0]
    for layout in LAYOUTS:
        for plain, _ in in_world(layout, lambda mesh: served(cut(whole, HALF, mesh, torch.float16), HALF)):
            torch.testing.assert_close(kept(plain[0])[0], kept(exact)[0], atol=0.01 * PEAK, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("is_parallel", [True, False], ids=["parallel", "sequential"])
def test_the_layer_that_overflows_is_named_with_the_precision_that_it_does_not_fit_in(is_parallel: bool, layout: Layout, tmp_path: Path) -> None:
    spec = replace(HALF, parallel_residual=is_parallel)
    whole = loud(tmp_path, spec)
    whole.layers[3].get_parameter("mlp.dense_4h_to_h.weight").mul_(200)

    def said(mesh: Mesh) -> str:
        with pytest.raises(CheckpointError) as caught:
            served(cut(whole, spec, mesh, torch.float16), spec)
        return str(caught.value)

    for sentence in in_world(layout, said):
        assert "the logits of prompt 1 are no numbers (NaN or infinite) after 0 tokens, first behind layer 3: the weights are damaged" in sentence
        assert sentence.endswith("or float16 overflows (try precision=bfloat16 or fp32)")
