"""What `evaluate.py` does: tasks are found first, then weights are read; results are kept as tasks finish, reported, and held against published ones."""

import hashlib
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from megatron_lite.checkpoint.fingerprint import fingerprint
from megatron_lite.config.show import settings as shown_settings
from megatron_lite.data.jsonl import check_writable
from megatron_lite.errors import OutputError
from megatron_lite.evaluation.evaluate import evaluate
from megatron_lite.evaluation.published import KnownModel, known_model
from megatron_lite.evaluation.results import Report, Results, as_table, flat, result_rows
from megatron_lite.evaluation.samples import sample_table, write_samples
from megatron_lite.evaluation.tasks import Unit, find_tasks
from megatron_lite.log import logger
from megatron_lite.metrics.metrics import Metrics, open_metrics
from megatron_lite.parallel.lead import on_writer
from megatron_lite.run import Run, load_stage

LOGS = Path("logs")  # where log_dir is silent


def evaluate_run(run: Run) -> str:
    """Evaluates as the configuration says. Returns the results as a text for the screen, on the writer; elsewhere an empty one."""
    config, settings, is_writer = run.config, run.config.evaluation, run.mesh.is_writer
    path = settings.results_file(time.localtime())
    units: list[Unit] = []
    on_writer(run.mesh, lambda: units.extend(_prepare(run, path)))
    stage = load_stage(run)
    told = {key: value for key, value, _ in shown_settings(config)}
    folder = config.logging.log_dir or LOGS
    with open_metrics(config.logging, told, folder=folder, is_writer=is_writer) as metrics:
        weights = fingerprint(run.checkpoint, run.adapters) if is_writer else ""
        keeper = Keeper(Report(path, _header(run, told, weights)), metrics, known_model(run.spec), settings.limit)
        evaluate(
            stage,
            run.spec,
            run.tokenizer,
            settings,
            units=units,
            rows=config.generation.generation_batch_size,
            seed=config.training.seed,
            cache=_cache_file(run, weights) if is_writer else None,
            keep=keeper.keep,
        )
    return keeper.text() if is_writer else ""


def _prepare(run: Run, path: Path) -> list[Unit]:
    """Everything that can be wrong is found before weights are read."""
    settings = run.config.evaluation
    check_writable(path)
    if settings.limit is not None:
        logger.warning(f"limit {settings.limit}: only the first {settings.limit} documents of every task count; such results compare with nothing")
    return find_tasks(settings)


@dataclass
class Keeper:
    """Takes each task's results where they belong as soon as it has finished."""

    report: Report
    metrics: Metrics
    known: KnownModel | None
    limit: int | None
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def keep(self, results: Results, seconds: float) -> None:
        self.report.add(results, seconds=seconds)
        self.metrics.log({f"eval/{name}": value for name, value in flat(results).items()})
        for path in write_samples(results, self.report.path):
            logger.info(f"questions and answers written to {path}")
        for task, samples in results.get("samples", {}).items():
            self.metrics.table(f"eval/{task}_samples", *sample_table(samples))
        self.rows += result_rows(results, self.known)
        done = ", ".join(f"{task} ({count['effective']:,} documents)" for task, count in results["n-samples"].items())
        logger.info(f"{done} in {seconds:.1f} s, kept in {self.report.path}")

    def text(self) -> str:
        lines = [as_table(self.rows)]
        if self.known and any(row[6] for row in self.rows):
            lines.append(f"published: results of {self.known.name}, which has this shape; docs/evaluation.md names the sources")
        if self.limit is not None:
            lines.append(f"LIMITED to the first {self.limit} documents of every task: these numbers compare with nothing")
        return "\n\n".join(lines)


def _header(run: Run, told: dict[str, str], weights: str) -> dict[str, object]:
    """What the results file says beside the results."""
    settings = run.config.evaluation
    return {
        "config": {
            "model": run.config.files[0].stem,
            "model_args": told,
            "checkpoint": str(run.checkpoint),
            "adapters": str(run.adapters.folder) if run.adapters else None,
            "fingerprint": weights,
            "dtype": run.spec.dtype,
            "layout": str(run.mesh.layout),
            "num_fewshot": settings.num_fewshot,
            "limit": settings.limit,
            "bootstrap_iters": settings.bootstrap_iters,
        },
        "lm_eval_version": version("lm-eval"),
        "torch_version": torch.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _cache_file(run: Run, weights: str) -> Path | None:
    """A file of its own for everything that changes answers: weights, number format, length, tokenizer."""
    folder = run.config.evaluation.eval_cache_dir
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder for cached answers {folder} cannot be made: {error.strerror}; set eval_cache_dir to another") from None
    tokens = run.tokenizer.encode("Answers depend on how 1,234 texts are cut.\n  Übrigens\ttoo.")
    parts = (weights, run.spec.dtype, run.spec.quantization, run.spec.max_positions, run.tokenizer.vocab_size, run.tokenizer.eod, tokens)
    return folder / f"answers-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.db"
