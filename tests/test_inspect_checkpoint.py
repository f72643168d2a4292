"""tools/inspect_checkpoint.py says what lies in a folder, and what differs between two."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.inspect_checkpoint import main, ranges

Layer = dict[str, Tensor]


def layer_file(step: Path, number: int, part: int, tensors: Layer) -> None:
    torch.save(tensors, step / f"layer_{number:02d}-model_{part:02d}-model_states.pt")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two blocks cut in two: an embedding of 2 x [6, 4], a norm of [4] in every block."""
    return write_checkpoint(tmp_path / "first")


def write_checkpoint(folder: Path) -> Path:
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    for part in range(2):
        layer_file(step, 0, part, {"word_embeddings.weight": torch.full((6, 4), 0.5, dtype=torch.float16)})
        for number in (2, 3):
            layer_file(step, number, part, {"input_layernorm.weight": torch.arange(4.0)})
    return folder


def inspect(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, list[str], str]:
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, [" ".join(line.split()) for line in printed.out.splitlines()], printed.err


def test_equal_layers_share_a_row_with_shape_dtype_and_count(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = inspect(capsys, checkpoint)
    assert code == 0
    assert lines[0] == f"{checkpoint} global_step7 (neox, model-parallel-size 2)"
    assert lines[1].startswith("6 files of weights, ")
    assert lines[3:6] == [
        "layers tensor shape dtype count",
        "0 word_embeddings.weight 6 x 4 float16 2",
        "2-3 input_layernorm.weight 4 float32 4",
    ]
    assert lines[-1] == "6 tensors, 64 numbers, 160 bytes"


def test_nan_and_inf_are_counted_where_they_are(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = torch.tensor([float("nan"), -2.0, 5.0, float("inf")])
    layer_file(checkpoint / "global_step7", 3, 1, {"input_layernorm.weight": damaged})
    _, lines, _ = inspect(capsys, checkpoint, "--values")
    assert lines[4] == "0 word_embeddings.weight 6 x 4 float16 2 0.5 0.5 0 0"
    assert lines[5] == "2-3 input_layernorm.weight 4 float32 4 -2 5 1 1"


def test_rank_files_beside_layer_files_are_counted_but_never_opened(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "global_step7" / "mp_rank_00_model_states.pt").write_bytes(b"not even a pickle")
    code, lines, _ = inspect(capsys, checkpoint)
    assert (code, lines[2]) == (0, "1 files mp_rank_* beside them, not opened: they hold no weights")


def test_a_copy_is_the_same_bit_for_bit(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(capsys, checkpoint, write_checkpoint(tmp_path / "second"))[:2] == (0, ["the same tensors, bit for bit"])


def test_differences_are_named_with_their_size(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = write_checkpoint(tmp_path / "second")
    layer_file(second / "global_step7", 0, 0, {"word_embeddings.weight": torch.zeros(5, 4, dtype=torch.float16)})
    layer_file(second / "global_step7", 2, 1, {"input_layernorm.weight": torch.tensor([0.0, 1.0, 2.25, 2.0])})
    layer_file(second / "global_step7", 3, 0, {"post_attention_layernorm.weight": torch.arange(4.0)})
    code, lines, _ = inspect(capsys, checkpoint, second)
    assert code == 1
    assert lines == [
        "layer 0 part 0 word_embeddings.weight: 6 x 4 float16 and 5 x 4 float16",
        "layer 2 part 1 input_layernorm.weight: 2 of 4 numbers differ, by at most 1",
        "layer 3 part 0 input_layernorm.weight: only in the first",
        "layer 3 part 0 post_attention_layernorm.weight: only in the second",
    ]


def test_saves_without_layer_files_are_numbered_by_their_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = {"sequential.2.mlp.linear1.weight": torch.zeros(8, 2), "sequential.3.mlp.linear1.weight": torch.zeros(8, 2)}
    torch.save({"module": module, "iteration": 3}, tmp_path / "mp_rank_00_model_states.pt")
    _, lines, _ = inspect(capsys, tmp_path)
    assert "2-3 sequential.N.mlp.linear1.weight 8 x 2 float32 2" in lines


def test_hugging_face_folders_are_read_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    save_file({f"gpt_neox.layers.{n}.attention.dense.bias": torch.ones(3) for n in range(11)}, tmp_path / "model.safetensors")
    _, lines, _ = inspect(capsys, tmp_path)
    assert "0-10 gpt_neox.layers.N.attention.dense.bias 3 float32 11" in lines


def test_a_truncated_file_ends_with_a_sentence(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint / "global_step7" / "layer_02-model_01-model_states.pt"
    path.write_bytes(path.read_bytes()[:600])
    code, _, sentence = inspect(capsys, checkpoint)
    assert code == 2
    assert "layer_02-model_01-model_states.pt" in sentence
    assert "Traceback" not in sentence


def test_a_step_that_is_not_there_ends_with_a_sentence(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, sentence = inspect(capsys, checkpoint, "--iteration", "8")
    assert (code, "global_step7" in sentence) == (2, True)


def test_layer_numbers_are_written_as_ranges() -> None:
    assert ranges([48, 0, 2, 3, 4, 4, 47, None]) == "0 2-4 47-48"
