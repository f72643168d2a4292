"""Files on disk and in the page cache: what is cached, how to read it cold, and how fast the disk is without the cache."""

import ctypes
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np

BLOCK = 16 << 20
"""Bytes that are read at once, a multiple of what any disk wants reads to be aligned to."""
THREADS = 8


def drop(files: Sequence[Path]) -> None:
    """Writes what is not on the disk yet, and asks the system to forget the files' pages. Mapped pages stay, and those of file systems in memory."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(_drop_one, files))


def _drop_one(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def cached_share(files: Sequence[Path]) -> float:
    """Share of the files' pages that lie in the page cache (mincore)."""
    counts = [_cached_pages(path) for path in files if path.stat().st_size]
    return sum(here for here, _ in counts) / max(1, sum(pages for _, pages in counts))


def _cached_pages(path: Path) -> tuple[int, int]:
    """How many pages of a file are cached, and how many it has."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    told = np.zeros(pages, dtype=np.uint8)
    mapped = np.memmap(path, dtype=np.uint8, mode="c")  # private: nothing is ever written
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(size), told.ctypes.data_as(ctypes.c_void_p)):
        return pages, pages  # unknown counts as cached: nothing is called cold that may not be
    return int((told & 1).sum()), pages


def direct_rate(files: Sequence[Path], most: int) -> float | None:
    """Bytes/s of reading up to `most` bytes past the page cache, from places spread evenly over the files; None where the file system cannot."""
    blocks = [(path, offset) for path in files for offset in range(0, path.stat().st_size - BLOCK + 1, BLOCK)]
    blocks = blocks or [(path, 0) for path in files]
    count = min(len(blocks), max(1, most // BLOCK))
    chosen = [blocks[index * len(blocks) // count] for index in range(count)]
    buffers = [mmap.mmap(-1, BLOCK) for _ in range(THREADS)]  # aligned to pages
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            started = perf_counter()
            sizes = pool.map(lambda part: sum(_read_directly(*block, buffers[part]) for block in chosen[part::THREADS]), range(THREADS))
            return sum(sizes) / (perf_counter() - started)
    except OSError:
        return None


def _read_directly(path: Path, offset: int, buffer: mmap.mmap) -> int:
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        return os.preadv(file, [buffer], offset)
    finally:
        os.close(file)
