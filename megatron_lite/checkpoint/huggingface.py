"""Hugging Face folders: config.json with safetensors or .bin files, one or many with an index."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.checkpoint.pickled import open_pickled
from megatron_lite.checkpoint.source import Shards
from megatron_lite.errors import CheckpointError
from megatron_lite.models.architecture import Architecture
from megatron_lite.models.spec import ModelSpec

# spec field -> config.json keys that state the same fact
STATED = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "ffn": ("intermediate_size", "n_inner"),
    "parallel_residual": ("use_parallel_residual",),
    "tied_head": ("tie_word_embeddings",),
    "norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"),
}
NEOX_KEYS = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_kv_heads",
    "ffn": "intermediate_size",
    "parallel_residual": "gpt_j_residual",
    "tied_head": "no_weight_tying (its opposite)",
    "norm_eps": "layernorm_epsilon",
}


class HuggingFaceFolder:
    """A Hugging Face checkpoint, read layer by layer under our names."""

    tp = 1

    def __init__(self, layout: CheckpointLayout, architecture: Architecture, spec: ModelSpec) -> None:
        self.folder = layout.folder
        self.names = architecture.huggingface(spec)
        check_config(self.folder, architecture, spec)
        self.files = _index(self.folder)

    def shards(self, number: int) -> Shards:
        found: dict[str, list[Tensor]] = {}
        opened: dict[Path, Mapping[str, Tensor]] = {}
        for (layer, name), same in self.names.items():
            stored = next((stored for stored in same.names if stored in self.files), None)
            if layer == number and stored:
                path = self.files[stored]
                if path not in opened:
                    opened[path] = _Safetensors(path) if path.suffix == ".safetensors" else _pickled_tensors(path)
                found[name] = [opened[path][stored]]
        return found

    def place(self, number: int) -> Path:
        return self.folder


class _Safetensors(dict[str, Tensor]):
    """Tensors of one file, mapped when they are asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            self.file = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is missing, truncated or damaged ({error}); fetch it again") from None

    def __missing__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)


def _pickled_tensors(path: Path) -> Mapping[str, Tensor]:
    content = open_pickled(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a file of weights holds tensors by name")
    return cast(dict[str, Tensor], content)


def _index(folder: Path) -> dict[str, Path]:
    """Stored name -> file."""
    for kind in ("model.safetensors", "pytorch_model.bin"):
        if (folder / f"{kind}.index.json").exists():
            files = read_json(folder / f"{kind}.index.json").get("weight_map")
            if not isinstance(files, dict):
                raise CheckpointError(f"{folder / kind}.index.json has no weight_map; fetch it again")
            if missing := sorted({file for file in files.values() if not (folder / file).exists()}):
                raise CheckpointError(f"{folder} lacks {', '.join(missing[:3])}, which its index names ({len(missing)} missing); fetch the files again")
            return {name: folder / file for name, file in files.items()}
        if (path := folder / kind).exists():
            names = _Safetensors(path).file.keys() if path.suffix == ".safetensors" else _pickled_tensors(path).keys()
            return dict.fromkeys(names, path)
    raise CheckpointError(f"{folder} holds no weights")


def read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a JSON object was expected")
    return content


def check_config(folder: Path, architecture: Architecture, spec: ModelSpec) -> None:
    """Raises CheckpointError where config.json describes another model than our configuration."""
    stated = read_json(folder / "config.json")
    if stated.get("model_type") != architecture.model_type:
        raise CheckpointError(
            f"{folder / 'config.json'} is of a {stated.get('model_type')} model; the configuration describes {architecture.name} ({architecture.model_type})"
        )
    for field, keys in STATED.items():
        key = next((key for key in keys if key in stated), None)
        if key and stated[key] is not None and stated[key] != getattr(spec, field):
            raise CheckpointError(
                f"{folder / 'config.json'} says {key} {stated[key]}, the configuration gives {getattr(spec, field)}; set {NEOX_KEYS[field]} to what the checkpoint was trained with"
            )
