"""Work that is captured in CUDA graphs, and replayed without its launches."""

from collections.abc import Callable

import torch
from torch import Tensor

Key = tuple[int, int, bool]


class Graphs:
    """Captured work, and where each leaves what it computes. All share one pool of memory: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.captured: dict[Key, Callable[[], Tensor]] = {}
        self.inputs: dict[Key, Tensor] = {}

    def replay(self, key: Key, begin: Callable[[], Tensor], finish: Callable[[Tensor], Tensor]) -> Tensor:
        """What finish(begin()) computes, which is captured when it is wanted for the first time."""
        if key not in self.captured:
            self.captured[key] = self.capture(begin, finish)
        return self.captured[key]()

    def capture(self, begin: Callable[[], Tensor], finish: Callable[[Tensor], Tensor] = lambda out: out) -> Callable[[], Tensor]:
        """`begin` runs once before, to compile its kernels; it may be repeated, `finish` not."""
        begin()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = finish(begin())

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def clear(self) -> None:
        self.captured.clear()
        self.inputs.clear()
