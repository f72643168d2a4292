"""What the kernels must know of the GPU that they are compiled for."""

from functools import cache

import torch


@cache
def is_hopper() -> bool:
    """Whether this GPU, or a later one, takes both operands of a product from shared memory."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@cache
def is_compiled() -> bool:
    """Whether kernels become code of an NVIDIA GPU, which can hold its own instructions; elsewhere Triton's interpreter runs them."""
    return torch.cuda.is_available() and torch.version.hip is None


@cache
def multiprocessors() -> int:
    """Of this GPU; an H200's where there is none."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count if torch.cuda.is_available() else 132


@cache
def shared_memory() -> int:
    """Bytes that one program of a kernel can share between its threads; an H200's where there is no GPU."""
    if not torch.cuda.is_available():
        return 227 << 10
    from triton.compiler.compiler import max_shared_mem  # what Triton itself holds a kernel against

    return max_shared_mem(torch.cuda.current_device())
