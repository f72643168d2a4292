"""Where a training's numbers end up: Weights & Biases' own files, and the sentence of a save that failed."""

import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from launcher.cli import main
from megatron_lite.config.load import load_config
from megatron_lite.models.spec import spec_of
from megatron_lite.training.report import flops_per_token
from tests.disks import no_file_beyond
from tests.training_runs import trained, write_training

ROOT = Path(__file__).parents[1]
KEYS = {
    *("train/lm_loss", "train/learning_rate", "train/loss_scale", "train/grad_norm", "train/skipped_steps"),
    *("runtime/iteration_time", "runtime/steps_per_sec", "runtime/samples_per_sec", "runtime/tokens_per_sec", "runtime/flops_per_sec_per_gpu"),
    *("validation/lm_loss", "validation/lm_loss_ppl", "test/lm_loss", "test/lm_loss_ppl"),
}


BLOCK, HEADER = 1 << 15, 7


def _parts(content: bytes) -> Iterator[bytes]:
    """Records of wandb's file, a LevelDB log: blocks of 32 KiB, in them pieces with checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    at, record = HEADER, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        record += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):
            yield record
            record = b""


def _records(folder: Path) -> tuple[list[set[str]], list[str], list[str]]:
    """Keys of every row of history, ids, and names of the settings in the files of an offline run."""
    messages = import_module("wandb.proto.wandb_internal_pb2")
    history, ids, settings = [], [], []
    for path in sorted(folder.rglob("run-*.wandb")):
        for part in _parts(path.read_bytes()):
            record = messages.Record()
            record.ParseFromString(part)
            if record.WhichOneof("record_type") == "history":
                history.append({item.key or "/".join(item.nested_key) for item in record.history.item})
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
                settings += [item.key for item in record.run.config.update]
    return history, ids, settings


def test_an_offline_run_holds_neox_keys_and_goes_on_under_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    config = write_training(tmp_path, use_wandb=True, load=str(tmp_path / "out"))
    assert trained(config, exit_interval=2) == [None]
    assert trained(config) == [None]
    history, ids, settings = _records(tmp_path)
    assert {key for row in history for key in row if not key.startswith("_")} == KEYS
    assert len(set(ids)) == 1
    assert {"hidden_size", "optimizer", "train_iters"} <= set(settings)


def test_a_full_disk_ends_the_training_with_the_name_of_the_file(tmp_path: Path) -> None:
    config = write_training(tmp_path, checkpoint_factor=1, data_path=None)
    with no_file_beyond(60_000):
        (sentence,) = trained(config, data_path=str(tmp_path / "texts.jsonl"))
    assert str(sentence).startswith("OutputError: ")
    assert "layer_00-model_00-model_states.pt cannot be written" in str(sentence)
    assert not list((tmp_path / "out").glob("latest"))


def test_flops_of_20b_are_those_of_the_formula() -> None:
    config = load_config([ROOT / "configs/20B.yml"])
    spec = spec_of(config.model, vocab=50432, dtype="bfloat16")
    assert flops_per_token(spec, 2048, recompute=False) == pytest.approx(128.1e9, rel=0.005)
    assert flops_per_token(spec, 2048, recompute=True) == pytest.approx(4 / 3 * flops_per_token(spec, 2048, recompute=False))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data_path=nowhere.jsonl"], "there are no training data nowhere.jsonl: neither a file of texts nor nowhere.jsonl.bin with nowhere.jsonl.idx"),
        ([], "no data to train on: set data_path"),
        (["finetune=true", "load=nowhere"], "there is no checkpoint folder nowhere"),
    ],
    ids=lambda value: "",
)
def test_deepy_knows_before_any_process_starts_what_a_training_lacks(
    tmp_path: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_training(tmp_path, data_path=None)
    assert main(["train.py", str(config), *words]) == 2
    assert sentence in capsys.readouterr().err
