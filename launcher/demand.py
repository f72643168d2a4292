"""What a training has to hold at once, read from its settings without importing what trains; the processes read them again, and strictly."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from megatron_lite.config.lora import LoraSection
from megatron_lite.config.sections import Family, RunConfig
from megatron_lite.models.spec import ModelSpec
from megatron_lite.models.training_memory import LIVE, REDUCED, Lora, Training
from megatron_lite.parallel.layout import Layout

ADAM, ADAM_IN_8_BITS, LION = 8, 2, 4
"""Bytes that an optimizer keeps for each parameter beside its fp32 master."""


@dataclass(frozen=True)
class Change:
    """Settings that would lessen what a training takes."""

    words: tuple[str, ...] = ()
    recompute: bool = False
    rows: int | None = None
    zero: int | None = None
    lora: bool = False
    in_8_bits: bool = False

    def applied(self, training: Training) -> Training:
        changed = replace(training, rows=self.rows or training.rows, zero=training.zero if self.zero is None else self.zero)
        changed = replace(changed, recompute=max(1, training.recompute)) if self.recompute else changed
        return replace(changed, lora=ADAPTERS) if self.lora else changed

    def held(self, spec: ModelSpec) -> ModelSpec:
        """The model, with its weights as they are held."""
        return replace(spec, quantization="int8") if self.in_8_bits else spec


ADAPTERS = Lora(16, ("query_key_value",))
LORA = "lora.rank=16"
IN_8_BITS = "weight_quantization=int8"


def training_of(config: RunConfig, layout: Layout) -> Training:
    section, zero = config.training, _mapping(config, "zero_optimization")
    rows = section.train_micro_batch_size_per_gpu or max(1, (section.train_batch_size or 1) // (section.gradient_accumulation_steps * layout.dp))
    together = rows * layout.dp
    accumulation = max(section.gradient_accumulation_steps, (section.train_batch_size or together) // together)
    return Training(
        rows=rows,
        tokens=config.model.seq_length,
        accumulation=accumulation,
        recompute=section.checkpoint_num_layers if section.checkpoint_activations else 0,
        zero=_whole(zero.get("stage"), 0),
        state_bytes=_state_bytes(config),
        bucket=_whole(zero.get("reduce_bucket_size"), REDUCED),
        live=_whole(zero.get("stage3_max_live_parameters"), LIVE),
        offload_optimizer=_is_on_host(zero.get("offload_optimizer")),
        lora=adapters_of(section.lora, config.model.family),
    )


def _state_bytes(config: RunConfig) -> int:
    stated = _mapping(config, "optimizer")
    kind, params = str(stated.get("type", "Adam")).lower(), stated.get("params")
    if kind == "sgd":
        return 4 if isinstance(params, Mapping) and params.get("momentum") else 0
    return LION if kind == "lion" else ADAM_IN_8_BITS if config.training.use_bnb_optimizer else ADAM


def adapters_of(section: LoraSection | None, family: Family) -> Lora | None:
    return None if section is None else Lora(section.rank, tuple(section.layers(family)))


def changes_for(training: Training, layout: Layout) -> list[Change]:
    """Settings that would lessen what this training takes of memory, the least intrusive first."""
    recompute = (Change(("checkpoint_activations=true",), recompute=True),) if not training.recompute else ()
    fewer = (Change(("train_micro_batch_size_per_gpu=1",), rows=1),) if training.rows > 1 else ()
    stages = [Change((f"zero_optimization.stage={stage}",), zero=stage) for stage in (2, 3) if layout.pp == 1 and layout.dp > 1 and training.zero < stage]
    small = _joined(*recompute, *fewer)
    single = [Change(), *recompute, *fewer, *([small] if len(small.words) > 1 else [])]
    adapters = small if training.lora else _joined(small, Change((LORA,), lora=True))
    last = [*([] if training.lora else [adapters]), _joined(adapters, Change((IN_8_BITS,), in_8_bits=True))]
    return [*single, *(_joined(small, stage) for stage in stages), *last]


def _joined(*changes: Change) -> Change:
    return Change(
        tuple(word for change in changes for word in change.words),
        any(change.recompute for change in changes),
        next((change.rows for change in changes if change.rows), None),
        next((change.zero for change in changes if change.zero is not None), None),
        any(change.lora for change in changes),
        any(change.in_8_bits for change in changes),
    )


def _mapping(config: RunConfig, key: str) -> Mapping[str, object]:
    value = config.deepspeed.get(key)
    return cast(Mapping[str, object], value) if isinstance(value, Mapping) else {}


def _whole(value: object, default: int) -> int:
    return int(value) if isinstance(value, int | float) else default


def _is_on_host(value: object) -> bool:
    return isinstance(value, Mapping) and value.get("device", "none") not in ("none", None)
