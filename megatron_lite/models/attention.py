"""Rotary positions and attention, shared by the architectures."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from megatron_lite.models.cache import Past, causal_mix

# b batch, s tokens in this call, h heads on this rank, d head size, r rotary dims


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021) on the first `dim` dims of every head; `half` pairs i with i + dim/2, `interleaved` 2i with 2i + 1."""

    dim: int
    base: float
    max_positions: int
    pairing: Literal["half", "interleaved"] = "half"

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """[b h s d] turned by the angles of positions [b s] or [s]; computed in fp32."""
        if not self.dim:
            return x
        cos, sin = (table[positions].unsqueeze(-3) for table in angles(self.dim, self.base, self.max_positions, x.device))
        turned, kept = x[..., : self.dim].float(), x[..., self.dim :]
        if self.pairing == "half":
            one, two = turned.chunk(2, -1)
            turned = torch.cat([one * cos - two * sin, two * cos + one * sin], -1)
        else:
            one, two = turned.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack([one * cos - two * sin, two * cos + one * sin], -1).flatten(-2)
        return torch.cat([turned.to(x.dtype), kept], -1)


@lru_cache(maxsize=16)
def angles(dim: int, base: float, max_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [max_positions, dim/2] in fp32: half precision is off by degrees at large positions."""
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float64), frequencies)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def attend(query: Tensor, key: Tensor, value: Tensor, rotary: Rotary, past: Past | None) -> Tensor:
    """b h s d -> b s (h d). Each token sees itself and what came before it in its row."""
    positions = torch.arange(query.shape[2], device=query.device) if past is None else past.positions
    query, key = rotary(query, positions), rotary(key, positions)
    mixed = causal_mix(query, key, value) if past is None else past.mix(query, key, value)
    return mixed.transpose(1, 2).flatten(2)
