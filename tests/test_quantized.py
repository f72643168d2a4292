"""Weights of 8 bits: the same numbers at every cut, the memory that the plan says, and next to the same predictions."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from launcher.cards import hardware_named
from launcher.planner import plan_generation
from launcher.train_plan import plan_training
from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.checkpoint.load import load_layers, open_source
from megatron_lite.checkpoint.reader import BLOCK, Reader
from megatron_lite.config.load import load_config
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.errors import ConfigError, FitError
from megatron_lite.models.architecture import architecture_named
from megatron_lite.models.memory import generation_footprint, layer_bytes
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Axis, Mesh, single_mesh
from megatron_lite.parallel.quantized import Quantized, dequantized, quantize, rounded, row_scale, share_place
from megatron_lite.parallel.stage import Stage
from megatron_lite.run import load_stage, prepare
from tests.live_bytes import LiveBytes, alive
from tests.models import SMALL, logits
from tests.runs import BYTES, write_run
from tests.test_families import LLAMA, write_layer_files
from tests.worlds import in_world

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT.parent / "shared" / "data" / "stories" / "stories.jsonl"
TOKENS = torch.randint(160, (2, 33), generator=torch.Generator().manual_seed(1))
SPECS: dict[str, ModelSpec] = {
    "GPT-NeoX, parallel": SMALL,
    "GPT-NeoX, sequential": replace(SMALL, parallel_residual=False),
    "GPT-J": replace(SMALL, family="gptj", rotary_dim=8),
    "LLaMA": LLAMA,
    "LLaMA, 2 key/value heads": replace(LLAMA, heads=8, head_dim=8, rotary_dim=8, kv_heads=2),
}


def written(folder: Path, spec: ModelSpec) -> CheckpointLayout:
    """A random model in layer files for two ranks."""
    torch.manual_seed(4)
    layers: dict[int, nn.Module] = {}
    for number, make in architecture_named(spec.family).plan(spec, Axis("tp")).items():
        layers[number] = make().requires_grad_(False)
        for name, parameter in layers[number].named_parameters():
            parameter.normal_(1.0 if "norm" in name and not name.endswith("bias") else 0.0, 0.12)
    return write_layer_files(folder, Stage(layers, single_mesh(), spec.hidden, torch.float32), spec, tp=2)


def loaded(layout: CheckpointLayout, spec: ModelSpec, mesh: Mesh, *, is_quantized: bool = True) -> Stage:
    architecture = architecture_named(spec.family)
    layers = load_layers(
        architecture.plan(spec, mesh.tp),
        mesh.layout.numbers(spec.layers)[mesh.pp.index],
        open_source(layout, architecture, spec),
        tp=mesh.tp,
        dtype=torch.float32,
        device=mesh.device,
        progress=lambda count: None,
        settle=(lambda _, layer: quantize(layer, mesh.tp)) if is_quantized else None,
    )
    return Stage(layers, mesh, spec.hidden, torch.float32)


def eight_bit(layers: Mapping[int, nn.Module]) -> dict[str, Quantized]:
    found = {f"{number}.{path}": module for number, layer in layers.items() for path, module in layer.named_modules()}
    return {path: module for path, module in found.items() if isinstance(module, Quantized)}


def held(stage: Stage) -> int:
    return sum(parameter.nbytes for layer in stage.layers.values() for parameter in layer.parameters())


def test_the_largest_number_of_a_row_becomes_127_and_the_others_are_off_by_half_a_step_at_most() -> None:
    matrix = torch.randn(1500, 40) * torch.logspace(-4, 3, 1500).unsqueeze(1)
    matrix[7] = 0
    scale = row_scale(matrix, Axis("tp"))
    whole = rounded(matrix, scale)
    assert whole.dtype == torch.int8
    assert whole.abs().amax(1).tolist() == [0 if row == 7 else 127 for row in range(1500)]
    assert ((dequantized(whole, scale, torch.float32) - matrix).abs() <= scale.unsqueeze(1) * 0.50001).all()


@pytest.mark.parametrize("name", SPECS)
def test_every_cut_of_a_model_holds_the_same_8_bit_numbers_and_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    layout, spec = written(tmp_path, SPECS[name]), SPECS[name]

    def answer(mesh: Mesh) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], int]:
        stage = loaded(layout, spec, mesh)
        numbers = {path: (module.weight.detach(), module.scale.detach()) for path, module in eight_bit(stage.layers).items()}
        return logits(stage, TOKENS, spec.vocab), numbers, held(stage)

    expected, whole, _ = answer(single_mesh())
    exactly = logits(loaded(layout, spec, single_mesh(), is_quantized=False), TOKENS, spec.vocab)
    assert len(whole) == 4 * spec.layers
    assert 0 < float((expected - exactly).norm() / exactly.norm()) < 0.05
    for cut in (Layout(tp=2), Layout(tp=4), Layout(pp=2), Layout(pp=3, blocks=(1, 2, 1))):
        found = in_world(cut, answer)
        for rank, (theirs, numbers, size) in enumerate(found):
            torch.testing.assert_close(theirs, expected, atol=2e-5, rtol=0)
            stage = cut.coordinates(rank)[0]
            assert size == generation_footprint(replace(spec, quantization="int8"), cut, stage, rows=0, context=0).weights
            for path in numbers if cut.pp == 1 else ():
                if path.endswith(("dense", "dense_4h_to_h")):  # cut by columns: every rank knows the scale of whole rows
                    assert torch.equal(torch.cat([part[1][path][0] for part in found], 1), whole[path][0])
                    assert torch.equal(numbers[path][1], whole[path][1])


def test_loading_takes_the_memory_of_8_bits_and_one_block_whole(tmp_path: Path) -> None:
    spec = replace(SMALL, hidden=256, head_dim=64, ffn=1024, layers=6)
    layout = written(tmp_path, spec)
    with Reader(torch.device("cpu")) as reader:
        buffers = reader.threads * BLOCK
    with LiveBytes(alive()) as counted:
        before = counted.now
        stage = loaded(layout, spec, single_mesh())
        peak = counted.peak - before - buffers
    block = layer_bytes(spec, 2, 1)
    assert held(stage) == pytest.approx(0.256 * 6 * block + 2 * 160 * 256 * 4, rel=0.01)
    assert held(stage) + 0.5 * block < peak < held(stage) + 2 * block  # a block in fp32, and its file, which is mapped


def test_a_place_that_layers_share_is_as_large_as_the_largest_matrix_and_changes_no_number(tmp_path: Path) -> None:
    stage = loaded(written(tmp_path, SMALL), SMALL, single_mesh())
    before = logits(stage, TOKENS, SMALL.vocab)
    share_place(stage.layers.values())
    quantized = list(eight_bit(stage.layers).values())
    (place,) = {id(module.place): module.place for module in quantized}.values()
    assert place is not None
    assert len(place) == max(module.weight.numel() for module in quantized)
    place.fill_(torch.nan)
    assert torch.equal(logits(stage, TOKENS, SMALL.vocab), before)
    assert not place.isnan().all(), "it was used"


def some_stories(count: int) -> list[str]:
    if not STORIES.is_file():
        pytest.skip(f"{STORIES} is not there: the held-out stories are what perplexity is measured on")
    texts = [json.loads(line)["text"] for line in STORIES.read_text(encoding="utf-8").splitlines()]
    return [text for number, text in enumerate(texts) if number % 40 == 0][:count]


def perplexity(stage: Stage, rows: Tensor) -> float:
    x = rows[:, :-1]
    with torch.inference_mode():
        for layer in stage.layers.values():
            x = layer(x)
    return math.exp(F.cross_entropy(x.flatten(0, 1), rows[:, 1:].flatten()).item())


def test_the_bundled_model_predicts_held_out_stories_within_1_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stories = some_stories(4)
    tokens = load_tokenizer(load_config([Path("configs/tiny.yml")]).tokenizer).encode_batch(stories)
    rows = torch.tensor([each for text in tokens for each in text][: 10 * 257]).view(10, 257)
    configs = (load_config([Path("configs/tiny.yml")], {"weight_quantization": value}) for value in ("null", "int8"))
    exact, rough = (perplexity(load_stage(prepare(config, single_mesh())), rows) for config in configs)
    assert 15 < exact < 45
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.01)


def test_only_the_matrices_of_blocks_are_held_in_8_bits(tmp_path: Path) -> None:
    stage = load_stage(prepare(load_config([write_run(tmp_path, tp=1, weight_quantization="int8")]), single_mesh()))
    kinds = {name: parameter.dtype for layer in stage.layers.values() for name, parameter in layer.named_parameters()}
    matrices = {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
    assert {name for name in kinds if kinds[name] == torch.int8} == {f"{name}.weight" for name in matrices}
    assert {name for name in kinds if kinds[name] == torch.int32} == {f"{name}.scale_bits" for name in matrices}
    assert set(kinds.values()) - {torch.int8, torch.int32} == {torch.float32}
    assert held(stage) == generation_footprint(replace(BYTES, quantization="int8"), Layout(), 0, rows=0, context=0).weights


def planned(name: str, gpus: str, **settings: str) -> float:
    """Gigabytes on the fullest GPU."""
    config = load_config([ROOT / "configs" / f"{name}.yml"], {"weight_quantization": "int8", "generation_batch_size": "1", **settings})
    plan = plan_generation(config, hardware_named(gpus), 50277 if name == "20B" else 50400)
    assert plan.layout == Layout()
    return plan.largest / 1e9


def test_20b_is_planned_on_one_card_of_24_gb_with_2048_tokens() -> None:
    assert 23.5 < planned("20B", "RTX 3090") < 25.3
    assert 23.5 < planned("20B", "1x24GiB") < 25.3


def test_gpt_j_is_planned_on_one_card_of_8_gb() -> None:
    assert planned("gpt-j-6B", "1x8GiB", seq_length="1024") < 8.3
    assert planned("gpt-j-6B", "1x8GB", seq_length="512") < 8.0


def test_who_has_8_gb_is_told_how_long_texts_may_be() -> None:
    config = load_config([ROOT / "configs" / "gpt-j-6B.yml"], {"weight_quantization": "int8", "generation_batch_size": "1"})
    with pytest.raises(FitError, match=r"no layout fits on what is here \(1 GPU found\); seq_length=1024 would \(pipe 1 x model 1 with 1 row at once: 8.3 GB"):
        plan_generation(config, hardware_named("1x8GiB"), 50400)


def test_who_has_too_little_memory_is_told_that_8_bits_would_fit() -> None:
    config = load_config([ROOT / "configs" / "20B.yml"], {"generation_batch_size": "1"})
    with pytest.raises(FitError, match=r"no layout fits on what is here \(1 GPU found\); weight_quantization=int8 would \(pipe 1 x model 1 with 1 row at once"):
        plan_generation(config, hardware_named("RTX3090"), 50277)


def test_adapters_are_added_before_the_sum_is_rounded(tmp_path: Path) -> None:
    """Rounded afterwards, what is small beside the weights would be lost."""
    config = write_run(tmp_path, tp=1)
    adapters, module = tmp_path / "adapters", "base_model.model.gpt_neox.layers.1.attention.dense"
    adapters.mkdir()
    a, b = torch.randn(2, BYTES.hidden) * 0.05, torch.randn(BYTES.hidden, 2) * 0.05
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, adapters / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["dense"], "base_model_name_or_path": None}
    (adapters / "adapter_config.json").write_text(json.dumps(stated))
    settings = {"lora_load": str(adapters)}
    exact, rough = (load_stage(prepare(load_config([config], {**settings, **more}), single_mesh())) for more in ({}, {"weight_quantization": "int8"}))
    whole, held = (stage.layers[3].get_submodule("attention.dense") for stage in (exact, rough))
    assert isinstance(whole, nn.Linear)
    assert isinstance(held, Quantized)
    assert torch.equal(held.weight, rounded(whole.weight, row_scale(whole.weight, Axis("tp"))))


def test_training_all_weights_refuses_8_bits() -> None:
    config = load_config([ROOT / "configs" / "tiny.yml", ROOT / "configs" / "finetune-cpu.yml"], {"weight_quantization": "int8"})
    with pytest.raises(ConfigError) as error:
        plan_training(config, hardware_named("1x24GB"), 4096)
    assert str(error.value) == (
        "weight_quantization is int8 (command line), and lora is not set: weights of 8 bits stay as they are in a training, "
        "only adapters beside them can learn; set lora, for instance lora.rank=16, or weight_quantization=null to train all weights"
    )


def test_what_is_not_built_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="weight_quantization needs one of int8, found 'int4'"):
        load_config([ROOT / "configs" / "tiny.yml"], {"weight_quantization": "int4"})
