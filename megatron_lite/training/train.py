"""The training loop: steps, reports, validations and saves, until the end or until somebody asks to stop."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

from megatron_lite.config.sections import RunConfig
from megatron_lite.data.batches import TokenBatch
from megatron_lite.errors import DataError, TrainingError
from megatron_lite.log import logger
from megatron_lite.metrics.metrics import Metrics
from megatron_lite.training.beginning import goes_on_from
from megatron_lite.training.engine import Step
from megatron_lite.training.hang import SAVING
from megatron_lite.training.interrupt import Interruption, last_words, stop
from megatron_lite.training.job import announce, identify, metrics_folder, numbers, on_disk, saver_for
from megatron_lite.training.live import Uses, live_stage
from megatron_lite.training.optimizer import prepare_to_save
from megatron_lite.training.report import Reporter, clock
from megatron_lite.training.resume import loss_scaler_of
from megatron_lite.training.samples import Sampler
from megatron_lite.training.save import Progress
from megatron_lite.training.start import Training, build_engine, open_training
from megatron_lite.training.state import state_names, updates
from megatron_lite.training.validate import Validator, stream
from megatron_lite.training.watch import GiveUp, Watch, give_up

PATIENCE = 50
"""Steps in a row that may be skipped because they are not finite."""


NOBODY = Uses()


def train(config: RunConfig, uses: Uses = NOBODY, *, give_up: GiveUp = give_up) -> None:
    """Trains as the configuration says. Exits with code 75 after a save where it was asked to stop; `give_up` ends a process that waits in vain."""
    with open_training(config) as training:
        run_training(training, uses, give_up=give_up)


def run_training(training: Training, uses: Uses = NOBODY, *, give_up: GiveUp = give_up) -> None:
    """Trains to the end, or says that there is nothing to do."""
    config, done, steps = training.config, training.progress.iteration, training.recipe.steps
    if done >= steps:
        _, folder = goes_on_from(config)
        logger.info(f"nothing to train: {folder} is at step {done}, and train_iters is {steps}; raise it, or set finetune: true")
        return
    if training.recipe.zero_stage == 3:
        if config.evaluation.eval_tasks:
            logger.warning("eval_tasks are not evaluated while ZeRO 3 spreads the weights; run evaluate.py on the checkpoints that are saved, or use ZeRO 1")
        if config.generation.sample_interval:
            logger.warning("no samples are completed while ZeRO 3 spreads the weights; run generate.py on the checkpoints that are saved, or use ZeRO 1")
        uses = NOBODY
    training = identify(training)
    watch = Watch(training.mesh, 60 * config.training.hang_timeout_minutes, give_up)
    with last_words(lambda: training.mesh.is_writer and logger.info(f"stopped; {on_disk(config)}")), ExitStack() as last, watch, numbers(training) as metrics:
        Loop(training, metrics, uses, watch).run(last)


class Loop:
    """A training under way."""

    def __init__(self, training: Training, metrics: Metrics, uses: Uses, watch: Watch) -> None:
        self.training, self.metrics, self.uses, self.watch = training, metrics, uses, watch
        self.config, self.recipe = training.config, training.recipe
        self.first, self.progress = training.progress.iteration, training.progress
        self.last = min(self.first + 2, self.recipe.steps) if self.config.training.check else self.recipe.steps
        self.engine = build_engine(training)
        self.validator = Validator(training, self.engine, watch)
        self.sampler = Sampler(training, self.engine, metrics, metrics_folder(self.config), uses.complete)
        self.saver = saver_for(training)
        self.reporter = Reporter(metrics, training.spec, self.recipe, training.mesh, self.config)
        self.in_a_row, self.saved = 0, -1

    def run(self, last: ExitStack) -> None:
        """From where the training stands to its end. `last` is closed after the metrics: until then a signal must not end the process that hands them in."""
        announce(self.training, self.engine)
        self.validator.look_at_start(self.uses.measure)
        batches = self._batches()
        started, interruption = time.monotonic(), Interruption(self.training.mesh)
        last.callback(interruption.close)
        while self.progress.iteration < self.last:
            self._step(batches)
            if interruption.asked():
                self._leave()
            if self._ends_here():
                break
        self._finish(time.monotonic() - started)

    def _batches(self) -> Iterator[TokenBatch]:
        batches = self.training.batches("train", self.training.samples)
        if batches is None:
            raise DataError("there is no data to train on; set data_path, or train_data_paths")
        return self.watch.reading(stream(self.training, batches, self.progress.samples))

    def _step(self, batches: Iterator[TokenBatch]) -> None:
        self.saver.check()
        self.watch.at(self.progress.iteration + 1, "computing")
        rate = self.recipe.schedule(self.progress.iteration)
        self.reporter.begin()
        step = self.engine.step(batches, rate=rate)
        self.reporter.note(step)
        iteration = self.progress.iteration + 1
        skipped = self.progress.skipped + (not step.applied)
        self.progress = replace(self.progress, iteration=iteration, samples=self.progress.samples + self.recipe.batching.samples, skipped=skipped)
        self._watch(step)
        if iteration % self.config.logging.log_interval == 0 or iteration == self.last:
            self.reporter.report(iteration, step, rate=rate, skipped=skipped)
        if self.validator.is_due(iteration):
            self._validate(iteration)
        if self.sampler.is_due(iteration):
            self.watch.at(iteration, "completing prompts")
            self.sampler.sample(iteration)
        if is_save_due(self.config, iteration):
            self._save()

    def _watch(self, step: Step) -> None:
        """Says which steps were skipped, and ends a training that does not recover. A fp16 loss scale that comes down is no news."""
        self.in_a_row = 0 if step.applied else self.in_a_row + 1
        if not step.applied and (step.loss_scale == 1.0 or not math.isfinite(step.loss)):
            what = "the gradient is not finite" if math.isfinite(step.loss) else f"the loss is {step.loss}"
            logger.warning(f"step {self.progress.iteration}: {what}; the step is skipped ({self.progress.skipped} so far)")
        if self.in_a_row >= PATIENCE:
            raise TrainingError(
                f"{PATIENCE} steps in a row were not finite, the last of them step {self.progress.iteration}; the weights are still those of step "
                f"{self.progress.iteration - PATIENCE}: lower the learning rate, lengthen the warmup, or look at the data"
            )

    def _validate(self, iteration: int) -> None:
        loss = self.validator.loss("valid")
        if loss is not None:
            best = self.progress.best_validation
            self.progress = replace(self.progress, best_validation=loss if best is None else min(best, loss))
            self.reporter.validated(iteration, loss)
        if self.uses.evaluate is not None and self.config.evaluation.eval_tasks:
            self.watch.at(iteration, "evaluating tasks")
            values = self.uses.evaluate(live_stage(self.engine, self.training.spec), self.training.spec, self.training.tokenizer, self.config.evaluation)
            self.metrics.log({f"eval/{name}": value for name, value in values.items()}, step=iteration)

    def _save(self) -> None:
        if self.saved != self.progress.iteration:
            self.saved = self.progress.iteration
            self.watch.at(self.saved, SAVING)
            prepare_to_save(self.engine.optimizer)
            self.saver.save(self.engine, self._as_saved())

    def _as_saved(self) -> Progress:
        return replace(self.progress, updates=updates(self.engine), states=tuple(state_names(self.engine)), loss_scaler=loss_scaler_of(self.engine))

    def _ends_here(self) -> bool:
        interval = self.config.training.exit_interval
        if interval is None or self.progress.iteration % interval:
            return False
        logger.info(f"step {self.progress.iteration}: training ends here, because exit_interval is {interval}")
        return True

    def _leave(self) -> None:
        self._save()
        self.watch.at(self.progress.iteration, SAVING)
        self.saver.wait()
        self.training.mesh.wait()
        logger.info(f"step {self.progress.iteration}: asked to stop; {self.saver.kept}")
        stop()

    def _finish(self, seconds: float) -> None:
        self._save()
        if self.config.training.check and not self.validator.is_due(self.last):
            self._validate(self.last)
        if self.config.training.do_test is not False and (loss := self.validator.loss("test")) is not None:
            self.reporter.validated(self.progress.iteration, loss, name="test")
        self.watch.at(self.progress.iteration, SAVING)
        self.saver.wait()
        self.saver.close()
        steps = self.progress.iteration - self.first
        tokens = steps * self.recipe.batching.samples * self.config.model.seq_length
        best = f", best validation loss {self.progress.best_validation:.4f}" if self.progress.best_validation is not None else ""
        skipped = f", {self.progress.skipped} steps skipped" if self.progress.skipped else ""
        logger.info(f"trained {steps} steps, {tokens:,} tokens, in {clock(seconds)}{best}{skipped}; {self.saver.kept}")


def is_save_due(config: RunConfig, iteration: int) -> bool:
    """checkpoint_factor is a distance, or with checkpoint_scale log a base; extra_save_iters come on top."""
    section = config.checkpoint
    factor = section.checkpoint_factor
    if iteration in (section.extra_save_iters or ()):
        return True
    if factor is None:
        return False
    if section.checkpoint_scale == "linear" or factor == 1:
        return iteration % factor == 0
    return factor ** round(math.log(iteration, factor)) == iteration
