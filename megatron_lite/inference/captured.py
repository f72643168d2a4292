"""The steps of continuous batching captured in CUDA graphs, one for each size of batch: the same numbers as the plain steps, without their launches."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_lite.inference.fused import FusedStack
from megatron_lite.inference.graphs import Graphs
from megatron_lite.inference.kernels.attention import Scratch, attend_pages
from megatron_lite.inference.kernels.exchange import gather_offers, packets, proven
from megatron_lite.inference.kernels.shares import shares_proven
from megatron_lite.inference.paged import FilledPast, PagedPast
from megatron_lite.inference.reading import LENGTHS, Readings
from megatron_lite.inference.sample import Rules
from megatron_lite.inference.step import Arrival, Slots, Stepper
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layers import LayerNorm, VocabularyEmbedding
from megatron_lite.parallel.peers import Shares, box_bytes, connect, share_bytes, shares_of
from megatron_lite.parallel.stage import Stage

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
"""Batches that are captured; others run in the next larger one, with empty slots."""

HIDDEN_LAUNCHES = int(3e11)
"""Parameters of a block times tokens that it reads, from which on its products take an H200 longer than its launches a host (1 ms)."""
PROGRAMS = SIZES[-1] + 1
"""Of an exchange: one for each row, and one that compares the rows' best tokens."""
SHARED = LENGTHS[-1]
"""Prompt tokens that are summed in memory that GPUs share, at most."""


def capacity_of(spec: ModelSpec) -> int:
    """Packets of an exchange of steps."""
    return packets(SIZES[-1], spec.hidden)


def lays_shares(ranks: int) -> bool:
    """More than two GPUs would read the shares of all others, which takes longer than the library's sum."""
    return ranks == 2


def exchanging(spec: ModelSpec, ranks: int) -> int:
    """Bytes in which GPUs of so many tensor-parallel ranks exchange what they compute, where they reach each other's memory."""
    shares = share_bytes(SHARED, spec.hidden, getattr(torch, spec.dtype)) if lays_shares(ranks) else 0
    return box_bytes(ranks, capacity_of(spec)) + shares if ranks > 1 else 0


def size_in(slots: Slots, rows: int) -> int:
    """Rows of the step that these rows take part in: kernels must find a slot for each."""
    return min(next(size for size in SIZES if size >= rows), len(slots.tokens))


@dataclass(frozen=True)
class KernelPast(PagedPast):
    """The same attention in one launch, which takes any lengths when it is replayed."""

    scratch: Scratch

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (each.squeeze(2) for each in (query, key, value))
        mixed = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        attend_pages((query, key, value), (self.keys, self.values), self.table, self.lengths, mixed, self.scratch)
        return mixed.unsqueeze(2)


class CapturedStepper(Stepper):
    """A Stepper on a GPU. Blocks with parallel residuals run as fused ones, others as they are."""

    def __init__(self, stage: Stage, spec: ModelSpec, *, words: int, pages: int) -> None:
        super().__init__(stage, spec, words=words, pages=pages)
        mesh, norm = stage.mesh, stage.layers.get(spec.norm_number)
        peers = connect(mesh.tp, capacity=capacity_of(spec), programs=PROGRAMS, device=mesh.device)
        self.peers = proven(peers, mesh.tp, width=spec.hidden, dtype=stage.dtype)
        last = norm.norm if norm is not None and isinstance(norm.norm, LayerNorm) else None
        blocks = [stage.layers[number] for number in self.cache.keys]
        stack = FusedStack.of(blocks, last, tp=mesh.tp, peers=self.peers) if last or norm is None else None
        self.stack = replace(stack, shares=self._shares()) if stack is not None else None
        self.graphs = Graphs(mesh.device)
        self.readings = Readings(self._read, self.graphs.capture, mesh.device, most=HIDDEN_LAUNCHES // max(parameters_of_a_block(stage, spec), 1))
        self.scratches: dict[int, Scratch] = {}

    def advance(self, slots: Slots, rows: int, rules: Rules) -> Arrival:
        if self.mesh.pp.size > 1 or not rules.is_greedy:
            return super().advance(slots, rows, rules)
        size = size_in(slots, rows)
        slots.known()  # from here on the graph itself leaves its tokens in their slots
        return Arrival(
            self.graphs.replay((slots.number, size, True), lambda: self._rows(slots, size, slots.tokens[:size]), lambda out: self._move(slots, out))[:rows]
        )

    def _move(self, slots: Slots, logits: Tensor) -> Tensor:
        chosen = self.likeliest(logits)
        slots.tokens[: len(chosen)] = chosen.clamp(min=0)
        slots.lengths[: len(chosen)] += slots.going[: len(chosen)]
        return chosen

    def through_rows(self, slots: Slots, rows: int, x: Tensor) -> Tensor:
        size = size_in(slots, rows)
        key = (slots.number, size, False)
        if key not in self.graphs.inputs:
            self.graphs.inputs[key] = x.new_zeros(size, *x.shape[1:])
        place = self.graphs.inputs[key]
        place[:rows] = x
        out = self.graphs.replay(key, lambda: self._rows(slots, size, place), lambda out: out)[:rows]
        return out if self.mesh.pp.is_last else out.clone()  # another group's graph may use this memory before it is sent

    def through_prompts(self, x: Tensor, pasts: Mapping[int, FilledPast], last: Tensor) -> Tensor:
        return self.readings.read(x, pasts, last) if self.mesh.pp.size == 1 else self._read(x, pasts, last)

    def gathered(self, offers: Tensor) -> Tensor:
        return super().gathered(offers) if self.peers is None else gather_offers(offers, self.peers)

    def past(self, slots: Slots, number: int, rows: int) -> KernelPast:
        plain = super().past(slots, number, rows)
        return KernelPast(plain.keys, plain.values, plain.table, plain.lengths, self._scratch(rows))

    def close(self) -> None:
        """Lets go of the graphs: a communicator that one of them uses cannot be closed."""
        torch.cuda.synchronize()
        self.graphs.clear()
        self.readings.replays.clear()

    def _rows(self, slots: Slots, rows: int, x: Tensor) -> Tensor:
        """One token a row: tokens [b] or states [b d] -> states [b d] or logits [b v]."""
        if self.stack is None:
            return super().through_rows(slots, rows, x)
        x, is_share = (self._embedding().share(x), True) if self.mesh.pp.is_first else (x, False)
        out = self.stack.run(x, [self.past(slots, number, rows) for number in self.cache.keys], self._scratch(rows), is_share=is_share)
        return self._head(out) if self.mesh.pp.is_last else out[0]

    def _read(self, x: Tensor, pasts: Mapping[int, FilledPast], last: Tensor) -> Tensor:
        if self.stack is None:
            return super().through_prompts(x, pasts, last)
        x = self._embedding()(x) if self.mesh.pp.is_first else x
        return self._head(self.stack.read(x, list(pasts.values()), last)) if self.mesh.pp.is_last else self.stack.pass_on(x, list(pasts.values()))

    def _head(self, normed: Tensor) -> Tensor:
        """[c b d] -> [b v]; several copies where the norms of the saved ranks differ."""
        head = self.stage.layers[self.spec.head_number]
        return head(normed.unsqueeze(2) if len(normed) > 1 else normed[0].unsqueeze(1)).flatten(0, -2)

    def _embedding(self) -> VocabularyEmbedding:
        embedding = self.stage.layers[0].word_embeddings
        assert isinstance(embedding, VocabularyEmbedding)
        return embedding

    def _shares(self) -> Shares | None:
        """Where ranks lay what they compute for prompts."""
        tp, device = self.mesh.tp, self.mesh.device
        if self.peers is None or not lays_shares(tp.size):
            return None
        return shares_proven(shares_of(tp, rows=SHARED, width=self.spec.hidden, dtype=self.stage.dtype, device=device), tp)

    def _scratch(self, rows: int) -> Scratch:
        """Its counts return to 0 after every launch, so that all blocks share it."""
        if rows not in self.scratches:
            tp, spec = self.mesh.tp.size, self.spec
            self.scratches[rows] = Scratch.empty(rows, spec.heads // tp, spec.kv_heads_of(tp), spec.head_dim, self.mesh.device)
        return self.scratches[rows]


def parameters_of_a_block(stage: Stage, spec: ModelSpec) -> int:
    """On this rank; 0 where the stage has no block."""
    return max((sum(each.numel() for each in layer.parameters()) for number, layer in stage.layers.items() if spec.is_block(number)), default=0)
