"""What a model is, in numbers: everything its layers need to know. Pure Python, nothing of YAML below this line."""

from dataclasses import dataclass
from typing import Literal

from megatron_lite.config.sections import Family, ModelSection

Activation = Literal["gelu", "gelu_tanh", "silu"]
DType = Literal["float16", "bfloat16", "float32"]
Quantization = Literal["int8"]

DTYPES: dict[str, DType] = {"fp16": "float16", "bfloat16": "bfloat16", "fp32": "float32"}
"""NeoX's words for number formats -> torch's."""

BYTES: dict[DType, int] = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Shape and arithmetic of one model. `vocab` counts the rows of the embedding, padding included; `quantization` is how the matrices of blocks are held."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    rotary_dim: int
    rotary_base: float
    norm_eps: float
    activation: Activation
    parallel_residual: bool
    tied_head: bool
    dtype: DType
    family: Family = "neox"
    quantization: Quantization | None = None

    def is_block(self, number: int) -> bool:
        """Whether the layer with this number has attention, and so keys and values."""
        return 2 <= number < self.norm_number

    def kv_heads_of(self, tp: int) -> int:
        """Key/value heads that one of tp ranks holds: with more ranks than heads, neighbours hold the same one."""
        return max(1, self.kv_heads // tp)

    @property
    def head_number(self) -> int:
        return self.layers + 4

    @property
    def norm_number(self) -> int:
        return self.layers + 3


def spec_of(model: ModelSection, *, vocab: int, dtype: DType) -> ModelSpec:
    """NeoX's keys turned into a ModelSpec. `bias_gelu_fusion` is not a detail of speed: it selects the tanh form of GELU."""
    head_dim = model.hidden_size // model.num_attention_heads
    rotary_dim = int(head_dim * model.rotary_pct) if model.pos_emb == "rotary" else 0
    return ModelSpec(
        layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        kv_heads=model.num_kv_heads or model.num_attention_heads,
        head_dim=head_dim,
        ffn=model.mlp_width,
        vocab=vocab,
        max_positions=model.max_position_embeddings,
        rotary_dim=rotary_dim,
        rotary_base=float(model.rotary_emb_base),
        norm_eps=model.rms_norm_epsilon if model.norm == "rmsnorm" else model.layernorm_epsilon,
        activation="silu" if model.gated else "gelu_tanh" if model.bias_gelu_fusion else "gelu",
        parallel_residual=model.gpt_j_residual,
        tied_head=not model.no_weight_tying,
        dtype=dtype,
        family=model.family,
        quantization=model.weight_quantization,
    )
