"""Launches that overlap: on Hopper and later a kernel starts while the one before it ends, fetches its weights, and only then waits for its inputs."""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# kernels are Triton's language, which is only spelled like Python

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINE = 128
"""Bytes that one prefetch brings into the L2 cache."""


@cache
def overlap() -> bool:
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


def options() -> dict[str, bool]:
    """What a launch needs to overlap: the kernel's own switch and the launcher's."""
    return {"OVERLAP": True, "launch_pdl": True} if overlap() else {"OVERLAP": False}


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Lets the next kernel start, which waits for this one where it needs it."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until all that earlier kernels wrote can be seen. Every program must come here, or kernels further down would start too early."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def fetch(places):
    """Brings the lines at these places into the L2 cache and waits for nothing."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1)
