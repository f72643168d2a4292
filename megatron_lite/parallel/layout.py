"""How many processes a model is spread over, and which layers and ranks belong together. Pure Python."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_lite.errors import LayoutError


@dataclass(frozen=True)
class Layout:
    """Sizes of the three mesh axes: pp pipeline stages, dp replicas, tp parts of every cut weight. `blocks` counts those of every stage; empty deals evenly."""

    pp: int = 1
    dp: int = 1
    tp: int = 1
    blocks: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return self.pp * self.dp * self.tp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pp, dp, tp) of a rank; model is fastest, as in Megatron: rank = (pipe * dp + data) * tp + model."""
        return rank // (self.dp * self.tp), rank // self.tp % self.dp, rank % self.tp

    def rank(self, pp: int, dp: int, tp: int) -> int:
        return (pp * self.dp + dp) * self.tp + tp

    def numbers(self, layers: int) -> list[list[int]]:
        """Layer numbers of every stage of a model with so many blocks."""
        return stage_numbers(layers, self.pp, self.blocks)

    def __str__(self) -> str:
        replicas = f"data {self.dp} x " if self.dp > 1 else ""
        blocks = f" ({' + '.join(map(str, self.blocks))} blocks)" if self.blocks else ""
        return f"{replicas}pipe {self.pp}{blocks} x model {self.tp}"


def evenly(layers: int, pp: int) -> tuple[int, ...]:
    """Blocks of every stage, the first stages taking one more each, which is what DeepSpeed's `type:transformer|mlp` gives for models of equal blocks
    (20B on 8 stages: 6 6 6 6 5 5 5 5)."""
    if pp > layers:
        raise LayoutError(f"pipe-parallel-size {pp} is more than the {layers} layers of the model; use at most {layers}")
    return tuple(layers // pp + (stage < layers % pp) for stage in range(pp))


def stage_numbers(layers: int, pp: int, blocks: Sequence[int] = ()) -> list[list[int]]:
    """Layer numbers (as in NeoX's file names) of every stage: 0 embedding, 2..n+1 blocks, n+3 norm, n+4 head. `blocks` are those of every stage where they
    are not dealt evenly."""
    if blocks and (len(blocks), sum(blocks)) != (pp, layers):
        raise LayoutError(f"{' + '.join(map(str, blocks))} blocks (pipe-stage-layers) are no way to deal {layers} to the {pp} stages of pipe-parallel-size")
    stages: list[list[int]] = []
    first = 2
    for count in blocks or evenly(layers, pp):
        stages.append(list(range(first, first + count)))
        first += count
    stages[0].insert(0, 0)
    stages[-1] += [layers + 3, layers + 4]
    return stages


def check_cut(layout: Layout, *, heads: int, kv_heads: int, ffn: int, layers: int) -> None:
    """Raises LayoutError where the model cannot be cut into this layout."""
    for what, count in (("attention heads", heads), ("columns of the MLP", ffn)):
        if count % layout.tp:
            sizes = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0 and n <= 64)
            raise LayoutError(f"model-parallel-size {layout.tp} does not divide the {count} {what}; use one of {sizes}")
    if kv_heads % layout.tp and layout.tp % kv_heads:
        raise LayoutError(f"model-parallel-size {layout.tp} neither divides the {kv_heads} key/value heads nor is a multiple of them")
    layout.numbers(layers)


def layouts_up_to(devices: int, *, heads: int, layers: int) -> Iterator[Layout]:
    """Every pipe x model layout of at most this many devices: most devices first, then most tensor parallel (the faster way to use them)."""
    sizes = [(pp, tp) for tp in range(1, devices + 1) if heads % tp == 0 for pp in range(1, devices // tp + 1) if pp <= layers]
    for pp, tp in sorted(sizes, key=lambda cut: (-cut[0] * cut[1], -cut[1])):
        yield Layout(pp=pp, tp=tp)
