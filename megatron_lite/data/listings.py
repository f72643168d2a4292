"""Which files a model consists of, where nobody knows before: asked of the Hugging Face hub, or found in a folder of any web server."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from typing import NamedTuple, cast
from urllib.parse import quote

from megatron_lite.data.download import RemoteFile
from megatron_lite.data.hub import endpoint
from megatron_lite.data.transfer import BrokenError, RefusedError, insist, read_text, size_of
from megatron_lite.errors import DataError


class Weights(NamedTuple):
    """A form in which weights are published: the file that tells it, and the others."""

    sign: str
    others: str = ""


KINDS = (
    Weights("model.safetensors.index.json", "model-*-of-*.safetensors"),
    Weights("model.safetensors"),
    Weights("pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
    Weights("pytorch_model.bin"),
    Weights("*layer_00-model_00-model_states.pt", "*layer_*-model_*-model_states.pt"),
    Weights("*mp_rank_00_model_states.pt", "*mp_rank_*_model_states.pt"),
)
"""The first that is there is fetched, and none of the others."""

BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
DECIDING = ("config.json", "latest")
"""Without one of them a folder is no checkpoint, so they come last."""


def hub_files(repository: str, revision: str) -> list[RemoteFile]:
    """The files that a checkpoint on the hub needs, with sizes and checksums, of the commit that the revision means now."""
    url = f"{endpoint()}/api/models/{quote(repository)}/revision/{quote(revision, safe='')}?blobs=true"
    try:
        answer = json.loads(insist(lambda: read_text(url), tries=2))
        commit, entries = str(answer["sha"]), cast(list[dict[str, object]], answer["siblings"])
        files = [_hub_file(f"{endpoint()}/{quote(repository)}/resolve/{quote(commit, safe='')}", entry) for entry in entries]
    except (BrokenError, RefusedError) as error:
        hint = "; a model behind a licence needs HF_TOKEN" if isinstance(error, RefusedError) and error.code in (401, 403) else ""
        raise DataError(f"the hub has no list of the files of {repository} at {revision} ({url}: {error}){hint}; check the name") from None
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{url} answers something else than the hub's list of files; check HF_ENDPOINT") from None
    chosen = _chosen(files)
    if not chosen:
        raise DataError(f"{repository} at {revision} holds no weights that are read here, but {', '.join(sorted(file.name for file in files)[:8])}")
    return chosen


def _hub_file(place: str, entry: dict[str, object]) -> RemoteFile:
    name, size = str(entry["rfilename"]), cast(int | None, entry.get("size"))
    stored = cast(dict[str, object] | None, entry.get("lfs"))
    return RemoteFile(name, (f"{place}/{quote(name)}",), str(stored["sha256"]) if stored else None, int(size) if size is not None else None)


def _chosen(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    kind = next((kind for kind in KINDS if any(fnmatch(file.name, kind.sign) for file in files)), None)
    if kind is None:
        return []
    wanted = (kind.sign, kind.others, *BESIDE, *DECIDING)
    return sorted((file for file in files if any(fnmatch(file.name, name) for name in wanted)), key=lambda file: file.name in DECIDING)


def folder_files(base_url: str) -> list[RemoteFile]:
    """The files of a Hugging Face folder that some server offers, by the names that such folders have."""
    kind = next((kind for kind in KINDS[:4] if _has(base_url, kind.sign)), None)
    config = _has(base_url, "config.json")
    if kind is None or config is None:
        raise DataError(f"{base_url} offers no {' nor '.join(kind.sign for kind in KINDS[:4]) if config else 'config.json'}; give the folder that holds them")
    weights = list(_indexed(base_url, kind.sign)) if kind.others else []
    beside = [file for name in BESIDE if (file := _has(base_url, name))]
    return [*weights, RemoteFile(kind.sign, (f"{base_url}/{kind.sign}",)), *beside, config]


def _has(base_url: str, name: str) -> RemoteFile | None:
    file = RemoteFile(name, (f"{base_url}/{quote(name)}",))
    try:
        return replace(file, size=insist(lambda: size_of(file.urls[0]), tries=2))
    except RefusedError as error:
        if error.code in (404, 410):
            return None
        raise DataError(f"{file.urls[0]} is not to be had: {error}") from None
    except BrokenError as error:
        raise DataError(f"{file.urls[0]} is not to be had: {error}; check the address, or try again later") from None


def _indexed(base_url: str, index: str) -> Iterator[RemoteFile]:
    try:
        names = sorted(set(json.loads(read_text(f"{base_url}/{index}"))["weight_map"].values()))
    except (BrokenError, RefusedError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{base_url}/{index} cannot be read as a list of files ({error}); is it the index of a sharded model?") from None
    yield from (RemoteFile(name, (f"{base_url}/{quote(name)}",)) for name in names)
