"""How likely a model finds given continuations: requests are packed, dealt to the replicas, and every rank gets all answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_lite.errors import DataError
from megatron_lite.inference.packing import KEYS_PER_TOKEN, Packed, TokenRequest, deal, inputs_of, pack
from megatron_lite.inference.segments import segmented, to_device
from megatron_lite.models.spec import BYTES, ModelSpec
from megatron_lite.parallel.budget import free_memory, least
from megatron_lite.parallel.probability import word_scores
from megatron_lite.parallel.stage import Stage

Progress = Callable[[float], object]
"""Told how many more requests are answered, about."""

TOKENS_AT_ONCE = {"cuda": 16384, "cpu": 2048}
LOGITS_AT_ONCE = 1 << 26  # 256 MB in fp32


@dataclass(frozen=True)
class Score:
    """The log-probability of a continuation, and whether greedy decoding would have written it."""

    logprob: float
    is_greedy: bool


class Scorer:
    """Scores continuations with one model. Every rank calls it with the same requests and gets the same scores.

    `words` are the entries of the vocabulary without padding. `tokens` go through the model at once; None takes what suits the device.
    """

    def __init__(self, stage: Stage, spec: ModelSpec, *, words: int, tokens: int | None = None) -> None:
        self.stage = stage
        self.spec = spec
        self.words = words
        # agreed on by all: each deals out the same batches, and takes its own
        self.tokens = tokens or least(stage.mesh, tokens_at_once(spec, stage.mesh.tp.size, stage.mesh.device), of_all=True)

    @torch.inference_mode()
    def score(self, requests: Sequence[TokenRequest], progress: Progress = lambda count: None) -> list[Score]:
        """One score for each request, in their order."""
        check_requests(requests, context=self.spec.max_positions)
        mesh = self.stage.mesh
        sums = torch.zeros(len(requests), 2, dtype=torch.float64, device=mesh.device)
        if requests:
            inputs = inputs_of(requests, context=self.spec.max_positions)
            mine = deal(inputs, budget=self.tokens, replicas=mesh.dp.size)[mesh.dp.index :: mesh.dp.size]
            for packed in paced(map(pack, mine), mesh.device):
                self._add(sums, packed)
                progress(len(requests) / len(mine))
        sums = mesh.pp.share(mesh.tp.share(sums, source=0), source=mesh.pp.size - 1)
        sums = mesh.dp.gather(sums).unflatten(-1, (mesh.dp.size, 2)).sum(1)  # a replica has zeros where another has the answer
        return [Score(logprob, greedy == len(request.continuation)) for request, (logprob, greedy) in zip(requests, sums.tolist(), strict=True)]

    def _add(self, sums: Tensor, packed: Packed) -> None:
        """Adds the scores of a batch's tokens to those of the requests [requests 2], on the last stage."""
        device = self.stage.mesh.device
        past = segmented(packed.segments, self.spec, dtype=self.stage.dtype, device=device)
        tokens, places, targets, owners = (to_device(each, device) for each in (packed.tokens, packed.places, packed.targets, packed.owners))

        def visit(number: int, layer: nn.Module, x: Tensor) -> Tensor:
            if self.spec.is_block(number):
                return layer(x, past)
            if number == self.spec.norm_number:
                return layer(x[:, places])
            if number == self.spec.head_number:
                return self._words(layer, x, targets)
            return layer(x)

        scores = self.stage.pass_through(tokens.unsqueeze(0), visit)
        if scores is not None:
            sums.index_add_(0, owners, scores.double())

    def _words(self, head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        """[n 2] from the normed states [.. 1 n d], a few at a time: the logits of a whole batch would be the largest tensor by far."""
        tp = self.stage.mesh.tp
        count = max(1, LOGITS_AT_ONCE * tp.size // self.spec.vocab)
        parts = zip(x.split(count, -2), targets.split(count), strict=True)
        return torch.cat([word_scores(head(states).squeeze(0), these, words=self.words, tp=tp) for states, these in parts])


def paced(batches: Iterator[Packed], device: torch.device) -> Iterator[Packed]:
    """The batches, each as soon as the one before the last is computed: the GPU always has work waiting, but we do not run far ahead of it."""
    marks: list[torch.cuda.Event] = []
    for packed in batches:
        yield packed
        if device.type == "cuda":
            marks.append(torch.cuda.Event())
            marks[-1].record()
            if len(marks) > 1:
                marks.pop(0).synchronize()


def check_requests(requests: Sequence[TokenRequest], *, context: int) -> None:
    for request in requests:
        if not request.context or not request.continuation:
            raise DataError(
                "a request to be scored has an empty context or continuation; both need at least one token, check the task's doc_to_text and doc_to_target"
            )
        if len(request.continuation) > context:
            raise DataError(
                f"a continuation of {len(request.continuation)} tokens is to be scored, but the model has {context} positions (max_position_embeddings); "
                "leave out the task, or shorten its answers"
            )


def tokens_at_once(spec: ModelSpec, tp: int, device: torch.device) -> int:
    """How many tokens a batch may have on this device: many fill a GPU, but their activations must fit in a half of the memory that is free."""
    most = TOKENS_AT_ONCE[device.type]
    if device.type != "cuda":
        return most
    widest = 3 * spec.hidden + (3 * spec.hidden + 2 * spec.ffn) // tp + 2 * KEYS_PER_TOKEN * spec.heads * spec.head_dim // tp
    return max(spec.max_positions, min(most, free_memory(device) // 2 // (widest * BYTES[spec.dtype])))
