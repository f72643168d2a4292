"""Replicas hand their completions over through the store where they met: of any size, at any pace, and call by call."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from megatron_lite.inference.decoders import Watch
from megatron_lite.inference.replicas import complete_all
from megatron_lite.inference.request import Completion, Request
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mailbox import CHUNK, Mailbox, wait_quietly
from megatron_lite.parallel.mesh import Mesh
from tests.runs import requests
from tests.worlds import in_world

PATIENCE = timedelta(seconds=1)


@dataclass
class Slow:
    """Answers after a while, each prompt with so many logits."""

    seconds: float
    said: str
    logits: int

    def complete(self, requests: Sequence[Request], *, watch: Watch | None = None) -> Iterator[Completion]:
        for request in requests:
            time.sleep(self.seconds)
            yield Completion(request, f"{self.said} {request.id}", 1, True, None, 0.0, [[1 / 3] * self.logits])

    def close(self) -> None: ...


def meet_over_tcp(mesh: Mesh) -> Any:
    """Joins the world anew as a launcher's processes do, with communicators of little patience. The store."""
    server = TCPStore("127.0.0.1", 0, is_master=True, timeout=PATIENCE, wait_for_workers=False) if mesh.rank == 0 else None
    port: list[Any] = [server.port if server else None]
    dist.broadcast_object_list(port)
    store = server or TCPStore("127.0.0.1", port[0], is_master=False, timeout=PATIENCE)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=mesh.rank, world_size=mesh.layout.size, timeout=PATIENCE)
    return dist.distributed_c10d._get_default_store()


def test_completions_of_any_size_are_handed_over_and_nothing_of_them_stays() -> None:
    asked = requests("abcd")

    def run(mesh: Mesh) -> tuple[list[int], int]:
        store = meet_over_tcp(mesh)
        before = store.num_keys()
        lengths = [len((completion.logits or [[]])[0]) for completion in complete_all(Slow(0, "", 500_000), asked, mesh)]
        return lengths, store.num_keys() - before

    (lengths, kept), (others, _) = in_world(Layout(dp=2), run)
    assert (len(lengths), len(others)) == (4, 2)
    assert {*lengths, *others} == {500_000}, "10 MB of JSON; the store takes 8 MiB at once"
    assert kept <= 4, "what the ranks have waited by"


def test_a_second_call_reads_its_own_answers() -> None:
    asked = requests("abcd")

    def run(mesh: Mesh) -> list[list[str]]:
        return [sorted(str(completion.text) for completion in complete_all(Slow(0, said, 1), asked, mesh)) for said in ("first", "second")]

    assert in_world(Layout(dp=2), run)[0] == [[f"{said} {number}" for number in range(4)] for said in ("first", "second")]


def test_a_replica_may_take_longer_than_the_patience_of_communicators() -> None:
    for slow in (0, 1):

        def run(mesh: Mesh, slow: int = slow) -> int:
            meet_over_tcp(mesh)
            return sum(1 for _ in complete_all(Slow(2.5 if mesh.rank == slow else 0, "", 1), requests("ab"), mesh))

        assert in_world(Layout(dp=2), run) == [2, 1]


def test_a_message_arrives_as_it_was_sent_whatever_its_length() -> None:
    messages = {"none": "", "umlaut": "ä" * 5, "one": "x" * CHUNK, "more": "ä" * CHUNK}

    def run(mesh: Mesh) -> bool:
        mailbox = Mailbox(mesh, "letters")
        if mesh.rank == 1:
            for name, message in messages.items():
                mailbox.post(name, message)
            wait_quietly(mesh)
            return True
        found = {name: mailbox.read(name) for name in messages}
        wait_quietly(mesh)
        return found == messages and not any(map(mailbox.has, messages))

    assert in_world(Layout(dp=2), run) == [True, True]
