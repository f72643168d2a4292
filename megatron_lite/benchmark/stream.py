"""Reading memory and nothing else, in Triton: the rate that weights could be read at."""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# kernels are Triton's language, which is only spelled like Python

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
"""Numbers that a program reads at once: 32 KiB."""


def fold(source: Tensor) -> Tensor:
    """The exclusive or of what each program read of source [n], whole numbers of 32 bits; n is a multiple of BLOCK times the programs."""
    programs = programs_of(source.device)
    found = torch.empty(programs, dtype=torch.int32, device=source.device)
    _fold[(programs,)](source, found, len(source) // programs, BLOCK=BLOCK, num_warps=8)
    return found


def programs_of(device: torch.device) -> int:
    """Four for every multiprocessor."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def _either(one, other):
    return one ^ other


@triton.jit
def _fold(source, found, each, BLOCK: tl.constexpr):
    at = source + tl.program_id(0).to(tl.int64) * each + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, each, BLOCK):
        total ^= tl.load(at + start, eviction_policy="evict_first")
    tl.store(found + tl.program_id(0), tl.reduce(total, 0, _either))
