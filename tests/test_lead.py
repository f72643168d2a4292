"""One process decides, all compute, and what is wrong on the one is said by all."""

from typing import Any

import torch

from megatron_lite.errors import DataError, UserError
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.lead import led, on_writer
from megatron_lite.parallel.mesh import Mesh
from tests.worlds import in_world


def test_orders_of_the_writer_are_performed_by_every_rank() -> None:
    def on_every_rank(mesh: Mesh) -> tuple[str, list[int]]:
        performed: list[int] = []

        def perform(order: int) -> int:
            performed.append(order)
            return int(mesh.tp.sum(torch.ones(1)).item()) * order

        def lead(give: Any) -> str:
            return f"{give(3)} {give(5)}"

        return led(mesh, lead, perform), performed

    assert in_world(Layout(tp=2), on_every_rank) == [("6 10", [3, 5])] * 2


def test_what_is_wrong_on_the_writer_is_said_by_every_rank() -> None:
    def on_every_rank(mesh: Mesh) -> str:
        def act() -> None:
            raise DataError("there is no such file; put it there")

        try:
            on_writer(mesh, act)
        except UserError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    assert in_world(Layout(dp=2), on_every_rank) == ["DataError: there is no such file; put it there"] * 2
