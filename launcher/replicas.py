"""Replicas need not wait for each other: for evaluation the model is cut no further than memory demands, and is there as often as it fits; prompts of which
there are many are shared."""

from dataclasses import dataclass, replace

from launcher.fit import fit_devices, layouts_for
from launcher.hardware import Hardware
from launcher.plan import Demand, Plan, with_note
from launcher.planner import Planner, plan_with
from megatron_lite.config.sections import RunConfig
from megatron_lite.parallel.layout import Layout

TOKENS = 4096
"""That must fit at once beside the weights; where memory has room for more, more are taken."""


@dataclass(frozen=True)
class ScoringPlanner(Planner):
    """Weighs layouts for scoring, which keeps keys and values of one layer at a time."""

    def weigh(self, layout: Layout, rows: int, hardware: Hardware | None = None) -> Plan:
        plan = super().weigh(layout, rows, hardware)
        return replace(plan, stages=tuple(replace(stage, cache=0) for stage in plan.stages))


def scoring_planner(config: RunConfig, hardware: Hardware, entries: int) -> Planner:
    return ScoringPlanner(config, hardware, entries, Demand(1, max(TOKENS, config.model.max_position_embeddings)))


def plan_evaluation(config: RunConfig, hardware: Hardware, entries: int) -> Plan:
    """The plan for evaluation. Raises LayoutError or FitError where nothing that was asked for can run."""
    planner = scoring_planner(config, hardware, entries)
    wish, asked = planner.wish, planner.wish.layout
    devices = _devices(planner)
    layouts = [replace(layout, dp=devices // (layout.pp * layout.tp)) for layout in layouts_for(wish, devices, planner.spec(asked))]
    # all devices if that can be, cut little; and rather in stages, which hand on little and take up the next batch, than in parts that wait for each other
    for layout in sorted(layouts, key=lambda layout: (-layout.size, layout.pp * layout.tp, layout.tp)):
        plan = planner.weigh(layout, 1)
        if plan.shortage() is None:
            return with_note(plan, None if plan.layout == asked else f"{wish.where} asks for {asked}; {hardware.found}: using {plan.layout}")
    return plan_with(planner)


def with_replicas(plan: Plan, demand: Demand | None) -> Plan:
    """The plan for generation with as many replicas as devices allow, where there are more prompts than one takes at once."""
    free, asked = len(plan.hardware) // plan.layout.size, 1 if demand is None else -(-demand.rows // plan.rows)
    count = 1 if plan.hardware.kind == "CPU" else min(free, asked)
    several = replace(plan, layout=replace(plan.layout, dp=count))
    return plan if count == 1 or several.shortage() else with_note(several, f"{count} replicas share the prompts")


def _devices(planner: Planner) -> int:
    """On CPUs as many processes as generation would have: cores are not devices, and a process uses several."""
    hardware, wish = planner.hardware, planner.wish
    return fit_devices(wish, hardware, planner.spec(wish.layout))[0].size if hardware.kind == "CPU" else len(hardware)
