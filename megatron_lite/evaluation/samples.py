"""Every question with its answer, for those who want to look: files of JSON lines, and tables for Weights & Biases."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_lite.data.jsonl import RecordWriter
from megatron_lite.evaluation.results import Results

Sample = Mapping[str, object]
ABOUT = ("doc_id", "arguments", "target", "filtered_resps")


def write_samples(results: Results, beside: Path) -> list[Path]:
    """One file for each task whose samples the results hold, named after the results file."""
    paths: list[Path] = []
    for task, samples in results.get("samples", {}).items():
        stem = beside.stem.replace("eval_results_", "eval_samples_", 1)
        path = beside.with_name(f"{stem}_{task.replace('/', '_').replace(':', '_')}.jsonl")
        with RecordWriter(path) as records:
            for sample in samples:
                records.write(json.loads(json.dumps(sample, default=str, ensure_ascii=False)))
        paths.append(path)
    return paths


def sample_table(samples: Sequence[Sample]) -> tuple[list[str], list[list[object]]]:
    """Columns and rows: the question, the answers that were judged, and the metrics of each document."""
    metrics = [str(name) for name in samples[0]["metrics"]] if samples and isinstance(samples[0]["metrics"], list) else []
    columns = [*ABOUT, *metrics]
    return columns, [[_cell(sample.get(column)) for column in columns] for sample in samples]


def _cell(value: object) -> object:
    return value if isinstance(value, int | float | str) else json.dumps(value, default=str, ensure_ascii=False)
