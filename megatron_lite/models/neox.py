"""GPT-NeoX: rotary attention, two LayerNorms, parallel or sequential residuals (Black et al. 2022). Parameter names are those of its layer files."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.models.architecture import Architecture, LayerPlan
from megatron_lite.models.attention import Rotary, attend
from megatron_lite.models.cache import Past
from megatron_lite.models.spec import ModelSpec
from megatron_lite.models.weights import Same, WeightMap
from megatron_lite.parallel.layers import (
    ColumnLinear,
    LayerNorm,
    PartialColumnLinear,
    PartialLayerNorm,
    PartialRowLinear,
    RowLinear,
    VocabularyEmbedding,
    VocabularyLinear,
)
from megatron_lite.parallel.mesh import Axis

# b batch, s tokens in this call, d hidden size, h heads on this rank

Column = type[ColumnLinear] | type[PartialColumnLinear]
Row = type[RowLinear] | type[PartialRowLinear]


class Embedding(nn.Module):
    """tokens [b s] -> [b s d]."""

    def __init__(self, spec: ModelSpec, tp: Axis) -> None:
        super().__init__()
        self.word_embeddings = VocabularyEmbedding(spec.vocab, spec.hidden, tp=tp)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.word_embeddings(tokens)


class Attention(nn.Module):
    """Multi-head attention; rows of query_key_value are ordered [head][q|k|v][head_dim]."""

    def __init__(self, spec: ModelSpec, tp: Axis, column: Column, row: Row) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.rotary = Rotary(spec.rotary_dim, spec.rotary_base, spec.max_positions)
        self.query_key_value = column(spec.hidden, 3 * spec.hidden, tp=tp)
        self.dense = row(spec.hidden, spec.hidden, tp=tp)

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        query, key, value = self.query_key_value(x).unflatten(-1, (-1, 3, self.head_dim)).permute(3, 0, 2, 1, 4).unbind(0)
        return self.dense(attend(query, key, value, self.rotary, past))


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec, tp: Axis, column: Column, row: Row) -> None:
        super().__init__()
        self.approximate = "tanh" if spec.activation == "gelu_tanh" else "none"
        self.dense_h_to_4h = column(spec.hidden, spec.ffn, tp=tp)
        self.dense_4h_to_h = row(spec.ffn, spec.hidden, tp=tp)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate=self.approximate))


class ParallelBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm'(x)): one reduction for both, so their biases are terms of a sum over the ranks. One for their gradients, too."""

    def __init__(self, spec: ModelSpec, tp: Axis) -> None:
        super().__init__()
        self.tp = tp
        self.input_layernorm = PartialLayerNorm(spec.hidden, eps=spec.norm_eps, tp=tp)
        self.post_attention_layernorm = PartialLayerNorm(spec.hidden, eps=spec.norm_eps, tp=tp)
        self.attention = Attention(spec, tp, PartialColumnLinear, PartialRowLinear)
        self.mlp = MLP(spec, tp, PartialColumnLinear, PartialRowLinear)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        shared = self.tp.copy(x)
        attended = self.attention(self.input_layernorm(shared), past)
        expanded = self.mlp(self.post_attention_layernorm(shared))
        return x + self.tp.sum(attended + expanded)


class SequentialBlock(nn.Module):
    """y = x + attention(norm(x)), then y + mlp(norm'(y)): two reductions, biases added after them."""

    def __init__(self, spec: ModelSpec, tp: Axis) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(spec.hidden, eps=spec.norm_eps)
        self.post_attention_layernorm = LayerNorm(spec.hidden, eps=spec.norm_eps)
        self.attention = Attention(spec, tp, ColumnLinear, RowLinear)
        self.mlp = MLP(spec, tp, ColumnLinear, RowLinear)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), past)
        return x + self.mlp(self.post_attention_layernorm(x))


class FinalNorm(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm = LayerNorm(spec.hidden, eps=spec.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Head(nn.Module):
    """[b s d] -> this rank's part of the vocabulary's logits [b s v]."""

    def __init__(self, spec: ModelSpec, tp: Axis) -> None:
        super().__init__()
        self.final_linear = VocabularyLinear(spec.vocab, spec.hidden, tp=tp)

    def forward(self, x: Tensor) -> Tensor:
        return self.final_linear(x)


class TiedHead(nn.Module):
    """The head whose weight is the embedding's, and lies in its file."""

    def __init__(self, spec: ModelSpec, tp: Axis) -> None:
        super().__init__()
        self.word_embeddings = VocabularyLinear(spec.vocab, spec.hidden, tp=tp)

    def forward(self, x: Tensor) -> Tensor:
        return self.word_embeddings(x)


def plan(spec: ModelSpec, tp: Axis) -> LayerPlan:
    block = ParallelBlock if spec.parallel_residual else SequentialBlock
    return plan_of(spec, tp, embedding=Embedding, block=block, norm=FinalNorm, head=TiedHead if spec.tied_head else Head)


def plan_of(spec: ModelSpec, tp: Axis, *, embedding: type[nn.Module], block: type[nn.Module], norm: type[nn.Module], head: type[nn.Module]) -> LayerPlan:
    """Layers under the numbers that gpt-neox gives them: 1 and n + 2 are its reshapings, which hold nothing."""
    return {
        0: partial(embedding, spec, tp),
        **{number: partial(block, spec, tp) for number in range(2, spec.layers + 2)},
        spec.norm_number: partial(norm, spec),
        spec.head_number: partial(head, spec, tp),
    }


def huggingface(spec: ModelSpec) -> WeightMap:
    """Names on disk in a Hugging Face GPT-NeoX folder; the fused rows of query_key_value keep NeoX's order there."""
    names: WeightMap = {(0, "word_embeddings.weight"): Same("gpt_neox.embed_in.weight")}
    for number in range(2, spec.layers + 2):
        for name in BLOCK_NAMES:
            names[number, name] = Same(f"gpt_neox.layers.{number - 2}.{name}")
    for kind in ("weight", "bias"):
        names[spec.norm_number, f"norm.{kind}"] = Same(f"gpt_neox.final_layer_norm.{kind}")
    if not spec.tied_head:
        names[spec.head_number, "final_linear.weight"] = Same("embed_out.weight", "lm_head.weight")
    return names


BLOCK_NAMES = [
    f"{module}.{kind}"
    for module in ("input_layernorm", "post_attention_layernorm", "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    for kind in ("weight", "bias")
]


def config(spec: ModelSpec) -> dict[str, object]:
    rotary = spec.rotary_dim / spec.head_dim
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.ffn,
        "hidden_act": "gelu_fast" if spec.activation == "gelu_tanh" else "gelu",
        "max_position_embeddings": spec.max_positions,
        "layer_norm_eps": spec.norm_eps,
        "use_parallel_residual": spec.parallel_residual,
        "tie_word_embeddings": spec.tied_head,
        # both spellings: transformers 4 reads the first two, transformers 5 the third
        "rotary_pct": rotary,
        "rotary_emb_base": spec.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rotary_base, "partial_rotary_factor": rotary},
    }


ARCHITECTURE = Architecture("neox", plan, huggingface, config, "gpt_neox")
