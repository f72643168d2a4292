"""On GPUs, continuous batching with captured steps and fused blocks writes what the plain path writes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.inference.decode import Decoder
from megatron_lite.inference.decoders import Load, continuous_decoder
from megatron_lite.parallel.mesh import single_mesh
from megatron_lite.parallel.quantized import quantize
from tests.models import load, write_random
from tests.runs import BYTES, TOKENIZER, random_prompts, requests

pytestmark = pytest.mark.gpu
SPEC = replace(BYTES, max_positions=512, hidden=512, ffn=2048, heads=8, kv_heads=8, head_dim=64, rotary_dim=16)


@pytest.mark.parametrize("settings", [{}, {"parallel_residual": False}, {"quantization": "int8"}], ids=["parallel", "sequential", "int8"])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_captured_steps_write_what_the_plain_path_writes(settings: dict[str, Any], rows: int, tmp_path: Path) -> None:
    spec = replace(SPEC, **settings)
    stage = load(write_random(tmp_path, spec, tp=2), spec, single_mesh(torch.device("cuda", 0)))
    if spec.quantization:
        for layer in stage.layers.values():
            quantize(layer, stage.mesh.tp)
    asked = requests(random_prompts((1, 30, 7, 400, 18, 64, 63, 65, 3, *range(1, 120))), maximum_tokens=25)
    fast = continuous_decoder(stage, spec, TOKENIZER, Load(spec.max_positions, rows))
    found = {completion.request.id: completion.text for completion in fast.complete(asked)}
    expected = {completion.request.id: completion.text for completion in Decoder(stage, spec, TOKENIZER, context=spec.max_positions).complete(asked)}
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_products_of_8_bit_weights_are_those_of_the_numbers_they_stand_for(rows: int, dtype: torch.dtype) -> None:
    from megatron_lite.inference.kernels.linear import Projection, combine, project

    device = torch.device("cuda", 0)
    one, two = (torch.randint(-127, 128, shape, dtype=torch.int8, device=device) for shape in ((192, 512), (192, 2048)))
    scales = torch.rand(192, device=device) / 127, torch.rand(192, device=device) / 127
    x, y = (torch.randn(rows, width, dtype=dtype, device=device) for width in (512, 2048))
    first, second = (F.linear(states.float(), weight.float()) * scale for states, weight, scale in ((x, one, scales[0]), (y, two, scales[1])))
    outs = torch.empty(rows, 192, device=device), torch.empty(rows, 192, device=device)
    project(x.unsqueeze(0), (one, one), (None, None), outs, Projection(), scales=(scales[0], scales[0]))
    torch.testing.assert_close(outs, (first, first), atol=1e-3, rtol=1e-4)
    terms = torch.empty(5, rows, 192, device=device)
    combine((x, y), (one, two), terms, scales=scales)
    torch.testing.assert_close(terms.sum(0), first + second, atol=1e-3, rtol=1e-4)
