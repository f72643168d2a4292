"""The device's side of continuous batching: one new token for every row at once, and whole prompts read in one pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.inference.packing import Segment
from megatron_lite.inference.paged import FilledPast, PagedCache, PagedPast, pages_for, places_of
from megatron_lite.inference.rows import NO_TOKEN
from megatron_lite.inference.sample import Rules, choose
from megatron_lite.inference.segments import segmented, to_device
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.stage import Stage

# b rows, n prompts, d hidden size, v rows of the vocabulary on this rank


@dataclass(frozen=True)
class Slots:
    """The rows' state on the device, at fixed addresses. Slots beyond the rows have length 0 and write to page 0, which nobody reads."""

    tokens: Tensor  # [b] the last token of every row, which the model has not seen
    lengths: Tensor  # [b] tokens that it has seen
    going: Tensor  # [b] 1 for a row, 0 for an empty slot
    table: Tensor  # [b pages]

    @classmethod
    def empty(cls, rows: int, *, longest: int, device: torch.device) -> "Slots":
        lengths, going = (torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(2))
        table = torch.zeros(rows, pages_for(longest), dtype=torch.int32, device=device)
        return cls(torch.zeros(rows, dtype=torch.long, device=device), lengths, going, table)

    def fill(self, tokens: Tensor, lengths: Sequence[int], pages: Sequence[Sequence[int]]) -> None:
        """Makes these the rows, without waiting for the device."""
        width, empty = self.table.shape[1], len(self.lengths) - len(lengths)
        self.tokens[: len(lengths)] = tokens
        self.lengths.copy_(to_device([*lengths, *[0] * empty], self.lengths.device, torch.int32))
        self.going.copy_(to_device([*[1] * len(lengths), *[0] * empty], self.going.device, torch.int32))
        flat = [page for held in pages for page in (*held, *[0] * (width - len(held)))]
        self.table.copy_(to_device([*flat, *[0] * (empty * width)], self.table.device, torch.int32).view_as(self.table))


class Stepper:
    """Runs a model of one pipeline stage over the slots. Every rank calls it with the same and gets the same tokens."""

    def __init__(self, stage: Stage, spec: ModelSpec, *, words: int, slots: Slots, pages: int) -> None:
        self.stage = stage
        self.spec = spec
        self.words = words
        self.slots = slots
        self.pages = pages
        self.cache = PagedCache.empty(stage.layers, spec, pages=pages, tp=stage.mesh.tp.size, dtype=stage.dtype, device=stage.mesh.device)

    def read(self, prompts: Sequence[Sequence[int]], pages: Sequence[Sequence[int]], rules: Rules) -> Tensor:
        """The first new token of each prompt [n], whose keys and values go to its pages."""
        device = self.stage.mesh.device
        starts = [sum(map(len, prompts[:index])) for index in range(len(prompts))]
        inner = segmented([Segment(start, len(prompt), ()) for start, prompt in zip(starts, prompts, strict=True)], self.spec, dtype=self.stage.dtype, device=device)
        where = [to_device(each, device) for each in places_of([(len(prompt), held) for prompt, held in zip(prompts, pages, strict=True)])]
        last = to_device([start + len(prompt) - 1 for start, prompt in zip(starts, prompts, strict=True)], device)
        tokens = to_device([token for prompt in prompts for token in prompt], device)
        pasts = {number: self.cache.fill(number, inner, *where) for number in self.cache.keys}
        return self.pick(self.logits_behind(tokens, pasts, last), rules)

    def logits_behind(self, tokens: Tensor, pasts: Mapping[int, FilledPast], last: Tensor) -> Tensor:
        """What follows the tokens at `last` of packed prompts [n v]."""
        x = tokens.unsqueeze(0)
        for number, layer in self.stage.layers.items():
            if number in pasts:
                x = layer(x, pasts[number])
            else:
                x = layer(x[:, last] if number == self.spec.norm_number else x)
        return x.flatten(0, -2)

    def advance(self, rows: int, rules: Rules) -> Tensor:
        """The next token of the first `rows` slots [rows], or NO_TOKEN; it becomes the slot's last one."""
        chosen = self.pick(self.logits(rows), rules)
        self.move(rows, chosen)
        return chosen

    def move(self, rows: int, chosen: Tensor) -> None:
        self.slots.tokens[:rows] = chosen.clamp(min=0)
        self.slots.lengths[:rows] += self.slots.going[:rows]

    def logits(self, rows: int) -> Tensor:
        """What follows the last tokens of the first slots [rows v]."""
        slots = self.slots
        x = slots.tokens[:rows].unsqueeze(1)
        for number, layer in self.stage.layers.items():
            x = layer(x, self.past(number, rows)) if number in self.cache.keys else layer(x)
        return x.flatten(0, -2)

    def close(self) -> None:
        """Lets go of what must not outlive the communicators."""

    def past(self, number: int, rows: int) -> PagedPast:
        return self.cache.step(number, self.slots.table[:rows], self.slots.lengths[:rows])

    def pick(self, logits: Tensor, rules: Rules) -> Tensor:
        """The next tokens [n] from this rank's logits [n v]."""
        tp = self.stage.mesh.tp
        known = tp.gather(logits).float()[:, : self.words]  # rows that only pad the vocabulary were never trained
        chosen = choose(known, rules).where(known.amax(-1).isfinite(), NO_TOKEN)
        return tp.share(chosen, source=0)  # cards may round differently: the first one decides for all

    def gathered(self, offers: Tensor) -> Tensor:
        """What every rank offers [ranks n 2], given this rank's offers [n 2]."""
        tp = self.stage.mesh.tp
        return tp.gather(offers).unflatten(-1, (tp.size, 2)).transpose(0, 1)

    def likeliest(self, logits: Tensor) -> Tensor:
        """The same where every row takes the most likely token: ranks compare their best ones, and no rank sees all logits."""
        tp, width = self.stage.mesh.tp, logits.shape[-1]
        first = tp.index * width
        best, place = logits[:, : max(0, min(width, self.words - first))].float().max(-1)
        if tp.size > 1:
            offers = self.gathered(torch.stack([best, (place + first).float()], -1))  # an id is exact in fp32
            winner = offers[..., 0].argmax(0, keepdim=True)
            place = offers[..., 1].gather(0, winner).squeeze(0).long()
            best = offers[..., 0].sum(0)
        return place.where(best.isfinite(), NO_TOKEN)
