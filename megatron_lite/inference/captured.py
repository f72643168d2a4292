"""The step of continuous batching captured in CUDA graphs, one for each size of batch: the same numbers as the plain step, without its launches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.inference.fused import FusedStack
from megatron_lite.inference.kernels.attention import Scratch, attend_pages
from megatron_lite.inference.kernels.exchange import gather_offers, packets, proven
from megatron_lite.inference.paged import FilledPast, PagedPast
from megatron_lite.inference.reading import Readings
from megatron_lite.inference.sample import Rules
from megatron_lite.inference.step import Slots, Stepper
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layers import LayerNorm, VocabularyEmbedding
from megatron_lite.parallel.peers import connect
from megatron_lite.parallel.stage import Stage

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Batches that are captured; others run in the next larger one, with empty slots."""


def size_for(rows: int) -> int:
    return next(size for size in SIZES if size >= rows)


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

    def __init__(self, stage: Stage, spec: ModelSpec, *, words: int, slots: Slots, pages: int) -> None:
        super().__init__(stage, spec, words=words, slots=slots, pages=pages)
        self.steps: dict[tuple[int, bool], Captured] = {}
        self.scratches: dict[int, Scratch] = {}
        mesh = stage.mesh
        peers = connect(mesh.tp, capacity=packets(SIZES[-1], spec.hidden), programs=SIZES[-1] + 1, device=mesh.device)
        self.peers = proven(peers, mesh.tp, width=spec.hidden, dtype=stage.dtype)
        blocks = [stage.layers[number] for number in self.cache.keys]
        self.pool = torch.cuda.graph_pool_handle() if mesh.device.type == "cuda" else (0, 0)
        self.readings = Readings(self._behind, lambda begin: self._capture(begin, lambda logits: logits).replay, mesh.device)
        last = stage.layers[spec.norm_number].norm
        self.stack = FusedStack.of(blocks, last if isinstance(last, LayerNorm) else None, tp=mesh.tp, peers=self.peers)

    def advance(self, rows: int, rules: Rules) -> Tensor:
        size = size_for(rows)
        if rules.is_greedy:
            return self._captured(size, is_greedy=True).replay()[:rows]
        chosen = self.pick(self._captured(size, is_greedy=False).replay()[:rows], rules)
        self.slots.tokens[:rows] = chosen.clamp(min=0)
        return chosen

    def _captured(self, size: int, *, is_greedy: bool) -> "Captured":
        if (size, is_greedy) not in self.steps:
            self.steps[size, is_greedy] = self._capture(lambda: self.logits(size), self._greedy(size) if is_greedy else self._moved(size))
        return self.steps[size, is_greedy]

    def _capture(self, begin: Callable[[], Tensor], finish: Callable[[Tensor], Tensor]) -> "Captured":
        return Captured.of(begin, finish, pool=self.pool)

    def close(self) -> None:
        """Lets go of the graphs: a communicator that one of them uses cannot be closed."""
        torch.cuda.synchronize()
        self.steps.clear()
        self.readings.replays.clear()

    def _greedy(self, size: int) -> Callable[[Tensor], Tensor]:
        def finish(logits: Tensor) -> Tensor:
            chosen = self.likeliest(logits)
            self.move(size, chosen)
            return chosen

        return finish

    def _moved(self, size: int) -> Callable[[Tensor], Tensor]:
        def finish(logits: Tensor) -> Tensor:
            self.slots.lengths[:size] += self.slots.going[:size]
            return logits

        return finish

    def logits(self, rows: int) -> Tensor:
        if self.stack is None:
            return super().logits(rows)
        x = self._embedding().share(self.slots.tokens[:rows])
        return self._head(self.stack.run(x, [self.past(number, rows) for number in self.cache.keys], self._scratch(rows)))

    def logits_behind(self, tokens: Tensor, pasts: Mapping[int, FilledPast], last: Tensor) -> Tensor:
        return self.readings.read(tokens, pasts, last)

    def _behind(self, tokens: Tensor, pasts: Mapping[int, FilledPast], last: Tensor) -> Tensor:
        if self.stack is None:
            return super().logits_behind(tokens, pasts, last)
        x = self.stage.layers[0](tokens.unsqueeze(0)).squeeze(0)
        return self._head(self.stack.read(x, list(pasts.values()), last))

    def _head(self, normed: Tensor) -> Tensor:
        """[c b d] -> [b v]; several copies where the norms of the saved ranks differ."""
        head = self.stage.layers[self.spec.head_number]
        return head(normed.unsqueeze(2) if len(normed) > 1 else normed[0].unsqueeze(1)).flatten(0, -2)

    def _embedding(self) -> VocabularyEmbedding:
        embedding = self.stage.layers[0].word_embeddings
        assert isinstance(embedding, VocabularyEmbedding)
        return embedding

    def gathered(self, offers: Tensor) -> Tensor:
        return super().gathered(offers) if self.peers is None else gather_offers(offers, self.peers)

    def past(self, number: int, rows: int) -> KernelPast:
        plain = super().past(number, rows)
        return KernelPast(plain.keys, plain.values, plain.table, plain.lengths, self._scratch(rows))

    def _scratch(self, rows: int) -> Scratch:
        """Its counts return to 0 after every launch, so that all blocks share it."""
        if rows not in self.scratches:
            tp, spec = self.stage.mesh.tp.size, self.spec
            self.scratches[rows] = Scratch.empty(rows, spec.heads // tp, max(1, spec.kv_heads // tp), spec.head_dim, self.stage.mesh.device)
        return self.scratches[rows]


@dataclass(frozen=True)
class Captured:
    """A graph, and where it leaves what it computes."""

    graph: torch.cuda.CUDAGraph
    result: Tensor

    @classmethod
    def of(cls, begin: Callable[[], Tensor], finish: Callable[[Tensor], Tensor], *, pool: tuple[int, int]) -> "Captured":
        """Captures finish(begin()). `begin` runs once before, to compile its kernels; it may be repeated, `finish` not."""
        begin()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = finish(begin())
        return cls(graph, result)

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.result
