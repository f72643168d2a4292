"""The device's side of continuous batching: one new token for every row at once, and whole prompts read in one pass, through all stages of a pipeline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from megatron_lite.inference.packing import Segment
from megatron_lite.inference.paged import FilledPast, PagedCache, PagedPast, pages_for, places_of
from megatron_lite.inference.rows import NO_TOKEN
from megatron_lite.inference.sample import Rules, choose
from megatron_lite.inference.segments import segmented, to_device
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.mesh import Later
from megatron_lite.parallel.stage import Stage

# b rows, n prompts, s tokens of packed prompts, d hidden size, v rows of the vocabulary on this rank


@dataclass(frozen=True)
class Arrival:
    """Tokens that are on their way from the last stage."""

    tokens: Tensor
    later: Later | None = None

    def ready(self) -> Tensor:
        """The tokens; what the device is told from now on waits for them."""
        if self.later is not None:
            self.later.wait()
        return self.tokens


@dataclass
class Slots:
    """A group of rows as the device knows them, at fixed addresses. Slots beyond the rows have length 0 and write to page 0, which nobody reads."""

    tokens: Tensor  # [b] the last token of every row, which the model has not seen
    lengths: Tensor  # [b] tokens that it has seen
    going: Tensor  # [b] 1 for a row, 0 for an empty slot
    table: Tensor  # [b pages]
    coming: Arrival | None = None
    sent: Later | None = None
    number: int = field(default_factory=count().__next__)  # no two are alike, wherever they lie in memory

    @classmethod
    def empty(cls, rows: int, *, longest: int, device: torch.device) -> "Slots":
        lengths, going = (torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(2))
        table = torch.zeros(rows, pages_for(longest), dtype=torch.int32, device=device)
        return cls(torch.zeros(rows, dtype=torch.long, device=device), lengths, going, table)

    def known(self) -> Tensor:
        """The last tokens of all slots, the coming ones included."""
        if self.coming is not None:
            tokens = self.coming.ready()
            self.tokens[: len(tokens)] = tokens.clamp(min=0)
            self.coming = None
        return self.tokens

    def fill(self, tokens: Tensor, lengths: Sequence[int], pages: Sequence[Sequence[int]]) -> None:
        """Makes these the rows, without waiting for the device."""
        width, empty = self.table.shape[1], len(self.lengths) - len(lengths)
        self.tokens[: len(lengths)] = tokens
        self.lengths.copy_(to_device([*lengths, *[0] * empty], self.lengths.device, torch.int32))
        self.going.copy_(to_device([*[1] * len(lengths), *[0] * empty], self.going.device, torch.int32))
        flat = [page for held in pages for page in (*held, *[0] * (width - len(held)))]
        self.table.copy_(to_device([*flat, *[0] * (empty * width)], self.table.device, torch.int32).view_as(self.table))


class Stepper:
    """Runs this stage's part of a model over slots. Every rank calls it with the same and gets the same tokens. A stage hands on what it has and may take up
    the next group of rows while this one is further down the pipeline."""

    def __init__(self, stage: Stage, spec: ModelSpec, *, words: int, pages: int) -> None:
        self.stage = stage
        self.spec = spec
        self.words = words
        self.pages = pages
        self.mesh = stage.mesh
        self.cache = PagedCache.empty(stage.layers, spec, pages=pages, tp=self.mesh.tp.size, dtype=stage.dtype, device=self.mesh.device)

    def read(self, prompts: Sequence[Sequence[int]], pages: Sequence[Sequence[int]], rules: Rules) -> Arrival:
        """The first new token of each prompt [n], whose keys and values go to its pages."""
        device, pp = self.mesh.device, self.mesh.pp
        starts = [sum(map(len, prompts[:index])) for index in range(len(prompts))]
        segments = [Segment(start, len(prompt), ()) for start, prompt in zip(starts, prompts, strict=True)]
        inner = segmented(segments, self.spec, dtype=self.stage.dtype, device=device)
        where = [to_device(each, device) for each in places_of([(len(prompt), held) for prompt, held in zip(prompts, pages, strict=True)])]
        last = to_device([start + len(prompt) - 1 for start, prompt in zip(starts, prompts, strict=True)], device)
        pasts = {number: self.cache.fill(number, inner, *where) for number in self.cache.keys}
        x = to_device([token for prompt in prompts for token in prompt], device) if pp.is_first else self._received(sum(map(len, prompts)))
        out = self.through_prompts(x, pasts, last)
        if not pp.is_last:
            self.mesh.pp.send(out, to=pp.index + 1)
        return self._arrival(self.pick(out, rules) if pp.is_last else None, len(prompts))

    def advance(self, slots: Slots, rows: int, rules: Rules) -> Arrival:
        """The next token of the first `rows` slots [rows], or NO_TOKEN; it becomes the slot's last one."""
        pp, known = self.mesh.pp, slots.known()
        if slots.sent is not None:
            slots.sent.wait()  # what it reads may be written again now
        out = self.through_rows(slots, rows, known[:rows] if pp.is_first else self._received(rows))
        slots.sent = None if pp.is_last else pp.send_later(out, to=pp.index + 1)
        slots.coming = self._arrival(self.pick(out, rules) if pp.is_last else None, rows)
        slots.lengths[:rows] += slots.going[:rows]
        return slots.coming

    def through_rows(self, slots: Slots, rows: int, x: Tensor) -> Tensor:
        """This stage's layers for one token a row: tokens [b] or states [b d] -> states [b d] or logits [b v]."""
        x = x.unsqueeze(1)
        for number, layer in self.stage.layers.items():
            x = layer(x, self.past(slots, number, rows)) if number in self.cache.keys else layer(x)
        return x.flatten(0, -2)

    def through_prompts(self, x: Tensor, pasts: Mapping[int, FilledPast], last: Tensor) -> Tensor:
        """The same for packed prompts: tokens [s] or states [s d] -> states [s d] or the logits of the tokens at `last` [n v]."""
        x = x.unsqueeze(0)
        for number, layer in self.stage.layers.items():
            x = layer(x, pasts[number]) if number in pasts else layer(x[:, last] if number == self.spec.norm_number else x)
        return x.flatten(0, -2)

    def past(self, slots: Slots, number: int, rows: int) -> PagedPast:
        return self.cache.step(number, slots.table[:rows], slots.lengths[:rows])

    def close(self) -> None:
        """Lets go of what must not outlive the communicators."""

    def _received(self, count: int) -> Tensor:
        pp = self.mesh.pp
        return pp.receive(torch.empty(count, self.spec.hidden, dtype=self.stage.dtype, device=self.mesh.device), source=pp.index - 1)

    def _arrival(self, chosen: Tensor | None, count: int) -> Arrival:
        pp = self.mesh.pp
        tokens = torch.empty(count, dtype=torch.long, device=self.mesh.device) if chosen is None else chosen
        return Arrival(tokens, pp.share_later(tokens, source=pp.size - 1) if pp.size > 1 else None)

    def pick(self, logits: Tensor, rules: Rules) -> Tensor:
        """The next tokens [n] from this rank's logits [n v]."""
        if rules.is_greedy:
            return self.likeliest(logits)
        tp = self.mesh.tp
        known = tp.gather(logits).float()[:, : self.words]  # rows that only pad the vocabulary were never trained
        chosen = choose(known, rules).where(known.amax(-1).isfinite(), NO_TOKEN)
        return tp.share(chosen, source=0)  # cards may round differently: the first one decides for all

    def likeliest(self, logits: Tensor) -> Tensor:
        """The same where every row takes the most likely token: ranks compare their best ones, and no rank sees all logits."""
        tp, width = self.mesh.tp, logits.shape[-1]
        first = tp.index * width
        best, place = logits[:, : max(1, min(width, self.words - first))].float().max(-1)
        if first >= self.words:  # rows that only pad the vocabulary: every other offer is better, and their sum a number
            best = torch.full_like(best, torch.finfo(torch.float32).min / tp.size)
        if tp.size > 1:
            offers = self.gathered(torch.stack([best, (place + first).float()], -1))  # an id is exact in fp32
            winner = offers[..., 0].argmax(0, keepdim=True)
            place = offers[..., 1].gather(0, winner).squeeze(0).long()
            best = offers[..., 0].sum(0)
        return place.where(best.isfinite(), NO_TOKEN)

    def gathered(self, offers: Tensor) -> Tensor:
        """What every rank offers [ranks n 2], given this rank's offers [n 2]."""
        tp = self.mesh.tp
        return tp.gather(offers).unflatten(-1, (tp.size, 2)).transpose(0, 1)
