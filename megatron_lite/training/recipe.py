"""What the settings say about a training, in numbers: batches, precision, optimizer and schedule. Checked before anything is built."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch

from megatron_lite.config.sections import RunConfig, TrainingSection
from megatron_lite.errors import ConfigError
from megatron_lite.log import logger
from megatron_lite.parallel.layout import Layout
from megatron_lite.training.schedule import Schedule, schedule_of

OptimizerKind = Literal["adam", "lion", "sgd"]
OPTIMIZERS: dict[str, OptimizerKind] = {
    **dict.fromkeys(("adam", "adamw", "fusedadam", "cpu_adam", "cpu_torch_adam"), "adam"),
    "lion": "lion",
    "sgd": "sgd",
}
PARAMETERS = {"lr": (1, math.inf), "betas": (2, 1.0), "eps": (1, math.inf), "momentum": (1, 1.0), "weight_decay": (1, math.inf)}
"""Parameters of optimizers: how many numbers each is, from 0 up to what."""
LOSS_SCALE = {"loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis", "min_loss_scale"}
"""Keys of fp16 that DeepSpeed knows; files of NeoX hold others, and it would refuse them."""
DTYPES = {"fp16": torch.float16, "bfloat16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Batching:
    """Sequences of a step: `micro` at once in a process, `accumulation` times, in `replicas` processes."""

    micro: int
    accumulation: int
    replicas: int

    @property
    def samples(self) -> int:
        return self.micro * self.accumulation * self.replicas


@dataclass(frozen=True)
class OptimizerRecipe:
    kind: OptimizerKind
    betas: tuple[float, float]
    eps: float
    momentum: float
    weight_decay: float
    eight_bit: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training, as it will run. `recompute` counts the blocks whose activations are computed again together; 0 keeps all. `zero` and `extra` are
    DeepSpeed's."""

    batching: Batching
    steps: int
    schedule: Schedule
    optimizer: OptimizerRecipe
    dtype: torch.dtype
    clipping: float
    recompute: int
    seed: int
    zero: Mapping[str, object]
    loss_scale: Mapping[str, object]
    extra: Mapping[str, object]

    @property
    def zero_stage(self) -> int:
        return cast(int, self.zero["stage"])

    def lasting(self, steps: int, training: TrainingSection) -> "Recipe":
        """The same for another number of steps, which is known only when the data are."""
        return replace(self, steps=steps, schedule=schedule_of(training, peak=self.schedule.peak, steps=steps))


def recipe_of(config: RunConfig, layout: Layout, *, device: str) -> Recipe:
    """The recipe for training on this layout, of train_iters steps. Raises ConfigError for what is missing, contradictory or not built."""
    training = config.training
    optimizer, peak = optimizer_of(config)
    if training.min_lr > peak:
        lr = f"the optimizer's lr is {peak:g} ({config.where('optimizer')})"
        raise ConfigError(f"min_lr is {training.min_lr:g} ({config.where('min_lr')}), and {lr}, but rates fall from lr to min_lr; lower min_lr, or raise lr")
    steps = training.train_iters or 1
    for key in ("hidden_dropout", "attention_dropout"):
        if getattr(config.model, key):
            raise ConfigError(
                f"{key} is {getattr(config.model, key)} ({config.where(key)}), but dropout is not built: a step must be the same at every cut and after "
                "every resume; set it to 0, as the files of GPT-NeoX-20B and Pythia do, and see overfitting early in the validation loss"
            )
    return Recipe(
        batching=batching_of(config, layout.dp),
        steps=steps,
        schedule=schedule_of(training, peak=peak, steps=steps),
        optimizer=optimizer,
        dtype=_dtype(config, device),
        clipping=training.gradient_clipping,
        recompute=training.checkpoint_num_layers if training.checkpoint_activations else 0,
        seed=training.seed,
        zero=_zero(config, layout),
        loss_scale={key: value for key, value in _mapping(config, "fp16").items() if key in LOSS_SCALE},
        extra=_extra(config),
    )


def batching_of(config: RunConfig, replicas: int) -> Batching:
    """train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x data-parallel size, from whichever of them are set."""
    training = config.training
    total, micro = training.train_batch_size, training.train_micro_batch_size_per_gpu
    accumulation = training.gradient_accumulation_steps
    if total is None and micro is None:
        raise ConfigError("neither train_batch_size nor train_micro_batch_size_per_gpu is set; set one, for instance train_micro_batch_size_per_gpu: 4")
    if total is None:
        return Batching(cast(int, micro), accumulation, replicas)
    if micro is None:
        micro = total // (accumulation * replicas)
    elif config.where("gradient_accumulation_steps") == "default":
        accumulation = total // (micro * replicas)
    if micro * accumulation * replicas != total:
        raise ConfigError(
            f"train_batch_size {total} ({config.where('train_batch_size')}) is not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
            f"{accumulation} x {replicas} data-parallel processes = {micro * accumulation * replicas}; change one of them or leave it out"
        )
    return Batching(micro, accumulation, replicas)


def optimizer_of(config: RunConfig) -> tuple[OptimizerRecipe, float]:
    """The optimizer that NeoX's key `optimizer` describes, and its learning rate."""
    stated = _mapping(config, "optimizer")
    where = config.where("optimizer")
    name = str(stated.get("type", "Adam"))
    kind = OPTIMIZERS.get(name.lower())
    if kind is None:
        raise ConfigError(f"optimizer type {name} ({where}) is not built; use Adam, Lion or SGD")
    params = stated.get("params", {})
    if not isinstance(params, Mapping) or params.get("lr") is None:
        raise ConfigError(f"the optimizer's learning rate is not set ({where}); write optimizer: {{type: Adam, params: {{lr: 1.0e-5}}}}")
    for what, found, known in (("optimizer", stated, {"type", "params", "legacy_fusion"}), ("optimizer params", params, PARAMETERS)):
        if strange := sorted(map(str, found.keys() - known)):
            raise ConfigError(f"{what} {', '.join(strange)} ({where}) are not known; known are {', '.join(sorted(known))}")
    eight_bit = config.training.use_bnb_optimizer
    if eight_bit and kind != "adam":
        raise ConfigError(f"use_bnb_optimizer is true ({config.where('use_bnb_optimizer')}), and optimizer type is {name} ({where}); it goes with Adam only")
    usual = {"betas": (0.9, 0.99) if kind == "lion" else (0.9, 0.999), "eps": 1e-8, "momentum": 0.0, "weight_decay": config.training.weight_decay}
    lr, betas, eps, momentum, decay = (_numbers(key, {**usual, **params}[key], where) for key in PARAMETERS)
    return OptimizerRecipe(kind, (betas[0], betas[1]), eps[0], momentum[0], decay[0], eight_bit), lr[0]


def _numbers(key: str, value: object, where: str) -> list[float]:
    """The numbers that a parameter of an optimizer consists of."""
    count, bound = PARAMETERS[key]
    parts = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    try:
        numbers = [math.nan if isinstance(part, bool) else float(cast(float, part)) for part in parts]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(0 <= number < bound for number in numbers):
        needed = "a number of at least 0" if count == 1 else f"{count} numbers of at least 0"
        raise ConfigError(f"optimizer.params.{key} is {value!r} ({where}); it needs {needed}{f' and below {bound:g}' if bound < math.inf else ''}")
    return numbers


def _dtype(config: RunConfig, device: str) -> torch.dtype:
    if config.precision == "fp16" and device == "cpu":
        logger.info("fp16 cannot be trained on CPUs: training in fp32")
        return torch.float32
    return DTYPES[config.precision]


def _zero(config: RunConfig, layout: Layout) -> dict[str, object]:
    """DeepSpeed's ZeRO settings. Stage 0 runs as stage 1: the same sums, masters in fp32, and a gradient norm that counts every stage of a pipeline."""
    stated = dict(_mapping(config, "zero_optimization"))
    stage = stated.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_optimization has stage {stage} ({config.where('zero_optimization')}); stages are 0, 1, 2 and 3")
    if layout.pp > 1 and stage in (2, 3):
        raise ConfigError(
            f"zero_optimization has stage {stage} ({config.where('zero_optimization')}), and pipe-parallel-size is {layout.pp}; "
            "DeepSpeed's pipeline works with stages 0 and 1: set stage 1, or pipe-parallel-size 1"
        )
    return {**stated, "stage": max(1, cast(int, stage))}


def _mapping(config: RunConfig, key: str) -> Mapping[str, object]:
    value = config.deepspeed.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {value!r} ({config.where(key)}); a mapping is needed")
    return value


OURS = {"optimizer", "fp16", "bf16", "zero_optimization", "deepspeed_extra_args"}
"""DeepSpeed's keys that are decided here, in one way or another."""


def _extra(config: RunConfig) -> dict[str, object]:
    """What is handed to DeepSpeed unread."""
    unread = {key: value for key, value in config.deepspeed.items() if key not in OURS and value is not None}
    return {**unread, **_mapping(config, "deepspeed_extra_args")}
