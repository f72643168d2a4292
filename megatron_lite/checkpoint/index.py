"""Which files hold the weights of a Hugging Face folder: those that its index names, or a single one. Reads names only, no weights."""

from os.path import lexists
from pathlib import Path

from megatron_lite.checkpoint.config_json import read_json
from megatron_lite.errors import CheckpointError

HUGGINGFACE_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
"""What beside a config.json makes a folder a model, in the order in which it counts."""


def index_of(folder: Path) -> dict[str, Path] | Path:
    """Stored name -> file, as the folder's index says, or the one file that holds them all. Raises CheckpointError where files that it names are missing."""
    first = next(path for name in HUGGINGFACE_FILES if lexists(path := folder / name))
    if first.suffix != ".json":
        return first
    files = read_json(first).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{first} has no weight_map from names to files; fetch it again")
    if missing := sorted({file for file in files.values() if not (folder / file).exists()}):
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:3])}, which its index names ({len(missing)} missing); fetch the files again")
    return {name: folder / file for name, file in files.items()}
