"""./deepy.py plan: what generation, evaluation, full fine-tuning and LoRA take on this machine or on one that is only named, and what would make them fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from launcher.cards import Card, hardware_named
from launcher.command import ALIASES, Command
from launcher.demand import LORA, training_of
from launcher.hardware import Hardware, find_hardware
from launcher.plan import Plan
from launcher.planner import MOST_ROWS, Planner, plan_anyway, plan_generation, remedy, usual_entries, vocabulary_entries
from launcher.replicas import plan_evaluation, scoring_planner
from launcher.speed import Speed, card_of, decoding, load_seconds, scoring, training
from launcher.train_plan import TrainPlanner, words_for
from megatron_lite.config.load import load_config
from megatron_lite.config.precision import check_trainable
from megatron_lite.config.sections import RunConfig
from megatron_lite.errors import ConfigError, FitError, LayoutError, TokenizerError
from megatron_lite.models.spec import ModelSpec

WORKS = {"generate": ("generation",), "evaluate": ("evaluation",), "train": ("full training", "LoRA")}


@dataclass(frozen=True)
class Forecast:
    """What one kind of work takes. `remark` says what was changed to make it fit or, where it does not, what would."""

    work: str
    plan: Plan
    fits: bool
    remark: str
    speeds: tuple[Speed, ...] = ()


@dataclass(frozen=True)
class Outlook:
    """All that is to be shown. `spec` is the model as it is generated with, `load` the seconds from a disk and from memory."""

    config: RunConfig
    hardware: Hardware
    spec: ModelSpec
    is_named: bool
    forecasts: tuple[Forecast, ...]
    refused: tuple[tuple[str, str], ...]
    load: tuple[float, float] | None
    notes: tuple[str, ...]


def outlook_of(command: Command) -> Outlook:
    """The outlook that `plan CONF [gpus=2x24GB] [script=train.py] [key=value]` asks for. Raises ConfigError for words that say nothing."""
    settings = dict(command.overrides)
    named, script = settings.pop("gpus", None), settings.pop("script", None)
    config = load_config(command.configs, settings)
    hardware = replace(hardware_named(str(named)) if named is not None else _here(config), limit=config.launcher.gpu_memory_limit)
    entries, notes = _entries(config)
    forecasts: list[Forecast] = []
    refused: list[tuple[str, str]] = []
    for work in _works(script):
        try:
            forecasts.append(FORECASTS[work](config, hardware, entries))
        except (LayoutError, ConfigError) as error:
            refused.append((work, str(error)))
    spec = (planner := Planner(config, hardware, entries)).spec(planner.wish.layout)
    generated = next((forecast.plan for forecast in forecasts), None)
    load = load_seconds(generated, spec) if generated else None
    return Outlook(config, hardware, spec, named is not None, tuple(forecasts), tuple(refused), load, notes)


def _here(config: RunConfig) -> Hardware:
    machine = find_hardware()
    count = config.launcher.num_gpus
    return machine if count is None else machine.only(range(count), where="num_gpus")


def _entries(config: RunConfig) -> tuple[int, tuple[str, ...]]:
    try:
        return vocabulary_entries(config), ()
    except TokenizerError:
        entries, note = usual_entries(config)
        return entries, (note,)


def _works(script: object) -> list[str]:
    if script is None:
        return [work for works in WORKS.values() for work in works]
    name = str(script).removesuffix(".py")
    name = ALIASES.get(name, name)
    if name not in WORKS:
        raise ConfigError(f"script is {script}; plans are made for {', '.join(f'{name}.py' for name in WORKS)}")
    return list(WORKS[name])


def _generation(config: RunConfig, hardware: Hardware, entries: int) -> Forecast:
    def remark(plan: Plan, planner: Planner) -> str:
        if planner.shares and plan.hardware.devices[0].free is not None:
            room = planner.room(plan.layout)
            return f"room for {_rows(room)}{' or more' * (room == MOST_ROWS)} of up to {plan.context} tokens, which shorter ones share"
        return f"{_rows(plan.rows)} at once of up to {plan.context} tokens (generation_batch_size={plan.rows})"

    def speeds(plan: Plan, spec: ModelSpec, card: Card) -> tuple[Speed, ...]:
        return tuple(decoding(plan, spec, card, rows) for rows in dict.fromkeys((1, plan.rows)))

    return _serving("generation", plan_generation, Planner(config, hardware, entries), remark, speeds)


def _evaluation(config: RunConfig, hardware: Hardware, entries: int) -> Forecast:
    def remark(plan: Plan, planner: Planner) -> str:
        return f"{plan.context} tokens at once in every replica"

    return _serving("evaluation", plan_evaluation, scoring_planner(config, hardware, entries), remark, lambda plan, spec, card: (scoring(plan, spec, card),))


def _serving(
    work: str,
    plan_of: Callable[[RunConfig, Hardware, int], Plan],
    planner: Planner,
    remark: Callable[[Plan, Planner], str],
    speeds: Callable[[Plan, ModelSpec, Card], tuple[Speed, ...]],
) -> Forecast:
    """The forecast of work that only reads weights, with what is said of a plan that fits."""
    try:
        plan = plan_of(planner.config, planner.hardware, planner.entries)
    except FitError:
        return Forecast(work, plan_anyway(planner), False, remedy(planner))
    card = card_of(plan)
    return Forecast(work, plan, True, remark(plan, planner), speeds(plan, planner.spec(plan.layout), card) if card else ())


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count > 1)}"


def _full_training(config: RunConfig, hardware: Hardware, entries: int) -> Forecast:
    whole = replace(config, training=config.training.model_copy(update={"lora": None}))
    return _training("full training", TrainPlanner(Planner(whole, hardware, entries)))


def _lora(config: RunConfig, hardware: Hardware, entries: int) -> Forecast:
    if config.training.lora is None:
        from megatron_lite.config.lora import LoraSection

        config = replace(config, training=config.training.model_copy(update={"lora": LoraSection.model_validate({})}))
        found = _training("LoRA", TrainPlanner(Planner(config, hardware, entries)))
        return replace(found, remark=f"with {LORA}: {found.remark}")
    return _training("LoRA", TrainPlanner(Planner(config, hardware, entries)))


def _training(work: str, trainer: TrainPlanner) -> Forecast:
    check_trainable(trainer.config)
    change, plan = trainer.nearest()
    card, asked = card_of(plan), training_of(trainer.config, plan.layout)
    speeds = (training(plan, trainer.spec(plan.layout), card, change.applied(asked)),) if card and change else ()
    if change is None:
        return Forecast(work, plan, False, trainer.more() if work != "LoRA" else trainer.remedy(plan.layout))
    words = words_for(change, plan.layout, trainer.planner.wish.layout)
    return Forecast(work, plan, True, plan.work.partition(": ")[2] + f"; with {words}" * bool(words), speeds)


FORECASTS: dict[str, Callable[[RunConfig, Hardware, int], Forecast]] = {
    "generation": _generation,
    "evaluation": _evaluation,
    "full training": _full_training,
    "LoRA": _lora,
}
