"""The processes as a grid of pipe x data x model, and what the ranks along one axis can do together.

Every operation is the identity at size 1, so the same model runs without torch.distributed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megatron_lite.errors import LayoutError
from megatron_lite.parallel.layout import Layout

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """The ranks that differ from this one along one axis of the mesh only. `ranks` are their numbers in the whole world, `index` is ours among them.

    `through_host` where the library that carries things between the ranks knows nothing of this device's memory."""

    name: str
    index: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None
    through_host: bool = False

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.size - 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the axis, accumulated in fp32; gradients pass unchanged (each rank's term entered once)."""
        return x if self.size == 1 else _Sum.apply(x, self)

    def sum_in_place(self, x: Tensor) -> Tensor:
        """x, which now holds the sum over the axis, accumulated in x's own precision; no gradients."""
        if self.size > 1:
            with self._carried(x) as there:
                dist.all_reduce(there, group=self.group)
        return x

    def copy(self, x: Tensor) -> Tensor:
        """x itself, entering work that is cut over the axis; gradients are summed, because every rank saw all of x."""
        return x if self.size == 1 else _Copy.apply(x, self)

    def maximum(self, x: Tensor) -> Tensor:
        """The elementwise maximum over the axis; no gradients."""
        if self.size > 1:
            x = x.detach().clone()
            with self._carried(x) as there:
                dist.all_reduce(there, dist.ReduceOp.MAX, group=self.group)
        return x

    def minimum(self, x: Tensor) -> Tensor:
        """The elementwise minimum over the axis; no gradients."""
        return -self.maximum(-x)

    def gather(self, x: Tensor) -> Tensor:
        """The ranks' tensors joined along the last dim; no gradients."""
        if self.size == 1:
            return x
        there = self._there(x.contiguous())
        parts = [torch.empty_like(there) for _ in self.ranks]
        dist.all_gather(parts, there, group=self.group)
        return torch.cat(parts, -1).to(x.device)

    def gather_objects(self, x: T) -> list[T]:
        """What the ranks hold, in their order. Only for small things."""
        found: list[T | None] = [x for _ in self.ranks]
        if self.size > 1:
            dist.all_gather_object(found, x, group=self.group)
        return cast(list[T], found)

    def share(self, x: Tensor, *, source: int) -> Tensor:
        """What rank `source` of the axis holds, on every rank. x is overwritten elsewhere."""
        if self.size > 1:
            with self._carried(x) as there:
                dist.broadcast(there, self.ranks[source], group=self.group)
        return x

    def send(self, x: Tensor, *, to: int) -> None:
        dist.send(self._there(x.contiguous()), self.ranks[to], group=self.group)

    def send_later(self, x: Tensor, *, to: int) -> "Later":
        """Sends without waiting until it has arrived; x must not change before."""
        there = self._there(x.contiguous())
        return Later(dist.isend(there, self.ranks[to], group=self.group), there)

    def share_later(self, x: Tensor, *, source: int) -> "Later":
        """As `share`, without waiting: x must not be touched before."""
        there = self._there(x)
        return Later(dist.broadcast(there, self.ranks[source], group=self.group, async_op=True), there, x)

    def receive(self, like: Tensor, *, source: int) -> Tensor:
        """Fills `like` with what rank `source` of the axis sends."""
        with self._carried(like) as there:
            dist.recv(there, self.ranks[source], group=self.group)
        return like

    def _there(self, x: Tensor) -> Tensor:
        """x where the library can take it from."""
        return x.cpu() if self.through_host else x

    @contextmanager
    def _carried(self, x: Tensor) -> Iterator[Tensor]:
        """x where the library can change it; afterwards x is what was made of it."""
        there = self._there(x)
        yield there
        if there is not x:
            x.copy_(there)


@dataclass(frozen=True)
class Later:
    """Something under way between ranks, and the tensor that it reads or writes; `target` is to hold the same on this device."""

    work: dist.Work | None
    tensor: Tensor
    target: Tensor | None = None

    @property
    def keeps_host_waiting(self) -> bool:
        return self.target is not None and self.target is not self.tensor

    def wait(self) -> None:
        """What this device is told from now on comes after it."""
        if self.work is not None:
            self.work.wait()
        if self.target is not None and self.keeps_host_waiting:
            self.target.copy_(self.tensor)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: Axis) -> Tensor:
        return _all_reduce(x, axis)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradients[0], ctx.axis), None


def _all_reduce(x: Tensor, axis: Axis) -> Tensor:
    return axis.sum_in_place(x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)).to(x.dtype)


@dataclass(frozen=True)
class Mesh:
    """This process's place among all: its three axes and its device."""

    layout: Layout
    rank: int
    device: torch.device
    pp: Axis
    dp: Axis
    tp: Axis

    @property
    def is_writer(self) -> bool:
        """True on the one process that writes to disk and to the terminal."""
        return self.rank == 0

    def share_from_writer(self, make: Callable[[], T]) -> T:
        """What `make` returns on the writer, on every rank. Only for small things."""
        box: list[T | None] = [make() if self.is_writer else None]
        if self.layout.size > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]  # pyright: ignore[reportReturnType]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.layout.size > 1:
            dist.barrier()


def goes_through_host(device: torch.device) -> bool:
    """Whether the library that joined the processes knows nothing of this device's memory: so it is where they share a GPU."""
    return device.type == "cuda" and dist.is_initialized() and dist.get_backend() == "gloo"


def single_mesh(device: torch.device | None = None) -> Mesh:
    """The mesh of one process alone."""
    return Mesh(Layout(), 0, device or torch.device("cpu"), Axis("pp"), Axis("dp"), Axis("tp"))


def build_mesh(layout: Layout, *, rank: int, device: torch.device) -> Mesh:
    """Process groups for every axis. torch.distributed must be initialised with layout.size ranks; every rank calls this."""
    if layout.size == 1:
        return single_mesh(device)
    if dist.get_world_size() != layout.size:
        raise LayoutError(f"{layout} needs {layout.size} processes; {dist.get_world_size()} were started")
    through_host = goes_through_host(device)
    here = dict(zip(("pp", "dp", "tp"), layout.coordinates(rank), strict=True))
    axes: dict[str, Axis] = {}
    for name in here:
        lines: dict[tuple[int, ...], list[int]] = {}
        for other in range(layout.size):
            place = dict(zip(here, layout.coordinates(other), strict=True))
            lines.setdefault(tuple(at for axis, at in place.items() if axis != name), []).append(other)
        for line in lines.values():  # new_group is collective: every rank makes every group, in the same order
            group = cast(dist.ProcessGroup, dist.new_group(line)) if len(line) > 1 else None
            if rank in line:
                axes[name] = Axis(name, line.index(rank), tuple(line), group, through_host)
    return Mesh(layout, rank, device, axes["pp"], axes["dp"], axes["tp"])
