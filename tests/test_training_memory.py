"""The memory plan of a training, held against the tensors that a real one has alive at once."""

import gc
from dataclasses import replace

import pytest
import torch

from megatron_lite.config.lora import LoraSection
from megatron_lite.models.memory import Footprint, generation_footprint
from megatron_lite.models.spec import DType, ModelSpec, Quantization
from megatron_lite.models.training_memory import Lora, Training, adapter_parameters, training_footprint
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.quantized import quantize
from megatron_lite.training.engine import start_engine
from megatron_lite.training.lora import put_adapters
from megatron_lite.training.recipe import Batching
from tests.live_bytes import LiveBytes, alive
from tests.lora_models import EVERYWHERE
from tests.models import SMALL
from tests.training_models import RECIPE, Samples, batches_for, fresh_stage
from tests.worlds import forked

SPEC = replace(SMALL, hidden=128, head_dim=32, rotary_dim=8, ffn=512, vocab=512)
ROWS, TOKENS, BUCKET = 4, 64, 100_000
DATA = Samples(torch.randint(0, SPEC.vocab, (64, TOKENS + 1), generator=torch.Generator().manual_seed(0)))


def measured(
    layout: Layout, dtype: DType, *, zero: int, recompute: int, lora: LoraSection | None = None, quantization: Quantization | None = None
) -> list[tuple[int, Footprint]]:
    """The most bytes of tensors that were alive in a second step, and the plan, of every rank."""

    def take_steps(mesh: Mesh) -> tuple[int, Footprint]:
        batching = Batching(micro=ROWS, accumulation=2, replicas=layout.dp)
        settings = {"stage": zero, "reduce_bucket_size": BUCKET}
        spec = replace(SPEC, dtype=dtype, quantization=quantization)
        recipe = replace(RECIPE, batching=batching, dtype=getattr(torch, dtype), recompute=recompute, zero=settings)
        stage = fresh_stage(spec, mesh, recipe).to(recipe.dtype)
        for layer in stage.layers.values() if quantization else ():
            quantize(layer, mesh.tp)
        if lora:
            put_adapters({int(number): layer for number, layer in stage.layers.items()}, lora, None, family=spec.family, seed=1, tp=mesh.tp)
        foreign = {id(tensor.untyped_storage()) for tensor in alive()} - {id(parameter.untyped_storage()) for parameter in stage.parameters()}
        engine = start_engine(stage, mesh, recipe, words=spec.vocab, tied_head=None)
        batches = batches_for(engine, 0, DATA)
        engine.step(batches, rate=1e-3)
        gc.collect()
        with LiveBytes(tensor for tensor in alive() if id(tensor.untyped_storage()) not in foreign) as live:
            engine.step(batches, rate=1e-3)
        adapters = Lora(lora.rank, lora.targets) if lora else None
        training = Training(rows=ROWS, tokens=TOKENS, accumulation=2, recompute=recompute, zero=zero, bucket=BUCKET, lora=adapters)
        return live.peak, training_footprint(spec, layout, mesh.pp.index, training)

    return forked(layout, take_steps)


@pytest.mark.parametrize(
    ("layout", "dtype", "zero", "recompute"),
    [
        (Layout(), "bfloat16", 1, 0),
        (Layout(dp=2), "bfloat16", 1, 1),
        (Layout(pp=2), "bfloat16", 1, 1),
        pytest.param(Layout(tp=2), "bfloat16", 1, 0, marks=pytest.mark.slow),
        pytest.param(Layout(dp=2), "bfloat16", 2, 1, marks=pytest.mark.slow),
        pytest.param(Layout(dp=2), "bfloat16", 3, 0, marks=pytest.mark.slow),
        pytest.param(Layout(), "float32", 1, 0, marks=pytest.mark.slow),
        pytest.param(Layout(dp=2), "float32", 1, 1, marks=pytest.mark.slow),
        pytest.param(Layout(pp=2), "bfloat16", 1, 0, marks=pytest.mark.slow),
        pytest.param(Layout(dp=2), "float32", 2, 0, marks=pytest.mark.slow),
        pytest.param(Layout(dp=2), "float32", 3, 0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_training_s_plan_is_within_a_tenth_of_the_tensors_that_are_alive(layout: Layout, dtype: DType, zero: int, recompute: int) -> None:
    for peak, plan in measured(layout, dtype, zero=zero, recompute=recompute):
        assert plan.total == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("recompute", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_plan_for_adapters_is_within_a_tenth_too(recompute: int) -> None:
    """Beside weights in 8 bits as well, which save what they are smaller by: no matrix that is made of them stays for the backward pass."""
    ((whole, plan),) = measured(Layout(), "bfloat16", zero=1, recompute=recompute, lora=EVERYWHERE)
    ((small, plan_in_8_bits),) = measured(Layout(), "bfloat16", zero=1, recompute=recompute, lora=EVERYWHERE, quantization="int8")
    assert plan.total == pytest.approx(whole, rel=0.1)
    assert plan_in_8_bits.total == pytest.approx(small, rel=0.1)
    assert whole - small == plan.weights - plan_in_8_bits.weights > 0.35 * plan.weights


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "zero"), [(Layout(tp=2), 1), (Layout(dp=2), 2)], ids=str)
def test_a_plan_for_adapters_beside_8_bits_is_within_a_tenth_at_every_cut(layout: Layout, zero: int) -> None:
    for peak, plan in measured(layout, "bfloat16", zero=zero, recompute=1, lora=EVERYWHERE, quantization="int8"):
        assert plan.total == pytest.approx(peak, rel=0.1)


BIG = ModelSpec(
    layers=44,
    hidden=6144,
    heads=64,
    kv_heads=64,
    head_dim=96,
    ffn=24576,
    vocab=50432,
    max_positions=2048,
    rotary_dim=24,
    rotary_base=10000.0,
    norm_eps=1e-5,
    activation="gelu_tanh",
    parallel_residual=True,
    tied_head=False,
    dtype="bfloat16",
)
STEP = Training(rows=1, tokens=2048, accumulation=16, recompute=1, zero=1)


def test_20b_in_bfloat16_takes_20_bytes_a_parameter_in_one_replica_and_8_and_a_share_of_12_in_several() -> None:
    parameters = 20_554_567_680
    one, four = (training_footprint(BIG, Layout(dp=dp), 0, STEP) for dp in (1, 4))
    assert [round(size / parameters, 1) for size in (one.weights, one.gradients, one.masters, one.optimizer)] == [2, 5.9, 4, 8]
    assert [round(size / parameters, 1) for size in (four.weights, four.gradients, four.masters, four.optimizer)] == [2, 6, 1, 2]
    third = training_footprint(BIG, Layout(dp=4), 0, replace(STEP, zero=3))
    assert [size / parameters for size in (third.weights, third.gradients, third.masters, third.optimizer)] == [0.5, 1, 1, 2]


def test_adapters_alone_have_gradients_masters_and_states() -> None:
    lora = Lora(16, ("query_key_value", "dense"))
    trained = adapter_parameters(BIG, Layout(), 0, lora)
    assert trained == 44 * 16 * ((6144 + 3 * 6144) + (6144 + 6144))
    plan = training_footprint(BIG, Layout(), 0, replace(STEP, lora=lora))
    assert (plan.gradients, plan.masters, plan.optimizer) == (4 * trained, 4 * trained, 8 * trained)  # those of the weights have room in the activations'
    assert plan.weights == generation_footprint(BIG, Layout(), 0, rows=0, context=0).weights + 2 * trained
    assert plan.total < 48e9


def test_weights_of_8_bits_and_their_adapters_take_half_of_the_memory() -> None:
    training = replace(STEP, lora=Lora(16, ("query_key_value",)))
    whole, held = (training_footprint(replace(BIG, quantization=kind), Layout(), 0, training) for kind in (None, "int8"))
    assert [round(plan.weights / 1e9, 1) for plan in (whole, held)] == [41.1, 21.2]
    assert replace(held, weights=0) == replace(whole, weights=0)  # a matrix of 16 bits has room where the logits were
    short = training_footprint(replace(BIG, quantization="int8"), Layout(), 0, replace(training, tokens=64))
    assert short.total - short.weights == pytest.approx(2 * 12 * 6144**2, rel=0.01)  # the block that is whole while weights are loaded


def test_recomputing_keeps_one_state_a_block_where_all_would_be_seventeen_times_that() -> None:
    keeping, again = (training_footprint(BIG, Layout(), 0, replace(STEP, recompute=recompute)).activations for recompute in (0, 1))
    state = 2048 * 6144 * 2
    assert keeping == pytest.approx(44 * 17 * state, rel=0.02)
    assert again == (44 + 2) * state  # with those before and behind the blocks; what a block is computed again in has room where the logits were


def test_the_first_stage_of_a_pipeline_holds_as_many_micro_batches_as_there_are_stages() -> None:
    layout, plain = Layout(pp=4), replace(STEP, recompute=0)
    first, last = (training_footprint(BIG, layout, stage, plain) for stage in (0, 3))
    assert first.activations / last.activations == pytest.approx(4, rel=0.15)
    assert (first.logits, last.logits) == (0, 2048 * 50432 * 14)
    assert training_footprint(BIG, layout, 0, replace(plain, accumulation=1)).activations < 1.1 * last.activations
