"""Opens .pt and .bin files: memory-mapped, and never running what a pickle may ask for."""

import pickle
from pathlib import Path

import numpy as np
import torch

from megatron_lite.checkpoint.unopened import unopened
from megatron_lite.errors import CheckpointError

# Training checkpoints keep numpy's random state beside the weights: an array, made by a function that moved to another module in numpy 2.
MAKE_ARRAY, MAKE_NUMBER = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
NUMPY: list[object] = [
    *((MAKE_ARRAY, f"{module}.multiarray._reconstruct") for module in ("numpy.core", "numpy._core")),
    *((MAKE_NUMBER, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "uint8", "int32", "uint32", "int64", "uint64", "float32", "float64")),
]

# once, not around every file: several threads open files
torch.serialization.add_safe_globals(NUMPY)  # pyright: ignore[reportArgumentType]


def open_pickled(path: Path) -> object:
    """The content of a file written by torch.save, its tensors memory-mapped. Raises CheckpointError for a missing, damaged or untrusted file."""
    try:
        return _load(path)
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder; a file of weights was expected") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} is not opened: {_foreign(path)}; only tensors, numbers, text and their containers are loaded") from None
    except Exception as error:  # damaged bytes can end in any exception
        raise unopened(path, error) from None


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # files of before torch 1.6 cannot be mapped


def _foreign(path: Path) -> str:
    """Why the unpickler refused the file."""
    damaged = "it is not a file of weights, or it is damaged"
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # as above
        return damaged
    names = sorted(name for name in set(asked) if not name.startswith("numpy."))
    return f"its pickle asks for {', '.join(names)}, which could run code" if names else damaged
