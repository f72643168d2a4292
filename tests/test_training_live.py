"""The model in the middle of its training: completions of prompts, and the loss that evaluation finds. It trains on as if nothing had been."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_lite.config.load import load_config
from megatron_lite.data.batches import TokenBatch
from megatron_lite.inference.live import completer, unlikelihoods
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.stage import Stage
from megatron_lite.run import load_stage, prepare
from megatron_lite.training.live import Uses
from megatron_lite.training.start import settle
from tests.training_runs import losses, trained, write_training
from tests.worlds import forked

LAYOUTS = [Layout(), Layout(pp=2), Layout(tp=2)]


def sampled(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "out" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_prompts_are_completed_at_their_interval_alike_at_every_cut_and_change_nothing(tmp_path: Path) -> None:
    found = []
    for place, layout in enumerate(LAYOUTS):
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / "prompts.txt").write_text("the fox\na bird\n")
        sampling = {"sample_interval": 3, "sample_input_file": str(folder / "prompts.txt"), "maximum_tokens": 5, "padded_vocab_size": 520}
        config = write_training(folder, **sampling)
        assert trained(config, layout, Uses(complete=completer(load_config([config])))) == [None] * layout.size
        found.append([{key: value for key, value in record.items() if key != "duration_seconds"} for record in sampled(folder)])
    (tmp_path / "plain").mkdir()
    trained(write_training(tmp_path / "plain", padded_vocab_size=520))
    assert losses(tmp_path / "plain") == losses(tmp_path / "0")
    assert [(record["step"], record["context"], record["length"]) for record in found[0]] == [
        (3, "the fox", 5),
        (3, "a bird", 5),
        (6, "the fox", 5),
        (6, "a bird", 5),
    ]
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_completions_are_text_in_tensorboard_and_a_table_at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    config = write_training(tmp_path, sample_interval=6, num_samples=1, maximum_tokens=4, use_wandb=True, tensorboard_dir=str(tmp_path / "board"))
    assert trained(config, uses=Uses(complete=completer(load_config([config])))) == [None]
    [record] = sampled(tmp_path)
    [table] = [json.loads(path.read_text()) for path in tmp_path.rglob("files/media/table/samples_*.table.json")]
    assert table == {"columns": ["step", "context", "text", "length", "finished"], "data": [[6, "", record["text"], 4, False]]}
    board = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    assert board.Tags()["tensors"] == ["samples/text_summary"]
    [text] = board.Tensors("samples/text_summary")
    assert text.step == 6
    assert str(record["length"]) in text.tensor_proto.string_val[0].decode()


def test_a_file_of_prompts_that_is_missing_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    config = write_training(tmp_path, sample_interval=3, sample_input_file="nowhere.txt")
    with pytest.raises(Exception, match=r"nowhere\.txt"):
        completer(load_config([config]))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to start from."""
    folder = tmp_path_factory.mktemp("base")
    assert trained(write_training(folder, train_iters=2)) == [None]
    return folder / "out"


def first_samples(mesh: Mesh, config: Path) -> list[list[int]]:
    """The rows of the first step, with the token behind each."""
    training = settle(load_config([config]), mesh)
    batches = training.batches("train", training.recipe.steps * training.recipe.batching.samples)
    assert batches is not None
    batch: TokenBatch = batches.at(0, training.recipe.batching.samples)
    return [[*row, label] for row, label in zip(batch.tokens.tolist(), batch.labels[:, -1].tolist(), strict=True)]


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(tp=2)], ids=str)
def test_the_first_loss_of_a_fine_tuning_is_what_scoring_finds_with_the_same_checkpoint(
    base: Path, tmp_path: Path, layout: Layout, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_training(tmp_path, load=str(base), finetune=True, train_iters=1, train_micro_batch_size_per_gpu=2)
    [rows] = forked(Layout(), lambda mesh: first_samples(mesh, config))

    def scored(mesh: Mesh) -> list[float]:
        run = prepare(load_config([config]), mesh)
        return unlikelihoods(load_stage(run), run.spec, rows, run.spec.vocab)

    [found] = forked(Layout(), scored)
    assert trained(config, layout, Uses(measure=unlikelihoods), save=str(tmp_path / "out")) == [None] * layout.size
    assert losses(tmp_path)[1] == pytest.approx(sum(found) / sum(len(row) - 1 for row in rows), abs=1e-5)
    assert "evaluation finds the loss that training finds in the first rows: " in capfd.readouterr().err


def test_of_answers_in_conversations_the_two_losses_say_what_they_are_of(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chat = {"messages": [{"role": "user", "content": "the fox went into " * 4}, {"role": "assistant", "content": "wood and saw a bird"}]}
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps(chat)}\n" * 40)
    config = write_training(tmp_path, load=str(base), finetune=True, train_iters=1, data_path=str(tmp_path / "chat.jsonl"))
    assert trained(config, uses=Uses(measure=unlikelihoods)) == [None]
    said = capfd.readouterr().err
    assert f"loss before training: {losses(tmp_path)[1]:.4f}, of the tokens that are learned\n" in said
    assert "evaluation finds the loss that training finds in the first rows, of all tokens, learned or not: " in said


def test_a_training_whose_loss_is_not_that_of_evaluation_does_not_begin(base: Path, tmp_path: Path) -> None:
    def wrong(stage: Stage, spec: ModelSpec, rows: Sequence[Sequence[int]], words: int) -> list[float]:
        return [1.01 * value for value in unlikelihoods(stage, spec, rows, words)]

    [sentence] = trained(write_training(tmp_path, load=str(base), finetune=True), uses=Uses(measure=wrong))
    assert "in evaluation, of the same rows and weights; that is a fault of this program or of the installed DeepSpeed on pipe 1 x model 1" in str(sentence)
