"""What this machine can do at best, measured in the same run as what is held against it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.benchmark.bench import release
from megatron_lite.benchmark.clock import median_seconds, seconds_a_call
from megatron_lite.benchmark.table import Row
from megatron_lite.models.spec import BYTES, ModelSpec
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.peers import connect

CEILING = "ceiling"
ROWS = (1, 8, 64)
"""Rows of hidden states that an all-reduce sums: 12, 96 and 768 KiB of 20B in half precision."""


@dataclass(frozen=True)
class Ceilings:
    """Bytes of memory that are read and operations that are done in a second, on one device: operations for a moment, and for as long as it takes a GPU to
    lower its clock to what its power allows."""

    stream: float
    product: float
    lasting: float

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> "Ceilings":
        stream = read_only(device) if device.type == "cuda" and find_spec("triton") else read_stream(device, dtype)
        release(device)  # or what the matrix library keeps would lie in that block of memory, which then could not be given back
        product = matrix_product(device, dtype)
        return cls(stream, product, lasting_product(device, dtype, product))

    def rows(self, device: torch.device, dtype: torch.dtype) -> list[Row]:
        name, size = str(dtype).removeprefix("torch."), product_size(device)
        return [
            Row(what="memory, read only", by=CEILING, rate=self.stream / 1e12, unit="TB/s"),
            Row(what=f"matrix product {size}^3, {name}", by=CEILING, rate=self.product / 1e12, unit="TFLOP/s"),
            Row(what=f"matrix product {size}^3, {name}, lasting", by=CEILING, rate=self.lasting / 1e12, unit="TFLOP/s"),
        ]


def read_only(device: torch.device) -> float:
    """Bytes/s of a kernel that only reads what no cache holds."""
    from megatron_lite.benchmark.stream import BLOCK, fold, programs_of

    each = BLOCK * programs_of(device)
    source = torch.zeros(each * max(1, (1 << 30) // each), dtype=torch.int32, device=device)
    return source.nbytes / seconds_a_call(lambda index: fold(source), device, calls=4)


def read_stream(device: torch.device, dtype: torch.dtype) -> float:
    """The same by products of matrices with a vector."""
    count, shape = (16, (24576, 6144)) if device.type == "cuda" else (4, (1024, 512))
    matrices = [torch.randn(shape, device=device, dtype=dtype) for _ in range(count)]
    vector = torch.randn(1, shape[1], device=device, dtype=dtype)
    out = torch.empty(1, shape[0], device=device, dtype=dtype)
    seconds = seconds_a_call(lambda index: torch.mm(vector, matrices[index].T, out=out), device, calls=count)
    return matrices[0].nbytes / seconds


def product_size(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 512


def matrix_product(device: torch.device, dtype: torch.dtype) -> float:
    """Operations/s of a large product of random matrices, for a moment."""
    return _operations(device) / median_seconds(_product(device, dtype), device, times=9)


def lasting_product(device: torch.device, dtype: torch.dtype, brief: float) -> float:
    """The same behind a second of them; `brief` is the rate for a moment."""
    work, count = _product(device, dtype), max(1, int((1.0 if device.type == "cuda" else 0.05) * brief / _operations(device)))

    def many() -> None:
        for _ in range(count):
            work()

    return _operations(device) * count / median_seconds(many, device, times=1)


def _operations(device: torch.device) -> int:
    return 2 * product_size(device) ** 3


def _product(device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    size = product_size(device)
    one, other, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    return lambda: torch.mm(one, other, out=out)


def copy_rate(device: torch.device) -> float:
    """Bytes/s from pinned memory of the host to the device."""
    size = (256 << 20) if device.type == "cuda" else (1 << 20)
    source = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda").fill_(1)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return size / median_seconds(lambda: target.copy_(source, non_blocking=True), device, times=9)


@torch.inference_mode()
def all_reduces(mesh: Mesh, spec: ModelSpec) -> list[Row]:
    """The latency of summing hidden states over a tensor-parallel group, by the library and by the exchange that decoding uses where it works."""
    if mesh.tp.size == 1:
        return []
    return [*_by_library(mesh, spec), *_by_exchange(mesh, spec)]


def _by_library(mesh: Mesh, spec: ModelSpec) -> Iterator[Row]:
    library = dist.get_backend(mesh.tp.group).upper()
    for rows in ROWS:
        state = torch.zeros(rows, spec.hidden, dtype=getattr(torch, spec.dtype), device=mesh.device)
        seconds = seconds_a_call(lambda index, state=state: dist.all_reduce(state, group=mesh.tp.group), mesh.device, calls=20)
        yield Row(what=f"all-reduce of {rows} x {spec.hidden}", by=f"{library}, {state.nbytes / 1024:.0f} KiB", seconds=seconds, batch=rows)


def _by_exchange(mesh: Mesh, spec: ModelSpec) -> Iterator[Row]:
    """The launch that decoding sums with, without the norm that can follow in it."""
    if mesh.device.type != "cuda":
        return
    from megatron_lite.inference.kernels.exchange import packets, proven, sum_and_norm

    dtype = getattr(torch, spec.dtype)
    found = connect(mesh.tp, capacity=packets(ROWS[-1], spec.hidden), programs=ROWS[-1] + 1, device=mesh.device)
    peers = proven(found, mesh.tp, width=spec.hidden, dtype=dtype)
    if peers is None:
        return
    for rows in ROWS:
        state, share = (torch.zeros(*shape, rows, spec.hidden, device=mesh.device) for shape in ((), (1,)))
        none, out = (torch.empty(*shape, spec.hidden, dtype=dtype, device=mesh.device) for shape in ((0,), (0, rows)))

        def work(index: int, state: Tensor = state, share: Tensor = share, none: Tensor = none, out: Tensor = out) -> None:
            sum_and_norm(state, share, None, none, none, out, peers, eps=0.0)

        seconds = seconds_a_call(work, mesh.device, calls=20)
        size = rows * spec.hidden * BYTES[spec.dtype]
        yield Row(what=f"all-reduce of {rows} x {spec.hidden}", by=f"exchange, {size / 1024:.0f} KiB", seconds=seconds, batch=rows)
