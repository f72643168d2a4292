"""Memory that the GPUs of one axis write into each other's, without a library call between them."""

import socket
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from megatron_lite.parallel.mesh import Axis


@dataclass(frozen=True)
class Peers:
    """A box of packets [2 ranks capacity] on every rank of an axis: two halves that take turns, and in each the packets of every rank. A packet is 32 bits of
    data and the number of the turn that it belongs to, so that whoever sees it knows that it is there. `boxes` holds the addresses of all ranks' boxes,
    `turns` counts this rank's exchanges, program by program; all are on the device."""

    index: int
    size: int
    capacity: int
    boxes: Tensor
    turns: Tensor
    memory: Tensor


def connect(axis: Axis, *, capacity: int, programs: int, device: torch.device) -> Peers | None:
    """Symmetric memory for exchanges of up to `capacity` packets by `programs` programs; None where the GPUs cannot reach each other's. All ranks of the axis
    call this together."""
    if axis.size == 1 or device.type != "cuda" or axis.group is None:
        return None
    reaches = all(torch.cuda.can_device_access_peer(device, other) for other in range(torch.cuda.device_count()) if other != device.index)
    alike = torch.tensor(float(reaches), device=device)
    if axis.minimum(alike) < 1 or not are_seen(axis, device):
        return None
    import torch.distributed._symmetric_memory as symmetric

    memory = symmetric.empty(2 * axis.size * capacity, dtype=torch.int64, device=device).zero_()
    handle = symmetric.rendezvous(memory, axis.group.group_name)
    boxes = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
    torch.cuda.synchronize()
    axis.maximum(alike)  # no rank writes before all have cleared their memory
    return Peers(axis.index, axis.size, capacity, boxes, torch.zeros(programs, dtype=torch.int32, device=device), memory)


def are_seen(axis: Axis, device: torch.device) -> bool:
    """Whether all ranks of the axis are on this host, and each sees the GPUs of all: not so where every process was given one GPU, which it calls 0."""
    mine = torch.tensor([crc32(socket.gethostname().encode()), device.index or 0], device=device)
    hosts, numbers = axis.gather(mine).unflatten(-1, (-1, 2)).unbind(-1)
    return len(hosts.unique()) == 1 and len(numbers.unique()) == axis.size
