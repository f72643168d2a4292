"""What --dry-run prints: the settings and who set them, which rank holds which layers, and the memory each GPU needs."""

from collections.abc import Iterator, Mapping, Sequence

from launcher.plan import Plan, gigabytes
from megatron_lite.config.sections import RunConfig
from megatron_lite.config.show import settings

LONGEST = 60  # characters of a value


def show_run(config: RunConfig, plan: Plan, changes: Mapping[str, object]) -> str:
    """Settings, layout and memory. `changes` are the settings that the plan replaces."""
    rows = [("setting", "value", "set by"), *_settings(config, changes)]
    notes = [*config.notes, *plan.notes]
    parts = [table(rows), _headline(plan), stage_table(config, plan), _closing(plan), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


def _settings(config: RunConfig, changes: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    for key, value, origin in settings(config):
        if key in changes and str(changes[key]) != value:
            yield key, str(changes[key]), f"fitted to this machine ({value}: {origin})"
        else:
            yield key, value if len(value) <= LONGEST else value[: LONGEST - 3] + "...", origin


def _headline(plan: Plan) -> str:
    return f"{plan.layout} on {describe_devices(plan)}; what every process of a stage takes:"


def describe_devices(plan: Plan) -> str:
    """For instance `2 GPUs (NVIDIA H100 80GB HBM3)` or `2 CPU processes`."""
    count = plan.layout.size
    if plan.hardware.kind == "GPU":
        names = ", ".join(dict.fromkeys(device.name for device in plan.hardware.devices[:count]))
        return f"{count} GPU{'s' * (count > 1)} ({names})"
    return f"{count} {'CPU ' if plan.hardware.kind == 'CPU' else ''}process{'es' * (count > 1)}"


def stage_table(config: RunConfig, plan: Plan) -> str:
    """What every process of a stage takes, by part."""
    parts = list(dict.fromkeys(name for footprint in plan.stages for name in footprint.parts))
    header = ("stage", "ranks", "layers", *parts, "process", "total", "free")
    return table([header, *_stages(config, plan, parts)], right=range(3, len(header)))


def _stages(config: RunConfig, plan: Plan, parts: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for stage, (numbers, footprint) in enumerate(zip(plan.layout.numbers(config.model.num_layers), plan.stages, strict=True)):
        ranks = [rank for rank in range(plan.layout.size) if plan.stage(rank) == stage]
        free = [free for rank in ranks if plan.hardware.kind != "CPU" and (free := plan.hardware.devices[rank].free) is not None]
        sizes = (*(footprint.parts.get(name, 0) for name in parts), plan.itself, footprint.total + plan.itself)
        yield f"{stage}", _span(ranks), _layers(numbers, config.model.num_layers), *map(gigabytes, sizes), gigabytes(min(free)) if free else "-"


def _layers(numbers: Sequence[int], layers: int) -> str:
    """Layer numbers, which are those of the files, and what they are."""
    blocks = [number for number in numbers if 2 <= number < layers + 2]
    names = {0: "00 embedding", layers + 3: f"{layers + 3:02d} norm", layers + 4: f"{layers + 4:02d} head"}
    ends = [names[number] for number in numbers if number in names]
    middle = f"{_span(blocks, width=2)} block{'s' * (len(blocks) > 1)}"
    return ", ".join([*ends[:1], middle, *ends[1:]] if 0 in numbers else [middle, *ends])


def _span(numbers: Sequence[int], width: int = 0) -> str:
    first, last = f"{numbers[0]:0{width}d}", f"{numbers[-1]:0{width}d}"
    return first if first == last else f"{first}-{last}"


def _closing(plan: Plan) -> str:
    if plan.hardware.kind != "CPU":
        return f"reckoned for {plan.work}"
    free = f" of {gigabytes(plan.hardware.memory)} of memory that are free" if plan.hardware.memory is not None else ""
    return f"reckoned for {plan.work}{', in float32' * bool(plan.rows)}; all processes together take {gigabytes(plan.total)}{free}"


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Rows as aligned columns under a rule; `right` are the columns of numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) if column in right else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
