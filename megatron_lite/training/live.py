"""What is done with the model in the middle of its training, by parts that training does not import: the entry point hands them in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_lite.config.sections import EvaluationSection
from megatron_lite.data.tokenizer import Tokenizer
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.stage import Stage
from megatron_lite.training.engine import Engine

Evaluate = Callable[[Stage, ModelSpec, Tokenizer, EvaluationSection], Mapping[str, float]]
"""Scores the model on eval_tasks: names such as piqa_acc. Called by all ranks, as all of these are."""
Complete = Callable[[Stage, ModelSpec, Tokenizer], Sequence[Mapping[str, object]]]
"""Completes some prompts: the records that generate.py would write."""
Measure = Callable[[Stage, ModelSpec, Sequence[Sequence[int]], int], Sequence[float]]
"""The negative log-probability of every row of tokens behind its first, of a vocabulary of so many words."""


@dataclass(frozen=True)
class Uses:
    """What the live model is used for; None where nobody can."""

    evaluate: Evaluate | None = None
    complete: Complete | None = None
    measure: Measure | None = None


def live_stage(engine: Engine, spec: ModelSpec) -> Stage:
    """The layers that are being trained, as inference knows them."""
    layers = {int(number): layer for number, layer in engine.stage.layers.items()}
    return Stage(layers, engine.mesh, spec.hidden, engine.recipe.dtype)
