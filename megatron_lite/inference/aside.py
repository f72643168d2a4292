"""A second line of work on a GPU, beside what its caller goes on with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Aside:
    """On other devices one thing follows the other. What is computed aside belongs to the caller once `join` was called, and so does the memory it used."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def begun(self) -> Iterator[None]:
        """What is told the device here comes after what it was told before, and at the same time as what it is told next."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """What the device is told from now on comes after all that was begun aside."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
