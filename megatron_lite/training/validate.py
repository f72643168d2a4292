"""Loss on held-out samples, the same ones every time, and the best there was."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_lite.data.batches import Batches, TokenBatch
from megatron_lite.data.sources import Purpose
from megatron_lite.errors import TrainingError
from megatron_lite.log import logger
from megatron_lite.training.engine import Engine
from megatron_lite.training.live import Measure, live_stage
from megatron_lite.training.start import Training
from megatron_lite.training.watch import Watch


@dataclass(frozen=True)
class Validator:
    """Measures losses of the model that the engine holds."""

    training: Training
    engine: Engine
    watch: Watch

    def is_due(self, iteration: int) -> bool:
        section = self.training.config.training
        return section.do_valid is not False and section.eval_interval is not None and iteration % section.eval_interval == 0

    def loss(self, purpose: Purpose) -> float | None:
        """The mean loss of the learned tokens of eval_iters steps' worth of samples; None where there are no data for this purpose."""
        section, batching = self.training.config.training, self.training.recipe.batching
        count = (1 if section.check else section.eval_iters) * batching.accumulation
        batches = self.training.batches(purpose, count * batching.micro * batching.replicas)
        return None if batches is None else self.engine.validate(self.watch.reading(stream(self.training, batches, 0)), count)

    def look_at_start(self, measure: Measure | None) -> None:
        """The loss of the first step's samples before anything is trained: of weights that were loaded it must be better than guessing, and what those who
        score tasks find."""
        training = self.training
        batches = training.batches("train", training.samples)
        if batches is None or training.beginning != "weights of a checkpoint":
            return
        loss = self.engine.validate(stream(training, batches, training.progress.samples), training.recipe.batching.accumulation)
        guessing = math.log(training.progress.words)
        first = batches.at(training.progress.samples, training.recipe.batching.micro)
        logger.info(f"loss before training: {loss:.4f}{'' if first.loss_mask.all() else ', of the tokens that are learned'}")
        if not loss < guessing and training.mesh.is_writer:  # once is enough
            logger.warning(
                f"the loaded model does no better than guessing (loss {loss:.2f}, guessing {guessing:.2f}); is the tokenizer the model's own, and are "
                "rotary_pct, bias_gelu_fusion and gpt_j_residual those it was trained with?"
            )
        if measure is not None and math.isfinite(loss):
            self._compare(first, measure)

    def _compare(self, first: TokenBatch, measure: Measure) -> None:
        """Raises TrainingError where the engine finds another loss than scoring does, of the same rows and weights: the training would be of another model."""
        training = self.training
        learned = torch.ones_like(first.loss_mask)
        learned[:, -1] = 0  # what follows the last token is not asked
        plain = TokenBatch(first.tokens, first.tokens.roll(-1, dims=1), learned)
        trained = self.engine.validate(iter([plain]), 1)
        rows = first.tokens.tolist()
        scored = sum(measure(live_stage(self.engine, training.spec), training.spec, rows, training.progress.words)) / float(learned.sum())
        tolerance = 1e-3 if training.recipe.dtype == torch.float32 else 0.1
        if not abs(trained - scored) <= tolerance:
            raise TrainingError(
                f"the loss before training is {trained:.4f} in training and {scored:.4f} in evaluation, of the same rows and weights; that is a fault of this "
                f"program or of the installed DeepSpeed on {training.mesh.layout}: try another layout, and report it"
            )
        every = "" if first.loss_mask.all() else ", of all tokens, learned or not"
        logger.info(f"evaluation finds the loss that training finds in the first rows{every}: {scored:.4f}")


def stream(training: Training, batches: Batches, consumed: int) -> Iterator[TokenBatch]:
    """This replica's micro batches from there on. A step takes its own all at once: those of the next one are read while it computes."""
    dp, batching = training.mesh.dp, training.recipe.batching
    return batches.stream(consumed, batching.micro, index=dp.index, size=dp.size, ahead=batching.accumulation + 1)
