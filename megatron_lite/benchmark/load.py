"""From files to GPUs: cold ones against what the disk can do, those in the page cache against what the link to the GPU can do."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from megatron_lite.benchmark.bench import Numbers, precision, release
from megatron_lite.benchmark.ceilings import CEILING, copy_rate
from megatron_lite.benchmark.clock import seconds_of
from megatron_lite.benchmark.disk import cached_share, direct_rate, drop
from megatron_lite.benchmark.peer import BALANCED, NAME, PLANNED, import_transformers, loaded, manners
from megatron_lite.benchmark.table import OURS, Row
from megatron_lite.checkpoint.find import find_checkpoint
from megatron_lite.checkpoint.load import open_source, spec_as_stored, vocabulary_rows
from megatron_lite.checkpoint.reader import WEIGHT_FILES
from megatron_lite.config.sections import RunConfig
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.models.architecture import architecture_named
from megatron_lite.models.spec import spec_of
from megatron_lite.parallel.mailbox import wait_quietly
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.stage import Stage
from megatron_lite.run import Run, load_stage

WARM, COLD = "load, files in the page cache", "load, cold"


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    times: int
    cold: bool
    direct_bytes: int
    peer: bool


def measure_loading(config: RunConfig, mesh: Mesh, options: LoadOptions) -> Iterator[Row]:
    """Ours cold and warm, then transformers warm and cold, so that every cold reading begins with files that nobody has mapped."""
    bench = LoadBench(config, mesh, options)
    copying, direct = copy_rate(mesh.device), bench.shared(lambda: direct_rate(bench.files, options.direct_bytes))
    yield Row(what="copy from pinned memory to one device", by=CEILING, rate=copying / 1e9, unit="GB/s")
    direct_note = "" if direct else "this file system has no O_DIRECT"
    yield Row(what="reading past the page cache (O_DIRECT)", by=CEILING, rate=direct / 1e9 if direct else None, unit="GB/s", note=direct_note)
    if options.cold:
        yield bench.cold(OURS, bench.ours, floor=bench.on_disk / direct if direct else None)
    yield bench.warm(OURS, bench.ours, floor=bench.held() / copying)  # the first time fills the cache
    if options.peer:
        names = manners(mesh)
        for name in names:
            yield from bench.peer(name, cold=options.cold and name == names[0], copying=copying, direct=direct)


class LoadBench:
    """A checkpoint, and the processes that read it."""

    def __init__(self, config: RunConfig, mesh: Mesh, options: LoadOptions) -> None:
        if config.checkpoint.load is None:
            raise ConfigError("load is not set; it names the folder of the checkpoint, or give --folder")
        self.config, self.mesh, self.options = config, mesh, options
        self.folder = config.checkpoint.load
        self.files = weight_files(find_checkpoint(self.folder, iteration=config.checkpoint.iteration).folder)
        self.on_disk = sum(path.stat().st_size for path in self.files)

    def ours(self) -> Stage:
        return load_stage(opened(self.config, self.mesh))

    def held(self) -> int:
        """Bytes of weights that this process comes to hold, which it loads to know."""
        held = sum(tensor.nbytes for layer in self.ours().layers.values() for tensor in (*layer.parameters(), *layer.buffers()))
        release(self.mesh.device)
        return held

    def shared(self, ask: Callable[[], float | None]) -> float | None:
        """What the first process finds, while the others wait."""
        return self.mesh.share_from_writer(ask)

    def timed(self, work: Callable[[], object]) -> float:
        wait_quietly(self.mesh)
        seconds = seconds_of(work, self.mesh.device)
        release(self.mesh.device)  # files must not stay mapped
        wait_quietly(self.mesh)
        return seconds

    def warm(self, by: str, work: Callable[[], object], *, floor: float | None) -> Row:
        return self._row(WARM, by, median(self.timed(work) for _ in range(self.options.times)), floor)

    def cold(self, by: str, work: Callable[[], object], *, floor: float | None) -> Row:
        left = self.shared(self._forget) or 0.0
        note = f"{left:.0%} of the pages stayed cached: this file system forgets nothing" if left > 0.02 else ""
        return self._row(COLD, by, self.timed(work), floor, note=note)

    def _forget(self) -> float:
        drop(self.files)
        return cached_share(self.files)

    def peer(self, name: str, *, cold: bool, copying: float, direct: float | None) -> Iterator[Row]:
        takes_part = self.mesh.is_writer or name == PLANNED
        dtype = getattr(torch, precision(self.config, self.mesh.device))

        def work() -> None:
            if takes_part:
                loaded(str(self.folder), self.mesh, name, dtype)

        run = opened(self.config, self.mesh)
        import_transformers(run.architecture, run.spec)
        del run
        parts = 1 if name in (NAME, BALANCED) else self.mesh.layout.size
        yield self.warm(name, work, floor=self.on_disk / parts / copying)
        if cold:
            yield self.cold(name, work, floor=self.on_disk / direct if direct else None)

    def _row(self, what: str, by: str, seconds: float, floor: float | None, *, note: str = "") -> Row:
        size = self.on_disk * (self.mesh.layout.dp if by == OURS else 1)
        told = f"{size / 1e9:.2f} GB" + (f"; {note}" if note else "")
        return Row(what=what, by=by, rate=size / seconds / 1e9, unit="GB/s", seconds=seconds, floor=floor, note=told)


def opened(config: RunConfig, mesh: Mesh) -> Run:
    """A run that needs no tokenizer."""
    assert config.checkpoint.load is not None
    architecture = architecture_named(config.model.family)
    checkpoint = find_checkpoint(config.checkpoint.load, iteration=config.checkpoint.iteration)
    spec = spec_as_stored(checkpoint, spec_of(config.model, vocab=0, dtype=precision(config, mesh.device)))
    source = open_source(checkpoint, architecture, spec)
    rows = vocabulary_rows(source)
    spec = replace(spec, vocab=-(-rows // mesh.tp.size) * mesh.tp.size)
    return Run(config, mesh, architecture, spec, Numbers(rows), checkpoint, source)


def weight_files(folder: Path) -> Sequence[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (*WEIGHT_FILES, ".npz") and not path.name.startswith("mp_rank")]
    if not files:
        raise CheckpointError(f"{folder} has no files of weights ({', '.join(WEIGHT_FILES)}); give another --folder")
    return files
