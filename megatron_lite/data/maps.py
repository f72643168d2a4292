"""Sample maps beside their data set, under the names that NeoX gives them: those that it made are used, those made here serve it."""

import hashlib
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_lite.data.indexed import Corpus, files_of
from megatron_lite.data.once import one_at_a_time, save_array
from megatron_lite.data.packing import Documents, Packing, SampleMaps, check_documents, epochs_for, pack, samples_in
from megatron_lite.log import logger

PARTS = ("doc_idx", "sample_idx", "shuffle_idx")


@dataclass(frozen=True)
class MapFiles:
    """Where the maps of a data set lie, for a purpose such as "train" or, of several data sets, "train_0". Maps of whole documents say nothing that could
    be checked of what they were made from: their names hold its `origin`, so that those of NeoX are not taken for ours."""

    prefix: Path
    purpose: str
    samples: int
    packing: Packing
    origin: str

    def paths(self) -> list[Path]:
        packing = self.packing
        chopped = "_ac" if packing.allow_chopped else ""
        title = f"{self.prefix.name}_{self.purpose}_indexmap_{self.samples}ns_{packing.seq_length}sl_{packing.seed}s_{packing.pack_impl}pi{chopped}"
        if packing.pack_impl != "packed":
            title += f"_{self.origin}"
        return [self.prefix.with_name(f"{title}_{part}.npy") for part in PARTS]

    def load(self, documents: Documents) -> SampleMaps | None:
        """The maps, mapped, if they are there, younger than the data, and could be of these documents."""
        paths = self.paths()
        if not all(path.is_file() for path in paths):
            return None
        made = files_of(self.prefix)[0].stat().st_mtime
        if any(path.stat().st_mtime < made for path in paths):
            return None
        try:
            maps = SampleMaps(*(np.load(path, mmap_mode="r") for path in paths))
        except (OSError, ValueError):  # a file that is cut short
            return None
        return maps if fits(maps, documents, self.samples, self.packing) else None

    def save(self, maps: SampleMaps) -> None:
        for path, numbers in zip(self.paths(), (maps.documents, maps.starts, maps.order), strict=True):
            save_array(path, numbers)


def origin_of(corpus: Corpus, part: range) -> str:
    """Another text for another part of the data, other lengths, or other labels."""
    parts: list[object] = [part.start, part.stop, hashlib.sha256(corpus.tokens.sizes[part.start : part.stop].tobytes()).hexdigest()]
    if corpus.labels is not None:
        state = files_of(corpus.labels.prefix)[0].stat()
        parts += [str(corpus.labels.prefix.resolve()), state.st_size, state.st_mtime_ns]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def fits(maps: SampleMaps, documents: Documents, samples: int, packing: Packing) -> bool:
    """Whether maps have the shape and the range that these documents would give them."""
    entries = len(maps.documents)
    if not documents.tokens:
        return False
    if packing.pack_impl == "packed":
        epochs = epochs_for(documents.tokens, samples, packing.seq_length)
        samples = samples_in(documents.tokens, epochs, packing.seq_length)
        if entries != epochs * len(documents.sizes):
            return False
    if maps.starts.shape != (samples + 1, 2) or maps.order.shape != (samples,) or not 0 <= maps.starts[-1, 0] <= entries:
        return False
    return bool(maps.documents.min() >= documents.first and maps.documents.max() < documents.first + len(documents.sizes))


def sample_maps(files: MapFiles, documents: Documents) -> SampleMaps:
    """The maps from their files, which are made if need be; in a folder that cannot be written every process makes its own."""
    found = files.load(documents)
    if found is not None:
        return found
    folder = files.prefix.parent
    with one_at_a_time(folder) if folder.is_dir() else nullcontext():
        return files.load(documents) or _build(files, documents)


def _build(files: MapFiles, documents: Documents) -> SampleMaps:
    name = f"{files.prefix} ({files.purpose})"
    check_documents(documents, files.packing, name)
    started = time.monotonic()
    maps = pack(documents, files.samples, files.packing)
    logger.info(f"{name}: {len(maps.order):,} samples of {files.packing.seq_length:,} tokens mapped in {time.monotonic() - started:.1f} s")
    try:
        files.save(maps)
    except OSError as error:
        logger.info(f"{name}: the maps are not kept beside the data ({error.strerror or error})")
        return maps
    return files.load(documents) or maps  # mapped, so that the processes of a machine share the memory
