"""GPT-J (Wang and Komatsuzaki 2021): interleaved rotary positions, one LayerNorm for attention and MLP, no biases in attention, one on the head."""

from torch import Tensor, nn

from megatron_lite.models.architecture import Architecture, LayerPlan
from megatron_lite.models.attention import Rotary, attend
from megatron_lite.models.cache import Past
from megatron_lite.models.neox import MLP, Embedding, FinalNorm, plan_of
from megatron_lite.models.spec import ModelSpec
from megatron_lite.models.weights import ByHead, Same, WeightMap
from megatron_lite.parallel.layers import PartialColumnLinear, PartialLayerNorm, PartialRowLinear, VocabularyLinear
from megatron_lite.parallel.mesh import Axis

# b batch, s tokens in this call, d hidden size, v rows of the vocabulary on this rank


class Attention(nn.Module):
    """Multi-head attention without biases; rows of query_key_value are ordered [head][q|k|v][head_dim], as NeoX's."""

    def __init__(self, spec: ModelSpec, tp: Axis) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.rotary = Rotary(spec.rotary_dim, spec.rotary_base, spec.max_positions, "interleaved")
        self.query_key_value = PartialColumnLinear(spec.hidden, 3 * spec.hidden, tp=tp, bias=False)
        self.dense = PartialRowLinear(spec.hidden, spec.hidden, tp=tp, bias=False)

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        query, key, value = self.query_key_value(x).unflatten(-1, (-1, 3, self.head_dim)).permute(3, 0, 2, 1, 4).unbind(0)
        return self.dense(attend(query, key, value, self.rotary, past))


class Block(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x))."""

    def __init__(self, spec: ModelSpec, tp: Axis) -> None:
        super().__init__()
        self.tp = tp
        self.input_layernorm = PartialLayerNorm(spec.hidden, eps=spec.norm_eps, tp=tp)
        self.attention = Attention(spec, tp)
        self.mlp = MLP(spec, tp, PartialColumnLinear, PartialRowLinear)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        normed = self.input_layernorm(self.tp.copy(x))
        return x + self.tp.sum(self.attention(normed, past) + self.mlp(normed))


class Head(nn.Module):
    """[b s d] -> this rank's part of the vocabulary's logits [b s v]."""

    def __init__(self, spec: ModelSpec, tp: Axis) -> None:
        super().__init__()
        self.final_linear = VocabularyLinear(spec.vocab, spec.hidden, tp=tp, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.final_linear(x)


def plan(spec: ModelSpec, tp: Axis) -> LayerPlan:
    return plan_of(spec, tp, embedding=Embedding, block=Block, norm=FinalNorm, head=Head)


def huggingface(spec: ModelSpec) -> WeightMap:
    names: WeightMap = {(0, "word_embeddings.weight"): Same("transformer.wte.weight")}
    for number in range(2, spec.layers + 2):
        layer = f"transformer.h.{number - 2}"
        names[number, "attention.query_key_value.weight"] = ByHead(tuple(f"{layer}.attn.{kind}_proj.weight" for kind in "qkv"), spec.heads)
        names[number, "attention.dense.weight"] = Same(f"{layer}.attn.out_proj.weight")
        for kind in ("weight", "bias"):
            names[number, f"input_layernorm.{kind}"] = Same(f"{layer}.ln_1.{kind}")
            names[number, f"mlp.dense_h_to_4h.{kind}"] = Same(f"{layer}.mlp.fc_in.{kind}")
            names[number, f"mlp.dense_4h_to_h.{kind}"] = Same(f"{layer}.mlp.fc_out.{kind}")
    for kind in ("weight", "bias"):
        names[spec.norm_number, f"norm.{kind}"] = Same(f"transformer.ln_f.{kind}")
        names[spec.head_number, f"final_linear.{kind}"] = Same(f"lm_head.{kind}")
    return names


def config(spec: ModelSpec) -> dict[str, object]:
    return {
        "architectures": ["GPTJForCausalLM"],
        "n_layer": spec.layers,
        "n_embd": spec.hidden,
        "n_head": spec.heads,
        "n_inner": spec.ffn,
        "rotary_dim": spec.rotary_dim,
        "n_positions": spec.max_positions,
        "activation_function": "gelu_new" if spec.activation == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": spec.norm_eps,
        "tie_word_embeddings": False,
    }


ARCHITECTURE = Architecture("gptj", plan, huggingface, config, "gptj")
