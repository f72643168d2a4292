"""Replicas that share a list of prompts: each takes its part, and the process that writes hands out all completions, in the order of the prompts."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from megatron_lite.inference.decoders import Completer
from megatron_lite.inference.request import Completion, Request
from megatron_lite.parallel.mailbox import Mailbox, wait_quietly
from megatron_lite.parallel.mesh import Mesh


def complete_all(decoder: Completer, requests: Sequence[Request], mesh: Mesh) -> Iterator[Completion]:
    """Every completion on the process that writes, those of its own replica elsewhere. Requests are numbered from 0, in their order."""
    mine = decoder.complete(requests[mesh.dp.index :: mesh.dp.size])
    if mesh.dp.size == 1:
        yield from mine
        return
    mailbox = Mailbox(mesh, "completions")
    if mesh.is_writer:
        yield from _collected(mine, requests, mesh, mailbox)
    else:
        for completion in mine:
            if mesh.tp.is_first and mesh.pp.is_first and not mesh.dp.is_first:
                mailbox.post(str(completion.request.id), json.dumps(asdict(replace(completion, request=None))))
            yield completion
    wait_quietly(mesh)  # whoever keeps the messages stays until they are read


def _collected(mine: Iterator[Completion], requests: Sequence[Request], mesh: Mesh, mailbox: Mailbox) -> Iterator[Completion]:
    """Our own completions as they come, between them those of the others that are there, and at last those that are not."""
    others = [request for number, request in enumerate(requests) if number % mesh.dp.size]

    def read(request: Request) -> Completion:
        return Completion(**{**json.loads(mailbox.read(str(request.id))), "request": request})

    for completion in mine:
        yield completion
        while others and mailbox.has(str(others[0].id)):
            yield read(others.pop(0))
    yield from map(read, others)
