"""Memory that the GPUs of one axis read from each other, without a library call between them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.parallel.mesh import Axis


@dataclass(frozen=True)
class Peers:
    """Buffers of fp32 numbers on every rank of an axis, in two halves of `capacity`, and a signal for every program and rank. `buffers` and `signals` hold
    the addresses of all ranks' memory, `rounds` counts this rank's exchanges, program by program; all on the GPU."""

    index: int
    size: int
    capacity: int
    buffers: Tensor
    signals: Tensor
    rounds: Tensor
    memory: tuple[Tensor, Tensor]



def connect(axis: Axis, *, capacity: int, programs: int, device: torch.device) -> Peers | None:
    """Symmetric memory for exchanges of up to `capacity` numbers by `programs` programs; None where the GPUs cannot read each other's. All ranks of the axis
    call this together."""
    if axis.size == 1 or device.type != "cuda" or axis.group is None:
        return None
    reaches = all(torch.cuda.can_device_access_peer(device, other) for other in range(torch.cuda.device_count()) if other != device.index)
    alike = torch.tensor(float(reaches), device=device)
    if -float(axis.maximum(-alike)) < 1:
        return None
    import torch.distributed._symmetric_memory as symmetric

    buffer = symmetric.empty(2 * capacity, dtype=torch.float32, device=device)
    signal = symmetric.empty(programs * axis.size, dtype=torch.int32, device=device)
    addresses: list[Tensor] = []
    for memory in (buffer, signal):
        memory.zero_()
        handle = symmetric.rendezvous(memory, axis.group.group_name)
        addresses.append(torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device))
    rounds = torch.zeros(programs, dtype=torch.int32, device=device)
    torch.cuda.synchronize()
    axis.maximum(alike)  # no rank speaks before all have cleared their memory
    return Peers(axis.index, axis.size, capacity, addresses[0], addresses[1], rounds, (buffer, signal))
