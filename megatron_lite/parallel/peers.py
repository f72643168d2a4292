"""Memory of the GPUs of one axis that they write into and read from each other, without a library call between them."""

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


@dataclass(frozen=True)
class Shares:
    """Memory of this rank that all ranks of an axis read: rows of numbers in two halves, which take turns. `addresses` holds those of all ranks' halves,
    `flags` those of the turns that ranks have told each rank, `turn` counts this rank's; all are on the device."""

    index: int
    size: int
    halves: Tensor  # 2 rows width
    addresses: Tensor  # ranks
    flags: Tensor  # ranks
    turn: Tensor  # 1


def connect(axis: Axis, *, capacity: int, programs: int, device: torch.device) -> Peers | None:
    """Symmetric memory for exchanges of up to `capacity` packets by `programs` programs; None where the GPUs cannot reach each other's. All ranks of the axis
    call this together."""
    if axis.size == 1 or device.type != "cuda" or axis.group is None:
        return None
    reaches = all(torch.cuda.can_device_access_peer(device, other) for other in range(torch.cuda.device_count()) if other != device.index)
    alike = torch.tensor(float(reaches), device=device)
    if axis.minimum(alike) < 1 or not are_seen(axis, device):
        return None
    memory, boxes = _symmetric(axis, box_bytes(axis.size, capacity) // 8, device)
    return Peers(axis.index, axis.size, capacity, boxes, torch.zeros(programs, dtype=torch.int32, device=device), memory)


def shares_of(axis: Axis, *, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Shares:
    """Symmetric memory for shares of so many rows, where the GPUs of the axis reach each other's. All ranks of the axis call this together."""
    size = share_bytes(rows, width, dtype) // 8
    memory, addresses = _symmetric(axis, size + axis.size, device)
    turn = torch.zeros(1, dtype=torch.int32, device=device)
    return Shares(axis.index, axis.size, memory[:size].view(dtype).view(2, rows, width), addresses, addresses + 8 * size, turn)


def box_bytes(ranks: int, capacity: int) -> int:
    """Of a box of each of so many ranks."""
    return 8 * 2 * ranks * capacity


def share_bytes(rows: int, width: int, dtype: torch.dtype) -> int:
    """Of a rank's halves."""
    return 2 * rows * width * dtype.itemsize


def _symmetric(axis: Axis, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """So many 64-bit zeros that all ranks of the axis reach, and their addresses of all ranks."""
    import torch.distributed._symmetric_memory as symmetric

    assert axis.group is not None
    memory = symmetric.empty(count, dtype=torch.int64, device=device).zero_()
    handle = symmetric.rendezvous(memory, axis.group.group_name)
    addresses = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
    torch.cuda.synchronize()
    axis.maximum(torch.zeros((), device=device))  # no rank writes before all have cleared their memory
    return memory, addresses


def are_seen(axis: Axis, device: torch.device) -> bool:
    """Whether all ranks of the axis are on this host, and each sees the GPUs of all: not so where every process was given one GPU, which it calls 0."""
    mine = torch.tensor([crc32(socket.gethostname().encode()), device.index or 0], device=device)
    hosts, numbers = axis.gather(mine).unflatten(-1, (-1, 2)).unbind(-1)
    return len(hosts.unique()) == 1 and len(numbers.unique()) == axis.size
