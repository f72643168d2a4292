"""Turns prompts into text, a batch at a time: ragged rows share every step, and each row gets exactly what it would get alone."""

import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from megatron_lite.errors import FitError
from megatron_lite.inference.finite import first_bad_layer
from megatron_lite.inference.request import Codec, Completion, Request
from megatron_lite.inference.rows import NO_TOKEN, Row, Scribe, Watch, uniform_numbers
from megatron_lite.inference.sample import Rules, choose
from megatron_lite.models.cache import Cache
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.stage import Stage


class Decoder:
    """Continues prompts with one model. Every rank calls it with the same requests and gets the same completions. Of a pipeline one stage works at a time,
    on all rows: pipe_schedule is naive here whatever it says."""

    def __init__(
        self, stage: Stage, spec: ModelSpec, tokenizer: Codec, *, context: int, rows: int | None = None, keep_logits: bool = False, recompute: bool = False
    ) -> None:  # fmt: skip
        self.stage = stage
        self.spec = spec
        self.tokenizer = tokenizer
        self.scribe = Scribe(tokenizer, spec.dtype, partial(first_bad_layer, stage), keep_logits)
        self.context = context
        self.rows = rows
        self.keep_logits = keep_logits
        self.recompute = recompute

    def complete(self, requests: Sequence[Request], *, watch: Watch | None = None) -> Iterator[Completion]:
        """Completions as they finish, `rows` prompts after the other. Prompts must not be longer than the context. `watch` sees every row's tokens grow."""
        size = self.rows or len(requests) or 1
        for first in range(0, len(requests), size):
            yield from self._complete(requests[first : first + size], watch)

    def close(self) -> None:
        """Nothing outlives this."""

    def _complete(self, requests: Sequence[Request], watch: Watch | None) -> Iterator[Completion]:
        started = time.monotonic()
        rows = [Row(request, min(request.sampling.maximum_tokens, self.context - len(request.tokens))) for request in requests]
        for row in rows:
            if row.limit <= 0:
                row.seconds = 0.0
                yield self.scribe.completion(row)
        rows = [row for row in rows if not row.is_done]
        if not rows:
            return
        try:
            for row in self._continue(rows, watch):
                row.seconds = time.monotonic() - started
                yield self.scribe.completion(row)
        except torch.OutOfMemoryError as error:
            raise FitError(
                f"generating {len(rows)} rows at once does not fit in the memory of {self.stage.mesh.device}: {str(error).splitlines()[0]}; "
                "use a smaller generation_batch_size or maximum_tokens, or spread the model over more GPUs"
            ) from None

    @torch.inference_mode()
    def _continue(self, rows: list[Row], watch: Watch | None) -> Iterator[Row]:
        """Rows as they end: at the end of text, a stop string or their limit."""
        text, lengths = self._prompts(rows)
        steps = max(row.limit for row in rows)
        rules = Rules.of([row.request for row in rows], device=text.device)
        draws = torch.from_numpy(np.stack([uniform_numbers(row.request, steps) for row in rows])).to(text.device)
        cache = None if self.recompute else self._cache(*text.shape)
        tokens, counts = text[:, : int(lengths.max())], lengths
        open_rows, going = len(rows), torch.ones_like(lengths)  # 0 for a row that has ended: it stays where it is until the others end too
        for step in range(steps):
            chosen = self._step(tokens, counts, cache, rules.at(draws[:, step]), rows)
            for index, token in enumerate(chosen.tolist()):
                row = rows[index]
                if not row.is_done:
                    self.scribe.take(row, token)
                    if watch:
                        watch(index, row.tokens)
                    if row.has_ended:
                        yield row
            left = [int(not row.is_done) for row in rows]
            if not any(left):
                return
            if sum(left) < open_rows:
                open_rows, going = sum(left), torch.tensor(left, device=text.device)
            tokens, counts = chosen.clamp(min=0).unsqueeze(1), going  # what a row that has ended would say next does not matter
            if cache is None:
                text = text.scatter(1, lengths.unsqueeze(1), tokens)
                lengths = lengths + going
                tokens, counts = text[:, : int(lengths.max())], lengths

    def _prompts(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """The prompts side by side with room for what may follow [b s], and their lengths [b]."""
        lengths = torch.tensor([len(row.request.tokens) for row in rows])
        room = max(len(row.request.tokens) + row.limit for row in rows)
        text = torch.full((len(rows), room), self.tokenizer.eod)
        for index, row in enumerate(rows):
            text[index, : len(row.request.tokens)] = torch.tensor(row.request.tokens)
        device = self.stage.mesh.device
        return text.to(device), lengths.to(device)

    def _cache(self, rows: int, slots: int) -> Cache:
        stage, spec = self.stage, self.spec
        heads = spec.kv_heads_of(stage.mesh.tp.size)
        return Cache.empty(stage.layers, spec, rows=rows, slots=slots, heads=heads, dtype=stage.dtype, device=stage.mesh.device)

    def _step(self, tokens: Tensor, counts: Tensor, cache: Cache | None, rules: Rules, rows: list[Row]) -> Tensor:
        """The next token of every row [b], having seen its first `counts` [b] of `tokens` [b s]."""
        length = tokens.shape[1]
        last = (counts - 1).clamp(min=0)

        def visit(number: int, layer: nn.Module, x: Tensor) -> Tensor:
            if cache is not None and number in cache.keys:
                return layer(x, cache.layer(number, length))
            if number == self.spec.norm_number:  # only the last position of a row says something about its next token
                x = x[torch.arange(len(x), device=x.device), last].unsqueeze(1)
            return layer(x)

        def finish(logits: Tensor) -> Tensor:
            words = self.stage.mesh.tp.gather(logits.squeeze(1).contiguous()).float()
            known = words[:, : self.tokenizer.vocab_size]  # rows that only pad the vocabulary were never trained
            chosen = choose(known, rules).where(known.amax(-1).isfinite(), NO_TOKEN)
            return torch.cat([chosen.unsqueeze(1).double(), words.double()], 1) if self.keep_logits else chosen

        width = [self.spec.vocab + 1] if self.keep_logits else []
        kind = torch.double if self.keep_logits else torch.long
        answer = torch.empty([len(tokens), *width], dtype=kind, device=tokens.device)
        result = self.stage.run(tokens, visit, finish=finish, answer=answer)
        if cache is not None:
            cache.advance(counts, length)
        if not self.keep_logits:
            return result
        for row, values in zip(rows, result[:, 1:].float().tolist(), strict=True):
            if not row.is_done:
                row.logits.append(values)
        return result[:, 0].long()
