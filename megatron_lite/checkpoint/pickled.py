"""Opens .pt and .bin files: memory-mapped, and never running what a pickle may ask for."""

import pickle
from pathlib import Path

import numpy as np
import torch

from megatron_lite.errors import CheckpointError

# Training checkpoints keep numpy's random state beside the weights; numpy 2 moved the module that their pickles name.
NUMPY = [
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    np._core.multiarray._reconstruct,
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
]


def open_pickled(path: Path) -> object:
    """The content of a file written by torch.save, its tensors memory-mapped. Raises CheckpointError for a missing, damaged or untrusted file."""
    try:
        with torch.serialization.safe_globals(NUMPY):  # pyright: ignore[reportArgumentType]
            return _load(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; fetch it again") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} is not opened: {_foreign(path)}; only tensors, numbers, text and their containers are loaded") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} ({_size(path)} bytes) is truncated or damaged ({str(error).splitlines()[0][:120]}); fetch it again") from None


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # files of before torch 1.6 cannot be mapped


def _foreign(path: Path) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, OSError, pickle.UnpicklingError):
        return "it is not a file of weights, or it is damaged"
    known = {name if isinstance(name, str) else "" for name in ("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct")}
    names = [name for name in names if name not in known and not name.startswith("numpy.")]
    return f"its pickle asks for {', '.join(sorted(names))}, which could run code" if names else "it is not a file of weights, or it is damaged"


def _size(path: Path) -> str:
    return f"{path.stat().st_size:,}" if path.exists() else "0"
