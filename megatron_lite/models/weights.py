"""How our parameters are named in other formats."""

from dataclasses import dataclass


@dataclass(frozen=True, init=False)
class Same:
    """The very tensor, under the first of these names that is there."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)


WeightMap = dict[tuple[int, str], Same]
