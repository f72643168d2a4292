"""What speed to expect of a plan, from the bytes that must move and the bandwidths that are stated: an upper bound that good code comes near to."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from launcher.cards import Card, card_named
from launcher.plan import Plan
from megatron_lite.models.memory import generation_footprint, layer_parameters, parameters
from megatron_lite.models.spec import BYTES, ModelSpec
from megatron_lite.models.training_memory import Training

READING = 0.9
"""Share of the stated bandwidth that a stream of reads reaches (measured: 4.3 of an H200's 4.8 TB/s)."""
SCORING, TRAINING = 0.6, 0.4
"""Shares of the stated TFLOP/s that long products reach with all that stands between them (measured in scoring: 0.54 to 0.7)."""
REDUCTION = 20e-6
"""Seconds that the ranks of a cut need to add up one small tensor."""
CACHED, DISK, LINK = 22e9, 2e9, 25e9
"""Bytes a second: from the page cache to one GPU (measured), from a good disk, and over the link of one GPU."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second, of `rows` rows together where rows are generated."""

    rows: int
    tokens: float


def card_of(plan: Plan) -> Card | None:
    """The card that the plan's GPUs are, or the slowest of them; None where one is not known."""
    return _slowest(plan, range(plan.layout.size))


def _slowest(plan: Plan, ranks: Iterable[int]) -> Card | None:
    """The card of these ranks that reads and computes slowest, as if one card did both."""
    names = {plan.hardware.devices[rank].name for rank in ranks} if plan.hardware.kind == "GPU" else set()
    cards = [card for name in names if (card := card_named(name))]
    if not cards or len(cards) < len(names):
        return None
    slowest = min(cards, key=lambda card: card.bandwidth)
    return replace(slowest, teraflops=min(card.teraflops for card in cards))


def _stage_card(plan: Plan, stage: int, card: Card) -> Card:
    return _slowest(plan, (rank for rank in range(plan.layout.size) if plan.stage(rank) == stage)) or card


def load_seconds(plan: Plan, spec: ModelSpec) -> tuple[float, float]:
    """Seconds to load the weights: from a disk, and where the files are in memory already."""
    whole = parameters(spec) * BYTES[spec.dtype]
    held = replace(spec, quantization=None)  # what is held in 8 bits comes in full
    largest = max(generation_footprint(held, plan.layout, stage, rows=0, context=0).weights for stage in range(plan.layout.pp))
    return whole / DISK, max(largest / CACHED, largest / LINK)


def decoding(plan: Plan, spec: ModelSpec, card: Card, rows: int) -> Speed:
    """Every token reads all weights but the embedding's, and the keys and values of what was written: here half of the context."""
    layout = plan.layout
    step = 0.0
    for stage in range(layout.pp):
        needed = generation_footprint(spec, layout, stage, rows=rows, context=plan.context // 2)
        embedding = layer_parameters(spec, 0, layout.tp) * BYTES[spec.dtype] if stage == 0 and not spec.tied_head else 0
        step += (needed.weights - embedding + needed.cache) / (_stage_card(plan, stage, card).bandwidth * 1e9 * READING)
    step += spec.layers * REDUCTION if layout.tp > 1 else 0
    computing = rows * forward_operations(spec, plan.context // 2) / layout.tp / (card.teraflops * 1e12 * SCORING)
    return Speed(rows, rows / max(step, computing))


def scoring(plan: Plan, spec: ModelSpec, card: Card) -> Speed:
    each = forward_operations(spec, plan.context // 2) / (card.teraflops * 1e12 * SCORING)
    return Speed(0, plan.layout.size / each)


def training(plan: Plan, spec: ModelSpec, card: Card, work: Training) -> Speed:
    """Forward once, or twice where activations are computed again; back twice as much, or once where the matrices themselves have no gradients. A pipeline
    stands still while it fills and empties."""
    passes = 1 + (1 if work.lora else 2) + bool(work.recompute)
    each = passes * forward_operations(spec, plan.context // 2) / (card.teraflops * 1e12 * TRAINING)
    return Speed(0, plan.layout.size / each * work.accumulation / (work.accumulation + plan.layout.pp - 1))


def forward_operations(spec: ModelSpec, context: int) -> float:
    """Floating-point operations of one token behind so many others."""
    matrices = parameters(spec) - (0 if spec.tied_head else spec.vocab * spec.hidden)
    return 2 * matrices + 4 * spec.layers * spec.heads * spec.head_dim * context
