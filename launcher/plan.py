"""What is going to run: a layout, how many rows at once, and what that takes of every device's memory."""

from dataclasses import dataclass, replace

from launcher.hardware import Hardware
from megatron_lite.models.memory import Footprint, generation_footprint
from megatron_lite.models.spec import ModelSpec
from megatron_lite.models.training_memory import Training, training_footprint
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
    work: str
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
        if self.hardware.limit is not None and self.largest > self.hardware.limit:
            rank = max(range(self.layout.size), key=self.taken)
            parts = self._parts([rank], "CUDA itself" if self.hardware.kind == "GPU" else "the process itself")
            return f"needs {gigabytes(self.largest)} in a process ({parts}); gpu-memory-limit allows {gigabytes(self.hardware.limit)}"
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
        return f"needs {gigabytes(self.total)} on CPU{self._format} ({self._parts(ranks, 'the processes themselves')}); {gigabytes(free)} of memory are free"

    @property
    def _format(self) -> str:
        return " in float32" if self.rows else ""

    def _parts(self, ranks: list[int] | range, itself: str) -> str:
        prints = [self.stages[self.stage(rank)].parts for rank in ranks]
        names = dict.fromkeys(name for parts in prints for name in parts)
        parts = {name: sum(parts.get(name, 0) for parts in prints) for name in names}
        parts[itself] = self.itself * len(prints)
        return ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())


def weigh(hardware: Hardware, layout: Layout, spec: ModelSpec, *, rows: int, context: int) -> Plan:
    """What generating with so many rows of up to so many tokens takes."""
    stages = tuple(generation_footprint(spec, layout, stage, rows=rows, context=context) for stage in range(layout.pp))
    return Plan(hardware, layout, rows, context, stages, f"{rows} row{'s' * (rows > 1)} at once of up to {context} tokens")


def weigh_training(hardware: Hardware, layout: Layout, spec: ModelSpec, training: Training) -> Plan:
    stages = tuple(training_footprint(spec, layout, stage, training) for stage in range(layout.pp))
    return Plan(hardware, layout, 0, training.tokens, stages, training_work(training, spec))


def training_work(training: Training, spec: ModelSpec) -> str:
    """What is trained and how, in words."""
    what = f"LoRA of rank {training.lora.rank}" if training.lora else "full training"
    what += f" beside weights in {spec.quantization}" if spec.quantization else ""
    activations = "activations computed again" if training.recompute else "all activations kept"
    offload = ", optimizer on the host" if training.offload_optimizer else ""
    return f"{what}: {training.rows} x {training.tokens} tokens at once, ZeRO {max(1, training.zero)}, {activations}{offload}"


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def with_note(plan: Plan, note: str | None) -> Plan:
    return replace(plan, notes=(*plan.notes, note)) if note else plan
