"""Holds a process to a budget of its GPU's memory, so that what is tried on a large GPU is known to run on a small one."""

import torch

from megatron_lite.parallel.mesh import Mesh

CUDA_ITSELF = 2**30
"""Bytes that a process takes beside what it holds itself: the plan reckons with the same."""
CAPTURED = 160 * 2**20
"""Bytes of these that pass through the allocator: captured steps keep 112 MiB beside the cache, most of them the matrix library's workspaces (H200)."""


def hold_to(limit: int | None, device: torch.device) -> None:
    """Lets this process have so many bytes of the device, all in all; more ends with torch.OutOfMemoryError. None is no limit, and CPUs know none. What it
    was held to before still holds where it is less."""
    if limit is not None and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(_share_of(device), max(0, limit - CUDA_ITSELF + CAPTURED) / whole), device)


def _share_of(device: torch.device) -> float:
    """The share of the device's memory that this process was held to so far."""
    stated = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # older versions of torch cannot tell, and then nothing was limited here
    return stated(device) if stated else 1.0


def free_memory(device: torch.device, *, outside: int = 0) -> int:
    """Bytes of a GPU that this process can still get: what nobody has, within its budget. So many bytes it will take `outside` of the allocator, which the
    budget leaves room for (CUDA_ITSELF)."""
    free, whole = torch.cuda.mem_get_info(device)
    budget = int(_share_of(device) * whole)
    return max(0, min(free - outside, budget - torch.cuda.memory_reserved(device)))


def least(mesh: Mesh, count: int, *, of_all: bool = False) -> int:
    """The same on every rank of a replica, or of all of them: what the fullest GPU has room for. All those ranks call it together."""
    for axis in (mesh.tp, mesh.pp, *([mesh.dp] if of_all else [])):
        count = int(axis.minimum(torch.tensor(float(count), device=mesh.device)))
    return count
