"""How many bytes a model needs on each GPU, by part, before anything is allocated. Pure Python."""

from dataclasses import dataclass

from megatron_lite.models.spec import BYTES, ModelSpec
from megatron_lite.parallel.layout import Layout, stage_numbers

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "masters": "fp32 masters",
    "optimizer": "optimizer states",
    "cache": "KV cache",
    "activations": "activations",
    "logits": "logits",
    "buffers": "buffers",
}
"""Fields of a footprint, and what people call them."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on one GPU."""

    weights: int
    gradients: int = 0
    masters: int = 0
    optimizer: int = 0
    cache: int = 0
    activations: int = 0
    logits: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what they are for, of all parts that there are."""
        return {name: size for field, name in PARTS.items() if (size := getattr(self, field))}


def layer_parameters(spec: ModelSpec, number: int, tp: int) -> int:
    """Parameters that one of tp ranks holds of the layer with this number."""
    d, f, kv = spec.hidden, spec.ffn, spec.kv_heads * spec.head_dim
    vocab = -(-spec.vocab // tp)
    if number == 0:
        return vocab * d
    if number == spec.norm_number:
        return d if spec.family == "llama" else 2 * d
    if number == spec.head_number:
        return vocab * (d + 1) if spec.family == "gptj" else vocab * d
    queries, keys, matrices = d * d // tp, max(kv // tp, spec.head_dim) * d, d * d // tp
    if spec.family == "llama":
        return queries + 2 * keys + matrices + 3 * d * f // tp + 2 * d  # a gate, no biases, two scales
    biases = f // tp + (d if spec.family == "gptj" else (d + 2 * kv) // tp + 2 * d)  # row biases are whole on every rank
    norms = 2 * d if spec.family == "gptj" else 4 * d
    return queries + 2 * keys + matrices + 2 * d * f // tp + biases + norms


def parameters(spec: ModelSpec) -> int:
    """Parameters of the whole model, each counted once."""
    numbers = stage_numbers(spec.layers, 1)[0]
    return sum(layer_parameters(spec, n, 1) for n in numbers) - (spec.vocab * spec.hidden if spec.tied_head else 0)


def stage_parameters(spec: ModelSpec, layout: Layout, stage: int) -> int:
    """Parameters that every process of a pipeline stage holds."""
    held = sum(layer_parameters(spec, n, layout.tp) for n in stage_numbers(spec.layers, layout.pp)[stage])
    return held - (layer_parameters(spec, spec.head_number, layout.tp) if spec.tied_head and layout.pp == 1 else 0)


def stage_blocks(spec: ModelSpec, layout: Layout, stage: int) -> int:
    return sum(2 <= n < spec.norm_number for n in stage_numbers(spec.layers, layout.pp)[stage])


def generation_footprint(spec: ModelSpec, layout: Layout, stage: int, *, rows: int, context: int) -> Footprint:
    """What generating with `rows` rows of up to `context` tokens takes on every GPU of a pipeline stage."""
    size = BYTES[spec.dtype]
    numbers = stage_numbers(spec.layers, layout.pp)[stage]
    kv_heads = max(1, spec.kv_heads // layout.tp)
    cache = stage_blocks(spec, layout, stage) * 2 * kv_heads * spec.head_dim * context * rows * size
    widest = 3 * spec.hidden + (3 * spec.hidden + 2 * spec.ffn) // layout.tp
    logits = rows * -(-spec.vocab // layout.tp) * (size + 4 * (1 + layout.tp)) if spec.head_number in numbers else 0
    return Footprint(weights=stage_parameters(spec, layout, stage) * size, cache=cache, activations=rows * context * widest * size + logits)
