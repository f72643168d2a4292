"""How large files are, asked of their servers before anything is fetched."""

import threading
from collections.abc import Sequence
from dataclasses import replace

from megatron_lite.data.download import RemoteFile
from megatron_lite.data.parallel import in_parallel
from megatron_lite.data.transfer import BrokenError, RefusedError, insist, size_of
from megatron_lite.errors import DataError


def with_sizes(files: Sequence[RemoteFile], *, parallel: int = 8) -> list[RemoteFile]:
    """The files with the sizes that their servers announce, where nobody else says. Raises DataError for one that is offered nowhere."""
    return in_parallel(_with_size, files, parallel, threading.Event())


def _with_size(file: RemoteFile) -> RemoteFile:
    reasons: list[str] = []
    for url in file.urls if file.size is None else ():
        try:
            size = insist(lambda url=url: size_of(url), tries=2)
        except (BrokenError, RefusedError) as error:
            reasons.append(f"{url}: {error}")
            continue
        if size is not None and size < file.least:
            reasons.append(f"{url}: it has {size:,} bytes, the file at least {file.least:,}")
            continue
        return replace(file, size=size)
    if reasons:
        raise DataError(f"{file.name} is not to be had ({'; '.join(reasons)}); try again later, or name another place with --base-url")
    return file
