"""The least that work can take: bytes that must be read, operations that must be done. Pure arithmetic."""

from megatron_lite.models.memory import layer_bytes, layer_parameters
from megatron_lite.models.spec import BYTES, ModelSpec
from megatron_lite.parallel.layout import stage_numbers


def step_bytes(spec: ModelSpec, tp: int, *, batch: int, context: int) -> int:
    """What each of tp GPUs reads for one more token of `batch` rows that have `context` tokens: all weights but the embedding's, and keys and values."""
    numbers = [number for number in stage_numbers(spec.layers, 1)[0] if number]
    weights = sum(layer_bytes(spec, number, tp) for number in numbers)
    return weights + BYTES[spec.dtype] * batch * context * spec.layers * 2 * spec.kv_heads_of(tp) * spec.head_dim


def prefill_operations(spec: ModelSpec, *, batch: int, tokens: int) -> float:
    """Floating-point operations of reading `batch` prompts: two a weight and token, causal attention, and the head behind the last token of each."""
    blocks = spec.layers * layer_parameters(spec, 2, 1)
    attention = spec.layers * spec.heads * spec.head_dim * 2 * tokens**2  # q k and p v over half of the square
    return float(batch * (2 * blocks * tokens + attention + 2 * layer_parameters(spec, spec.head_number, 1)))
