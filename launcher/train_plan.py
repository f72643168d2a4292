"""The plan for training: the layout as it was asked for, as often as the devices hold it, and what would make it fit where memory is short."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launcher.deal import Dealer, what_was_dealt
from launcher.demand import Change, changes_for, training_of
from launcher.fit import check_layout, layouts_for, replicate
from launcher.hardware import Hardware
from launcher.plan import ITSELF, Plan, gigabytes, weigh_training, with_note
from launcher.planner import MOST_DEVICES, Planner
from megatron_lite.config.precision import check_trainable
from megatron_lite.config.sections import RunConfig
from megatron_lite.errors import FitError
from megatron_lite.models.spec import DTYPES, ModelSpec
from megatron_lite.models.training_memory import training_footprint
from megatron_lite.parallel.layout import Layout

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
        hardware, spec = hardware or self.planner.hardware, self.spec(layout)
        spec = change.held(spec) if change else spec
        itself = ITSELF[hardware.kind]

        def needs(cut: Layout, stage: int) -> int:
            return training_footprint(spec, cut, stage, training).total + itself

        dealt = Dealer(hardware, spec.layers, needs, lambda card: card.teraflops).deal(layout)
        return with_note(weigh_training(hardware, dealt, spec, training), what_was_dealt(layout, dealt, hardware))

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

    def nearest(self) -> tuple[Change | None, Plan]:
        """A plan that fits, with the least change of settings and then of the layout; else what was asked for, and None."""
        asked = self.planner.wish.layout
        devices = asked.size if self.planner.hardware.kind == "CPU" else len(self.planner.hardware)
        check_layout(asked, self.planner.spec(asked))
        filled = [replace(asked, dp=devices // asked.size)] if devices % asked.size == 0 else []
        layouts = list(dict.fromkeys([*filled, *self.layouts(devices)]))
        fitting = sorted((choice for choice in self.fitting(layouts) if not choice[0].lora), key=lambda choice: len(choice[0].words))
        return fitting[0] if fitting else (None, self.weigh((filled or layouts)[0]))

    def remedy(self, layout: Layout) -> str:
        """What would fit: settings, other layouts, adapters, or more GPUs."""
        hardware = self.planner.hardware
        devices = layout.size if hardware.kind == "CPU" else len(hardware)
        found = list(self.fitting(list(dict.fromkeys([layout, *self.layouts(devices)]))))
        found.sort(key=lambda choice: (choice[0].lora, choice[0].in_8_bits))  # adapters train less: what trains all comes first
        if found:
            return "here would fit: " + "; ".join(_choice(change, plan, layout) for change, plan in found[:REMEDIES])
        if hardware.kind == "CPU":
            return "no setting changes that; it takes a machine with more memory, or GPUs"
        return f"no setting makes it fit on what is here ({hardware.found}); {self.more()}"

    def more(self) -> str:
        """The smallest number of such GPUs, a power of two, on which all of the model can be trained."""
        hardware = self.planner.hardware
        if hardware.kind == "CPU":
            return "it takes a machine with more memory, or GPUs"
        smallest = min(hardware.devices, key=lambda device: device.free or 0)
        for count in (2**power for power in range(1, MOST_DEVICES.bit_length())):
            if count > len(hardware):
                full = (choice for choice in self.fitting(self.layouts(count), replace(hardware, devices=(smallest,) * count)) if not choice[0].lora)
                if choice := next(full, None):
                    return f"{count} such GPUs would do: {_choice(*choice, self.planner.wish.layout)}"
        return f"not even {MOST_DEVICES} such GPUs would do"


def plan_training(config: RunConfig, hardware: Hardware, entries: int, *, anyway: bool = False) -> Plan:
    """The plan for training. Raises LayoutError where the devices do not hold the layout, and FitError, unless it is wanted `anyway`, where memory is short."""
    check_trainable(config)
    trainer = TrainPlanner(Planner(config, hardware, entries))
    wish = trainer.planner.wish
    layout = replicate(wish, hardware, trainer.planner.spec(wish.layout))
    plan = trainer.weigh(layout)
    if anyway or not (shortage := plan.shortage()):
        return plan
    raise FitError(f"{wish.where} with {layout} ({plan.work}) {shortage}; {trainer.remedy(layout)}")


def words_for(change: Change, layout: Layout, asked: Layout) -> str:
    """The settings that turn what was asked for into this."""
    cut = () if (layout.pp, layout.tp) == (asked.pp, asked.tp) else (f"pipe-parallel-size={layout.pp}", f"model-parallel-size={layout.tp}")
    return " ".join((*cut, *change.words))


def _choice(change: Change, plan: Plan, asked: Layout) -> str:
    words = words_for(change, plan.layout, asked)
    return f"{words}{' ' * bool(words)}({gigabytes(plan.largest)} a process)"
