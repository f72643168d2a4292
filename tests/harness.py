"""The same tasks through lm-eval's own model for transformers and through ours, on the same weights, to be compared request by request."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.checkpoint.find import CheckpointLayout, find_checkpoint
from megatron_lite.config.load import load_config
from megatron_lite.config.sections import EvaluationSection
from megatron_lite.data.tokenizer import Tokenizer, load_tokenizer
from megatron_lite.evaluation.evaluate import evaluate
from megatron_lite.evaluation.quiet import quiet_harness
from megatron_lite.evaluation.results import Results
from megatron_lite.evaluation.tasks import find_tasks
from megatron_lite.models.spec import ModelSpec, spec_of
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from tests.models import SMALL, in_transformers, load, write_random
from tests.worlds import in_world

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "checkpoints" / "tiny" / "tokenizer.json"
WORDS = 4096  # of the bundled model's tokenizer

# Random models that differ in everything that NeoX models differ in, with the vocabulary of the bundled model's tokenizer
RANDOM_MODELS = {
    "parallel residual": replace(SMALL, layers=2, vocab=WORDS, max_positions=512),
    "sequential residual, erf, full rotary": replace(
        SMALL,
        layers=2,
        hidden=48,
        heads=6,
        kv_heads=6,
        head_dim=8,
        ffn=96,
        rotary_dim=8,
        vocab=WORDS,
        max_positions=512,
        parallel_residual=False,
        activation="gelu",
    ),
    "short, tied head": replace(SMALL, layers=3, hidden=32, heads=2, kv_heads=2, ffn=128, vocab=WORDS, max_positions=336, tied_head=True),
}


@dataclass(frozen=True)
class Model:
    """Weights on disk and what they are."""

    layout: CheckpointLayout
    spec: ModelSpec


def bundled_model() -> Model:
    config = load_config([ROOT / "configs" / "tiny.yml"], {})
    return Model(find_checkpoint(ROOT / "checkpoints" / "tiny"), spec_of(config.model, vocab=WORDS, dtype="float32"))


def random_model(name: str, folder: Path) -> Model:
    return Model(write_random(folder, RANDOM_MODELS[name], tp=2, seed=len(name)), RANDOM_MODELS[name])


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(load_config([ROOT / "configs" / "tiny.yml"], {"vocab_file": str(TOKENIZER)}).tokenizer)


def through_transformers(model: Model, settings: EvaluationSection) -> dict[str, Results]:
    """Results of every task by lm-eval's HFLM."""
    from lm_eval.models import huggingface
    from transformers import PreTrainedTokenizerFast

    harness: Any = huggingface.HFLM  # Any: its constructor is hidden behind a decorator
    words = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    return through(harness(pretrained=in_transformers(model.layout, model.spec), tokenizer=words, batch_size=16, device="cpu"), settings)


def through(model: Any, settings: EvaluationSection) -> dict[str, Results]:
    """Results of every task by any of lm-eval's models."""
    from lm_eval.evaluator import evaluate as evaluate_with_harness

    found: dict[str, Results] = {}
    with quiet_harness():
        for unit in find_tasks(settings):
            random.seed(0)
            np.random.seed(1234)
            results = evaluate_with_harness(lm=model, task_dict=unit.loaded, limit=settings.limit, bootstrap_iters=settings.bootstrap_iters, log_samples=True)
            found[unit.name] = dict(results or {})
    return found


def through_ours(model: Model, settings: EvaluationSection, mesh: Layout | None = None) -> dict[str, Results]:
    """Results of every task by our scorer in this layout. Every rank must have returned the same numbers."""

    def on_every_rank(place: Mesh) -> tuple[dict[str, float], list[Results]]:
        kept: list[Results] = []
        stage = load(model.layout, model.spec, place)
        return evaluate(stage, model.spec, tokenizer(), settings, keep=lambda results, seconds: kept.append(results)), kept

    found = in_world(mesh or Layout(), on_every_rank)
    assert all(values == found[0][0] for values, _ in found)
    assert all(kept == [] for _, kept in found[1:])
    return {next(iter(results["results"])): results for results in found[0][1]}


def answers(results: Results, task: str) -> list[Any]:
    """Every response to every request of a task, in order."""
    return [response for sample in results["samples"][task] for request in sample["resps"] for response in request]


def compare(ours: Mapping[str, Results], theirs: Mapping[str, Results], *, tolerance: float = 1e-3) -> float:
    """Asserts that log-probabilities agree and that judgements are the same. Returns the largest difference between log-probabilities."""
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for task in ours:
        pairs = list(zip(answers(ours[task], task), answers(theirs[task], task), strict=True))
        worst = max(worst, *(abs(mine[0] - other[0]) for mine, other in pairs))
        assert worst < tolerance, task
        assert [mine[1] for mine, _ in pairs] == [other[1] for _, other in pairs], task
        for key, value in theirs[task]["results"][task].items():
            if key.startswith("acc"):
                assert ours[task]["results"][task][key] == value, key
            elif isinstance(value, float):
                assert abs(ours[task]["results"][task][key] - value) <= 2e-3 * abs(value), key
    return worst
