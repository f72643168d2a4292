"""Probabilities of words from logits that are cut over the vocabulary: the ranks exchange a few numbers for every position, never the logits."""

import torch
from torch import Tensor

from megatron_lite.parallel.mesh import Axis

# n positions, v rows of the vocabulary on this rank


def word_scores(logits: Tensor, targets: Tensor, *, words: int, tp: Axis) -> Tensor:
    """[n 2] in fp32, the same on every rank: the log-probability of each target [n], and 1 where it is the likeliest word, else 0.

    `logits` [n v] are this rank's part; those in fp32 are overwritten. Rows from `words` on only pad the vocabulary: no probability is theirs.
    """
    rows = logits.shape[-1]
    offset = tp.index * rows
    logits = logits.float()
    logits[:, max(0, words - offset) :] = -torch.inf
    here = (targets >= offset) & (targets < offset + rows)
    found = logits.gather(-1, (targets - offset).clamp(0, rows - 1).unsqueeze(-1)).squeeze(-1).masked_fill(~here, -torch.inf)
    best = logits.max(-1)
    facts = torch.stack([logits.logsumexp(-1), found, best.values, (best.indices + offset).float()], -1)  # fp32 counts to 16 million
    total, found, highest, index = tp.gather(facts).unflatten(-1, (tp.size, 4)).unbind(-1)  # each [n ranks]
    likeliest = index.gather(-1, highest.argmax(-1, keepdim=True)).squeeze(-1)
    return torch.stack([found.amax(-1) - total.logsumexp(-1), (likeliest == targets).float()], -1)
