"""How many bytes a training needs on each GPU, by part, as DeepSpeed 0.19 keeps things. Pure Python."""

from dataclasses import dataclass, replace

from megatron_lite.models.memory import Footprint, block_matrices, layer_bytes, stage_blocks, stage_bytes, stage_parameters
from megatron_lite.models.spec import BYTES, ModelSpec
from megatron_lite.parallel.layout import Layout

# d hidden size, f width of the MLP, t tensor-parallel ranks: as in the formulas of Korthikanti et al. 2022

REDUCED = 500_000_000
"""Numbers that DeepSpeed reduces or gathers at once where no setting says otherwise."""
LIVE, PREFETCHED = 1_000_000_000, 50_000_000
"""Numbers of the weights that stage 3 holds whole at a time, and fetches ahead."""


@dataclass(frozen=True)
class Lora:
    """Adapters of rank `rank` beside these matrices of every block; nothing else is trained."""

    rank: int
    targets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a step has to hold: `rows` sequences of `tokens` at once, `accumulation` times. `state_bytes` are the optimizer's for each
    parameter; `recompute` counts the blocks whose activations are computed again together, 0 keeps all."""

    rows: int
    tokens: int
    accumulation: int
    recompute: int
    zero: int
    state_bytes: int = 8
    bucket: int = REDUCED
    live: int = LIVE
    offload_optimizer: bool = False
    lora: Lora | None = None


def training_footprint(spec: ModelSpec, layout: Layout, stage: int, training: Training) -> Footprint:
    """What a training takes on every GPU of a pipeline stage, at its largest. `buffers` is what reducing and applying gradients takes beyond the room of
    the activations, which are gone by then."""
    size, on_host = BYTES[spec.dtype], training.offload_optimizer
    held = stage_parameters(spec, layout, stage)
    adapters = 0 if training.lora is None else adapter_parameters(spec, layout, stage, training.lora)
    trained = adapters or held
    own = -(-trained // layout.dp)
    gradients, coming, reducing = _gradients(spec, layout, training, trained)
    base, gathered = stage_bytes(spec, layout, stage), 0
    weights = base + size * adapters
    if training.zero == 3:
        weights = -(-weights // layout.dp)
        gathered = base * (min(training.live, held) + min(PREFETCHED, held)) // held if layout.dp > 1 else 0
    kept, work = _activations(spec, layout, stage, training)
    logits = _logits(spec, layout, stage, training)
    before = max(logits, work)  # the backward pass begins with the logits, and with room for no gradient yet
    beyond = max(0, coming + max(work, reducing) - kept - before)
    found = Footprint(
        weights=weights,
        gradients=gradients + min(beyond, coming),
        masters=0 if on_host or (training.zero == 3 and spec.dtype == "float32") else 4 * own,
        optimizer=0 if on_host else training.state_bytes * own,
        activations=kept + before - logits,
        logits=logits,
        buffers=gathered + max(0, beyond - coming),
    )
    return replace(found, buffers=found.buffers + _loading(spec, layout.tp, beside=found.total - weights))


def _loading(spec: ModelSpec, tp: int, *, beside: int) -> int:
    """Bytes of the block that is whole until it is rounded to 8 bits, beyond the room of what is not there yet while weights are loaded."""
    return 0 if spec.quantization is None else max(0, layer_bytes(replace(spec, quantization=None), 2, tp) - beside)


def _gradients(spec: ModelSpec, layout: Layout, training: Training, trained: int) -> tuple[int, int, int]:
    """Bytes of the gradients that stay between micro batches, of those that a backward pass leaves besides, and of what it takes to reduce and apply them."""
    size, own = BYTES[spec.dtype], -(-trained // layout.dp)
    bucket = min(training.bucket, trained)
    if spec.dtype == "bfloat16" and training.zero < 2 and not training.offload_optimizer:
        # DeepSpeed's BF16_Optimizer adds up in fp32, and keeps the weights' own gradients meanwhile
        return 4 * trained, size * trained, 4 * min(REDUCED, trained) if layout.dp > 1 else 0
    staying = size * trained if training.zero < 2 else (4 if spec.dtype == "bfloat16" or training.zero == 3 else size) * own
    return staying, 0, 2 * size * bucket + (4 * own if spec.dtype == "float16" else 0)


def _activations(spec: ModelSpec, layout: Layout, stage: int, training: Training) -> tuple[int, int]:
    """Bytes that the backward pass needs of the forward pass, and those of the space it works in."""
    tokens, size, blocks = training.rows * training.tokens, BYTES[spec.dtype], stage_blocks(spec, layout, stage)
    numbers = layout.numbers(spec.layers)[stage]
    between = tokens * spec.hidden * size
    block = saved_by_block(spec, layout.tp, training)
    ends = between * ((0 in numbers) + (spec.head_number in numbers))
    again = min(training.recompute, blocks)
    kept = between * -(-blocks // again) + ends if again else blocks * block + ends
    under_way = min(layout.pp - stage, training.accumulation)
    exchanged = 2 * between * max(2, under_way) if layout.pp > 1 else 0
    work = tokens * size * (2 * spec.hidden + (2 if spec.family == "llama" else 1) * spec.ffn // layout.tp)
    if spec.quantization is not None:  # a matrix as it is multiplied with
        work += size * max(outputs * inputs for outputs, inputs in block_matrices(spec, layout.tp))
    return kept * under_way + exchanged, block * again + work


def saved_by_block(spec: ModelSpec, tp: int, training: Training) -> int:
    """Bytes that autograd keeps of one block."""
    tokens, size = training.rows * training.tokens, BYTES[spec.dtype]
    heads, groups = spec.heads * spec.head_dim // tp, spec.kv_heads_of(tp) * spec.head_dim
    turned = heads + groups if spec.rotary_dim else 0
    attention = heads + 2 * groups + turned + heads  # queries, keys and values; turned queries and keys; what they mixed
    tables = 8 * training.tokens * spec.rotary_dim + 4 * tokens * spec.heads // tp
    if spec.family == "llama":  # its norms compute in fp32: x, and x scaled before and after the weights
        return tokens * (2 * spec.hidden * (4 + 2 * size) + size * (attention + 4 * spec.ffn // tp)) + tables
    inputs = {"gptj": 2, "neox": 3}[spec.family] + (not spec.parallel_residual)
    return tokens * size * (inputs * spec.hidden + attention + 2 * spec.ffn // tp) + tables


def _logits(spec: ModelSpec, layout: Layout, stage: int, training: Training) -> int:
    """Logits, probabilities and their gradients in fp32, of this rank's part of the vocabulary."""
    if spec.head_number not in layout.numbers(spec.layers)[stage]:
        return 0
    each = 12 + (BYTES[spec.dtype] if spec.dtype != "float32" else 0)
    return training.rows * training.tokens * -(-spec.vocab // layout.tp) * each


def adapter_parameters(spec: ModelSpec, layout: Layout, stage: int, lora: Lora) -> int:
    """Parameters of the adapters that every process of a stage holds: of a matrix cut by columns B is cut, of one cut by rows A is."""
    fused = spec.hidden + 2 * spec.kv_heads * spec.head_dim
    up = 2 * spec.ffn if spec.family == "llama" else spec.ffn
    shapes = {"query_key_value": (spec.hidden, fused // layout.tp), "dense": (spec.hidden // layout.tp, spec.hidden)}
    shapes |= {"dense_h_to_4h": (spec.hidden, up // layout.tp), "dense_4h_to_h": (spec.ffn // layout.tp, spec.hidden)}
    chosen = [shape for name, shape in shapes.items() if any(target.rpartition(".")[2] == name for target in lora.targets)]
    return stage_blocks(spec, layout, stage) * lora.rank * sum(inputs + outputs for inputs, outputs in chosen)
