"""One process leads, all compute: for work that is decided in one place only, such as an evaluation that asks the network for its questions."""

from collections.abc import Callable
from typing import TypeVar, cast

from megatron_lite.errors import UserError
from megatron_lite.parallel.mesh import Mesh

Order = TypeVar("Order")
Answer = TypeVar("Answer")
Result = TypeVar("Result")


def led(mesh: Mesh, lead: Callable[[Callable[[Order], Answer]], Result], perform: Callable[[Order], Answer]) -> Result:
    """Runs `lead` on the writer alone and returns its result on every rank. Every order that it gives is performed by all ranks together, and answered.

    A UserError of `lead` is raised on every rank. After any other failure the others wait for ever: the process that failed must end.
    """
    return _lead(mesh, lead, perform) if mesh.is_writer else cast(Result, _follow(mesh, perform))


def on_writer(mesh: Mesh, act: Callable[[], None]) -> None:
    """Runs `act` on the writer alone, while the others wait. Its UserError is raised on every rank."""
    led(mesh, lambda give: act(), lambda order: None)


def _lead(mesh: Mesh, lead: Callable[[Callable[[Order], Answer]], Result], perform: Callable[[Order], Answer]) -> Result:
    performing = False

    def give(order: Order) -> Answer:
        nonlocal performing
        performing = True
        mesh.share_from_writer(lambda: ("order", order))
        answer = perform(order)
        performing = False
        return answer

    try:
        result = lead(give)
    except UserError as error:
        failure = error
        if not performing:  # else the others are in the middle of the work, and do not listen
            mesh.share_from_writer(lambda: ("failure", failure))
        raise
    mesh.share_from_writer(lambda: ("result", result))
    return result


def _follow(mesh: Mesh, perform: Callable[[Order], object]) -> object:
    while True:
        kind, content = mesh.share_from_writer(lambda: ("", None))
        if kind == "failure":
            assert isinstance(content, UserError)
            raise content
        if kind == "result":
            return content
        perform(cast(Order, content))
