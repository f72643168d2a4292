"""Small models in training: the same model, the same samples, at any cut, and the plain PyTorch loop that they must agree with."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

from megatron_lite.config.sections import ModelSection
from megatron_lite.data.batches import TokenBatch, sample_numbers
from megatron_lite.models.architecture import architecture_named
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout, stage_numbers
from megatron_lite.parallel.mesh import Axis, Mesh
from megatron_lite.training.engine import Engine, start_engine
from megatron_lite.training.fresh import draw_layer
from megatron_lite.training.optimizer import build_optimizer, parameter_groups
from megatron_lite.training.recipe import Batching, OptimizerRecipe, Recipe
from megatron_lite.training.schedule import Schedule
from megatron_lite.training.stage import TrainedStage, make_trainable
from tests.models import SMALL

for name in ("torch._dynamo", "torch._inductor.compile_fx", "deepspeed.runtime.zero.muon.muon_optimizer"):
    import_module(name)  # what DeepSpeed imports late is imported once, before processes are forked

SECTION = ModelSection.model_validate(
    {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "seq_length": 32,
        "max_position_embeddings": 64,
        "pos_emb": "rotary",
        "init_method_std": 0.1,
    }
)
STEPS, SAMPLES = 8, 8
RECIPE = Recipe(
    batching=Batching(micro=2, accumulation=4, replicas=1),
    steps=STEPS,
    schedule=Schedule(peak=1e-2, floor=0.0, style="cosine", warmup=2, end=STEPS),
    optimizer=OptimizerRecipe("adam", (0.9, 0.95), 1e-8, 0.0, weight_decay=0.1),
    dtype=torch.float32,
    clipping=0.5,
    recompute=0,
    seed=1,
    zero={"stage": 1},
    loss_scale={},
    extra={},
)


@dataclass(frozen=True)
class Samples:
    """Random samples in memory, with data.batches' way to share them out. `learned` says which of their labels are, where not all of them."""

    rows: torch.Tensor
    learned: torch.Tensor | None = None

    def between(self, first: int, last: int) -> TokenBatch:
        rows = self.rows[first:last]
        mask = torch.ones(len(rows), rows.shape[1] - 1) if self.learned is None else self.learned[first:last]
        return TokenBatch(rows[:, :-1].contiguous(), rows[:, 1:].where(mask > 0, 0), mask)

    def stream(self, consumed: int, micro: int, *, index: int = 0, size: int = 1) -> Iterator[TokenBatch]:
        while True:
            chosen = sample_numbers(consumed, micro, index=index, size=size)
            yield self.between(chosen.start, chosen.stop)
            consumed += micro * size


DATA = Samples(torch.randint(0, SMALL.vocab, (STEPS * SAMPLES, SECTION.seq_length + 1), generator=torch.Generator().manual_seed(0)))


def recipe_for(layout: Layout, **changes: Any) -> Recipe:
    """The same samples a step, whatever the layout."""
    batching = replace(RECIPE.batching, accumulation=RECIPE.batching.accumulation // layout.dp, replicas=layout.dp)
    return replace(RECIPE, batching=batching, **changes)


def fresh_stage(spec: ModelSpec, mesh: Mesh, recipe: Recipe) -> TrainedStage:
    plan = architecture_named(spec.family).plan(spec, mesh.tp)
    layers = {number: plan[number]() for number in stage_numbers(spec.layers, mesh.layout.pp)[mesh.pp.index]}
    for number, layer in layers.items():
        draw_layer(layer, number, model=SECTION, spec=spec, seed=recipe.seed, tp=mesh.tp)
        make_trainable(layer, mesh.tp)
    if spec.tied_head and {0, spec.head_number} <= layers.keys():
        layers[spec.head_number].get_submodule("word_embeddings").weight = layers[0].get_submodule("word_embeddings").weight
    return TrainedStage(layers, recompute=recipe.recompute)


def engine_for(spec: ModelSpec, mesh: Mesh, recipe: Recipe) -> Engine:
    return start_engine(fresh_stage(spec, mesh, recipe), mesh, recipe, words=spec.vocab, tied_head=spec.head_number if spec.tied_head else None)


def batches_for(engine: Engine, consumed: int = 0, data: Samples = DATA) -> Iterator[TokenBatch]:
    return data.stream(consumed, engine.recipe.batching.micro, index=engine.mesh.dp.index, size=engine.mesh.dp.size)


def run_steps(engine: Engine, first: int, last: int, data: Samples = DATA) -> list[tuple[float, float]]:
    """Loss and norm of the gradient before clipping, of the steps first to last - 1."""
    batches = batches_for(engine, first * SAMPLES, data)
    steps = [engine.step(batches, rate=engine.recipe.schedule(done)) for done in range(first, last)]
    return [(step.loss, step.gradient_norm) for step in steps]


def plain_layers(spec: ModelSpec) -> torch.nn.ModuleDict:
    """The model at the start of training, in one process."""
    plan = architecture_named(spec.family).plan(spec, Axis("tp"))
    layers = torch.nn.ModuleDict({str(number): make() for number, make in plan.items()})
    for number, layer in layers.items():
        draw_layer(layer, int(number), model=SECTION, spec=spec, seed=RECIPE.seed, tp=Axis("tp"))
    if spec.tied_head:
        layers[str(spec.head_number)].get_submodule("word_embeddings").weight = layers["0"].get_submodule("word_embeddings").weight
    return layers


def plain_loss(layers: torch.nn.ModuleDict, batch: TokenBatch) -> torch.Tensor:
    """The mean over all tokens of the batch that are learned."""
    x = batch.tokens
    for layer in layers.values():
        x = layer(x)
    return F.cross_entropy(x.flatten(0, 1), batch.labels.where(batch.loss_mask > 0, -100).flatten())


def plain_loop(spec: ModelSpec, data: Samples = DATA) -> list[tuple[float, float]]:
    """Losses and norms of the steps that the samples last for, as PyTorch alone would take them."""
    layers = plain_layers(spec)
    optimizer = build_optimizer(RECIPE.optimizer, parameter_groups(layers, RECIPE.optimizer.weight_decay), rate=0.0)
    steps = []
    for done in range(len(data.rows) // SAMPLES):
        loss = plain_loss(layers, data.between(done * SAMPLES, (done + 1) * SAMPLES))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(layers.parameters(), RECIPE.clipping)
        for group in optimizer.param_groups:
            group["lr"] = RECIPE.schedule(done)
        optimizer.step()
        steps.append((loss.item(), norm.item()))
    return steps
