"""Configuration and hardware -> the plan that runs: the layout that was asked for, or the nearest one that the devices and their memory allow."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from launcher.deal import Dealer, what_was_dealt
from launcher.fit import Wish, fit_devices, layouts_for, sizes, wish_of
from launcher.hardware import Hardware
from launcher.plan import ITSELF, Demand, Plan, gigabytes, weigh, with_note
from megatron_lite.config.sections import RunConfig
from megatron_lite.errors import FitError
from megatron_lite.models.memory import generation_footprint
from megatron_lite.models.spec import DTYPES, DType, Family, ModelSpec, spec_of
from megatron_lite.parallel.layout import Layout

USUAL_ENTRIES: dict[Family, tuple[int, str]] = {"neox": (50277, "20B's tokenizer"), "gptj": (50257, "GPT-2's tokenizer"), "llama": (32000, "LLaMA's tokenizer")}
"""What is reckoned with before the tokenizer is there."""
MOST_DEVICES = 256  # nobody wants to hear that more would be needed
MOST_ROWS = 1024  # nor that more would fit


@dataclass(frozen=True)
class Planner:
    """Weighs layouts of one model on one machine. `entries` are those of the vocabulary before padding; without a demand, rows are as long as can be."""

    config: RunConfig
    hardware: Hardware
    entries: int
    demand: Demand | None = None

    @cached_property
    def wish(self) -> Wish:
        return wish_of(self.config)

    @cached_property
    def shares(self) -> bool:
        """Whether rows share a cache in pages, which takes what memory is left: rows that find no room wait, and short ones leave room for others."""
        settings = self.config.generation
        return self.hardware.kind == "GPU" and not (settings.return_logits or settings.recompute)

    @cached_property
    def row_choices(self) -> Sequence[int]:
        """For how many rows of full length there may be room, best first: for one is enough where rows share; elsewhere fewer than the default are only taken
        where nobody asked for a number."""
        asked = self.config.generation.generation_batch_size
        asked = min(asked, self.demand.rows) if self.demand else asked
        if self.shares:
            return range(asked, 0, -1)
        if self.config.where("generation_batch_size") != "default":
            return (asked,)
        return (asked, *(2**power for power in reversed(range(10)) if 2**power < asked))

    def spec(self, layout: Layout) -> ModelSpec:
        multiple = 1 if self.config.tokenizer.padded_vocab_size else self.config.tokenizer.make_vocab_size_divisible_by * layout.tp
        dtype: DType = "float32" if self.hardware.kind == "CPU" else DTYPES[self.config.precision]
        return spec_of(self.config.model, vocab=-(-self.entries // multiple) * multiple, dtype=dtype)

    def weigh(self, layout: Layout, rows: int, hardware: Hardware | None = None) -> Plan:
        context = self.demand.tokens if self.demand else self.config.model.seq_length
        hardware, spec = hardware or self.hardware, self.spec(layout)
        itself = ITSELF[hardware.kind]

        def needs(cut: Layout, stage: int) -> int:
            return generation_footprint(spec, cut, stage, rows=rows, context=context).total + itself

        dealt = Dealer(hardware, spec.layers, needs, lambda card: card.bandwidth).deal(layout)
        return with_note(weigh(hardware, dealt, spec, rows=rows, context=context), what_was_dealt(layout, dealt, hardware))

    def fitting(self, layouts: list[Layout], hardware: Hardware | None = None, *, rows: Sequence[int] | None = None) -> Iterator[Plan]:
        """The plans for these layouts that fit, each with as many of these rows, most first, as it can."""
        choices = rows or self.row_choices
        for layout in layouts:
            first = bisect_left(choices, True, key=lambda count, layout=layout: self.weigh(layout, count, hardware).shortage() is None)
            if first < len(choices):
                yield self.weigh(layout, choices[first], hardware)

    def room(self, layout: Layout) -> int:
        """How many rows of full length fit in memory."""
        return next((plan.rows for plan in self.fitting([layout], rows=range(MOST_ROWS, 0, -1))), 0)


def vocabulary_entries(config: RunConfig) -> int:
    """Entries of the vocabulary, as the configuration or the tokenizer says."""
    if config.tokenizer.padded_vocab_size:
        return config.tokenizer.padded_vocab_size
    from megatron_lite.data.tokenizer import load_tokenizer

    return load_tokenizer(config.tokenizer).vocab_size


def usual_entries(config: RunConfig) -> tuple[int, str]:
    """Entries of the vocabulary that models of this family have as a rule, and a sentence that says so."""
    entries, whose = USUAL_ENTRIES["gptj" if config.tokenizer.tokenizer_type == "GPT2BPETokenizer" else config.model.family]
    return entries, f"the tokenizer is not there yet: reckoned with the {entries:,} entries of {whose}; padded_vocab_size states another number"


def plan_generation(config: RunConfig, hardware: Hardware, entries: int, *, demand: Demand | None = None) -> Plan:
    """The plan for generation. Raises LayoutError or FitError where nothing that was asked for can run."""
    return plan_with(Planner(config, hardware, entries, demand))


def plan_with(planner: Planner) -> Plan:
    """The plan that this planner finds to fit. Raises LayoutError or FitError."""
    layout, line = fit_devices(planner.wish, planner.hardware, planner.spec(planner.wish.layout))
    first = planner.weigh(layout, planner.row_choices[0])
    shortage = first.shortage()
    if shortage is None:
        return with_note(first, line)
    plan = next(planner.fitting([layout, *layouts_for(planner.wish, len(planner.hardware), planner.spec(layout))]), None)
    if plan is None:
        least = planner.weigh(layout, planner.row_choices[-1])
        raise FitError(f"{planner.wish.where} with {layout} and {_rows(least.rows)} at once {least.shortage()}; {remedy(planner)}")
    fewer = plan.rows if plan.rows < first.rows and not planner.shares else None
    return replace(with_note(with_note(plan, line), f"{layout} {shortage}: using {_differences(planner, first, plan)}"), fewer_rows=fewer)


def plan_anyway(planner: Planner) -> Plan:
    """What was asked for, or fitted to the devices, whether memory holds it or not."""
    layout, line = fit_devices(planner.wish, planner.hardware, planner.spec(planner.wish.layout))
    return with_note(planner.weigh(layout, planner.row_choices[0]), line)


def plan_settings(plan: Plan, config: RunConfig) -> dict[str, object]:
    """What the processes must be told of a plan."""
    rows = {} if plan.fewer_rows is None else {"generation_batch_size": plan.fewer_rows}
    return {**sizes(plan.layout, config), **rows}


def _smallest_first(planner: Planner, wish: Wish, devices: int) -> list[Layout]:
    return sorted(layouts_for(wish, devices, planner.spec(wish.layout)), key=lambda layout: (layout.size, -layout.tp))


def _differences(planner: Planner, first: Plan, plan: Plan) -> str:
    layout = [f"{plan.layout} ({gigabytes(plan.largest)} a process)"] if plan.layout != first.layout else []
    fewer = f"{_rows(plan.rows)} at once instead of {first.rows} (generation_batch_size)"
    if planner.shares:
        fewer = f"a cache for {_rows(plan.rows)} of {plan.context} tokens instead of {first.rows}, which shorter rows share"
    return ", ".join([*layout, fewer] if plan.rows != first.rows else layout)


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count > 1)}"


def remedy(planner: Planner) -> str:
    """What would fit: other layouts here, fewer rows, or more GPUs."""
    hardware, wish = planner.hardware, replace(planner.wish, fixed=frozenset())
    for rows in (planner.row_choices[0], *(2**power for power in reversed(range(10)))):
        if rows > planner.row_choices[0]:
            continue
        here = list(planner.fitting(_smallest_first(planner, wish, len(hardware)), rows=[rows]))
        smaller = f" with a cache for {_rows(rows)}" if planner.shares else f" with generation_batch_size={rows}"
        fewer = smaller if rows < planner.row_choices[0] else ""
        if here:
            return f"here would fit{fewer}: " + ", ".join(f"{plan.layout} ({gigabytes(plan.largest)} a process)" for plan in here[:4])
    if hardware.kind == "CPU":
        return "no layout changes that; it takes a machine with more memory, or GPUs"
    smallest = min(hardware.devices, key=lambda device: device.free or 0)
    more = replace(hardware, devices=(smallest,) * MOST_DEVICES)
    plan = next(planner.fitting(_smallest_first(planner, wish, MOST_DEVICES), more), None)
    enough = (
        f"{plan.layout.size} such GPUs would do ({plan.layout}: {gigabytes(plan.largest)} on each)" if plan else f"not even {MOST_DEVICES} such GPUs would do"
    )
    return f"no layout fits on what is here ({hardware.found}); {_asking_less(planner, wish)}{enough}"


def _asking_less(planner: Planner, wish: Wish) -> str:
    """Which setting of the model would let it run here: weights of 8 bits, or shorter texts where nobody knows yet how long they are."""
    model = planner.config.model
    settings: list[tuple[str, object]] = [] if model.weight_quantization else [("weight_quantization", "int8")]
    settings += [("seq_length", model.seq_length // 2)] if planner.demand is None else []
    for key, value in settings:
        smaller = replace(planner, config=replace(planner.config, model=model.model_copy(update={key: value})))
        plan = next(smaller.fitting(_smallest_first(smaller, wish, len(planner.hardware)), rows=planner.row_choices), None)
        if plan is not None:
            return f"{key}={value} would ({plan.layout} with {_rows(plan.rows)} at once: {gigabytes(plan.largest)} a process); "
    return ""
