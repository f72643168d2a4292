"""Short messages between processes that do not keep the same pace, through the store where they met."""

from typing import Any

import torch.distributed as dist

from megatron_lite.parallel.mesh import Mesh


class Mailbox:
    """Messages by their names, each posted once and read by anybody. `name` tells mailboxes apart; all ranks open them alike."""

    def __init__(self, mesh: Mesh, name: str) -> None:
        assert mesh.layout.size > 1, "nobody to write to"
        groups: Any = dist.distributed_c10d
        self.store = groups.PrefixStore(name, groups._get_default_store())

    def post(self, name: str, message: str) -> None:
        self.store.set(name, message)

    def has(self, name: str) -> bool:
        return bool(self.store.check([name]))

    def read(self, name: str) -> str:
        """The message, as soon as it is there."""
        self.store.wait([name])
        return self.store.get(name).decode()
