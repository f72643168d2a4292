"""Evaluates a model that is there, after loading or in the middle of training, on tasks of lm-eval."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from megatron_lite.config.sections import EvaluationSection
from megatron_lite.data.tokenizer import Tokenizer
from megatron_lite.evaluation.quiet import quiet_harness
from megatron_lite.evaluation.results import Results, flat
from megatron_lite.evaluation.tasks import Unit, find_tasks
from megatron_lite.evaluation.work import Answer, Order, Worker
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.lead import led
from megatron_lite.parallel.stage import Stage

Keep = Callable[[Results, float], object]
"""Told the results of every task or group as soon as it is finished, and the seconds it took; on the writer only."""


def evaluate(
    stage: Stage,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    settings: EvaluationSection,
    *,
    units: Sequence[Unit] | None = None,
    rows: int = 16,
    seed: int = 1234,
    cache: Path | None = None,
    keep: Keep = lambda results, seconds: None,
) -> dict[str, float]:
    """`{task}_{metric}` -> value, on every rank; all of them call it. The model and the random numbers of its training are left as they were.

    `units` are the tasks, found before, if the writer has them; None finds those that the settings name. `cache` is a file of answers of these very weights.
    """
    worker = Worker(stage, spec, tokenizer, rows=rows, tokens=settings.eval_batch_tokens)

    def lead(give: Callable[[Order], Answer]) -> dict[str, float]:
        found = find_tasks(settings) if units is None else units  # first: it may tell the hub's libraries, before they are imported, not to try
        from megatron_lite.evaluation.adapter import HarnessModel

        model = HarnessModel(give, tokenizer, context=spec.max_positions, seed=seed)
        values: dict[str, float] = {}
        with quiet_harness(), _cached(model, cache) as answering:
            for unit in found:
                started = time.monotonic()
                results = _evaluate_unit(answering, unit, settings)
                keep(results, time.monotonic() - started)
                values |= flat(results)
        return values

    with _not_training(stage), _own_random_numbers():
        return led(stage.mesh, lead, worker)


def _evaluate_unit(model: Any, unit: Unit, settings: EvaluationSection) -> Results:
    """Any: lm-eval's model, or its cache around one."""
    from lm_eval.evaluator import evaluate as evaluate_with_harness

    random.seed(0)  # lm-eval's own seeds
    np.random.seed(1234)
    results = evaluate_with_harness(
        lm=model, task_dict=unit.loaded, limit=settings.limit, bootstrap_iters=settings.bootstrap_iters, log_samples=settings.log_samples
    )
    assert results is not None, "lm-eval sees one process and must return its results"
    return cast(Results, results)


@contextmanager
def _cached(model: Any, path: Path | None) -> Iterator[Any]:
    """The model, or lm-eval's cache around it, which answers again what it was asked before."""
    if path is None:
        yield model
        return
    from lm_eval.api.model import CachingLM

    caching = CachingLM(model, str(path))
    try:
        yield caching
    finally:
        caching.dbdict.close()


@contextmanager
def _not_training(stage: Stage) -> Iterator[None]:
    modes = [(layer, layer.training) for layer in stage.layers.values()]
    for layer, _ in modes:
        layer.eval()
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.train(mode)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """What is drawn here does not move the draws of training."""
    plain, arrays = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)
