"""The plan for training: the layout as it was asked for, as often as the devices hold it, and what would make it fit where memory is short."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launcher.demand import Change, changes_for, training_of
from launcher.fit import layouts_for, replicate
from launcher.hardware import Hardware
from launcher.plan import Plan, gigabytes, weigh_training
from launcher.planner import Planner
from megatron_lite.config.sections import RunConfig
from megatron_lite.errors import FitError
from megatron_lite.models.spec import DTYPES, ModelSpec
from megatron_lite.parallel.layout import Layout

MOST_DEVICES = 256
REMEDIES = 4


@dataclass(frozen=True)
class TrainPlanner:
    """Weighs trainings of one configuration."""

    planner: Planner

    @property
    def config(self) -> RunConfig:
        return self.planner.config

    def spec(self, layout: Layout) -> ModelSpec:
        """Half precision with bfloat16's range can be trained on CPUs, fp16 cannot."""
        on_cpu = self.planner.hardware.kind == "CPU" and self.config.precision == "fp16"
        return replace(self.planner.spec(layout), dtype="float32" if on_cpu else DTYPES[self.config.precision])

    def weigh(self, layout: Layout, change: Change | None = None, hardware: Hardware | None = None) -> Plan:
        training = training_of(self.config, layout)
        training = change.applied(training) if change else training
        return weigh_training(hardware or self.planner.hardware, layout, self.spec(layout), training)

    def fitting(self, layouts: list[Layout], hardware: Hardware | None = None) -> Iterator[tuple[Change, Plan]]:
        """For each layout the least change with which it fits, if there is one."""
        for layout in layouts:
            for change in changes_for(training_of(self.config, layout), layout):
                plan = self.weigh(layout, change, hardware)
                if not plan.shortage():
                    yield change, plan
                    break

    def layouts(self, devices: int) -> list[Layout]:
        """Every layout that fills so many devices with replicas: least cut first, for that is the fastest way to train what fits."""
        wish = replace(self.planner.wish, fixed=frozenset())
        cuts = layouts_for(wish, devices, self.planner.spec(wish.layout))
        filled = [replace(cut, dp=devices // cut.size) for cut in cuts if devices % cut.size == 0]
        return sorted(filled, key=lambda layout: (layout.pp * layout.tp, layout.pp))


def plan_training(config: RunConfig, hardware: Hardware, entries: int, *, anyway: bool = False) -> Plan:
    """The plan for training. Raises LayoutError where the devices do not hold the layout, and FitError, unless it is wanted `anyway`, where memory is short."""
    trainer = TrainPlanner(Planner(config, hardware, entries))
    wish = trainer.planner.wish
    layout = replicate(wish, hardware, trainer.planner.spec(wish.layout))
    plan = trainer.weigh(layout)
    if anyway or not (shortage := plan.shortage()):
        return plan
    raise FitError(f"{wish.where} with {layout} ({plan.work}) {shortage}; {_remedy(trainer, layout)}")


def _remedy(trainer: TrainPlanner, layout: Layout) -> str:
    """What would fit: settings, other layouts, adapters, or more GPUs."""
    hardware = trainer.planner.hardware
    devices = layout.size if hardware.kind == "CPU" else len(hardware)
    found = list(trainer.fitting(list(dict.fromkeys([layout, *trainer.layouts(devices)]))))
    found.sort(key=lambda choice: choice[0].lora)  # adapters train less: what trains all comes first
    if found:
        return "here would fit: " + "; ".join(_choice(change, plan, layout) for change, plan in found[:REMEDIES])
    if hardware.kind == "CPU":
        return "no setting changes that; it takes a machine with more memory, or GPUs"
    return f"no setting makes it fit on what is here ({hardware.found}); {_more(trainer)}"


def _choice(change: Change, plan: Plan, asked: Layout) -> str:
    cut = () if plan.layout == asked else (f"pipe-parallel-size={plan.layout.pp}", f"model-parallel-size={plan.layout.tp}")
    return f"{' '.join((*cut, *change.words))} ({gigabytes(plan.largest)} a process)"


def _more(trainer: TrainPlanner) -> str:
    """The smallest number of such GPUs, a power of two, on which it fits."""
    hardware = trainer.planner.hardware
    smallest = min(hardware.devices, key=lambda device: device.free or 0)
    count = 1
    while (count := 2 * count) <= MOST_DEVICES:
        if count > len(hardware):
            more = replace(hardware, devices=(smallest,) * count)
            full = (choice for choice in trainer.fitting(trainer.layouts(count), more) if not choice[0].lora)
            if choice := next(full, None):
                return f"{count} such GPUs would do: {_choice(*choice, asked=Layout())}"
    return f"nor would {MOST_DEVICES} such GPUs do"
