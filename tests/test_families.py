"""GPT-J and LLaMA-like models against transformers, from Hugging Face folders and from layer files, at every cut."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_lite.checkpoint.find import CheckpointLayout, find_checkpoint
from megatron_lite.checkpoint.load import load_layers, open_source, vocabulary_rows
from megatron_lite.checkpoint.write import name_latest, step_folder, write_layer
from megatron_lite.config.load import load_config
from megatron_lite.errors import CheckpointError
from megatron_lite.models.architecture import architecture_named
from megatron_lite.models.memory import parameters
from megatron_lite.models.spec import ModelSpec, spec_of
from megatron_lite.parallel.layout import Layout, stage_numbers
from megatron_lite.parallel.mesh import Mesh, single_mesh
from megatron_lite.parallel.shards import Rule
from megatron_lite.parallel.stage import Stage
from tests.models import SMALL, logits
from tests.worlds import in_world

GPTJ = replace(SMALL, family="gptj", rotary_dim=8, parallel_residual=True)
LLAMA = replace(SMALL, family="llama", rotary_dim=16, activation="silu", parallel_residual=False, ffn=176, norm_eps=1e-6)
SPECS: dict[str, ModelSpec] = {
    "GPT-J": GPTJ,
    "LLaMA": LLAMA,
    "LLaMA, tied head": replace(LLAMA, tied_head=True),
    "LLaMA, 2 key/value heads": replace(LLAMA, heads=8, head_dim=8, rotary_dim=8, kv_heads=2),
    "LLaMA, 1 key/value head": replace(LLAMA, kv_heads=1),
}
LAYOUTS = [Layout(pp=pp, tp=tp) for pp, tp in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2))]


def twin(spec: ModelSpec, **others: Any) -> nn.Module:
    """The same model in transformers, with random weights; `others` are settings of LLaMA's that no spec has."""
    import transformers

    torch.manual_seed(3)
    settings: dict[str, Any]
    if spec.family == "gptj":
        settings = {"n_embd": spec.hidden, "n_layer": spec.layers, "n_head": spec.heads, "rotary_dim": spec.rotary_dim, "n_positions": spec.max_positions}
        model = transformers.GPTJForCausalLM(transformers.GPTJConfig(vocab_size=spec.vocab, **settings))
    else:
        settings = {"hidden_size": spec.hidden, "intermediate_size": spec.ffn, "num_hidden_layers": spec.layers, "num_attention_heads": spec.heads}
        more = {"num_key_value_heads": spec.kv_heads, "max_position_embeddings": spec.max_positions, "tie_word_embeddings": spec.tied_head}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=spec.vocab, rms_norm_eps=spec.norm_eps, **settings, **more, **others))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name or ("ln_" in name and name.endswith("weight")) else 0.0, 0.12)
    return model.eval()


def cut(layer: nn.Module, size: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """What each of `size` tensor-parallel ranks holds of a whole layer, by its parameters' rules."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(size)]
    for path, parameter in layer.named_parameters():
        module_name, _, name = path.rpartition(".")
        rule = cast(dict[str, Rule], layer.get_submodule(module_name).rules)[name]
        for part, shard in zip(parts, rule.split(parameter.detach().to("cpu", dtype), size), strict=True):
            part[path] = shard.clone()
    return parts


def stage_of(layout: CheckpointLayout, spec: ModelSpec, mesh: Mesh) -> Stage:
    architecture = architecture_named(spec.family)
    source = open_source(layout, architecture, spec)
    padded = replace(spec, vocab=-(-vocabulary_rows(source) // mesh.tp.size) * mesh.tp.size)
    numbers = stage_numbers(spec.layers, mesh.layout.pp)[mesh.pp.index]
    plan = architecture.plan(padded, mesh.tp)
    layers = load_layers(plan, numbers, source, tp=mesh.tp, dtype=torch.float32, device=mesh.device, progress=lambda count: None)
    return Stage(layers, mesh, spec.hidden, torch.float32)


def write_layer_files(folder: Path, whole: Stage, spec: ModelSpec, *, tp: int) -> CheckpointLayout:
    layout = step_folder(folder, 1, tp=tp)
    for number, layer in whole.layers.items():
        if not (spec.tied_head and number == spec.head_number):
            for part, tensors in enumerate(cut(layer, tp, torch.float32)):
                write_layer(layout, number, part, tensors)
    name_latest(folder, layout.tag)
    return find_checkpoint(folder)


def tokens() -> Tensor:
    return torch.randint(160, (2, 33), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, list[CheckpointLayout]]]:
    """For every model transformers' logits, and where it lies: a Hugging Face folder, and layer files cut for 1, 2 and 4."""
    found = {}
    for name, spec in SPECS.items():
        folder, model = tmp_path_factory.mktemp("models"), twin(spec)
        model.save_pretrained(folder / "hf")  # pyright: ignore[reportCallIssue]
        hugging = find_checkpoint(folder / "hf")
        whole = stage_of(hugging, spec, single_mesh())
        files = [write_layer_files(folder / f"tp{tp}", whole, spec, tp=tp) for tp in (1, 2, 4)]
        with torch.no_grad():
            found[name] = (model(tokens()).logits, [hugging, *files])
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_family_agrees_with_transformers_at_every_cut(layout: Layout, saved: dict[str, tuple[Tensor, list[CheckpointLayout]]]) -> None:
    def answers(mesh: Mesh) -> dict[str, list[Tensor]]:
        return {name: [logits(stage_of(where, SPECS[name], mesh), tokens(), 160) for where in places] for name, (_, places) in saved.items()}

    for found in in_world(layout, answers):
        for name, (expected, places) in saved.items():
            assert expected.std() > 0.3
            for where, answer in zip(places, found[name], strict=True):
                torch.testing.assert_close(answer, expected, atol=1e-4, rtol=0, msg=lambda text, name=name, where=where: f"{name} from {where}: {text}")


@pytest.mark.parametrize(("setting", "found"), [("attention_bias", "self_attn.k_proj.bias"), ("mlp_bias", "mlp.down_proj.bias")])
def test_a_model_with_weights_that_nothing_here_uses_is_refused(setting: str, found: str, tmp_path: Path) -> None:
    twin(LLAMA, **{setting: True}).save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    with pytest.raises(CheckpointError, match=rf"holds model\.layers\.0\.{found}, .* and \d+ more, which the model of its configuration does not have"):
        stage_of(find_checkpoint(tmp_path), LLAMA, single_mesh())


@pytest.mark.parametrize("name", ["GPT-J", "LLaMA, tied head"])
def test_what_older_versions_of_transformers_saved_beside_the_weights_is_passed_over(name: str, tmp_path: Path) -> None:
    model = twin(SPECS[name])
    model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    expected = logits(stage_of(find_checkpoint(tmp_path), SPECS[name], single_mesh()), tokens(), 160)
    weights = load_file(tmp_path / "model.safetensors")
    kinds = ("attn.bias", "attn.masked_bias", "attn.embed_positions") if name == "GPT-J" else ("self_attn.rotary_emb.inv_freq",)
    prefix = "transformer.h" if name == "GPT-J" else "model.layers"
    buffers = {f"{prefix}.{layer}.{kind}": torch.ones(4) for layer in range(4) for kind in kinds}
    head = {} if name == "GPT-J" else {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(weights | buffers | head, tmp_path / "model.safetensors")
    assert torch.equal(logits(stage_of(find_checkpoint(tmp_path), SPECS[name], single_mesh()), tokens(), 160), expected)


@pytest.mark.parametrize("name", SPECS)
def test_parameters_are_counted_as_they_are(name: str) -> None:
    assert parameters(SPECS[name]) == sum(parameter.numel() for parameter in twin(SPECS[name]).parameters())


@pytest.mark.parametrize(
    ("name", "vocab", "count"),
    [
        ("gpt-j-6B", 50400, 6_050_882_784),
        ("llama/7B", 32000, 6_738_415_616),
        ("llama/13B", 32000, 13_015_864_320),
        ("llama/30B", 32000, 32_528_943_616),
        ("llama/65B", 32000, 65_285_660_672),
    ],
)
def test_the_configurations_have_the_published_parameter_counts(name: str, vocab: int, count: int) -> None:
    config = load_config([Path(__file__).parents[1] / "configs" / f"{name}.yml"])
    assert parameters(spec_of(config.model, vocab=vocab, dtype="float16")) == count
