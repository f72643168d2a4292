"""How kernels are launched, or looked at before: somebody who watches is told of a launch instead."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

# Any: Triton's functions are of different classes for GPUs and in its interpreter, and kernels take what they like


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and all it is given."""

    kernel: "Kernel"
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def compile(self) -> None:
        """Has the code ready for when this launch comes. Of tensors only the kind matters: they may lie nowhere."""
        self.kernel.jitted.run(*self.args, grid=self.grid, warmup=True, **self.options)


@dataclass(frozen=True)
class Kernel:
    """What is launched as kernel[grid](...): decorates a function of Triton's."""

    jitted: Any

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        watch = _watch.get()
        return self.jitted[grid] if watch is None else lambda *args, **options: watch(Launch(self, grid, args, options))


Watch = Callable[[Launch], object]
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """`watch` is told of what this thread would launch meanwhile, and nothing is."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
