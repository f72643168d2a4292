"""Several processes on this machine, forked from the test, joined by gloo: 0.5 s a world instead of 10 s."""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh, build_mesh, single_mesh

T = TypeVar("T")


def in_world(layout: Layout, function: Callable[[Mesh], T]) -> list[T]:
    """What `function(mesh)` returns on every rank of the layout, in rank order. Results travel by pickle."""
    return [function(single_mesh())] if layout.size == 1 else forked(layout, function)


def forked(layout: Layout, function: Callable[[Mesh], T]) -> list[T]:
    """The same, in processes of their own also where it is only one: what it leaves behind goes with it."""
    context = get_context("fork")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child cannot use its parent's thread pool
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(layout.size)]
        children = [context.Process(target=_child, args=(rank, layout, function, folder, pipe[1])) for rank, pipe in enumerate(pipes)]
        for child in children:
            child.start()
        for _, end in pipes:
            end.close()
        results = [_received(pipe[0]) for pipe in pipes]
        for child in children:
            child.join()
    torch.set_num_threads(threads)
    failures = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(results) if error]
    assert not failures, "\n".join(failures)
    return [result for result, _ in results]


def _received(pipe: Connection) -> tuple:
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return None, "the process ended without a word"


def _child(rank: int, layout: Layout, function: Callable[[Mesh], T], folder: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=layout.size)
        result = function(build_mesh(layout, rank=rank, device=torch.device("cpu")))
        pipe.send_bytes(pickle.dumps((result, None)))  # plain pickle: torch's own would hand over memory that ends with this process
        dist.barrier()
    except BaseException:
        pipe.send_bytes(pickle.dumps((None, traceback.format_exc())))
    finally:
        pipe.close()
        os._exit(0)
