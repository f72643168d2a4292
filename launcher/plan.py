"""What is going to run: a layout, how many rows at once, and what that takes of every device's memory."""

from dataclasses import dataclass, replace

from launcher.hardware import Hardware
from megatron_lite.models.memory import Footprint, generation_footprint
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout

ITSELF = {"GPU": 2**30, "slot": 2**30, "CPU": 2**28, "process": 0}  # bytes a process takes before it holds a tensor: the CUDA context, or torch


@dataclass(frozen=True)
class Demand:
    """What generation has to do: how many rows there are, and the tokens of the longest, prompt and completion."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """A layout on some hardware, and one footprint for every pipeline stage.

    `notes` say what differs from what was asked for; `fewer_rows` is how many are generated at once if memory holds no more.
    """

    hardware: Hardware
    layout: Layout
    rows: int
    context: int
    stages: tuple[Footprint, ...]
    notes: tuple[str, ...] = ()
    fewer_rows: int | None = None

    @property
    def itself(self) -> int:
        """Bytes a process takes beside the model."""
        return ITSELF[self.hardware.kind]

    def stage(self, rank: int) -> int:
        return self.layout.coordinates(rank)[0]

    def taken(self, rank: int) -> int:
        """Bytes that a rank takes."""
        return self.stages[self.stage(rank)].total + self.itself

    @property
    def largest(self) -> int:
        return max(self.taken(rank) for rank in range(self.layout.size))

    @property
    def total(self) -> int:
        return sum(self.taken(rank) for rank in range(self.layout.size))

    def shortage(self) -> str | None:
        """What it needs and what there is, where that is less."""
        if self.hardware.kind == "CPU":
            return self._shared_shortage()
        for rank in range(self.layout.size):
            free = self.hardware.devices[rank].free
            if free is not None and self.taken(rank) > free:
                return f"needs {gigabytes(self.taken(rank))} on GPU {rank} ({self._parts([rank], 'CUDA itself')}); {gigabytes(free)} are free there"
        return None

    def _shared_shortage(self) -> str | None:
        free, ranks = self.hardware.memory, range(self.layout.size)
        if free is None or self.total <= free:
            return None
        return f"needs {gigabytes(self.total)} on CPU in float32 ({self._parts(ranks, 'the processes themselves')}); {gigabytes(free)} of memory are free"

    def _parts(self, ranks: list[int] | range, itself: str) -> str:
        prints = [self.stages[self.stage(rank)] for rank in ranks]
        parts = {
            "weights": sum(footprint.weights for footprint in prints),
            "KV cache": sum(footprint.cache for footprint in prints),
            "activations": sum(footprint.activations for footprint in prints),
            itself: self.itself * len(prints),
        }
        return ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())


def weigh(hardware: Hardware, layout: Layout, spec: ModelSpec, *, rows: int, context: int) -> Plan:
    stages = tuple(generation_footprint(spec, layout, stage, rows=rows, context=context) for stage in range(layout.pp))
    return Plan(hardware, layout, rows, context, stages)


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def with_note(plan: Plan, note: str | None) -> Plan:
    return replace(plan, notes=(*plan.notes, note)) if note else plan
