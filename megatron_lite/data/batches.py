"""What a process trains on: rows of samples whose order is a function of the samples consumed, and of nothing else."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_lite.data.samples import SampleSource
from megatron_lite.errors import DataError

# b rows, s tokens in a row


@dataclass(frozen=True)
class TokenBatch:
    """tokens [b s], the token that follows each of them [b s], and whether it is learned [b s], 1 or 0. A label that is not learned is 0."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor

    @property
    def positions(self) -> Tensor:
        return torch.tensor(float(self.loss_mask.numel()))

    def to(self, device: torch.device) -> "TokenBatch":
        parts = (self.tokens, self.labels, self.loss_mask)
        if device.type == "cuda":
            parts = tuple(part.pin_memory() for part in parts)  # else the copy waits for what the GPU is at
        return TokenBatch(*(part.to(device, non_blocking=True) for part in parts))


class Counted(Iterator[TokenBatch]):
    """The same micro batches, and of those that were taken: how many positions, and how many of them are learned."""

    def __init__(self, batches: Iterator[TokenBatch]) -> None:
        self._batches, self.positions, self.learned = batches, 0, 0

    def __next__(self) -> TokenBatch:
        batch = next(self._batches)
        self.positions += batch.loss_mask.numel()
        self.learned += int(batch.loss_mask.count_nonzero())
        return batch


def sample_numbers(consumed: int, micro_batch: int, *, index: int = 0, size: int = 1) -> range:
    """The samples that data-parallel process `index` of `size` takes when all of them together have consumed so many.

    Together they take micro_batch * size samples in a row, each a contiguous part. So a step takes the same samples however they are shared out.
    """
    first = consumed + index * micro_batch
    return range(first, first + micro_batch)


class Batches:
    """Batches of a source for a model with `vocab` ids. No loss is taken on what follows the token `unlearned_after` (eod_mask_loss)."""

    def __init__(self, source: SampleSource, *, vocab: int, unlearned_after: int | None = None) -> None:
        self._source, self._vocab, self._unlearned_after = source, vocab, unlearned_after

    def at(self, consumed: int, micro_batch: int, *, index: int = 0, size: int = 1) -> TokenBatch:
        numbers = sample_numbers(consumed, micro_batch, index=index, size=size)
        if numbers.stop > len(self._source):
            raise DataError(
                f"the data ends after {len(self._source):,} samples ({self._source.where(len(self._source) - 1)}), but sample {numbers.stop - 1:,} was "
                "asked for; it was prepared for fewer steps than are trained"
            )
        rows = [self._source.row(number) for number in numbers]
        tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
        labels = torch.from_numpy(np.stack([row.labels for row in rows]))[:, 1:]
        self._check(tokens, numbers, "token")
        self._check(labels.clamp(min=0), numbers, "label")  # below 0 they are masked
        inputs = tokens[:, :-1].contiguous()
        learned = labels >= 0
        if self._unlearned_after is not None:
            learned = learned & (inputs != self._unlearned_after)
        return TokenBatch(inputs, labels.where(learned, 0), learned.float())

    def _check(self, tokens: Tensor, numbers: range, kind: str) -> None:
        wrong = (tokens < 0) | (tokens >= self._vocab)
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise DataError(
                f"{self._source.where(numbers[row])}, has the {kind} id {int(tokens[row, column])}, but the model's vocabulary ends at {self._vocab - 1}; "
                "the data was made with another tokenizer"
            )

    def stream(self, consumed: int, micro_batch: int, *, index: int = 0, size: int = 1, ahead: int = 2) -> Iterator[TokenBatch]:
        """Micro batch after micro batch from there on, without end; a thread reads some of them ahead."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as reader:
            reading: deque[Future[TokenBatch]] = deque()
            try:
                while True:
                    while len(reading) <= ahead:
                        reading.append(reader.submit(self.at, consumed, micro_batch, index=index, size=size))
                        consumed += micro_batch * size
                    yield reading.popleft().result()
            finally:
                for future in reading:
                    future.cancel()
