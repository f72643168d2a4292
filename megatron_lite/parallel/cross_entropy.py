"""The loss of training, on logits that are cut over the vocabulary: the ranks exchange three numbers for every position, never the logits."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.parallel.mesh import Axis

# n positions, v rows of the vocabulary on this rank


def cross_entropy(logits: Tensor, labels: Tensor, *, words: int, tp: Axis) -> Tensor:
    """[n] in fp32, the same on every rank: minus the log-probability of each label [n].

    `logits` [n v] are this rank's part. Rows from `words` on were only added so that the vocabulary divides: no probability is theirs.
    """
    return _CrossEntropy.apply(logits, labels, words, tp)


def mean_loss(losses: Tensor, learned: Tensor) -> Tensor:
    """NeoX's loss of a micro batch: the mean over the positions that are learned (1, not 0); 0 where none is."""
    return (losses * learned).sum() / learned.sum().clamp(min=1)


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
    if tp.size > 1:
        dist.all_reduce(x, group=tp.group)
    return x
