"""What a training tells while it runs: the progress line, and NeoX's keys for metrics.jsonl and Weights & Biases."""

import math
import time
from collections.abc import Mapping

import torch

from megatron_lite.config.sections import RunConfig
from megatron_lite.log import logger
from megatron_lite.metrics.metrics import Metrics
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.engine import Step
from megatron_lite.training.recipe import Recipe


def flops_per_token(spec: ModelSpec, length: int, *, recompute: bool) -> float:
    """NeoX's formula: multiplications of matrices and of attention over the whole square, forward and backward, and forward again where recomputed."""
    d, passes = spec.hidden, 4 if recompute else 3
    return 24 * passes * spec.layers * d * d * (1 + length / (6 * d) + spec.vocab / (16 * spec.layers * d))


class Reporter:
    """Gathers steps between reports. Rates are of the time since the last one, validation and saving left out."""

    def __init__(self, metrics: Metrics, spec: ModelSpec, recipe: Recipe, mesh: Mesh, config: RunConfig) -> None:
        self.metrics, self.recipe, self.mesh, self.peak = metrics, recipe, mesh, config.logging.peak_theoretical_tflops
        length = config.model.seq_length
        self.tokens = recipe.batching.samples * length
        self.operations = flops_per_token(spec, length, recompute=recipe.recompute > 0), flops_per_token(spec, length, recompute=False)
        self.losses: list[float] = []
        self.seconds = 0.0
        self._started = time.monotonic()

    def begin(self) -> None:
        self._started = time.monotonic()

    def note(self, step: Step) -> None:
        """Takes in a step that has just ended."""
        self.seconds += time.monotonic() - self._started
        self.losses.append(step.loss)

    def report(self, iteration: int, step: Step, *, rate: float, skipped: int) -> None:
        """Tells of the steps since the last report."""
        seconds, cards = self.seconds / len(self.losses), self.mesh.layout.size
        losses = [loss for loss in self.losses if math.isfinite(loss)]
        loss = sum(losses) / len(losses) if losses else math.nan
        speed = self.tokens / seconds
        values = {
            "train/lm_loss": loss,
            "train/learning_rate": rate,
            "train/loss_scale": step.loss_scale,
            "train/grad_norm": step.gradient_norm,
            "train/skipped_steps": float(skipped),
            "runtime/iteration_time": seconds,
            "runtime/steps_per_sec": 1 / seconds,
            "runtime/samples_per_sec": self.recipe.batching.samples / seconds,
            "runtime/tokens_per_sec": speed,
            "runtime/flops_per_sec_per_gpu": speed * self.operations[0] / cards,
            **self._utilization(speed / cards),
            **self._memory(),
        }
        self.metrics.log({name: value for name, value in values.items() if math.isfinite(value)}, step=iteration)
        left = (self.recipe.steps - iteration) * seconds
        share = f"  MFU {values['runtime/model_flops_utilization']:.1%}" if self.peak else ""
        logger.info(
            f"step {iteration}/{self.recipe.steps}  loss {loss:.4f}  gradient {step.gradient_norm:.3f}  {speed / cards:.1f} tokens/s/GPU{share}  "
            f"lr {rate:.3g}  {clock(left)} left"
        )
        self.losses, self.seconds = [], 0.0

    def validated(self, iteration: int, loss: float, *, name: str = "validation") -> None:
        perplexity = math.exp(loss) if loss < 100 else math.inf
        values = {f"{name}/lm_loss": loss, f"{name}/lm_loss_ppl": perplexity}
        self.metrics.log({key: value for key, value in values.items() if math.isfinite(value)}, step=iteration)
        logger.info(f"step {iteration}  {name} loss {loss:.4f}  perplexity {perplexity:.4g}")

    def _utilization(self, speed: float) -> Mapping[str, float]:
        if not self.peak:
            return {}
        hardware, model = (speed * operations / (self.peak * 1e12) for operations in self.operations)
        return {"runtime/model_flops_utilization": model, "runtime/hardware_flops_utilization": hardware}

    def _memory(self) -> Mapping[str, float]:
        if self.mesh.device.type != "cuda":
            return {}
        return {"runtime/peak_memory_gb": torch.cuda.max_memory_allocated(self.mesh.device) / 1e9}


def clock(seconds: float) -> str:
    """For instance 2 h 05 min, 3 min 20 s or 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
