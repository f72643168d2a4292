"""Moves weights from files to where they are needed: ranges of bytes, several at once, through a small ring of buffers.

Mapped memory would be read page by page, one fault after the other, and would count as ours; from pinned buffers a GPU copies at the full speed of its link.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import local

import torch
from torch import Tensor

from megatron_lite.errors import CheckpointError

Progress = Callable[[int], object]

BLOCK = 16 << 20
"""Bytes that are read at once."""
THREADS = 8
AHEAD = 64
"""Blocks that may be waiting: a gigabyte, so that errors and progress are not far behind."""
WORTHWHILE = 1 << 18
"""Smaller tensors are copied from the mapping: they take no time."""
WEIGHT_FILES = (".pt", ".bin", ".safetensors")


@dataclass(frozen=True)
class Mapping:
    """A file, or a part of it, in our address space."""

    start: int
    stop: int
    offset: int
    path: str


def mappings() -> list[Mapping]:
    """The files of weights that are mapped now (/proc/self/maps; none where the system has no such file)."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        if line.endswith(WEIGHT_FILES):
            span, _, offset, _, _, path = line.split(maxsplit=5)
            start, stop = (int(end, 16) for end in span.split("-"))
            found.append(Mapping(start, stop, int(offset, 16), path))
    return found


@dataclass(frozen=True)
class Range:
    """Rows of a matrix in a file: `shape` elements of `dtype`, rows `stride` elements apart, from byte `offset` on."""

    path: str
    offset: int
    shape: tuple[int, int]
    stride: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """From the first element to the last; of columns, what lies between them too."""
        return ((self.shape[0] - 1) * self.stride + self.shape[1]) * self.dtype.itemsize

    def rows(self, first: int, last: int) -> "Range":
        return Range(self.path, self.offset + first * self.stride * self.dtype.itemsize, (last - first, self.shape[1]), self.stride, self.dtype)


def range_of(tensor: Tensor, mapped: Sequence[Mapping]) -> Range | None:
    """Where a mapped matrix, or some rows or columns of one, lies in its file. None for what is better copied from memory."""
    if tensor.dim() != 2 or tensor.stride(1) != 1 or tensor.nbytes < WORTHWHILE or tensor.stride(0) * tensor.itemsize > BLOCK:
        return None
    address = tensor.data_ptr()
    for each in mapped:
        if each.start <= address < each.stop:
            rows, columns = tensor.shape
            return Range(each.path, each.offset + address - each.start, (rows, columns), tensor.stride(0), tensor.dtype)
    return None


class Reader:
    """Fills matrices from files, in the background until `wait`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.threads = min(THREADS, os.cpu_count() or 1)
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="reader")
        self.buffers: SimpleQueue[Tensor] = SimpleQueue()
        self.pending: deque[tuple[Future[None], int, Progress]] = deque()
        self.stream = local()
        for _ in range(self.threads):
            self.buffers.put(torch.empty(BLOCK, dtype=torch.uint8, pin_memory=device.type == "cuda"))

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def fetch(self, source: Range, target: Tensor, progress: Progress) -> None:
        """Starts to fill the matrix `target`, whose shape is the range's, on our device. `progress` hears of every block that is there, as `wait` finds it."""
        rows = max(1, BLOCK // (source.stride * source.dtype.itemsize))
        for first in range(0, source.shape[0], rows):
            last = min(first + rows, source.shape[0])
            self.pending.append((self.pool.submit(self._move, source.rows(first, last), target[first:last]), target[first:last].nbytes, progress))
        self.wait(most=AHEAD)

    def wait(self, *, most: int = 0) -> None:
        """Until at most so many blocks are still on their way. Raises CheckpointError where a file could not be read."""
        while len(self.pending) > most:
            block, size, progress = self.pending.popleft()
            block.result()
            progress(size)

    @torch.inference_mode()  # of a caller in this mode the target is such a tensor, and this thread would not know
    def _move(self, source: Range, target: Tensor) -> None:
        buffer = self.buffers.get()
        try:
            read_fully(source, buffer.numpy().data[: source.bytes])
            found = buffer[: source.bytes].view(source.dtype)
            if self.device.type == "cuda":
                self._to_gpu(found, source, target)
            else:
                target.copy_(found.as_strided(source.shape, (source.stride, 1)))
        finally:
            self.buffers.put(buffer)

    def _to_gpu(self, found: Tensor, source: Range, target: Tensor) -> None:
        if not hasattr(self.stream, "mine"):
            torch.cuda.set_device(self.device)
            self.stream.mine = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self.stream.mine):
            # whole bytes cross the link; columns are picked on the other side, where memory is fast
            target.copy_(found.to(self.device, non_blocking=True).as_strided(source.shape, (source.stride, 1)))
        self.stream.mine.synchronize()  # before the buffer is written again


def read_fully(source: Range, buffer: memoryview) -> None:
    """Reads the range's bytes; raises CheckpointError where the file ends before."""
    try:
        file = os.open(source.path, os.O_RDONLY)
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(file, [buffer[done:]], source.offset + done)
                if not count:
                    missing = f"{source.path} ends {len(buffer) - done} bytes before a tensor does"
                    raise CheckpointError(f"{missing}; it was changed while it was read, or is truncated")
                done += count
        finally:
            os.close(file)
    except OSError as error:
        raise CheckpointError(f"{source.path} cannot be read: {error.strerror}") from None
