"""Whether the GPUs of this machine can copy into each other's memory; where none can, what they exchange goes through the host's."""

import os
from collections.abc import Callable, MutableMapping
from itertools import permutations

import torch

from megatron_lite.log import logger

SWITCH = "NCCL_P2P_DISABLE"
Reaches = Callable[[int, int], bool]


def heed_reach(environment: MutableMapping[str, str] = os.environ) -> None:
    """Before NCCL starts: tells it what it cannot do on this machine, and rank 0 tells the user."""
    count = min(torch.cuda.device_count(), int(environment.get("LOCAL_WORLD_SIZE", "1")))
    line = settle_reach(count, torch.cuda.can_device_access_peer, environment)
    if line and environment.get("RANK", "0") == "0":
        logger.info(line)


def settle_reach(count: int, reaches: Reaches, environment: MutableMapping[str, str]) -> str | None:
    """Turns copies between GPUs off where no pair of the first `count` can make them and nobody has said otherwise. Returns what is to be said, if anything."""
    if count < 2 or SWITCH in environment:
        return None
    apart = [(one, other) for one, other in permutations(range(count), 2) if not reaches(one, other)]
    if len(apart) == count * (count - 1):
        environment[SWITCH] = "1"
        return f"the {count} GPUs cannot copy into each other's memory: what they exchange goes through the host's ({SWITCH}=1)"
    if apart:
        one, other = apart[0]
        return f"GPU {one} cannot copy into the memory of GPU {other} ({len(apart)} of {count * (count - 1)} ways): what these exchange goes through the host's"
    return None
