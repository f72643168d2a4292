"""Folders of low-rank adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors, two matrices for every adapted module."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor

from megatron_lite.checkpoint.config_json import read_json
from megatron_lite.checkpoint.pickled import open_pickled
from megatron_lite.checkpoint.unopened import unopened
from megatron_lite.errors import CheckpointError

CONFIG, WEIGHTS, OLDER = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# What changes the arithmetic in ways that are not built, where it is set
NOT_BUILT = ("use_dora", "modules_to_save", "lora_bias", "fan_in_fan_out", "trainable_token_indices", "target_parameters", "arrow_config", "use_qalora")


@dataclass(frozen=True)
class Pair:
    """The adapter of one module of transformers: scale * b @ a is added to its weight."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class PeftFolder:
    """What a folder holds: module -> its adapter, and what was written beside the tensors."""

    config: Mapping[str, object]
    pairs: Mapping[str, Pair]
    metadata: Mapping[str, str]


def read_peft(folder: Path) -> PeftFolder:
    """The adapters of a folder, in memory. Raises CheckpointError for a damaged one and for kinds of adapters that are not built."""
    config = read_json(folder / CONFIG)
    _check_kind(config, folder / CONFIG)
    tensors, metadata = _tensors(folder)
    path = folder / (WEIGHTS if (folder / WEIGHTS).exists() else OLDER)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{path} holds {key}, which is no matrix of a low-rank adapter; only adapters of linear layers (lora_A, lora_B) are built")
        found.setdefault(match[1], {})[match[2]] = tensor
    scale = scales(config, folder / CONFIG)
    return PeftFolder(config, {module: _pair(module, factors, scale, path) for module, factors in found.items()}, metadata)


def _check_kind(config: Mapping[str, object], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} says peft_type {config.get('peft_type')}; only LORA is built")
    if strange := [key for key in NOT_BUILT if config.get(key)]:
        raise CheckpointError(f"{path} says {strange[0]} {config[strange[0]]}, which is not built; train the adapters without it")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path} says bias {config['bias']}: biases were trained too, which is not built; train the adapters with bias none")


def _tensors(folder: Path) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    if (folder / WEIGHTS).exists():
        try:
            with safe_open(folder / WEIGHTS, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 - the file itself is no container
        except (SafetensorError, OSError) as error:
            raise unopened(folder / WEIGHTS, error) from None
    if not (folder / OLDER).exists():
        raise CheckpointError(f"{folder} has an {CONFIG} but no {WEIGHTS}; is it complete?")
    content = open_pickled(folder / OLDER)
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / OLDER} holds a {type(content).__name__}; adapters are tensors by name")
    return cast(dict[str, Tensor], content), {}


def _pair(module: str, factors: Mapping[str, Tensor], scale: Callable[[str, int], float], path: Path) -> Pair:
    a, b = factors.get("A"), factors.get("B")
    if a is None or b is None:
        raise CheckpointError(f"{path} lacks lora_{'A' if a is None else 'B'} of {module}; fetch it again")
    if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
        raise CheckpointError(f"{path}: the adapter of {module} is A {list(a.shape)} and B {list(b.shape)}; A [rank, inputs] and B [outputs, rank] are needed")
    return Pair(a, b, scale(module, len(a)))


def scales(config: Mapping[str, object], path: Path) -> Callable[[str, int], float]:
    """Module and rank -> what B A is multiplied with, by PEFT's rules."""
    stated = config.get("lora_alpha", 8)
    patterns = cast(Mapping[str, float], config.get("alpha_pattern") or {})
    if not isinstance(stated, int | float) or not isinstance(patterns, Mapping):
        raise CheckpointError(f"{path} says lora_alpha {stated}; a number is needed")

    def scale(module: str, rank: int) -> float:
        alpha = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), stated)
        return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)

    return scale


def write_peft(folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], *, rank: int, alpha: float, base: str, metadata: Mapping[str, str]) -> list[Path]:
    """Writes module -> (A, B) so that PeftModel.from_pretrained reads it. Returns the files."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": _last_names(pairs),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in pairs.items():  # safetensors wants every tensor to have memory of its own
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous().clone()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous().clone()
    (folder / WEIGHTS).write_bytes(serialized(tensors, {"format": "pt", **metadata}))  # save_file would make a file that only its owner can read
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return [folder / WEIGHTS, folder / CONFIG]


def _last_names(modules: Iterable[str]) -> list[str]:
    return sorted({module.rpartition(".")[2] for module in modules})
