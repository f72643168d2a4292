"""From a command to running processes: everything is settled first, then started."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from launcher.checks import CHECKS, demand_of
from launcher.command import Command
from launcher.hardware import Hardware
from launcher.job import Job
from launcher.multinode import run_on_hosts
from launcher.plan import Plan, with_note
from launcher.planner import Planner, plan_anyway, plan_generation, plan_settings, usual_entries, vocabulary_entries
from launcher.replicas import plan_evaluation, scoring_planner, with_replicas
from launcher.show import describe_devices, show_run
from launcher.site import Site, find_site
from launcher.spawn import new_log_folder, spawn
from launcher.train_plan import plan_training
from megatron_lite.config.load import load_config
from megatron_lite.config.sections import RunConfig
from megatron_lite.data.jsonl import trim_cut_line
from megatron_lite.errors import FitError, LayoutError, UserError

LOGS = Path("logs")  # where log_dir is silent
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """Everything that is settled before a process starts. `changes` are settings that the plan makes, `problems` what a dry run forgives."""

    command: Command
    config: RunConfig
    site: Site
    plan: Plan
    changes: dict[str, object]
    problems: list[UserError]

    @property
    def words(self) -> list[str]:
        """The command line of every process."""
        return replace(self.command, overrides={**self.command.overrides, **self.changes}).words()


def settle(command: Command, machine: Hardware | None = None) -> Run:
    """Reads, checks and plans. All that is wrong is told together; a dry run needs no more than a plan, for it may come before the download."""
    config = load_config(command.configs, command.overrides)
    site = find_site(config, command.hostfile, machine)
    problems: list[UserError] = []
    for check in CHECKS.get(command.script, ()):
        attempt(lambda check=check: check(config), problems)
    known = attempt(lambda: vocabulary_entries(config), problems)
    entries, note = usual_entries(config) if known is None else (known, None)
    plan = attempt(lambda: with_note(_plan(command, config, site.hardware, entries, problems), note), problems)
    if plan is None or (problems and not command.dry_run):
        raise UserError("\n".join(map(str, problems)))
    return Run(command, config, site, plan, plan_settings(plan, config), problems)


def attempt(make: Callable[[], T], problems: list[UserError]) -> T | None:
    """What `make` returns; where it cannot, the reason joins the problems."""
    try:
        return make()
    except UserError as problem:
        problems.append(problem)
        return None


def _plan(command: Command, config: RunConfig, hardware: Hardware, entries: int, problems: list[UserError]) -> Plan:
    demand = attempt(lambda: demand_of(config), []) if command.script == "generate" else None
    try:
        if command.script == "train":
            return plan_training(config, hardware, entries)
        if command.script == "evaluate":
            return plan_evaluation(config, hardware, entries)
        return with_replicas(plan_generation(config, hardware, entries, demand=demand), demand)
    except FitError as problem:
        if not command.dry_run:
            raise
        problems.append(problem)
        if command.script == "train":
            return plan_training(config, hardware, entries, anyway=True)
        return plan_anyway(scoring_planner(config, hardware, entries) if command.script == "evaluate" else Planner(config, hardware, entries, demand))


def show(run: Run) -> int:
    """What --dry-run says: the plan, then what would keep it from running."""
    print(show_run(run.config, run.plan, run.changes))
    if run.problems:
        print("\nnot ready to run:", *run.problems, sep="\n", file=sys.stderr)
    return 2 if run.problems else 0


def start(run: Run, script: Path) -> int:
    """Starts the processes and returns the exit code when they have ended."""
    if run.config.generation_mode == "interactive" and not run.site.hosts[0].is_here:
        raise LayoutError(f"a conversation needs its first process on this machine, and {run.site.hosts[0].name} is another; name this one first")
    logs = new_log_folder(script.stem, run.config.logging.log_dir or LOGS)
    remark = [run.site.hardware.remark] if run.site.hardware.remark else []
    for line in (*run.config.notes, *remark, *run.plan.notes, f"{run.plan.layout} on {describe_devices(run.plan)}; logs in {logs}"):
        print(line, file=sys.stderr)
    count = run.plan.layout.size
    if run.site.is_local:
        code = spawn(Job(script.stem, script, tuple(run.words), count, logs, environment=run.site.hardware.environment()))
    else:
        code = run_on_hosts(run.site.hosts, run.command.configs, Job(script.stem, script, tuple(run.words), count, logs), run.config.launcher)
    output = run.config.generation_output if run.command.script == "generate" else None
    if code and output:
        trim_cut_line(output)  # whoever is killed while writing leaves half a line
    return code
