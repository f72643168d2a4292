"""Results of an evaluation: kept on disk as tasks finish, under lm-eval's names and under the older ones of gpt-neox, and shown as a table."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.errors import OutputError
from megatron_lite.evaluation.published import KnownModel, difference, published
from megatron_lite.whole import whole_file

OLDER = {"perplexity": "ppl"}
ABOUT = ("name", "alias", "sample_len")  # entries of a task's results that are no metrics
BY_TASK = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")

Results = dict[str, Any]
"""What lm-eval returns (Any: JSON of its own shape)."""


@dataclass(frozen=True)
class Metric:
    """One number of one task. `name` is gpt-neox's: acc, acc_norm, ppl; with the filter behind it where there is one."""

    task: str
    name: str
    value: float
    error: float | None


def metrics_of(results: Results) -> Iterator[Metric]:
    """Every metric of every task and group."""
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if key in ABOUT or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            yield Metric(task, older_name(key), float(value), float(error) if isinstance(error, int | float) else None)


def flat(results: Results) -> dict[str, float]:
    """`{task}_{metric}` -> value, and `{task}_{metric}_stderr` where there is an error: as gpt-neox reports them behind eval/."""
    values: dict[str, float] = {}
    for metric in metrics_of(results):
        values[f"{metric.task}_{metric.name}"] = metric.value
        if metric.error is not None:
            values[f"{metric.task}_{metric.name}_stderr"] = metric.error
    return values


def older_name(key: str) -> str:
    """acc,none -> acc; perplexity_stderr,none -> ppl_stderr; exact_match,strict-match -> exact_match_strict-match."""
    metric, _, kind = key.partition(",")
    stem = metric.removesuffix("_stderr")
    name = OLDER.get(stem, stem) + metric[len(stem) :]
    return name if kind in ("", "none") else f"{name}_{kind}"


class Report:
    """The results file. It is replaced as a whole whenever a task has finished."""

    def __init__(self, path: Path, header: Mapping[str, object]) -> None:
        self.path = path
        self.content: Results = {"results": {}, **header}

    def add(self, results: Results, *, seconds: float) -> None:
        """Takes in the results of a task and writes the file."""
        for part in BY_TASK:
            self.content.setdefault(part, {}).update(results.get(part, {}))
        for task, values in results["results"].items():
            older = {older_name(key): value for key, value in values.items() if key not in ABOUT}
            self.content["results"][task] = {**older, **values}
            self.content.setdefault("seconds", {})[task] = round(seconds, 2)
        write_whole(self.path, json.dumps(self.content, indent=2, default=str, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole, or as it was before."""
    try:
        with whole_file(path) as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"the results {path} cannot be written: {error.strerror}; set eval_results_prefix to a place that can be written") from None


HEADS = ("task", "documents", "shots", "metric", "value", "stderr", "published", "difference")


def result_rows(results: Results, known: KnownModel | None) -> Iterator[tuple[str, ...]]:
    """One row for each metric: what the screen shows."""
    seen = ""
    for metric in metrics_of(results):
        row = published(known, metric.task, metric.name)
        away = difference(metric.value, metric.error, row) if row else None
        first = metric.task != seen
        seen = metric.task
        yield (
            metric.task if first else "",
            _documents(results, metric.task) if first else "",
            str(results["n-shot"].get(metric.task, "")) if first else "",
            metric.name,
            f"{metric.value:.4f}",
            f"{metric.error:.4f}" if metric.error is not None else "",
            f"{row.value:.4f}" if row else "",
            f"{away:+.1f} stderr" if away is not None else "",
        )


def _documents(results: Results, task: str) -> str:
    count = results["n-samples"].get(task)
    if not count:
        return ""
    return f"{count['effective']:,}" if count["effective"] == count["original"] else f"{count['effective']:,} of {count['original']:,}"


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in aligned columns under their heads; columns in which nothing is said are left out."""
    table = [HEADS, *rows]
    columns = [column for column in range(len(HEADS)) if any(row[column] for row in rows)]
    widths = {column: max(len(row[column]) for row in table) for column in columns}
    lines = ["  ".join(f"{row[column]:{'>' if column in (1, 2, 4, 5, 6, 7) else '<'}{widths[column]}}" for column in columns).rstrip() for row in table]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
