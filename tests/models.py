"""Small random models in NeoX's sharded layout, with biases and norms that differ on every rank, and the same models in transformers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.checkpoint.find import CheckpointLayout, find_checkpoint
from megatron_lite.checkpoint.load import load_layers, open_source, vocabulary_rows
from megatron_lite.checkpoint.write import name_latest, step_folder, write_layer
from megatron_lite.models.neox import ARCHITECTURE
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import stage_numbers
from megatron_lite.parallel.mesh import Axis, Mesh
from megatron_lite.parallel.stage import Stage

SMALL = ModelSpec(
    layers=4,
    hidden=64,
    heads=4,
    kv_heads=4,
    head_dim=16,
    ffn=256,
    vocab=160,
    max_positions=64,
    rotary_dim=4,
    rotary_base=10000.0,
    norm_eps=1e-5,
    activation="gelu_tanh",
    parallel_residual=True,
    tied_head=False,
    dtype="float32",
)


def write_random(folder: Path, spec: ModelSpec, *, tp: int, seed: int = 0) -> CheckpointLayout:
    """A checkpoint of random fp32 weights cut for tp ranks. What ranks hold in common differs between them wherever training lets it."""
    generator = torch.Generator().manual_seed(seed)
    layout = step_folder(folder, 10, tp=tp)
    plan = ARCHITECTURE.plan(spec, Axis("tp", 0, tuple(range(tp))))
    for number in stage_numbers(spec.layers, 1)[0]:
        if number == spec.head_number and spec.tied_head:
            continue
        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in plan[number]().named_parameters()}
        common: dict[str, Tensor] = {}
        for part in range(tp):
            tensors = {name: _random(name, shape, generator) for name, shape in shapes.items()}
            for name in tensors:
                if not spec.parallel_residual and name.endswith(("dense.bias", "4h_to_h.bias")):
                    tensors[name] = common.setdefault(name, tensors[name])  # added after the reduction, so the ranks' copies are replicas
            write_layer(layout, number, part, tensors)
    name_latest(folder, layout.tag)
    return find_checkpoint(folder)


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    centre, scale = (1.0, 0.3) if "norm" in name and name.endswith("weight") else (0.0, 0.12)
    return centre + scale * torch.randn(shape, generator=generator)


def load(layout: CheckpointLayout, spec: ModelSpec, mesh: Mesh) -> Stage:
    """The mesh's part of the checkpoint's model."""
    source = open_source(layout, ARCHITECTURE, spec)
    padded = replace(spec, vocab=-(-vocabulary_rows(source) // mesh.tp.size) * mesh.tp.size)
    plan = ARCHITECTURE.plan(padded, mesh.tp)
    numbers = stage_numbers(spec.layers, mesh.layout.pp)[mesh.pp.index]
    layers = load_layers(plan, numbers, source, tp=mesh.tp, dtype=torch.float32, device=mesh.device, progress=lambda count: None)
    return Stage(layers, mesh, spec.hidden, torch.float32)


@torch.no_grad()
def logits(stage: Stage, tokens: Tensor, vocab: int) -> Tensor:
    """Logits [b s vocab] of a whole forward pass without a cache, the same on every rank."""

    def visit(number: int, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    answer = torch.empty(*tokens.shape, vocab)
    return stage.run(tokens, visit, finish=lambda x: stage.mesh.tp.gather(x)[..., :vocab], answer=answer)


def in_transformers(layout: CheckpointLayout, spec: ModelSpec) -> nn.Module:
    """transformers' GPTNeoXForCausalLM that computes exactly what the saved ranks compute together.

    It knows one norm where every rank has its own: the ranks' scales and shifts are folded into the columns that they feed, which is exact.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.ffn,
        "max_position_embeddings": spec.max_positions,
        "rotary_pct": spec.rotary_dim / spec.head_dim,
        "rotary_emb_base": spec.rotary_base,
        "layer_norm_eps": spec.norm_eps,
        "hidden_act": "gelu_new" if spec.activation == "gelu_tanh" else "gelu",
        "use_parallel_residual": spec.parallel_residual,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**settings)).eval()
    head = nn.Linear(spec.hidden, spec.vocab)  # with a bias, for the shifts of the ranks' final norms
    model.lm_head = head
    files = {number: [_whole_precision(layout.layer_file(number, part)) for part in range(layout.tp)] for number in layout.numbers}
    with torch.no_grad():
        model.get_parameter("gpt_neox.embed_in.weight").copy_(_joined(files[0], "word_embeddings.weight"))
        for number, block in enumerate(model.gpt_neox.layers, start=2):
            parts = files[number]
            for norm, columns in (("input_layernorm", "attention.query_key_value"), ("post_attention_layernorm", "mlp.dense_h_to_4h")):
                _neutral(getattr(block, norm))
                _fold(parts, norm, [part[f"{columns}.weight"] for part in parts], [part[f"{columns}.bias"] for part in parts], block.get_submodule(columns))
            for rows in ("attention.dense", "mlp.dense_4h_to_h"):
                linear = block.get_submodule(rows)
                linear.get_parameter("weight").copy_(_joined(parts, f"{rows}.weight", dim=1))
                biases = [part[f"{rows}.bias"] for part in parts]
                linear.get_parameter("bias").copy_(torch.stack(biases).sum(0) if spec.parallel_residual else biases[0])
        _neutral(model.gpt_neox.final_layer_norm)
        weights = files[0] if spec.tied_head else files[spec.head_number]
        name = "word_embeddings.weight" if spec.tied_head else "final_linear.weight"
        zeros = [torch.zeros(len(part[name])) for part in weights]
        _fold(files[spec.norm_number], "norm", [part[name] for part in weights], zeros, head)
    return model


def _whole_precision(path: Path) -> dict[str, Tensor]:
    """A layer file in fp32: folding in half precision would round."""
    return {name: tensor.float() for name, tensor in torch.load(path).items()}


def _joined(parts: list[dict[str, Tensor]], name: str, dim: int = 0) -> Tensor:
    return torch.cat([part[name] for part in parts], dim)


def _neutral(norm: nn.Module) -> None:
    norm.get_parameter("weight").fill_(1)
    norm.get_parameter("bias").zero_()


def _fold(parts: list[dict[str, Tensor]], norm: str, weights: list[Tensor], biases: list[Tensor], into: nn.Module) -> None:
    """W (scale * x + shift) + b = (W scale) x + (W shift + b), rank by rank."""
    scaled = [weight * part[f"{norm}.weight"] for weight, part in zip(weights, parts, strict=True)]
    shifted = [bias + weight @ part[f"{norm}.bias"] for weight, bias, part in zip(weights, biases, parts, strict=True)]
    into.get_parameter("weight").copy_(torch.cat(scaled))
    into.get_parameter("bias").copy_(torch.cat(shifted))
