"""On GPUs, continuous batching with captured steps and fused blocks writes what the plain path writes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_lite.inference.decode import Decoder
from megatron_lite.inference.decoders import Load, continuous_decoder
from megatron_lite.parallel.mesh import single_mesh
from tests.models import load, write_random
from tests.runs import BYTES, TOKENIZER, random_prompts, requests

pytestmark = pytest.mark.gpu
SPEC = replace(BYTES, max_positions=512, hidden=512, ffn=2048, heads=8, kv_heads=8, head_dim=64, rotary_dim=16)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_captured_steps_write_what_the_plain_path_writes(parallel: bool, rows: int, tmp_path: Path) -> None:
    spec = replace(SPEC, parallel_residual=parallel)
    stage = load(write_random(tmp_path, spec, tp=2), spec, single_mesh(torch.device("cuda", 0)))
    asked = requests(random_prompts((1, 30, 7, 400, 18, 64, 63, 65, 3, *range(1, 120))), maximum_tokens=25)
    fast = continuous_decoder(stage, spec, TOKENIZER, Load(spec.max_positions, rows))
    found = {completion.request.id: completion.text for completion in fast.complete(asked)}
    expected = {completion.request.id: completion.text for completion in Decoder(stage, spec, TOKENIZER, context=spec.max_positions).complete(asked)}
    assert found == expected
