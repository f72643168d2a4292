"""Which layout the devices that are there allow: the one that was asked for, or a smaller one where nobody insists."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launcher.command import Command
from launcher.hardware import Device, Hardware
from megatron_lite.config.sections import RunConfig
from megatron_lite.errors import LayoutError
from megatron_lite.models.spec import ModelSpec, spec_of
from megatron_lite.parallel.layout import Layout, check_cut, layouts_up_to

SIZES = {"pp": "pipe_parallel_size", "tp": "model_parallel_size"}


@dataclass(frozen=True)
class Wish:
    """The layout that a configuration asks for, and where. Sizes set on the command line are fixed: honoured or refused, never changed."""

    layout: Layout
    fixed: frozenset[str]
    where: str

    def allows(self, layout: Layout) -> bool:
        return all(getattr(layout, axis) == getattr(self.layout, axis) for axis in self.fixed)

    def cut_like(self, layout: Layout) -> Layout:
        """The layout with the blocks that were asked for, where it has as many stages."""
        return replace(layout, blocks=self.layout.blocks if layout.pp == self.layout.pp else ())


def wish_of(config: RunConfig) -> Wish:
    origins = {axis: config.where(key) for axis, key in SIZES.items()}
    files = [origin.rpartition(" line ")[0] for origin in origins.values() if " line " in origin]
    return Wish(
        Layout(pp=max(1, config.parallel.pipe_parallel_size), tp=config.parallel.model_parallel_size, blocks=config.parallel.pipe_stage_layers or ()),
        frozenset(axis for axis, origin in origins.items() if origin == "command line"),
        " and ".join(dict.fromkeys(files)) or str(config.files[0]),
    )


def check_layout(layout: Layout, spec: ModelSpec) -> None:
    """Raises LayoutError where the model cannot be cut so."""
    check_cut(layout, heads=spec.heads, kv_heads=spec.kv_heads, ffn=spec.ffn, layers=spec.layers)


def layouts_for(wish: Wish, devices: int, spec: ModelSpec) -> Iterator[Layout]:
    """Every layout of at most so many devices that the wish allows and the model can be cut into; the fastest way to use most devices first."""
    for layout in layouts_up_to(devices, heads=spec.heads, layers=spec.layers):
        layout = wish.cut_like(layout)
        if wish.allows(layout):
            try:
                check_layout(layout, spec)
            except LayoutError:
                continue
            yield layout


def fit_devices(wish: Wish, hardware: Hardware, spec: ModelSpec) -> tuple[Layout, str | None]:
    """The layout that was asked for if there are devices enough, else a smaller one and a line that says so."""
    asked = wish.layout
    if asked.size > len(hardware) and (layout := next(layouts_for(wish, len(hardware), spec), None)):
        return layout, f"{_asks(wish, hardware)}: using {layout}"
    if asked.size > len(hardware) and hardware.kind != "CPU":
        raise LayoutError(f"{_insisted(wish)} on the command line: {_needs(wish, hardware)}; ask for fewer, or leave the sizes out to have them fitted")
    # Several CPU processes can share a core, if that is what the command line insists on.
    layout = asked if asked.size <= len(hardware) else wish.cut_like(replace(Layout(), **{axis: getattr(asked, axis) for axis in wish.fixed}))
    check_layout(layout, spec)
    return layout, None if layout == asked else f"{_asks(wish, hardware)}: using {layout}"


def replicate(wish: Wish, hardware: Hardware, spec: ModelSpec) -> Layout:
    """For training: the layout that was asked for, as often as the devices hold it."""
    asked = wish.layout
    check_layout(asked, spec)
    if hardware.kind == "CPU":  # cores are not devices: one replica is what was asked for
        return asked
    if len(hardware) % asked.size or not len(hardware):
        raise LayoutError(f"{wish.where}: {_needs(wish, hardware)}; training needs that number or a multiple of it, set num_gpus or the sizes")
    return replace(asked, dp=len(hardware) // asked.size)


def _asks(wish: Wish, hardware: Hardware) -> str:
    asked = wish.layout
    found = hardware.found.replace(" GPUs", "").replace(" GPU", "")
    return f"{wish.where} asks for {asked.pp} x {asked.tp} = {asked.size} {hardware.processes}; {found}"


def _needs(wish: Wish, hardware: Hardware) -> str:
    return f"{wish.layout} needs {wish.layout.size} {hardware.processes}; {hardware.found}"


def _insisted(wish: Wish) -> str:
    return " ".join(f"{SIZES[axis].replace('_', '-')}={getattr(wish.layout, axis)}" for axis in ("pp", "tp") if axis in wish.fixed)


def sizes(layout: Layout, config: RunConfig) -> dict[str, object]:
    """The layout as settings for the processes. pipe_parallel_size 0 is one stage too, and stays 0."""
    pipe = config.parallel.pipe_parallel_size
    found: dict[str, object] = {"pipe_parallel_size": pipe if max(1, pipe) == layout.pp else layout.pp, "model_parallel_size": layout.tp}
    stated = config.parallel.pipe_stage_layers or ()
    return found if layout.blocks == stated else {**found, "pipe_stage_layers": list(layout.blocks) or None}


def fit_to_processes(config: RunConfig, processes: int, *, training: bool) -> tuple[dict[str, object], str | None]:
    """Settings for a layout of exactly the processes that somebody else started, and a line if it is not the one that was asked for."""
    wish, started = wish_of(config), Hardware("process", (Device("process"),) * processes)
    spec = spec_of(config.model, vocab=0, dtype="float32")
    layout, line = (wish.layout, None) if training else fit_devices(wish, started, spec)
    check_layout(layout, spec)
    if processes % layout.size:
        raise LayoutError(f"{_needs(replace(wish, layout=layout), started)}; start a multiple of {layout.size}")
    return sizes(layout, config), line


def fitted(command: Command, processes: int) -> tuple[Command, list[str]]:
    """The command for processes that somebody else than deepy started, with sizes that suit their number, and what is to be said about it."""
    from megatron_lite.config.load import load_config

    config = load_config(command.configs, command.overrides)
    settings, line = fit_to_processes(config, processes, training=command.script == "train")
    return replace(command, overrides={**command.overrides, **settings}), [*config.notes, *([line] if line else [])]
