"""How many bytes a model needs on each GPU, by part, before anything is allocated. Pure Python."""

from dataclasses import dataclass, replace

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
    matrices = sum(outputs * inputs for outputs, inputs in block_matrices(spec, tp))
    if spec.family == "llama":
        return matrices + 2 * d  # no biases, two scales
    biases = f // tp + (d if spec.family == "gptj" else (d + 2 * kv) // tp + 2 * d)  # row biases are whole on every rank
    return matrices + biases + (2 * d if spec.family == "gptj" else 4 * d)


def block_matrices(spec: ModelSpec, tp: int) -> list[tuple[int, int]]:
    """Outputs and inputs of the matrices of a block on one of tp ranks. A gated MLP has two of them, one above the other."""
    d, f, keys = spec.hidden, spec.ffn, spec.kv_heads_of(tp) * spec.head_dim
    return [(d // tp + 2 * keys, d), (d, d // tp), ((2 * f if spec.family == "llama" else f) // tp, d), (d, f // tp)]


def layer_bytes(spec: ModelSpec, number: int, tp: int) -> int:
    """Bytes of the same: matrices of blocks may be held in 8 bits, with a scale in fp32 for every row."""
    size = BYTES[spec.dtype]
    whole = layer_parameters(spec, number, tp) * size
    if spec.quantization is None or number in (0, spec.norm_number, spec.head_number):
        return whole
    return whole - sum(outputs * (inputs * (size - 1) - 4) for outputs, inputs in block_matrices(spec, tp))


def parameters(spec: ModelSpec) -> int:
    """Parameters of the whole model, each counted once."""
    numbers = stage_numbers(spec.layers, 1)[0]
    return sum(layer_parameters(spec, n, 1) for n in numbers) - (spec.vocab * spec.hidden if spec.tied_head else 0)


def stage_parameters(spec: ModelSpec, layout: Layout, stage: int) -> int:
    """Parameters that every process of a pipeline stage holds."""
    held = sum(layer_parameters(spec, n, layout.tp) for n in layout.numbers(spec.layers)[stage])
    return held - (layer_parameters(spec, spec.head_number, layout.tp) if spec.tied_head and layout.pp == 1 else 0)


def stage_bytes(spec: ModelSpec, layout: Layout, stage: int) -> int:
    """Bytes of these."""
    held = sum(layer_bytes(spec, n, layout.tp) for n in layout.numbers(spec.layers)[stage])
    return held - (layer_bytes(spec, spec.head_number, layout.tp) if spec.tied_head and layout.pp == 1 else 0)


def stage_blocks(spec: ModelSpec, layout: Layout, stage: int) -> int:
    return sum(spec.is_block(n) for n in layout.numbers(spec.layers)[stage])


def generation_footprint(spec: ModelSpec, layout: Layout, stage: int, *, rows: int, context: int) -> Footprint:
    """What generating with `rows` rows of up to `context` tokens takes on every GPU of a pipeline stage."""
    size = BYTES[spec.dtype]
    numbers = layout.numbers(spec.layers)[stage]
    kv_heads = spec.kv_heads_of(layout.tp)
    cache = stage_blocks(spec, layout, stage) * 2 * kv_heads * spec.head_dim * context * rows * size
    widest = 3 * spec.hidden + (3 * spec.hidden + 2 * spec.ffn) // layout.tp
    logits = rows * -(-spec.vocab // layout.tp) * (size + 4 * (1 + layout.tp)) if spec.head_number in numbers else 0
    activations = rows * context * widest * size + logits
    return Footprint(
        weights=stage_bytes(spec, layout, stage), cache=cache, activations=activations, buffers=_unpacked(spec, layout.tp, beside=cache + activations)
    )


def _unpacked(spec: ModelSpec, tp: int, *, beside: int) -> int:
    """What 8-bit weights take for a moment: a matrix in the format of the states, where long prompts are read; a whole block while loading, when there is
    nothing else beside it yet."""
    if spec.quantization is None:
        return 0
    size = BYTES[spec.dtype]
    largest = size * max(outputs * inputs for outputs, inputs in block_matrices(spec, tp))
    return max(largest, layer_bytes(replace(spec, quantization=None), 2, tp) - beside)
