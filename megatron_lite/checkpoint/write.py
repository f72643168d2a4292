"""Writes checkpoints in NeoX's layout: files appear whole or not at all, and `latest` names a step only when all of it is there."""

import errno
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.errors import OutputError
from megatron_lite.whole import whole_file

CUT_SHORT = ("No space", "file write failed", "unexpected pos")
"""What torch says of a file that did not get all of its bytes."""


def step_folder(folder: Path, step: int, *, tp: int) -> CheckpointLayout:
    """Makes folder/global_stepN, to be filled with files cut for `tp` ranks."""
    tag = f"global_step{step}"
    try:
        (folder / tag).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the checkpoint folder {folder / tag} cannot be made: {error.strerror}; choose another folder") from None
    return CheckpointLayout("neox", folder / tag, tag, tp, ())


def write_layer(layout: CheckpointLayout, number: int, part: int, tensors: Mapping[str, Tensor]) -> None:
    """One layer file: names -> tensors, each saved with its own bytes only."""
    save(dict(tensors), layout.layer_file(number, part))


def save(content: object, path: Path) -> None:
    """torch.save under a temporary name, then renamed."""
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(content, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or any(sign in str(error) for sign in CUT_SHORT)
        raise OutputError(f"{path} cannot be written: {'no space is left on the disk' if full else error}; free some space or choose another folder") from None


def name_latest(folder: Path, tag: str) -> None:
    """Makes the step the one that is loaded by default."""
    try:
        with whole_file(folder / "latest") as file:
            file.write(tag)
    except OSError as error:
        raise OutputError(f"{folder / 'latest'} cannot be written: {error.strerror}") from None
