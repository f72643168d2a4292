"""What an evaluation asks of a model, as orders that every rank performs together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, cast

from tqdm import tqdm

from megatron_lite.data.tokenizer import Tokenizer
from megatron_lite.inference.decode import Decoder
from megatron_lite.inference.packing import TokenRequest
from megatron_lite.inference.request import Codec, Request
from megatron_lite.inference.score import Score, Scorer
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.stage import Stage


@dataclass(frozen=True)
class Scoring:
    """How likely are these continuations? `documents` is how many questions they belong to."""

    requests: Sequence[TokenRequest]
    documents: int


@dataclass(frozen=True)
class Writing:
    """How does the model go on from these prompts? Requests are numbered from 0."""

    requests: Sequence[Request]


Order = Scoring | Writing
Answer = list[Score] | list[str]


class Worker:
    """Performs orders with the part of a model that lives here. `rows` texts are written at once, `tokens` scored at once (None: what suits the device)."""

    def __init__(self, stage: Stage, spec: ModelSpec, tokenizer: Tokenizer, *, rows: int, tokens: int | None) -> None:
        self.mesh = stage.mesh
        self.rows = rows
        self.scorer = Scorer(stage, spec, words=tokenizer.vocab_size, tokens=tokens)
        self.decoder = Decoder(stage, spec, cast(Codec, tokenizer), context=spec.max_positions)

    def __call__(self, order: Order) -> Answer:
        return self._score(order) if isinstance(order, Scoring) else self._write(order)

    def _score(self, order: Scoring) -> list[Score]:
        each = order.documents / max(1, len(order.requests))
        with self._bar("scoring", order.documents) as bar:
            return self.scorer.score(order.requests, lambda count: bar.update(min(count * each, order.documents - bar.n)))

    def _write(self, order: Writing) -> list[str]:
        """The replicas share the prompts; of similar length are those that are continued together."""
        dp = self.mesh.dp
        mine = sorted(order.requests, key=lambda request: len(request.tokens), reverse=True)[dp.index :: dp.size]
        texts: dict[int, str] = {}
        with self._bar("writing", len(order.requests)) as bar:
            for first in range(0, len(mine), self.rows):
                for completion in self.decoder.complete(mine[first : first + self.rows]):
                    texts[completion.request.id] = completion.text or ""
                    bar.update(dp.size)
        gathered = {number: text for part in dp.gather_objects(texts) for number, text in part.items()}
        return [gathered[request.id] for request in order.requests]

    def _bar(self, verb: str, total: int) -> "tqdm[NoReturn]":
        form = "{l_bar}{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]"
        return tqdm(total=total, unit=" documents", desc=verb, disable=not self.mesh.is_writer, leave=False, mininterval=0.5, bar_format=form)
