"""Messages between processes that do not keep the same pace, and waiting for each other without a limit, through the store where they met."""

import time
from collections import defaultdict
from collections.abc import Callable
from itertools import count
from typing import Any

import torch.distributed as dist

from megatron_lite.parallel.mesh import Mesh

CHUNK = 4 << 20
"""Bytes of a message that the store takes at once; it refuses more than 8 MiB."""
PAUSE = 0.02

_opened: defaultdict[str, "count[int]"] = defaultdict(count)


class Mailbox:
    """Messages by their names, each posted once and read once, by anybody. `name` tells mailboxes apart; all ranks open those of a name equally often."""

    def __init__(self, mesh: Mesh, name: str) -> None:
        assert mesh.layout.size > 1, "nobody to write to"
        self.store = _store_of_its_own(name)

    def post(self, name: str, message: str) -> None:
        content = message.encode()
        chunks = range(0, len(content), CHUNK)
        for part, start in enumerate(chunks):
            self.store.set(f"{name}/{part}", content[start : start + CHUNK])
        self.store.set(name, str(len(chunks)))  # last: now all of it is there

    def has(self, name: str) -> bool:
        return bool(self.store.check([name]))

    def read(self, name: str) -> str:
        """The message, as soon as it is there, however long that takes. Then its place is free again: one process's memory holds what is not yet read."""
        _until(lambda: self.has(name))
        keys = [f"{name}/{part}" for part in range(int(self.store.get(name)))]
        content = b"".join(map(self.store.get, keys))
        for key in (name, *keys):
            self.store.delete_key(key)
        return content.decode()


def wait_quietly(mesh: Mesh) -> None:
    """Until every rank is here, however long that takes. A barrier of the library gives up after a while, and keeps a GPU busy that another rank may be
    measuring; this one sleeps."""
    if mesh.layout.size == 1:
        return
    store, size = _store_of_its_own("waiting"), mesh.layout.size
    if store.add("here", 1) == size:
        store.set("all", "here")
    _until(lambda: bool(store.check(["all"])))
    if store.add("gone", 1) == size:
        store.set("none", "here")
    if mesh.is_writer:  # the store may end with this process, so it leaves last
        _until(lambda: bool(store.check(["none"])))


def _store_of_its_own(name: str) -> Any:
    """Where the ranks met, under names that no one else uses, also not who asked for this name before."""
    groups: Any = dist.distributed_c10d
    return groups.PrefixStore(f"{name}/{next(_opened[name])}", groups._get_default_store())


def _until(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(PAUSE)
