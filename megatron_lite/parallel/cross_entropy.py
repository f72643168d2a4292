"""The loss of training, on logits that are cut over the vocabulary: the ranks exchange three numbers for every position, never the logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lite.parallel.mesh import Axis

# n positions, v rows of the vocabulary on this rank


def cross_entropy(logits: Tensor, labels: Tensor, *, words: int, tp: Axis) -> Tensor:
    """[n] in fp32, the same on every rank: minus the log-probability of each label [n].

    `logits` [n v] are this rank's part. Rows from `words` on were only added so that the vocabulary divides: no probability is theirs.
    """
    return _CrossEntropy.apply(logits, labels, words, tp)


@dataclass(frozen=True)
class Loss:
    """The loss of a micro batch, from this rank's logits. Rows of the vocabulary from `words` on are no words.

    The positions that are learned (1, not 0) are added up and divided by a number that others share: by their own, a micro batch with few would weigh like any.
    """

    words: int
    tp: Axis

    def __call__(self, logits: Tensor, wanted: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        labels, learned, among = wanted
        losses = cross_entropy(logits.flatten(0, -2), labels.flatten(), words=self.words, tp=self.tp)
        return (losses * learned.flatten()).sum() / among


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, words: int, tp: Axis) -> Tensor:
        rows, offset = logits.shape[-1], tp.index * logits.shape[-1]
        shifted = logits.to(torch.float32, copy=True)
        shifted[:, max(0, words - offset) :] = -torch.inf
        shifted -= tp.maximum(shifted.amax(-1)).unsqueeze(-1)
        here = (labels >= offset) & (labels < offset + rows)
        local = (labels - offset).clamp(0, rows - 1).unsqueeze(-1)
        found = shifted.gather(-1, local).squeeze(-1).masked_fill(~here, 0)
        probabilities = shifted.exp_()
        total, found = _summed(torch.stack([probabilities.sum(-1), found]), tp)
        probabilities /= total.unsqueeze(-1)
        ctx.save_for_backward(probabilities, local, here)
        ctx.dtype = logits.dtype
        return total.log() - found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, local, here = ctx.saved_tensors
        gradient = probabilities.scatter_add(-1, local, -here.unsqueeze(-1).float())
        return (gradient * gradients[0].unsqueeze(-1)).to(ctx.dtype), None, None, None


def _summed(x: Tensor, tp: Axis) -> Tensor:
    return tp.sum_in_place(x)
