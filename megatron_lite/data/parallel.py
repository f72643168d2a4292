"""The same for many, a few at a time; the first failure ends all."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(action: Callable[[Item], Result], items: Sequence[Item], workers: int, stopped: threading.Event) -> list[Result]:
    """The action's results, in order. Where one fails, `stopped` is set, none is begun any more, and its error is raised."""
    pool = ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(action, item) for item in items]
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
    except BaseException:
        stopped.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
