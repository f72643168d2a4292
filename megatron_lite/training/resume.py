"""Continues a training where a checkpoint of ours left it, at the same cut bit by bit, at another one with the same weights and optimizer state."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.checkpoint.pickled import open_pickled
from megatron_lite.errors import CheckpointError
from megatron_lite.training.engine import Engine
from megatron_lite.training.manifest import check_content, check_sizes
from megatron_lite.training.save import STATE, Progress, optimizer_file
from megatron_lite.training.state import Shards, write_states


def read_progress(checkpoint: CheckpointLayout) -> Progress:
    """How far the checkpoint's training had come. Raises CheckpointError for a checkpoint that holds weights only."""
    path = checkpoint.folder / STATE
    if not path.exists():
        raise CheckpointError(
            f"{checkpoint} holds weights, but no state of a training of ours ({STATE}); set finetune: true to start a new training from its weights"
        )
    check_content(path, check_sizes(checkpoint.folder))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Progress(**{**found, "states": tuple(found["states"])})
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); load another step with iteration=N") from None


def restore(engine: Engine, checkpoint: CheckpointLayout, progress: Progress) -> None:
    """Puts the optimizer's state and the fp32 weights back into an engine whose layers were loaded from the same checkpoint."""
    if progress.optimizer != engine.recipe.optimizer.kind:
        raise CheckpointError(
            f"{checkpoint} was trained with {progress.optimizer}, and the optimizer is {engine.recipe.optimizer.kind} now; "
            "keep the type, or set no_load_optim: true for a fresh state"
        )
    write_states(engine, optimizer_shards(checkpoint), names=list(progress.states), count=progress.updates)
    restore_loss_scale(engine, progress.loss_scaler)


def optimizer_shards(checkpoint: CheckpointLayout) -> Shards:
    """The stored states of a layer, by parameter and name, after a look at their files' checksums."""
    entries = check_sizes(checkpoint.folder)

    def shards(number: int) -> dict[str, dict[str, list[Tensor]]]:
        files = [optimizer_file(checkpoint, number, part) for part in range(checkpoint.tp)]
        parts = [_states(path) for path in files if _checked(path, entries)]
        return {path: {name: [part[path][name] for part in parts] for name in states} for path, states in parts[0].items()}

    return shards


def _checked(path: Path, entries: dict) -> bool:
    if not path.exists():
        raise CheckpointError(f"{path} is missing, so the optimizer's state is not known; set no_load_optim: true for a fresh one, or finetune: true")
    check_content(path, entries)
    return True


def _states(path: Path) -> dict[str, dict[str, Tensor]]:
    content = open_pickled(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; states by parameter were expected")
    return content


def restore_loss_scale(engine: Engine, stored: Mapping[str, float]) -> None:
    """Only where the scale was dynamic and is so now: another number format has a scale of 1, which is none to begin fp16 with."""
    if stored and stored.keys() == loss_scaler_of(engine).keys():
        vars(engine.deepspeed.optimizer.loss_scaler).update(stored)


def loss_scaler_of(engine: Engine) -> dict[str, float]:
    """The dynamic loss scale and its counters, in fp16; nothing in other number formats."""
    scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None)
    if engine.recipe.dtype != torch.float16 or not hasattr(scaler, "cur_iter"):
        return {}
    return {name: getattr(scaler, name) for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")}
