"""Joins the processes that were started together: over NCCL where each has a GPU of its own, over gloo on CPUs and where several share a GPU."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_lite.errors import LayoutError
from megatron_lite.log import logger
from megatron_lite.parallel.budget import hold_to
from megatron_lite.parallel.mesh import goes_through_host
from megatron_lite.parallel.reach import heed_reach

PATIENCE = timedelta(minutes=30)


@contextmanager
def joined_world(*, timeout: timedelta = PATIENCE) -> Iterator[tuple[int, int, torch.device]]:
    """Joins the processes that were started together (RANK, WORLD_SIZE, LOCAL_RANK) and leaves them at the end. Yields rank, world size and our device."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length, which takes longer than a step
    if world > 1 and device.type == "cuda":
        _join_gpus(rank, world, device, timeout)
    elif world > 1:
        dist.init_process_group("gloo", timeout=timeout)
    yield rank, world, device
    if dist.is_initialized():  # not after a failure: neighbours would notice, and complain, before this process has said why
        dist.destroy_process_group()


def _join_gpus(rank: int, world: int, device: torch.device, timeout: timedelta) -> None:
    """NCCL refuses two processes on one GPU, so they tell each other where they are before it starts."""
    store, *_ = next(rendezvous("env://", rank, world, timeout=timeout))
    store.set_timeout(timeout)
    places = dist.PrefixStore("gpus", store)  # pyright: ignore[reportPrivateImportUsage]
    places.set(str(rank), str(torch.cuda.get_device_properties(device).uuid))
    sharers = most_on_one([places.get(str(other)).decode() for other in range(world)])
    if sharers == 1:
        heed_reach()
        # stages tell NCCL of their messages in one order, and need no word about it
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
        dist.init_process_group("nccl", store=store, rank=rank, world_size=world, timeout=timeout, device_id=device)
        return
    hold_to(torch.cuda.get_device_properties(device).total_memory // sharers, device)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    if rank == 0:
        logger.info(f"up to {sharers} processes share a GPU: each may use 1 / {sharers} of its memory, and what they exchange goes through the host's, slowly")


def demand_own_gpus(device: torch.device, what: str) -> None:
    """Raises LayoutError where processes that have joined share a GPU."""
    if goes_through_host(device):
        raise LayoutError(f"{what} needs a GPU for every process; here several share one: start fewer of them")


def most_on_one(gpus: list[str]) -> int:
    """How many processes are at most on one GPU, given that of each by an id that no other has, on whatever host."""
    return max(Counter(gpus).values())
