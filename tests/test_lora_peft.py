"""Adapters in PEFT's format: what we write computes the same logits in PEFT, and what PEFT writes computes the same ones here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_lite.checkpoint.adapters import by_module, linears, read_adapters
from megatron_lite.checkpoint.convert import Model, to_huggingface
from megatron_lite.checkpoint.find import CheckpointLayout, find_checkpoint
from megatron_lite.checkpoint.load import open_source
from megatron_lite.checkpoint.peft import CONFIG, write_peft
from megatron_lite.config.lora import TARGETS
from megatron_lite.errors import CheckpointError
from megatron_lite.models.architecture import architecture_named
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh, single_mesh
from tests.models import SMALL, logits, write_random
from tests.test_families import SPECS, stage_of, tokens, twin
from tests.worlds import in_world

ALL = {"NeoX": SMALL, **{name: spec for name, spec in SPECS.items() if not spec.tied_head}}


@pytest.fixture(params=ALL)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ModelSpec, nn.Module, CheckpointLayout]:
    """A random model, in transformers and as a checkpoint."""
    import transformers

    spec = ALL[request.param]
    if spec.family == "neox":
        architecture, layout = architecture_named("neox"), write_random(tmp_path / "base", spec, tp=1)
        source = Model(open_source(layout, architecture, spec), architecture, spec)
        to_huggingface(source, tmp_path / "hf", dtype=torch.float32, extra={}, progress=lambda count: None)
        return spec, transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / "hf").eval(), layout
    theirs = twin(spec)
    theirs.save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    return spec, theirs, find_checkpoint(tmp_path / "base")


def with_adapters(layout: CheckpointLayout, spec: ModelSpec, folder: Path, cut: Layout) -> Tensor:
    """Logits of the model with the adapters of the folder merged into it."""

    def run(mesh: Mesh) -> Tensor:
        architecture, stage = architecture_named(spec.family), stage_of(layout, spec, mesh)
        adapters = read_adapters(folder, architecture, spec, open_source(layout, architecture, spec))
        for number, layer in stage.layers.items():
            adapters.merge_into(layer, number, mesh.tp)
        return logits(stage, tokens(), spec.vocab)

    return in_world(cut, run)[0]


def in_peft(theirs: nn.Module, folder: Path) -> Tensor:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -r requirements/requirements-dev.txt")
    loaded: Any = peft.PeftModel.from_pretrained(theirs, folder)
    with torch.no_grad():
        return loaded(tokens()).logits


def write_random_adapters(spec: ModelSpec, folder: Path) -> None:
    """Adapters of rank 3 on every linear layer, under our names first."""
    architecture, generator = architecture_named(spec.family), torch.Generator().manual_seed(0)
    block = architecture.plan(spec, single_mesh().tp)[2]()
    factors = {
        (number, path): (torch.randn(3, module.weight.shape[1], generator=generator), 0.02 * torch.randn(module.weight.shape[0], 3, generator=generator))
        for number in range(2, spec.layers + 2)
        for path, module in linears(block)
    }
    folder.mkdir()
    write_peft(folder, by_module(architecture, spec, factors), rank=3, alpha=6.0, base="base", metadata={})


def test_peft_reads_what_we_write_and_computes_the_same(model: tuple[ModelSpec, nn.Module, CheckpointLayout], tmp_path: Path) -> None:
    spec, theirs, layout = model
    write_random_adapters(spec, tmp_path / "adapters")
    ours = with_adapters(layout, spec, tmp_path / "adapters", Layout())
    assert (ours - logits(stage_of(layout, spec, single_mesh()), tokens(), spec.vocab)).abs().max() > 0.1
    torch.testing.assert_close(with_adapters(layout, spec, tmp_path / "adapters", Layout(tp=2)), ours, rtol=0, atol=1e-4)
    torch.testing.assert_close(in_peft(theirs, tmp_path / "adapters"), ours, rtol=0, atol=1e-4)


# What PEFT's users choose: parts of what is one matrix here, several ranks and alphas, another scale
CHOICES: dict[str, dict[str, Any]] = {
    "neox": {"r": 4, "lora_alpha": 8, "target_modules": ["query_key_value", "dense_4h_to_h"], "use_rslora": True},
    "gptj": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "fc_in"], "layers_to_transform": [0, 2]},
    "llama": {
        "r": 4,
        "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "o_proj"],
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {r"model\.layers\.1\.self_attn\.v_proj": 3},
    },
}


def test_we_read_what_peft_writes_and_compute_the_same(model: tuple[ModelSpec, nn.Module, CheckpointLayout], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -r requirements/requirements-dev.txt")
    spec, theirs, layout = model
    torch.manual_seed(1)
    adapted: Any = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **CHOICES[spec.family])).eval()
    adapted.save_pretrained(tmp_path / "adapters")
    with torch.no_grad():
        expected = adapted(tokens()).logits
    for cut in (Layout(), Layout(tp=2)):
        torch.testing.assert_close(with_adapters(layout, spec, tmp_path / "adapters", cut), expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "says peft_type IA3; only LORA is built"),
        ({"use_dora": True}, "says use_dora True, which is not built; train the adapters without it"),
        ({"modules_to_save": ["embed_in"]}, "says modules_to_save"),
        ({"bias": "all"}, "biases were trained too, which is not built"),
        ({"lora_alpha": "much"}, "says lora_alpha much; a number is needed"),
    ],
    ids=str,
)
def test_kinds_of_adapters_that_are_not_built_are_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / "adapters" / CONFIG
    write_random_adapters(SMALL, tmp_path / "adapters")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert said in _refusal(tmp_path)


def test_damaged_folders_are_refused_by_name(tmp_path: Path) -> None:
    write_random_adapters(SMALL, tmp_path / "adapters")
    weights = tmp_path / "adapters" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "bytes) is truncated or damaged (" in _refusal(tmp_path)
    weights.unlink()
    assert "has an adapter_config.json but no adapter_model.safetensors; is it complete?" in _refusal(tmp_path)


def _refusal(folder: Path) -> str:
    layout, architecture = write_random(folder / "base", SMALL, tp=1), architecture_named("neox")
    with pytest.raises(CheckpointError) as caught:
        read_adapters(folder / "adapters", architecture, SMALL, open_source(layout, architecture, SMALL))
    return str(caught.value)


def test_every_linear_layer_of_a_block_can_be_a_target() -> None:
    for spec in ALL.values():
        block = architecture_named(spec.family).plan(spec, single_mesh().tp)[2]()
        assert [path.rpartition(".")[2] for path, _ in linears(block)] == list(TARGETS)
