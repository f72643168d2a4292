"""Where published checkpoints lie, which files they have, and the folder where the configurations look for them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from megatron_lite.data.archive import Archive
from megatron_lite.data.download import ANOTHER, RemoteFile, check_space, safe_path, size_difference
from megatron_lite.data.listings import folder_files, hub_files
from megatron_lite.data.sizes import with_sizes
from megatron_lite.errors import ConfigError, DataError

THE_EYE = ("https://the-eye.eu/public/AI", "https://mystic.the-eye.eu/public/AI")
GPT2 = ("https://openaipublic.blob.core.windows.net/gpt-2/encodings/main", "https://huggingface.co/openai-community/gpt2/resolve/main")
PYTHIA = ("14M", "31M", "70M", "160M", "410M", "1B", "1.4B", "2.8B", "6.9B", "12B")
NAMES = ("20B", *(f"pythia/{size}" for size in PYTHIA), "gpt-j-6B")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Release:
    """A published checkpoint. The last of the files makes the folder a checkpoint. `folder` is where `config` looks for it."""

    name: str
    source: str
    files: tuple[RemoteFile, ...]
    folder: Path
    config: str = ""
    archive: Archive | None = None

    @property
    def all_files(self) -> tuple[RemoteFile, ...]:
        return (*self.files, self.archive.file) if self.archive else self.files

    def missing(self, folder: Path) -> list[RemoteFile]:
        """What has to be fetched into this folder, in whole or in part."""
        files = [file for file in self.files if not safe_path(folder, file.name).exists()]
        return [*files, self.archive.file] if self.archive and not self.archive.is_unpacked(folder) else files

    def with_sizes(self, folder: Path) -> "Release":
        """Its server asked for the sizes that nobody else says, of files that are there too: another program may have left them broken."""
        archive = self.archive
        if archive and not archive.is_unpacked(folder):
            archive = replace(archive, file=with_sizes([archive.file])[0])
        return replace(self, files=tuple(with_sizes(self.files)), archive=archive)

    def check_place(self, folder: Path) -> None:
        """Raises DataError where files are there that are others, and OutputError where the disk has no room for what is missing."""
        for file in self.files:
            path = safe_path(folder, file.name)  # other programs leave broken files under their names
            if path.exists() and (difference := size_difference(path, file)):
                raise DataError(ANOTHER.format(path, difference))
        unpacked = self.archive and replace(self.archive.file, name=self.archive.pattern, size=self.archive.unpacked)
        check_space(folder, [unpacked if self.archive and unpacked and file is self.archive.file else file for file in self.missing(folder)])


def release_named(name: str, *, base_url: str = "", revision: str = "") -> Release:
    """The release of this name, from its published place or from a folder of another server. Asks the server only where the list is not known before."""
    base = base_url.rstrip("/")
    if name.startswith("hub:"):
        return _on_hub(name, name.removeprefix("hub:"), base, revision)
    known = next((each for each in NAMES if each.lower() == name.lower().removeprefix("configs/").removesuffix(".yml")), None)
    if known is None:
        close = get_close_matches(name, NAMES, 1)
        meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(NAMES)}, and hub:OWNER/NAME"
        raise ConfigError(f"no release is called {name}; {meant}")
    if known.startswith("pythia/"):
        place = f"pythia-{known.removeprefix('pythia/').lower()}"
        release = _on_hub(known, f"EleutherAI/{place}", base, revision)
        return replace(release, folder=Path("checkpoints") / place, config=f"configs/{known}.yml")
    if revision:
        raise ConfigError(f"{known} has no revisions; leave --revision out, or take a model of the hub: hub:OWNER/NAME")
    return _neox_20b(base) if known == "20B" else _gpt_j(base)


def _on_hub(name: str, repository: str, base: str, revision: str) -> Release:
    if not HUB_NAME.fullmatch(repository) or set(repository.split("/")) & {".", ".."}:
        raise ConfigError(f"hub:{repository} is no name of a model on the hub; it should be hub:OWNER/NAME, such as hub:EleutherAI/pythia-70m-deduped")
    if base and revision:
        raise ConfigError("--revision is the hub's, which --base-url does without; give one of them")
    files = folder_files(base) if base else hub_files(repository, revision or "main")
    return Release(name, base or f"huggingface: {repository}", tuple(files), Path("checkpoints") / repository.split("/")[1])


def _neox_20b(base: str) -> Release:
    """The slim release: 47 layers in two files each. Its mp_rank files hold no weights, and are left where they are."""
    places = (base,) if base else tuple(f"{place}/models/GPT-NeoX-20B/slim_weights" for place in THE_EYE)
    step, tensors = "global_step150000", {0: 309_854_208, 47: 24_576, 48: 309_854_208}  # bytes of the tensors; the files have some more
    layers = [
        _offered(f"{step}/layer_{number:02d}-model_{part:02d}-model_states.pt", places, least=tensors.get(number, 453_101_568))
        for number in (0, *range(2, 46), 47, 48)
        for part in range(2)
    ]
    tokenizer = _offered("20B_tokenizer.json", places, "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade", 2_467_981)
    beside = [tokenizer, _offered("configs/20B.yml", places), _offered("latest", places)]
    return Release("20B", places[0], (*layers, *beside), Path("20B_checkpoints"), "configs/20B.yml")


def _gpt_j(base: str) -> Release:
    """The slim release of mesh-transformer-jax, with GPT-2's tokenizer."""
    places = (base,) if base else tuple(f"{place}/GPT-J-6B" for place in THE_EYE)
    archive = Archive(_offered("step_383500_slim.tar.zstd", places, least=1 << 30), "step_383500/shard_*/*.npz", count=128, unpacked=12_110_000_000)
    urls = {"vocab.json": (f"{GPT2[0]}/encoder.json", f"{GPT2[1]}/vocab.json"), "merges.txt": (f"{GPT2[0]}/vocab.bpe", f"{GPT2[1]}/merges.txt")}
    own = {name: ((f"{base}/{name}",) if base else ()) for name in urls}
    files = (
        RemoteFile("vocab.json", own["vocab.json"] + urls["vocab.json"], "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783", 1_042_301),
        RemoteFile("merges.txt", own["merges.txt"] + urls["merges.txt"], "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5", 456_318),
    )
    return Release("gpt-j-6B", places[0], files, Path("gpt-j-6b"), "configs/gpt-j-6B.yml", archive)


def _offered(name: str, places: Sequence[str], sha256: str | None = None, size: int | None = None, least: int = 0) -> RemoteFile:
    return RemoteFile(name, tuple(f"{place}/{name}" for place in places), sha256, size, least)
