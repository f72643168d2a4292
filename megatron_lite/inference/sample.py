"""Chooses the next token of every row from its logits. Each rule is a function on fp32 logits [b v]."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_lite.inference.request import Request

COLDEST, HOTTEST = 1e-30, 1e30
"""Temperatures beyond these would leave the range of fp32, and change nothing."""


@dataclass(frozen=True)
class Rules:
    """The sampling settings of a batch, one entry a row, on the device of the logits. What all rows have in common is known here, so that nothing waits
    for the device: `is_greedy` where no row draws, `most` the largest top_k, `has_top_p` where any row uses it."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    draws: Tensor  # [b] uniform numbers in [0, 1), new ones for every token
    is_greedy: bool
    most: int
    has_top_p: bool

    @classmethod
    def of(cls, requests: Sequence[Request], *, device: torch.device) -> "Rules":
        settings = [request.sampling for request in requests]
        most = [min(s.top_k, 2**31) for s in settings]
        return cls(
            torch.tensor([min(s.temperature, HOTTEST) for s in settings], dtype=torch.float32, device=device),
            torch.tensor(most, device=device),
            torch.tensor([s.top_p for s in settings], dtype=torch.float32, device=device),
            torch.zeros(len(settings), dtype=torch.float64, device=device),
            is_greedy=all(s.temperature == 0 for s in settings),
            most=max(most, default=0),
            has_top_p=any(0 < s.top_p < 1 for s in settings),
        )

    def at(self, draws: Tensor) -> "Rules":
        """The same rules with the numbers of the next token."""
        return replace(self, draws=draws)


def choose(logits: Tensor, rules: Rules) -> Tensor:
    """Token ids [b]: the argmax where temperature is 0, else a draw after temperature, top-k and top-p, in this order."""
    greedy = logits.argmax(-1)
    if rules.is_greedy:
        return greedy
    kept = logits / rules.temperature.clamp(min=COLDEST).unsqueeze(-1)
    if rules.most:
        kept = keep_top_k(kept, rules.top_k, most=rules.most)
    if rules.has_top_p:
        kept = keep_top_p(kept, rules.top_p)
    return greedy.where(rules.temperature == 0, draw(kept, rules.draws))


def keep_top_k(logits: Tensor, top_k: Tensor, *, most: int) -> Tensor:
    """All but the top_k highest logits of each row become -inf; ties with the k-th stay; 0 keeps all. `most` is the largest top_k."""
    highest = logits.topk(min(most, logits.shape[-1])).values
    threshold = highest.gather(-1, (top_k.clamp(1, highest.shape[-1]) - 1).unsqueeze(-1))
    return logits.masked_fill((logits < threshold) & (top_k > 0).unsqueeze(-1), -torch.inf)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Keeps the likeliest tokens of each row until their probability reaches top_p, the one that crosses it included; 0 and 1 keep all."""
    ordered, order = logits.sort(descending=True, stable=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    dropped = (before >= top_p.unsqueeze(-1)) & ((top_p > 0) & (top_p < 1)).unsqueeze(-1)
    dropped[:, 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token of each row at which the cumulative probability passes `uniform` [b]."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    target = uniform.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
