"""A short name for the weights of a checkpoint, so that results and caches of one model are never taken for another's."""

import hashlib

import torch
from torch import Tensor

from megatron_lite.checkpoint.adapters import Adapters
from megatron_lite.checkpoint.contents import stored_tensors
from megatron_lite.checkpoint.find import CheckpointLayout

WHOLE = 1 << 16  # bytes of a tensor that is read whole
SAMPLES, LENGTH = 16, 256  # of a larger one: so many pieces of so many bytes


def fingerprint(layout: CheckpointLayout, adapters: Adapters | None = None) -> str:
    """64 hexadecimal digits: sha256 over names, shapes and a sample of the bytes of every stored tensor. It does not depend on where the files lie, nor on the
    cut they are loaded with; files of another cut or format are other files."""
    digest = hashlib.sha256()
    for stored in sorted(stored_tensors(layout), key=lambda stored: (stored.layer is None, stored.layer, stored.part, stored.name)):
        digest.update(f"{stored.layer} {stored.part} {stored.name} {list(stored.tensor.shape)} {stored.tensor.dtype}\n".encode())
        digest.update(_sample(stored.tensor))
    if adapters:
        digest.update(adapters.fingerprint().encode())
    return digest.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    if len(content) <= WHOLE:
        return content.numpy().tobytes()
    starts = [(len(content) - LENGTH) * piece // (SAMPLES - 1) for piece in range(SAMPLES)]
    return b"".join(content[start : start + LENGTH].numpy().tobytes() for start in starts)
