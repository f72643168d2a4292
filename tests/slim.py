"""mesh-transformer-jax's slim checkpoint of a small GPT-J, and the same model in transformers, both from the published description of the files alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_lite.models.spec import ModelSpec

FILES, ROOT = 16, "causal_transformer_shard/~"
Tree = dict[str, dict[str, Tensor]]


def random_trees(spec: ModelSpec, shards: int) -> list[Tree]:
    """What every shard holds in bfloat16, under the names that haiku gives; matrices are [inputs, outputs]."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int, around: float = 0.0) -> Tensor:
        return (around + 0.12 * torch.randn(shape, generator=generator)).bfloat16()

    d, f, v, part = spec.hidden, spec.ffn // shards, spec.vocab // shards, spec.hidden // shards
    norms = [{"scale": draw(d, around=1.0), "offset": draw(d)} for _ in range(spec.layers + 1)]  # replicas
    trees = []
    for _ in range(shards):
        tree = {
            f"{ROOT}/embedding_shard/~/linear": {"w": draw(v, d), "b": draw(d)},
            f"{ROOT}/projection_shard/~/linear": {"w": draw(d, v), "b": draw(v)},
            f"{ROOT}/projection_shard/~/replicated_layer_norm": norms[-1],
        }
        for layer in range(spec.layers):
            module = f"{ROOT}/layer_{layer}/~"
            tree |= {f"{module}/linear{which}": {"w": draw(d, part)} for which in ("", "_1", "_2")}
            tree[f"{module}/linear_3"] = {"w": draw(part, d)}
            tree[f"{module}/linear_4"] = {"w": draw(d, f), "b": draw(f)}
            tree[f"{module}/linear_5"] = {"w": draw(f, d), "b": draw(d)}
            tree[f"{module}/replicated_layer_norm"] = norms[layer]
        trees.append(tree)
    return trees


def write_slim(folder: Path, trees: list[Tree], *, save: Callable[..., None] = np.savez, optimizer: int = 0) -> Path:
    """folder/shard_M/P.npz: the leaves in alphabetical order of their paths, dealt to 16 files. In a full checkpoint an optimizer's stand before them."""
    for number, tree in enumerate(trees):
        leaves = [_as_saved(tree[module][name]) for module in sorted(tree) for name in sorted(tree[module])]
        leaves = [np.ones(5, np.float32)] * optimizer + leaves + [np.array(383500, np.int32)]
        place = folder / f"shard_{number}"
        place.mkdir(parents=True)
        for file, chosen in enumerate(np.array_split(np.arange(len(leaves)), FILES)):
            save(place / f"{file}.npz", *(leaves[index] for index in chosen))
    return folder


def _as_saved(tensor: Tensor) -> np.ndarray:
    """numpy's name for bfloat16 is lost in a file: two bytes of nothing in particular."""
    return tensor.contiguous().view(torch.int16).numpy().view("V2")


def twin(trees: list[Tree], spec: ModelSpec) -> nn.Module:
    """The same model as transformers has it, in fp32: shards joined, matrices turned, terms added up."""
    import transformers

    def joined(module: str, dim: int, kind: str = "w") -> Tensor:
        return torch.cat([tree[f"{ROOT}/{module}"][kind].float() for tree in trees], dim)

    def added(module: str) -> Tensor:
        return torch.stack([tree[f"{ROOT}/{module}"]["b"].float() for tree in trees]).sum(0)

    state = {
        "transformer.wte.weight": joined("embedding_shard/~/linear", 0) + added("embedding_shard/~/linear"),
        "lm_head.weight": joined("projection_shard/~/linear", 1).T,
        "lm_head.bias": joined("projection_shard/~/linear", 0, "b"),
    }
    norms = {"transformer.ln_f": "projection_shard/~"} | {f"transformer.h.{layer}.ln_1": f"layer_{layer}/~" for layer in range(spec.layers)}
    for theirs, module in norms.items():
        norm = trees[0][f"{ROOT}/{module}/replicated_layer_norm"]
        state |= {f"{theirs}.weight": norm["scale"].float(), f"{theirs}.bias": norm["offset"].float()}
    for layer in range(spec.layers):
        block, module = f"transformer.h.{layer}", f"layer_{layer}/~"
        for kind, which in (("q", ""), ("v", "_1"), ("k", "_2")):
            state[f"{block}.attn.{kind}_proj.weight"] = joined(f"{module}/linear{which}", 1).T
        state[f"{block}.attn.out_proj.weight"] = joined(f"{module}/linear_3", 0).T
        state |= {f"{block}.mlp.fc_in.weight": joined(f"{module}/linear_4", 1).T, f"{block}.mlp.fc_in.bias": joined(f"{module}/linear_4", 0, "b")}
        state |= {f"{block}.mlp.fc_out.weight": joined(f"{module}/linear_5", 0).T, f"{block}.mlp.fc_out.bias": added(f"{module}/linear_5")}
    sizes: dict[str, Any] = {"n_embd": spec.hidden, "n_layer": spec.layers, "n_head": spec.heads, "rotary_dim": spec.rotary_dim, "n_inner": spec.ffn}
    model = transformers.GPTJForCausalLM(transformers.GPTJConfig(vocab_size=spec.vocab, n_positions=spec.max_positions, **sizes))
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()})
    return model.eval()
