"""Conversions there and back, to the bit where arithmetic allows, and bounded where it does not."""

import shutil
import signal
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lite.checkpoint.config_json import stated_spec
from megatron_lite.checkpoint.convert import Model, to_huggingface, to_neox
from megatron_lite.checkpoint.find import CheckpointLayout, find_checkpoint
from megatron_lite.checkpoint.load import open_source
from megatron_lite.config.load import load_config
from megatron_lite.errors import CheckpointError, OutputError
from megatron_lite.models.architecture import architecture_named
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.mesh import single_mesh
from tests.disks import no_file_beyond
from tests.models import SMALL, logits, write_random
from tests.test_families import SPECS, stage_of, twin, write_layer_files
from tools.convert import copy_tokenizer, main, tokenizer_files

ALL = {"NeoX": SMALL, "NeoX, sequential": replace(SMALL, parallel_residual=False), "NeoX, tied head": replace(SMALL, tied_head=True), **SPECS}


def model_of(layout: CheckpointLayout, spec: ModelSpec) -> Model:
    architecture = architecture_named(spec.family)
    return Model(open_source(layout, architecture, spec), architecture, spec)


def neox(layout: CheckpointLayout, spec: ModelSpec, folder: Path, tp: int) -> CheckpointLayout:
    to_neox(model_of(layout, spec), folder, tp=tp, step=3, dtype=torch.float32, progress=lambda count: None)
    return find_checkpoint(folder)


def hugging(layout: CheckpointLayout, spec: ModelSpec, folder: Path) -> CheckpointLayout:
    to_huggingface(model_of(layout, spec), folder, dtype=torch.float32, extra={}, progress=lambda count: None)
    return find_checkpoint(folder)


def contents(layout: CheckpointLayout) -> dict[str, Tensor]:
    files = sorted(layout.folder.glob("layer_*.pt"))
    return {f"{file.name} {name}": tensor for file in files for name, tensor in torch.load(file).items()}


def same(one: CheckpointLayout, other: CheckpointLayout) -> bool:
    a, b = contents(one), contents(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def start(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[CheckpointLayout, ModelSpec]:
    """A model in one piece, as layer files."""
    spec = ALL[request.param]
    if spec.family == "neox":
        return write_random(tmp_path / "start", spec, tp=1), spec
    twin(spec).save_pretrained(tmp_path / "twin")  # pyright: ignore[reportCallIssue]
    whole = stage_of(find_checkpoint(tmp_path / "twin"), spec, single_mesh())
    return write_layer_files(tmp_path / "start", whole, spec, tp=1), spec


@pytest.mark.parametrize("start", ALL, indirect=True)
def test_there_and_back_through_hugging_face_is_exact(start: tuple[CheckpointLayout, ModelSpec], tmp_path: Path) -> None:
    layout, spec = start
    folder = hugging(layout, spec, tmp_path / "hf")
    assert replace(stated_spec(folder.folder, dtype="float32"), vocab=spec.vocab) == spec
    assert same(neox(folder, spec, tmp_path / "back", tp=1), layout)


@pytest.mark.parametrize("start", ALL, indirect=True)
def test_cuts_one_after_the_other_end_where_they_began(start: tuple[CheckpointLayout, ModelSpec], tmp_path: Path) -> None:
    layout, spec = start
    two = neox(layout, spec, tmp_path / "2", tp=2)
    again = neox(neox(neox(two, spec, tmp_path / "1", tp=1), spec, tmp_path / "4", tp=4), spec, tmp_path / "22", tp=2)
    assert same(again, two)


@pytest.mark.parametrize("name", ALL)
def test_transformers_reads_what_is_written_with_the_same_logits(name: str, tmp_path: Path) -> None:
    import transformers

    spec = ALL[name]
    if spec.family == "neox":
        layout = write_random(tmp_path / "start", spec, tp=1)
    else:
        twin(spec).save_pretrained(tmp_path / "start")  # pyright: ignore[reportCallIssue]
        layout = find_checkpoint(tmp_path / "start")
    folder = hugging(layout, spec, tmp_path / "hf")
    tokens = torch.randint(160, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = transformers.AutoModelForCausalLM.from_pretrained(folder.folder, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(found, logits(stage_of(layout, spec, single_mesh()), tokens, 160), atol=1e-4, rtol=0)


def test_drifted_norms_are_averaged_said_and_no_further_from_the_copies_than_half_their_distance(tmp_path: Path) -> None:
    layout = write_random(tmp_path / "start", SMALL, tp=2)
    averaged = to_neox(model_of(layout, SMALL), tmp_path / "one", tp=1, step=3, dtype=torch.float32, progress=lambda count: None)
    assert len(averaged) == 4 * SMALL.layers + 2  # two norms with weight and bias a block, and the last one
    merged = contents(find_checkpoint(tmp_path / "one"))
    for name, tensor in merged.items():
        if "norm" in name:
            first, second = (contents(layout)[name.replace("model_00", f"model_0{part}")] for part in (0, 1))
            torch.testing.assert_close(tensor, (first + second) / 2, atol=1e-6, rtol=0)


def test_summed_biases_are_exact_to_one_rounding(tmp_path: Path) -> None:
    layout = write_random(tmp_path / "start", SMALL, tp=2)
    merged = contents(neox(layout, SMALL, tmp_path / "one", tp=1))
    for name, tensor in merged.items():
        if name.endswith(("dense.bias", "4h_to_h.bias")):
            terms = [contents(layout)[name.replace("model_00", f"model_0{part}")].double() for part in (0, 1)]
            torch.testing.assert_close(tensor.double(), terms[0] + terms[1], atol=0, rtol=2**-24)


def test_an_interrupted_conversion_leaves_no_file(tmp_path: Path) -> None:
    layout = write_random(tmp_path / "start", SMALL, tp=1)

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_huggingface(model_of(layout, SMALL), tmp_path / "hf", dtype=torch.float32, extra={}, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        to_neox(model_of(layout, SMALL), tmp_path / "neox", tp=2, step=3, dtype=torch.float32, progress=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"start", "neox"}
    assert not list((tmp_path / "neox").iterdir())


def test_what_a_killed_conversion_leaves_is_no_step_and_the_same_command_again_replaces_it(tmp_path: Path) -> None:
    layout = write_random(tmp_path / "start", SMALL, tp=1)
    shutil.copytree(layout.folder, tmp_path / "neox" / "global_step3.partial")
    with pytest.raises(CheckpointError, match="neox holds no checkpoint: no file `latest`, no folder global_stepN, no weights"):
        find_checkpoint(tmp_path / "neox")
    assert neox(layout, SMALL, tmp_path / "neox", tp=2).tp == 2
    assert {path.name for path in (tmp_path / "neox").iterdir()} == {"global_step3", "latest"}


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    layout = write_random(tmp_path / "start", SMALL, tp=1)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="hf exists and is not empty"):
        hugging(layout, SMALL, tmp_path / "hf")
    with pytest.raises(OutputError, match=r"mine.txt is a file; choose another folder"):
        hugging(layout, SMALL, tmp_path / "hf" / "mine.txt")
    assert (tmp_path / "hf" / "mine.txt").read_text() == "keep"


def test_a_checkpoint_is_not_converted_into_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny, folder = Path(__file__).parents[1] / "checkpoints" / "tiny", tmp_path / "checkpoint"
    shutil.copytree(tiny, folder)
    step = find_checkpoint(folder).folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words = [str(folder), str(folder), "--to", "neox", "--config", str(tiny.parents[1] / "configs" / "tiny.yml")]
    assert main(words) == 2
    assert f"{step} exists and is not empty; choose another folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("to", "there", "said"),
    [
        ("neox", "config.json", "holds a Hugging Face model (config.json): of it and layer files in one folder only one would be found; choose another folder"),
        ("neox", "model-00001-of-00002.safetensors", "holds a Hugging Face model (model-00001-of-00002.safetensors)"),
        ("neox", "pytorch_model.bin.index.json", "holds a Hugging Face model (pytorch_model.bin.index.json)"),
        ("neox", "layer_00-model_00-model_states.pt", "holds layer files (layer_00-model_00-model_states.pt)"),
        ("neox", "mp_rank_00_model_states.pt", "holds files of a pipe-parallel-size-0 save (mp_rank_00_model_states.pt)"),
        ("neox", "step_100/shard_0/0.npz", "holds a model of mesh-transformer-jax (step_100)"),
        ("neox", "global_step7/manifest.json", "holds checkpoints of a training (global_step7), which goes on from the step that `latest` names"),
        ("neox", "global_step7/adapter_config.json", "holds checkpoints of a training (global_step7)"),
        ("huggingface", "latest", "new exists and is not empty; choose another folder, or delete it first"),
        ("huggingface", "global_step7/layer_00-model_00-model_states.pt", "new exists and is not empty"),
    ],
)
def test_two_formats_are_not_put_into_one_folder(to: str, there: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny, config = (Path(__file__).parents[1] / each for each in ("checkpoints/tiny", "configs/tiny.yml"))
    (tmp_path / "new" / there).parent.mkdir(parents=True)
    (tmp_path / "new" / there).write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert main([str(tiny), str(tmp_path / "new"), "--to", to, "--config", str(config)]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert "\n" not in printed.err.strip()
    assert sorted(tmp_path.rglob("*")) == before


def test_steps_and_a_tokenizer_may_lie_beside_what_is_converted(tmp_path: Path) -> None:
    tiny, config = (Path(__file__).parents[1] / each for each in ("checkpoints/tiny", "configs/tiny.yml"))
    (tmp_path / "tokenizer.json").write_text("{}")
    write_random(tmp_path, SMALL, tp=1)
    assert main([str(tiny), str(tmp_path), "--to", "neox", "--config", str(config)]) == 0
    assert find_checkpoint(tmp_path).tag == "global_step5400"


@pytest.mark.parametrize("to", ["neox", "huggingface"])
def test_a_checkpoint_of_another_model_is_not_converted(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny, config = (Path(__file__).parents[1] / each for each in ("checkpoints/tiny", "configs/tiny.yml"))
    wide = tmp_path / "wide.yml"
    wide.write_text(config.read_text().replace('"num_layers"', '"intermediate_size": 512,\n  "num_layers"'))
    assert main([str(tiny), str(tmp_path / "new"), "--to", to, "--config", str(wide)]) == 2
    assert "the configuration needs [512, 256]" in capsys.readouterr().err

    folder = shutil.copytree(tiny, tmp_path / "long")
    file = find_checkpoint(folder).layer_file(3, 1)
    whole = torch.load(file)
    torch.save({**whole, "attention.dense.weight": whole["attention.dense.weight"].repeat(1, 2)}, file)
    assert main([str(folder), str(tmp_path / "new"), "--to", to, "--config", str(config)]) == 2
    assert "attention.dense.weight is [256, 128] + [256, 256] in the file" in capsys.readouterr().err

    torch.save({**whole, "attention.gate.weight": torch.zeros(2)}, file.with_name(file.name.replace("model_01", "model_00")))
    torch.save({**whole, "attention.gate.weight": torch.zeros(2)}, file)
    assert main([str(folder), str(tmp_path / "new"), "--to", to, "--config", str(config)]) == 2
    assert "holds attention.gate.weight, which layer 3 of this model does not have" in capsys.readouterr().err
    assert not any((tmp_path / "new").glob("*.json")), "nothing looks complete"
    assert not (tmp_path / "new" / "latest").exists()


def test_a_vocabulary_that_does_not_divide_is_padded(tmp_path: Path) -> None:
    spec = replace(SMALL, vocab=161)
    two = neox(write_random(tmp_path / "start", spec, tp=1), spec, tmp_path / "two", tp=2)
    assert {torch.load(two.layer_file(0, part))["word_embeddings.weight"].shape[0] for part in (0, 1)} == {81}


def test_the_tool_converts_the_bundled_model_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[1]
    words = [str(root / "checkpoints" / "tiny"), str(tmp_path / "hf"), "--to", "huggingface", "--config", str(root / "configs" / "tiny.yml"), "--verify"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "(huggingface, model-parallel-size 1)" in said
    assert float(said.split("in fp32: ")[1]) == 0
    assert {path.name for path in (tmp_path / "hf").iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert main([str(tmp_path / "hf"), str(tmp_path / "back"), "--to", "neox", "--model-parallel-size", "4"]) == 0
    assert find_checkpoint(tmp_path / "back").tp == 4


def test_norms_that_drifted_by_a_thousandth_change_logits_by_no_more_than_a_hundredth_and_nothing_else_changes(tmp_path: Path) -> None:
    layout = write_random(tmp_path / "start", SMALL, tp=2)
    generator = torch.Generator().manual_seed(2)
    for number in layout.numbers:
        first, second = (torch.load(layout.layer_file(number, part)) for part in (0, 1))
        norms = {name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator) for name, tensor in first.items() if "norm" in name}
        torch.save({**second, **norms}, layout.layer_file(number, 1))
    back = neox(hugging(layout, SMALL, tmp_path / "hf"), SMALL, tmp_path / "back", tp=2)
    before, after = contents(layout), contents(back)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert all("norm" in name or name.endswith(("dense.bias", "4h_to_h.bias")) for name in changed)
    whole, merged = (logits(stage_of(each, SMALL, single_mesh()), torch.arange(32)[None], SMALL.vocab) for each in (layout, back))
    assert 0 < (whole - merged).abs().max() < 0.01 * whole.std()


def test_the_tokenizer_goes_along_under_the_names_that_transformers_looks_for(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("vocab.json", "merges.txt", "spiece.model", "20B_tokenizer.json"):
        (source / name).write_text(name)

    def copied(settings: dict[str, object]) -> dict[str, str]:
        config = load_config([Path(__file__).parents[1] / "configs" / "tiny.yml"], settings)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        copy_tokenizer(tokenizer_files(Namespace(tokenizer=None, source=source), config), folder)
        return {path.name: path.read_text() for path in folder.iterdir()}

    bpe = {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": source / "vocab.json", "merge_file": source / "merges.txt"}
    assert copied(bpe) == {"vocab.json": "vocab.json", "merges.txt": "merges.txt"}
    assert copied({"vocab_file": source / "20B_tokenizer.json"}) == {"tokenizer.json": "20B_tokenizer.json"}
    assert copied({"tokenizer_type": "SPMTokenizer", "vocab_file": source / "spiece.model"}) == {"spiece.model": "spiece.model"}


def test_a_tokenizer_that_is_not_there_is_missed_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, config = (Path(__file__).resolve().parents[1] / each for each in ("checkpoints/tiny", "configs/tiny.yml"))
    monkeypatch.chdir(tmp_path)  # vocab_file is relative to where the command is given
    assert main([str(tiny), "hf", "--to", "huggingface", "--config", str(config)]) == 0
    assert "no tokenizer goes along: checkpoints/tiny/tokenizer.json is not there; name its file with --tokenizer, or put it into hf" in capsys.readouterr().err
    assert main([str(tiny), "hf2", "--to", "huggingface", "--config", str(config), "--tokenizer", str(tiny / "tokenizer.json")]) == 0
    assert "no tokenizer goes along" not in capsys.readouterr().err


def test_a_tokenizer_that_was_named_and_is_no_file_is_told_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny, config = (Path(__file__).parents[1] / each for each in ("checkpoints/tiny", "configs/tiny.yml"))
    assert main([str(tiny), str(tmp_path / "hf"), "--to", "huggingface", "--config", str(config), "--tokenizer", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"--tokenizer {tmp_path} is no file; ")
    assert not list(tmp_path.iterdir())


def test_layer_files_without_a_yaml_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_random(tmp_path / "start", SMALL, tp=1)
    assert main([str(tmp_path / "start"), str(tmp_path / "hf"), "--to", "huggingface"]) == 2
    assert "give its YAML with --config" in capsys.readouterr().err


def test_a_cut_into_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), str(tmp_path / "new"), "--to", "neox", "--model-parallel-size", "0"])
    assert "argument --model-parallel-size: invalid positive value: '0'" in capsys.readouterr().err


def test_a_conversion_can_be_stopped_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, config = (Path(__file__).parents[1] / each for each in ("checkpoints/tiny", "configs/tiny.yml"))
    words = [str(tiny), str(tmp_path / "new"), "--to", "neox", "--config", str(config)]
    with monkeypatch.context() as interrupted:
        interrupted.setattr(torch, "save", lambda *_: signal.raise_signal(signal.SIGINT))
        assert main(words) == 130
    assert capsys.readouterr().err.endswith("stopped; nothing is kept of a conversion that is not complete, and the same command begins it anew\n")
    assert main(words) == 0


def test_what_a_full_disk_does_not_take_is_said_to_be_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny, config = (Path(__file__).parents[1] / each for each in ("checkpoints/tiny", "configs/tiny.yml"))
    with no_file_beyond(10_000):
        assert main([str(tiny), str(tmp_path / "new"), "--to", "neox", "--config", str(config)]) == 2
    assert "model_states.pt cannot be written: no space is left on the disk; free some space or choose another folder" in capsys.readouterr().err
