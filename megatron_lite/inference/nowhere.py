"""Tensors that lie nowhere, and have nothing but a shape: what a model would launch can be seen by going through it with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_lite.inference.segments import own_mix
from megatron_lite.parallel.mesh import Axis

NOWHERE = torch.device("meta")


class Silent(Axis):
    """An axis whose ranks are not asked."""

    def sum(self, x: Tensor) -> Tensor:
        return x

    def sum_in_place(self, x: Tensor) -> Tensor:
        return x

    def maximum(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Unseen:
    """What a block needs to know of so many prompts that are not there."""

    positions: Tensor
    texts: int

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = own_mix((query, key, value), self.positions, self.texts)
        return torch.empty_like(query) if mixed is None else mixed


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _product(x: Tensor, other: Tensor, out: Tensor | None = None) -> Tensor:
    return x.new_empty(len(x), other.shape[1]) if out is None else out


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return parts[0].new_empty(shape)


def _combined(x: Tensor, other: Tensor | float) -> Tensor:
    larger = other if isinstance(other, Tensor) and other.numel() > x.numel() else x  # torch.broadcast_shapes would bring in what is avoided here
    return x.new_empty(larger.shape, dtype=torch.result_type(x, other))


def _reduced(x: Tensor, dim: int, *, keepdim: bool = False) -> Tensor:
    shape = list(x.shape)
    shape[dim : dim + 1 or None] = [1] * keepdim
    return x.new_empty(shape)


def _picked(x: Tensor, index: Any) -> Tensor:
    return x.new_empty(*index.shape, *x.shape[1:]) if isinstance(index, Tensor) else x[index]


ALIKE = (
    *(F.gelu, torch.empty_like, torch.maximum, Tensor.sub, Tensor.neg, Tensor.__neg__, Tensor.div, Tensor.__truediv__),
    *(Tensor.lt, Tensor.ge, Tensor.gt, Tensor.__or__, Tensor.where, Tensor.masked_fill, Tensor.round_, Tensor.copy_),
    *(Tensor.square, torch.rsqrt, F.silu),
)
"""What makes a tensor of the same shape; what it is made of does not matter here."""


class Shapes(TorchFunctionMode):
    """Answers for the library with tensors of the right shape. It would do so itself, but imports its compiler first, which takes seconds."""

    ANSWERS: dict[Callable[..., Any], Callable[..., Any]] = {
        **dict.fromkeys(ALIKE, lambda x, *others, **options: x),
        **dict.fromkeys((torch.mul, torch.div), lambda one, other, out=None: one if out is None else out),
        F.linear: _linear,
        torch.mm: _product,
        torch.addmm: lambda added, *factors, out=None: _product(*factors, out=out),
        F.embedding: lambda tokens, weight, **options: weight.new_empty(*tokens.shape, weight.shape[1]),
        Tensor.aminmax: lambda x, dim: (x.new_empty(len(x)), x.new_empty(len(x))),
        Tensor.__getitem__: _picked,
        **dict.fromkeys((Tensor.add, Tensor.__add__, Tensor.mul, Tensor.__mul__), _combined),
        **dict.fromkeys((Tensor.sum, Tensor.mean), _reduced),
        torch.cat: _joined,
        torch.stack: lambda parts, dim=0: _joined([part.unsqueeze(dim) for part in parts], dim),
    }

    def __torch_function__(self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return self.ANSWERS.get(func, func)(*args, **(kwargs or {}))
