"""DeepSpeed behind one small interface: a step, a validation. One stage runs its engine with ZeRO 1 to 3, several its pipeline engine with ZeRO 1."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lite.data.batches import Counted, TokenBatch
from megatron_lite.errors import ConfigError
from megatron_lite.parallel.cross_entropy import Loss
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.optimizer import Groups, build_optimizer, parameter_groups, set_rate
from megatron_lite.training.recipe import Recipe
from megatron_lite.training.stage import TrainedStage
from megatron_lite.training.world import Cut, join_world, quiet


@dataclass(frozen=True)
class Step:
    """What became of a step, the same on every rank. A step whose gradients are not finite is not applied."""

    loss: float
    gradient_norm: float
    applied: bool
    loss_scale: float


@dataclass(frozen=True)
class Parts:
    """What an engine is made of."""

    stage: TrainedStage
    mesh: Mesh
    recipe: Recipe
    optimizer: torch.optim.Optimizer
    loss: Loss


class Engine(ABC):
    """A stage in training. `batches` are micro batches of this rank's replica; all ranks call together."""

    def __init__(self, parts: Parts, deepspeed: Any) -> None:
        self.stage, self.mesh, self.recipe, self.optimizer, self.loss = parts.stage, parts.mesh, parts.recipe, parts.optimizer, parts.loss
        self.deepspeed = deepspeed

    def step(self, batches: Iterator[TokenBatch], *, rate: float) -> Step:
        """Takes a step's micro batches and moves the weights. Every learned token counts alike, wherever it is."""
        set_rate(self.optimizer, rate)
        counted = Counted(batches)
        taken = [next(counted) for _ in range(self.recipe.batching.accumulation)]
        loss = self._forward_and_back(taken, self._share(counted.learned))
        norm = float(self.deepspeed.get_global_grad_norm() or 0.0)
        return Step(loss, norm, not self.deepspeed.optimizer.overflow, self.loss_scale)

    @property
    def loss_scale(self) -> float:
        return float(self.deepspeed.optimizer.loss_scale) if self.recipe.dtype == torch.float16 else 1.0

    def validate(self, batches: Iterator[TokenBatch], count: int) -> float:
        """The mean loss of the learned tokens of so many micro batches in every replica; 0 where there are none."""
        counted = Counted(batches)
        loss = self._mean_over_positions(counted, count)
        found = torch.tensor([counted.positions, counted.learned], dtype=torch.float64, device=self.mesh.device)
        positions, learned = self.mesh.pp.share(self.mesh.dp.sum_in_place(found), source=self.mesh.pp.size - 1).tolist()  # stages between read nothing
        return loss * (positions / max(1, learned))

    def _share(self, learned: int) -> Tensor:
        """A micro batch's even share of the step's learned tokens, of which this replica has so many. Sums divided by it have the step's loss as mean."""
        total = self.mesh.dp.sum_in_place(torch.full((), float(learned), dtype=torch.float32, device=self.mesh.device))
        return total.clamp(min=1) / (self.recipe.batching.accumulation * self.mesh.dp.size)

    @abstractmethod
    def _forward_and_back(self, batches: list[TokenBatch], share: Tensor) -> float:
        """The mean over all micro batches of the sum of their losses by `share`, and its gradient to the weights."""

    @abstractmethod
    def _mean_over_positions(self, batches: Iterator[TokenBatch], count: int) -> float:
        """The loss of the learned tokens by the number of all positions."""

    def _mean_over_replicas(self, loss: Tensor) -> float:
        return float(self.mesh.dp.sum(loss.float())) / self.mesh.dp.size


class PlainEngine(Engine):
    """All layers in this process."""

    def _forward_and_back(self, batches: list[TokenBatch], share: Tensor) -> float:
        losses: list[Tensor] = []  # added up at the end: looking at one would keep the GPU waiting
        self.deepspeed.train()
        for batch in batches:
            loss = self._loss(batch, share)
            self.deepspeed.backward(loss)
            self.deepspeed.step()
            losses.append(loss.detach())
        return self._mean_over_replicas(torch.stack(losses).mean())

    @torch.no_grad()
    def _mean_over_positions(self, batches: Iterator[TokenBatch], count: int) -> float:
        self.deepspeed.eval()
        taken = (next(batches) for _ in range(count))
        return self._mean_over_replicas(torch.stack([self._loss(batch, batch.positions) for batch in taken]).mean())

    def _loss(self, batch: TokenBatch, among: Tensor) -> Tensor:
        batch = batch.to(self.mesh.device)
        return self.loss(self.deepspeed(batch.tokens), (batch.labels, batch.loss_mask, among))


class PipelineEngine(Engine):
    """One stage of several."""

    def _forward_and_back(self, batches: list[TokenBatch], share: Tensor) -> float:
        pairs = ((batch.tokens, (batch.labels, batch.loss_mask, share)) for batch in batches)
        return float(self.deepspeed.train_batch(pairs))

    def _mean_over_positions(self, batches: Iterator[TokenBatch], count: int) -> float:
        pairs = ((batch.tokens, (batch.labels, batch.loss_mask, batch.positions)) for batch in batches)
        return float(self.deepspeed.eval_batch(pairs, num_micro_batches=count))


def start_engine(stage: TrainedStage, mesh: Mesh, recipe: Recipe, *, words: int, tied_head: int | None) -> Engine:
    """The engine for this rank's stage, whose layers hold their initial weights. Every rank calls this."""
    join_world(mesh)
    groups = in_pieces(parameter_groups(stage, recipe.optimizer.weight_decay))
    optimizer = build_optimizer(recipe.optimizer, groups, rate=recipe.schedule.peak)
    parts = Parts(stage, mesh, recipe, optimizer, Loss(words, mesh.tp))
    try:
        with quiet():
            return _started(parts, tied_head)
    except ValueError as error:
        if type(error).__name__ != "ValidationError":  # pydantic's, which DeepSpeed reads its settings with
            raise
        problems = "; ".join(line.strip() for line in str(error).splitlines()[1:] if "further information" not in line)
        raise ConfigError(f"DeepSpeed refuses its settings: {problems}; look at zero_optimization and the other keys that are handed to it") from None


def _started(parts: Parts, tied_head: int | None) -> Engine:
    import deepspeed

    stage, mesh, optimizer = parts.stage, parts.mesh, parts.optimizer
    if mesh.pp.size == 1:
        started, *_ = deepspeed.initialize(model=stage, optimizer=optimizer, config=settings(parts.recipe), mpu=Cut(mesh))
        plain = PlainEngine(parts, started)
        plain.deepspeed.enable_backward_allreduce = _sums_gradients(parts)
        return plain
    from megatron_lite.training.pipeline import pipeline_of

    module = pipeline_of(stage, mesh.layout, mesh.pp, parts.loss, tied_head=tied_head)
    started, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings(parts.recipe))
    engine = PipelineEngine(parts, started)
    engine.deepspeed.pipeline_enable_backward_allreduce = _sums_gradients(parts)
    return engine


def _sums_gradients(parts: Parts) -> bool:
    """False where there is one replica and DeepSpeed would copy all gradients to add them to nothing."""
    return parts.mesh.dp.size > 1 or parts.recipe.zero_stage > 1 or parts.recipe.dtype != torch.bfloat16


def in_pieces(groups: Groups, *, limit: int = 500_000_000) -> Groups:
    """The groups in pieces of so many numbers. DeepSpeed lays each out anew in one block, and copies whole blocks to sum them over the replicas."""
    pieces: Groups = []
    for group in groups:
        room = 0
        for parameter in group["params"]:
            if parameter.numel() > room:
                pieces.append({**group, "params": []})
                room = limit
            pieces[-1]["params"].append(parameter)
            room -= parameter.numel()
    return pieces


def settings(recipe: Recipe) -> dict[str, object]:
    """DeepSpeed's configuration."""
    batching = recipe.batching
    formats: dict[str, object] = {}
    if recipe.dtype == torch.bfloat16:
        immediate = {"immediate_grad_update": True}  # else every gradient is there twice, in bf16 beside its sum in fp32
        formats = {"bf16": {"enabled": True, "check_grad_overflow": True, **immediate}, "data_types": {"grad_accum_dtype": "fp32"}}
    elif recipe.dtype == torch.float16:
        formats = {"fp16": {**recipe.loss_scale, "enabled": True}}
    return {
        **formats,
        "train_micro_batch_size_per_gpu": batching.micro,
        "gradient_accumulation_steps": batching.accumulation,
        "gradient_clipping": recipe.clipping,
        "zero_optimization": dict(recipe.zero),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU in every micro batch
        **recipe.extra,
    }
