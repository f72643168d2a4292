"""Completions of a few prompts while training goes on, to read how the model comes along: samples.jsonl always, a table wherever metrics go."""

import json
from pathlib import Path

from megatron_lite.config.sections import RunConfig
from megatron_lite.errors import OutputError
from megatron_lite.metrics.metrics import Metrics, trim
from megatron_lite.training.engine import Engine
from megatron_lite.training.live import Complete, live_stage
from megatron_lite.training.start import Training

FILE = "samples.jsonl"
COLUMNS = ("context", "text", "length", "finished")


class Sampler:
    """Completes prompts every sample_interval steps, where somebody can."""

    def __init__(self, training: Training, engine: Engine, metrics: Metrics, folder: Path, complete: Complete | None) -> None:
        self.training, self.engine, self.metrics, self.path, self.complete = training, engine, metrics, folder / FILE, complete

    def is_due(self, iteration: int) -> bool:
        return self.complete is not None and is_due(self.training.config, iteration)

    def sample(self, iteration: int) -> None:
        """Every rank calls this."""
        assert self.complete is not None
        records = self.complete(live_stage(self.engine, self.training.spec), self.training.spec, self.training.tokenizer)
        if not self.training.mesh.is_writer:
            return
        try:
            trim(self.path)
            with self.path.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps({"step": iteration, **record}, ensure_ascii=False) + "\n" for record in records)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}; free some space, or set sample_interval to null") from None
        self.metrics.table("samples", ["step", *COLUMNS], [[iteration, *(record[name] for name in COLUMNS)] for record in records], step=iteration)


def is_due(config: RunConfig, iteration: int) -> bool:
    return config.generation.sample_interval is not None and iteration % config.generation.sample_interval == 0
