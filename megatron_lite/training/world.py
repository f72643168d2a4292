"""The processes as DeepSpeed wants to see them, and its silence."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch.distributed as dist

from megatron_lite.parallel.mesh import Axis, Mesh


def join_world(mesh: Mesh) -> None:
    """Lets DeepSpeed use the processes that have joined; a process alone becomes a world of one."""
    for name, value in {"RANK": mesh.rank, "LOCAL_RANK": 0, "WORLD_SIZE": mesh.layout.size, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}.items():
        os.environ.setdefault(name, str(value))
    if mesh.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        backend = "nccl" if mesh.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning, r"torch\.distributed")  # of what DeepSpeed calls in every step
    with quiet():
        import deepspeed
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled at the start, and training does not use it
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


@contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed prints, logs and warns of much that helps nobody."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


class Cut:
    """Our axes under the names that DeepSpeed knows from Megatron."""

    def __init__(self, mesh: Mesh) -> None:
        self.tp, self.dp = mesh.tp, mesh.dp
        alone = [dist.new_group([rank]) for rank in range(mesh.layout.size)][mesh.rank]  # every rank makes every group

        def group(axis: Axis) -> Any:
            return axis.group or alone

        self.tp_group, self.dp_group = group(mesh.tp), group(mesh.dp)

    def get_model_parallel_rank(self) -> int:
        return self.tp.index

    def get_model_parallel_world_size(self) -> int:
        return self.tp.size

    def get_model_parallel_group(self) -> Any:
        return self.tp_group

    def get_data_parallel_rank(self) -> int:
        return self.dp.index

    def get_data_parallel_world_size(self) -> int:
        return self.dp.size

    def get_data_parallel_group(self) -> Any:
        return self.dp_group
