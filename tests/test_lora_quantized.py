"""Low-rank adapters beside weights that are held in 8 bits: what they compute, learn and leave alone, and how they are served."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from launcher.cards import hardware_named
from launcher.train_plan import plan_training
from megatron_lite.config.load import load_config
from megatron_lite.config.lora import LoraSection
from megatron_lite.errors import FitError
from megatron_lite.inference.live import unlikelihoods
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layers import columns
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Axis, Mesh
from megatron_lite.parallel.quantized import dequantized, product, rounded, row_scale
from megatron_lite.run import load_stage, prepare
from megatron_lite.training.live import Uses, live_stage
from megatron_lite.training.start import build_engine, settle
from megatron_lite.training.state import _flat_parameters, _whole
from tests.lora_models import EVERYWHERE, adapted_engine, base_layers, plain_lora_loop
from tests.models import SMALL, logits
from tests.test_families import GPTJ, LLAMA
from tests.test_lora_checkpoints import BASE, TOKENS, served, write_run
from tests.training_models import STEPS, recipe_for, run_steps
from tests.training_runs import trained
from tests.worlds import forked

ROOT = Path(__file__).resolve().parents[1]
slow = pytest.mark.slow
SEQUENTIAL = replace(SMALL, parallel_residual=False)
GROUPED = replace(LLAMA, heads=8, head_dim=8, rotary_dim=8, kv_heads=2)
FEW = LoraSection.model_validate({"rank": 4, "alpha": 8.0, "targets": ["dense_4h_to_h"]})
INT8 = {"weight_quantization": "int8"}


@pytest.mark.parametrize(
    ("spec", "layout", "zero", "recompute", "lora"),
    [
        (SMALL, Layout(tp=2), 1, 0, EVERYWHERE),
        (SMALL, Layout(pp=2), 1, 1, EVERYWHERE),
        (SMALL, Layout(dp=2), 2, 0, EVERYWHERE),
        (SMALL, Layout(dp=2), 3, 1, EVERYWHERE),
        (GROUPED, Layout(tp=2), 1, 1, FEW),
        pytest.param(SMALL, Layout(), 1, 3, EVERYWHERE, marks=slow),
        pytest.param(SMALL, Layout(dp=2), 1, 1, FEW, marks=slow),
        pytest.param(SMALL, Layout(pp=2, tp=2), 1, 1, EVERYWHERE, marks=slow),
        pytest.param(SMALL, Layout(dp=2, tp=2), 3, 0, FEW, marks=slow),
        pytest.param(SEQUENTIAL, Layout(tp=2), 1, 0, FEW, marks=slow),
        pytest.param(GPTJ, Layout(tp=2), 1, 0, FEW, marks=slow),
        pytest.param(LLAMA, Layout(tp=2), 1, 0, EVERYWHERE, marks=slow),
        pytest.param(replace(SMALL, tied_head=True), Layout(pp=2), 1, 0, EVERYWHERE, marks=slow),
    ],
    ids=[
        *("tensor 2", "pipe 2", "data 2, ZeRO 2", "data 2, ZeRO 3", "LLaMA, grouped, tensor 2"),
        *("one, computed again", "data 2, few targets", "pipe 2, tensor 2", "data 2, tensor 2, ZeRO 3"),
        *("sequential, tensor 2", "GPT-J, tensor 2", "LLaMA, tensor 2", "tied head, pipe 2"),
    ],
)
def test_adapters_beside_8_bits_train_at_every_cut_like_a_plain_loop(spec: ModelSpec, layout: Layout, zero: int, recompute: int, lora: LoraSection) -> None:
    """The loop multiplies with the rounded matrices in fp32, adapters added."""
    held, recipe = replace(spec, quantization="int8"), recipe_for(layout, zero={"stage": zero}, recompute=recompute)
    expected = plain_lora_loop(held, lora.targets)
    for steps in forked(layout, lambda mesh: run_steps(adapted_engine(held, mesh, recipe, lora), 0, STEPS)):
        torch.testing.assert_close(steps, expected, rtol=0, atol=1e-5)
    assert max(abs(one[0] - other[0]) for one, other in zip(expected, plain_lora_loop(spec, lora.targets), strict=True)) > 5e-5  # rounding is seen


@pytest.mark.parametrize("copies", [None, 2])
def test_gradients_pass_through_8_bits_and_no_matrix_is_kept_for_them(copies: int | None) -> None:
    """Also where norms that drifted apart hand on a state for every saved rank."""
    matrix, bias = torch.randn(48, 32), torch.randn(48)
    scale = row_scale(matrix, Axis("tp"))
    numbers = rounded(matrix, scale)
    x = torch.randn(*([copies] if copies else []), 3, 5, 32, requires_grad=True)
    kept: list[torch.dtype] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = product(x, numbers, scale.view(torch.int32), bias)
    expected = columns(x, dequantized(numbers, scale, torch.float32), bias)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((each * weights).sum(), x)[0] for each in (found, expected)]
    assert sorted(kept, key=str) == [torch.float32, torch.int8]
    assert torch.equal(found, expected)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("layout", "zero"), [(Layout(tp=2), 1), pytest.param(Layout(dp=2), 3, marks=slow), pytest.param(Layout(pp=2), 1, marks=slow)], ids=str)
def test_numbers_and_scales_stay_bit_for_bit_and_only_adapters_have_states(layout: Layout, zero: int) -> None:
    """DeepSpeed casts what it finds to bfloat16; scales are in fp32."""
    held, recipe = replace(SMALL, quantization="int8"), recipe_for(layout, dtype=torch.bfloat16, zero={"stage": zero})

    def train(mesh: Mesh) -> tuple[dict[str, Tensor], dict[str, Tensor], int, int]:
        numbers = mesh.layout.numbers(SMALL.layers)[mesh.pp.index]
        base = nn.ModuleDict({str(number): layer for number, layer in base_layers(held, mesh, numbers, torch.bfloat16).items()})
        engine = adapted_engine(held, mesh, recipe)
        run_steps(engine, 0, 2)
        after = {name: _whole(parameter).clone() for name, parameter in engine.stage.layers.named_parameters() if not parameter.requires_grad}
        adapters = sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in engine.stage.parameters() if parameter.requires_grad)
        return dict(base.state_dict()), after, adapters, sum(flat.numel() for flat in _flat_parameters(engine))

    for before, after, adapters, optimized in forked(layout, train):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert sum(tensor.dtype == torch.int8 for tensor in after.values()) == 4 * SMALL.layers // layout.pp
        assert adapters // layout.dp <= optimized < 1.01 * adapters / layout.dp


@pytest.mark.parametrize("cut", [1, 2])
def test_a_training_begins_with_the_model_that_generation_loads(tmp_path: Path, cut: int) -> None:
    """Bit for bit, with norms that drifted apart between the saved ranks."""
    path = write_run(tmp_path, **INT8)

    def both(mesh: Mesh) -> tuple[Tensor, Tensor]:
        config = load_config([path], {"model_parallel_size": cut})
        training = settle(config, mesh)
        begun = logits(live_stage(build_engine(training), training.spec), TOKENS, BASE.vocab)
        alone = load_config([path], {"model_parallel_size": cut, "lora_load": "null"})
        return begun, logits(load_stage(prepare(alone, mesh)), TOKENS, BASE.vocab)

    for begun, loaded in forked(Layout(tp=cut), both):
        assert torch.equal(begun, loaded)


def test_what_was_learned_beside_8_bits_is_served_in_8_bits_and_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Adapters are added to the weights before these are rounded, so that what is served differs by the rounding."""
    path = write_run(tmp_path, **INT8)
    assert trained(path, Layout(tp=2), Uses(measure=unlikelihoods)) == [None, None]
    assert "evaluation finds the loss that training finds in the first rows" in capfd.readouterr().err

    def beside(mesh: Mesh) -> Tensor:
        training = settle(load_config([path], {"train_iters": 7}), mesh)
        return logits(live_stage(build_engine(training), training.spec), TOKENS, BASE.vocab)

    learned = forked(Layout(), beside)[0]
    effect = float((learned - served(path, Layout(), lora_load="null")).norm() / learned.norm())
    rounded_again, whole = served(path, Layout()), served(path, Layout(), weight_quantization="null")
    torch.testing.assert_close(served(path, Layout(tp=2)), rounded_again, rtol=0, atol=1e-5)
    errors = [float((found - learned).norm() / learned.norm()) for found in (rounded_again, whole)]
    assert effect > 0.3
    assert 0 < max(errors) < 0.05 * effect


def planned(gigabytes: float, *settings: str) -> str:
    """What is trained of 20B on one GPU of this size, or why not."""
    overrides = {"pipe_parallel_size": "1", "model_parallel_size": "1", **dict(word.split("=") for word in settings)}
    config = load_config([ROOT / "configs" / "20B.yml", ROOT / "configs" / "finetune.yml"], overrides)
    try:
        return plan_training(config, hardware_named(f"1x{gigabytes}GB"), 50277).work
    except FitError as error:
        return str(error)


def test_20b_learns_on_one_card_of_24_gib_and_who_has_one_is_told() -> None:
    assert planned(25.7, "lora.rank=16", "weight_quantization=int8").startswith("LoRA of rank 16 beside weights in int8: 1 x 2048 tokens at once, ZeRO 1")
    assert planned(25.7, "lora.rank=16").endswith("here would fit: weight_quantization=int8 (25.2 GB a process)")
    assert planned(25.7).endswith("here would fit: lora.rank=16 weight_quantization=int8 (25.2 GB a process)")
    assert planned(48).endswith("here would fit: lora.rank=16 (45.1 GB a process)")
    assert "no setting makes it fit" in planned(16, "lora.rank=16", "weight_quantization=int8")
