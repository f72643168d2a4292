"""How long work on a device takes: by the device's own events where it has them, never by a clock that does not wait for it."""

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch


class Marks:
    """Moments between pieces of work, taken without holding the device up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.events: list[torch.cuda.Event] = []
        self.times: list[float] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)
        else:
            self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of every piece between two marks."""
        if self.events:
            self.events[-1].synchronize()
            return [start.elapsed_time(end) / 1e3 for start, end in pairwise(self.events)]
        return [end - start for start, end in pairwise(self.times)]


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """By the wall clock, until the device is done."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def median_seconds(work: Callable[[], object], device: torch.device, *, times: int) -> float:
    """Of so many runs, after one that is not counted."""
    seconds_of(work, device)
    return median(seconds_of(work, device) for _ in range(times))


def seconds_a_call(work: Callable[[int], object], device: torch.device, *, calls: int, times: int = 7) -> float:
    """Of `calls` calls in a row, work(0) .. work(calls - 1); on a GPU they are captured in a graph, so that launching them takes no time."""
    work(0)
    _wait(device)
    if device.type != "cuda":
        return median_seconds(lambda: [work(index) for index in range(calls)], device, times=times) / calls
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for index in range(calls):
            work(index)
    marks = Marks(device)
    graph.replay()
    marks.mark()
    for _ in range(times):
        graph.replay()
        marks.mark()
    return median(marks.seconds()) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
