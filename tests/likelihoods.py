"""The log-probability of every token of given texts, behind the ones before it: by one plain pass, by the pass that reads prompts, and by single steps."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.data.tokenizer import Tokenizer
from megatron_lite.inference.paged import pages_for
from megatron_lite.inference.sample import Rules
from megatron_lite.inference.step import Slots, Stepper
from megatron_lite.parallel.stage import Stage

# n texts, s tokens in each, v words

PLAY = Path(__file__).resolve().parents[1] / "examples" / "romeo-and-juliet.txt"


def play(texts: int, tokenizer: Tokenizer) -> Tensor:
    """2,000 tokens of a play, in so many texts."""
    return torch.tensor(tokenizer.encode(PLAY.read_text(encoding="utf-8")[:20000])[:2000]).view(texts, -1)


def by_one_pass(stage: Stage, texts: Tensor, words: int) -> Tensor:
    """[n s] -> [n s-1], by the plain path."""
    with torch.inference_mode():
        logits = stage.pass_through(texts.to(stage.mesh.device), lambda number, layer, x: layer(x))
    assert logits is not None
    return chosen(logits[:, :-1], texts[:, 1:], words)


@torch.inference_mode()
def by_reading(stepper: Stepper, texts: Tensor) -> Tensor:
    """The same as prompts of one row, of which all logits are asked for instead of the last ones."""
    last_only = stepper.through_prompts
    stepper.through_prompts = lambda x, pasts, last: last_only(x, pasts, torch.arange(len(x), device=x.device))
    logits = first_logits(stepper, texts.tolist(), pages_of(texts))
    del stepper.through_prompts
    return chosen(logits.unflatten(0, texts.shape)[:, :-1], texts[:, 1:], stepper.words)


@torch.inference_mode()
def by_steps(stepper: Stepper, texts: Tensor) -> Tensor:
    """The same token by token: all texts share every step."""
    device, count = stepper.mesh.device, len(texts)
    slots = Slots.empty(count, longest=texts.shape[1], device=device)
    found = [first_logits(stepper, texts[:, :1].tolist(), pages_of(texts))]
    slots.fill(texts[:, 1].to(device), [1] * count, pages_of(texts))
    for tokens in texts[:, 1:-1].to(device).unbind(1):
        found.append(stepper.through_rows(slots, count, tokens).clone())
        slots.lengths += slots.going
    return chosen(torch.stack(found, 1), texts[:, 1:], stepper.words)


def first_logits(stepper: Stepper, prompts: Sequence[Sequence[int]], pages: Sequence[Sequence[int]]) -> Tensor:
    """What a stepper finds behind prompts, before it picks a token."""
    stepper.pick = lambda logits, rules: logits
    logits = stepper.read(prompts, pages, Rules.of([], device=stepper.mesh.device)).tokens
    del stepper.pick
    return logits


def pages_of(texts: Tensor) -> list[list[int]]:
    each = pages_for(texts.shape[1])
    return [list(range(1 + each * number, 1 + each * (number + 1))) for number in range(len(texts))]


def pages_in_all(texts: Tensor) -> int:
    return 1 + len(texts) * pages_for(texts.shape[1])


def chosen(logits: Tensor, tokens: Tensor, words: int) -> Tensor:
    """The log-probabilities in fp32 of tokens [n s], of logits [n s v] that are followed by them."""
    return logits[..., :words].float().log_softmax(-1).gather(-1, tokens.to(logits.device).unsqueeze(-1)).squeeze(-1).cpu()


def furthest(stage: Stage, stepper: Stepper, texts: Tensor) -> dict[str, float]:
    """How far log-probabilities by reading and by steps are from those of the plain path, at most, in nats."""
    plain = by_one_pass(stage, texts, stepper.words)
    assert plain.isfinite().all()
    ways = {"reading": partial(by_reading, stepper), "steps": partial(by_steps, stepper)}
    return {name: (way(texts) - plain).abs().max().item() for name, way in ways.items()}
