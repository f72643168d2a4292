"""Attention over a packed row, where every segment sees only its own text: a plain way, and on GPUs one kernel for all of them, torch's or ours."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import accumulate, chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.inference.packing import Segment
from megatron_lite.models.cache import Past, causal_mix
from megatron_lite.models.spec import ModelSpec

# s tokens in the row, h heads on this rank, d head size, n segments of one shape, l tokens in each, c keys that they see

HALVES = (torch.float16, torch.bfloat16)
Attend = Callable[[tuple[Tensor, Tensor, Tensor], Tensor, int], Tensor]


def segmented(segments: Sequence[Segment], spec: ModelSpec, *, dtype: torch.dtype, device: torch.device) -> Past:
    """What a block needs to know of the segments; they cover the row in order."""
    kind = FlashSegments if has_flash(dtype, spec.head_dim, device) else PlainSegments
    return kind.of(segments, device)


def has_flash(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether torch's attention over segments of any length serves this model here."""
    if device.type != "cuda" or dtype not in HALVES or head_dim % 8 or head_dim > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and torch.backends.cuda.is_flash_attention_available()


@cache
def _own_attention(dtype: torch.dtype) -> Attend | None:
    """Attention over texts of their own by our kernel, with heads of up to 256 numbers; None where it was not measured against torch's."""
    if dtype not in HALVES or find_spec("triton") is None:
        return None
    from megatron_lite.inference.kernels.packed import attend_packed, serves

    return attend_packed if serves() else None


def own_mix(heads: tuple[Tensor, Tensor, Tensor], positions: Tensor, texts: int) -> Tensor | None:
    """What queries see of keys and values, `heads`, each [1 h s d], in a row of so many texts of their own, by our kernel; None where it does not serve."""
    attend = _own_attention(heads[0].dtype)
    if attend is None:
        return None
    query, key, value = (x[0].transpose(0, 1) for x in heads)
    return attend((query, key, value), positions[0], texts).transpose(0, 1).unsqueeze(0)


def to_device(values: Sequence[float] | np.ndarray, device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Numbers on the device, without waiting for what the device is doing."""
    tensor = torch.from_numpy(np.asarray(values)).to(dtype)  # numpy takes a long list in a fraction of torch's time
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def positions_of(segments: Sequence[Segment], device: torch.device) -> Tensor:
    """[1 s]: where each token of the row stands in its own text."""
    spans = [np.arange(segment.position, segment.position + segment.length) for segment in segments]
    return to_device(np.concatenate(spans), device).unsqueeze(0)


@dataclass(frozen=True)
class PlainSegments:
    """Segments of one shape are attended to together, shape by shape: the places of their queries [n l] and of the keys that they see [n c]."""

    positions: Tensor
    shapes: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> "PlainSegments":
        alike: dict[tuple[int, int], list[Segment]] = defaultdict(list)
        for segment in segments:
            alike[segment.position, segment.length].append(segment)
        shapes = []
        for same in alike.values():
            queries = torch.tensor([segment.path[-1] for segment in same], device=device)
            keys = torch.tensor([list(chain.from_iterable(segment.path)) for segment in same], device=device)
            shapes.append((queries, keys))
        return cls(positions_of(segments, device), shapes)

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = torch.empty_like(query)
        grouped = query.shape[1] != key.shape[1]
        for queries, keys in self.shapes:
            q, k, v = (x[0][:, places].transpose(0, 1) for x, places in ((query, queries), (key, keys), (value, keys)))  # n h l d, n h c d
            if q.shape[2] == k.shape[2]:
                found = causal_mix(q, k, v)
            else:
                seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
                found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
            mixed[0][:, queries] = found.transpose(0, 1)
        return mixed


@dataclass(frozen=True)
class FlashSegments:
    """One kernel for all segments. `keys` are the places of what each sees, one after the other; None where every segment is a text of its own: then there
    are about so many `texts`, which our kernel tells apart by the positions, and torch's by the starts."""

    positions: Tensor
    texts: int
    starts: Tensor
    longest: int
    keys: Tensor | None
    key_starts: Tensor
    most_keys: int

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> "FlashSegments":
        lengths = [segment.length for segment in segments]
        counts = [segment.position + segment.length for segment in segments]
        starts, key_starts = (to_device([0, *accumulate(each)], device, torch.int32) for each in (lengths, counts))
        keys = to_device([place for segment in segments for part in segment.path for place in part], device) if counts != lengths else None
        return cls(positions_of(segments, device), len(segments), starts, max(lengths), keys, key_starts, max(counts))

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = own_mix((query, key, value), self.positions, self.texts) if self.keys is None else None
        if mixed is not None:
            return mixed
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # s h d
        if self.keys is not None:
            key, value = key[self.keys], value[self.keys]
        if query.shape[1] != key.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        # what torch.nn.attention.varlen calls; that module imports torch's compiler, which takes seconds
        attend, no_dropout, is_causal, for_debugging = torch.ops.aten._flash_attention_forward, 0.0, True, False
        found = attend(query, key, value, self.starts, self.key_starts, self.longest, self.most_keys, no_dropout, is_causal, for_debugging)
        return found[0].transpose(0, 1).unsqueeze(0)
