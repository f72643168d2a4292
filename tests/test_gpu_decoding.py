"""On GPUs, continuous batching with captured steps and fused blocks writes what the plain path writes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.config.load import load_config
from megatron_lite.inference.decode import Decoder
from megatron_lite.inference.decoders import Load, continuous_decoder
from megatron_lite.parallel.mesh import single_mesh
from megatron_lite.parallel.quantized import quantize
from megatron_lite.run import load_stage, prepare
from tests.harness import bundled_model, tokenizer
from tests.likelihoods import by_one_pass, by_reading, by_steps, furthest, pages_in_all, play
from tests.loud import PEAK, cut, largest, make_loud, random_stage
from tests.models import load, write_random
from tests.runs import BYTES, TOKENIZER, random_prompts, requests, write_run

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rows", [3, 5, 11])
def test_rows_of_any_number_have_a_slot_each(rows: int, temperature: float, tmp_path: Path) -> None:
    stage = load(write_random(tmp_path, SPEC, tp=2), SPEC, single_mesh(GPU))
    asked = requests(random_prompts(range(1, rows + 1)), maximum_tokens=25, temperature=temperature)
    fast = continuous_decoder(stage, SPEC, TOKENIZER, Load(SPEC.max_positions, rows))
    found = {completion.request.id: completion.text for completion in fast.complete(asked)}
    expected = {completion.request.id: completion.text for completion in Decoder(stage, SPEC, TOKENIZER, context=SPEC.max_positions).complete(asked)}
    assert found == expected


def test_behind_the_warm_up_no_kernel_is_left_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    from megatron_lite.inference.warm import warm_up

    spec = replace(SPEC, max_positions=2048)
    write_run(tmp_path, spec, tp=2, precision="fp16")
    run, compiled = prepare(load_config([tmp_path / "config.yml"], {}), single_mesh(GPU)), []
    warm_up(run, rows=20, context=spec.max_positions).join()
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **told: compiled.append(told["repr"]))
    decoder = continuous_decoder(load_stage(run), run.spec, TOKENIZER, Load(spec.max_positions, 20))
    asked = requests(random_prompts((30, 7, 400, 18, 64, *range(2, 60))), maximum_tokens=40) + requests(random_prompts([1500]), maximum_tokens=4)
    assert len(list(decoder.complete(asked))) == len(asked)
    assert compiled == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "groups"), [(64, 4), (80, 8), (96, 8), (128, 1), (256, 2)])
@pytest.mark.parametrize("lengths", [[1500], [1, 700, 37, 64, 128, 5]], ids=["a long text", "texts"])
def test_packed_texts_are_attended_to_as_each_by_itself(lengths: list[int], size: int, groups: int, dtype: torch.dtype) -> None:
    from megatron_lite.inference.kernels.packed import attend_packed

    query, key, value = (torch.randn(sum(lengths), count, size, dtype=dtype, device=GPU) for count in (8, groups, groups))
    positions = torch.cat([torch.arange(length, device=GPU) for length in lengths])
    found = attend_packed((query, key, value), positions, len(lengths))
    texts = zip(*(each.float().transpose(0, 1).split(lengths, 1) for each in (query, key, value)), strict=True)
    expected = torch.cat([F.scaled_dot_product_attention(*each, is_causal=True, enable_gqa=True) for each in texts], 1).transpose(0, 1)
    error = {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]  # of numbers of up to 4, and weights rounded to the format
    torch.testing.assert_close(found.float(), expected, atol=error, rtol=error)


@pytest.mark.parametrize("texts", [1, 4, 16, 80])
def test_2000_tokens_of_a_play_are_as_likely_in_fp16_by_captured_steps_and_by_reading_as_by_the_plain_path(texts: int) -> None:
    """Of the bundled model, whose context is 512 tokens: the single text is shorter. 80 rows take their steps by the library's products."""
    from megatron_lite.inference.captured import CapturedStepper

    model, tokens = bundled_model(), play(max(4, texts), tokenizer())[:texts]
    spec = replace(model.spec, dtype="float16")
    stage = cut(load(model.layout, model.spec, single_mesh(GPU)), spec, single_mesh(GPU), torch.float16)
    stepper = CapturedStepper(stage, spec, words=tokenizer().vocab_size, pages=pages_in_all(tokens))
    assert stepper.stack is not None
    distances = furthest(stage, stepper, tokens)
    stepper.close()
    assert max(distances.values()) <= 0.02, distances


@pytest.mark.parametrize("is_tame", [True, False])
def test_activations_of_a_thousand_stay_numbers_in_fp16_at_the_width_of_20b(is_tame: bool) -> None:
    """Two layers of 20B. Where rounding does not decide the attention, probabilities are those of fp32, as near as fp16 tells logits of a thousand."""
    from megatron_lite.inference.captured import CapturedStepper

    spec = replace(BYTES, layers=2, hidden=6144, ffn=24576, heads=64, kv_heads=64, head_dim=96, rotary_dim=24, max_positions=512)
    torch.manual_seed(0)
    whole, texts = random_stage(spec, GPU), torch.tensor(random_prompts([96] * 70))
    make_loud(whole, texts[0].tolist(), head_dim=spec.head_dim if is_tame else None)
    assert min(largest(whole, texts[0].tolist())) > PEAK * 0.99
    half = replace(spec, dtype="float16")
    stage = cut(whole, half, single_mesh(GPU), torch.float16)
    assert by_one_pass(stage, texts[:8], TOKENIZER.vocab_size).isfinite().all()
    for rows in (1, 8, 40, 70):
        stepper = CapturedStepper(stage, half, words=TOKENIZER.vocab_size, pages=pages_in_all(texts[:rows]))
        found = by_reading(stepper, texts[:rows]), by_steps(stepper, texts[:rows])
        stepper.close()
        assert all(each.isfinite().all() for each in found)
        if is_tame:
            exact = by_one_pass(whole, texts[:rows], TOKENIZER.vocab_size)
            assert max((each - exact).abs().max().item() for each in found) < 0.02 * PEAK


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_products_of_8_bit_weights_are_those_of_the_numbers_they_stand_for(rows: int, dtype: torch.dtype) -> None:
    from megatron_lite.inference.kernels.linear import Projection, combine, project

    device = torch.device("cuda", 0)
    one, two = (torch.randint(-127, 128, shape, dtype=torch.int8, device=device) for shape in ((192, 512), (192, 2048)))
    scales = torch.rand(192, device=device) / 127, torch.rand(192, device=device) / 127
    x, y = (torch.randn(rows, width, dtype=dtype, device=device) for width in (512, 2048))
    first, second = (F.linear(states.float(), weight.float()) * scale for states, weight, scale in ((x, one, scales[0]), (y, two, scales[1])))
    out = torch.empty(rows, 192, device=device)
    project(x.unsqueeze(0), one, None, out, Projection(), scale=scales[0])
    torch.testing.assert_close(out, first, atol=1e-3, rtol=1e-4)
    terms = torch.empty(5, rows, 192, device=device)
    combine((x, y), (one, two), terms, scales=scales)
    torch.testing.assert_close(terms.sum(0), first + second, atol=1e-3, rtol=1e-4)
