"""LLaMA-like models (Touvron et al. 2023): RMSNorm, gated MLP, grouped-query attention, no biases, sequential residuals."""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.models.architecture import Architecture, LayerPlan
from megatron_lite.models.attention import Rotary, attend
from megatron_lite.models.cache import Past
from megatron_lite.models.neox import Embedding, Head, TiedHead, plan_of
from megatron_lite.models.spec import ModelSpec
from megatron_lite.models.weights import ByHead, Same, Stacked, WeightMap
from megatron_lite.parallel.layers import ColumnLinear, GroupedQueryLinear, RMSNorm, RowLinear, StackedColumnLinear
from megatron_lite.parallel.mesh import Axis

# b batch, s tokens in this call, d hidden size, h query heads and g key/value heads on this rank


class Attention(nn.Module):
    """As many key/value heads as query heads; rows of query_key_value are ordered [head][q|k|v][head_dim], as gpt-neox saves them."""

    def __init__(self, spec: ModelSpec, tp: Axis) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.rotary = Rotary(spec.rotary_dim, spec.rotary_base, spec.max_positions)
        self.query_key_value = ColumnLinear(spec.hidden, 3 * spec.hidden, tp=tp, bias=False)
        self.dense = RowLinear(spec.hidden, spec.hidden, tp=tp, bias=False)

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        query, key, value = self.query_key_value(x).unflatten(-1, (-1, 3, self.head_dim)).permute(3, 0, 2, 1, 4).unbind(0)
        return self.dense(attend(query, key, value, self.rotary, past))


class GroupedAttention(nn.Module):
    """Fewer key/value heads than query heads; rows of query_key_value are ordered [q|k|v][head][head_dim]."""

    def __init__(self, spec: ModelSpec, tp: Axis) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.queries = spec.heads // tp.size
        self.rotary = Rotary(spec.rotary_dim, spec.rotary_base, spec.max_positions)
        self.query_key_value = GroupedQueryLinear(spec.hidden, heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.head_dim, tp=tp)
        self.dense = RowLinear(spec.hidden, spec.hidden, tp=tp, bias=False)

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # b (h + 2 g) s head_dim
        groups = (heads.shape[1] - self.queries) // 2
        query, key, value = heads.split([self.queries, groups, groups], 1)
        return self.dense(attend(query, key, value, self.rotary, past))


class GatedMLP(nn.Module):
    """down(up(x) * silu(gate(x))); dense_h_to_4h is [up | gate]."""

    def __init__(self, spec: ModelSpec, tp: Axis) -> None:
        super().__init__()
        self.dense_h_to_4h = StackedColumnLinear(spec.hidden, spec.ffn, tp=tp)
        self.dense_4h_to_h = RowLinear(spec.ffn, spec.hidden, tp=tp, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(up * F.silu(gate))


class Block(nn.Module):
    """y = x + attention(norm(x)), then y + mlp(norm'(y))."""

    def __init__(self, spec: ModelSpec, tp: Axis) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden, eps=spec.norm_eps)
        self.post_attention_layernorm = RMSNorm(spec.hidden, eps=spec.norm_eps)
        self.attention = Attention(spec, tp) if spec.kv_heads == spec.heads else GroupedAttention(spec, tp)
        self.mlp = GatedMLP(spec, tp)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), past)
        return x + self.mlp(self.post_attention_layernorm(x))


class FinalNorm(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm = RMSNorm(spec.hidden, eps=spec.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def plan(spec: ModelSpec, tp: Axis) -> LayerPlan:
    return plan_of(spec, tp, embedding=Embedding, block=Block, norm=FinalNorm, head=TiedHead if spec.tied_head else Head)


def huggingface(spec: ModelSpec) -> WeightMap:
    names: WeightMap = {(0, "word_embeddings.weight"): Same("model.embed_tokens.weight"), (spec.norm_number, "norm.scale"): Same("model.norm.weight")}
    groups = (spec.heads, spec.kv_heads, spec.kv_heads)
    for number in range(2, spec.layers + 2):
        layer = f"model.layers.{number - 2}"
        parts = tuple(f"{layer}.self_attn.{kind}_proj.weight" for kind in "qkv")
        names[number, "attention.query_key_value.weight"] = ByHead(parts, spec.heads) if spec.kv_heads == spec.heads else Stacked(parts, groups)
        names[number, "attention.dense.weight"] = Same(f"{layer}.self_attn.o_proj.weight")
        names[number, "mlp.dense_h_to_4h.weight"] = Stacked((f"{layer}.mlp.up_proj.weight", f"{layer}.mlp.gate_proj.weight"), (1, 1))
        names[number, "mlp.dense_4h_to_h.weight"] = Same(f"{layer}.mlp.down_proj.weight")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            names[number, f"{norm}.scale"] = Same(f"{layer}.{norm}.weight")
    if not spec.tied_head:
        names[spec.head_number, "final_linear.weight"] = Same("lm_head.weight")
    return names


def config(spec: ModelSpec) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.ffn,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_head,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": spec.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rotary_base},
    }


ARCHITECTURE = Architecture("llama", plan, huggingface, config, "llama")
