"""Models of the Hugging Face hub, and Hugging Face folders of any server: which files are fetched, and that a listing can do no harm."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lite.checkpoint.find import find_checkpoint
from megatron_lite.checkpoint.unfinished import MARK
from megatron_lite.data.releases import release_named
from megatron_lite.errors import ConfigError, DataError
from tests.web import Web, serving
from tools import download
from tools.download import main

COMMIT = "c0ffee" * 6 + "c0ff"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with serving(monkeypatch) as offered:
        yield offered


def hub(web: Web, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, *, stored: dict[str, str] | None = None) -> None:
    """A hub with one model, org/small."""
    monkeypatch.setenv("HF_ENDPOINT", web.address)
    listed = [
        {"rfilename": name, "size": len(content)} | ({"lfs": {"sha256": stored[name]}} if stored and name in stored else {}) for name, content in files.items()
    ]
    answer = json.dumps({"sha": COMMIT, "siblings": listed}).encode()
    web.files |= {f"/org/small/resolve/{COMMIT}/{name}": content for name, content in files.items()}
    web.files |= {f"/api/models/org/small/revision/{revision}?blobs=true": answer for revision in ("main", "step1")}


def test_a_model_of_the_hub_comes_with_its_smallest_sufficient_set_of_files(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}", "pytorch_model.bin": b"same", "flax_model.msgpack": b"same"}
    hub(web, {**files, "README.md": b"", ".gitattributes": b"", "onnx/model.onnx": b"same", "evals/step1/tokenizer.json": b"no"}, monkeypatch)
    assert main(["hub:org/small", str(tmp_path / "small"), "--revision", "step1"]) == 0
    assert sorted(path.name for path in (tmp_path / "small").rglob("*")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert find_checkpoint(tmp_path / "small").format == "huggingface"
    assert web.asked[-1][0] == f"/org/small/resolve/{COMMIT}/config.json"


@pytest.mark.parametrize("name", ["../model-1-of-1.safetensors", "model-1/../../of-1.safetensors", "/tmp/model-1-of-1.safetensors"])
def test_a_listing_cannot_name_a_file_outside_the_folder(name: str, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = json.dumps({"weight_map": {"a": name}}).encode()
    web.files |= {"/m/config.json": b"{}", "/m/model.safetensors.index.json": index, f"/m/{name}": b"evil"}
    hub(web, {"config.json": b"{}", "model.safetensors.index.json": index, name: b"evil", "layer_00-model_00-model_states.pt": b""}, monkeypatch)
    assert main(["hub:org/small", str(tmp_path / "in" / "small"), "--base-url", f"{web.address}/m"]) == 2
    assert main(["hub:org/small", str(tmp_path / "in" / "small")]) in (0, 2)
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / "in" / "small" not in path.parents]
    assert outside == []
    assert not Path("/tmp/model-1-of-1.safetensors").exists()


def test_files_of_the_hub_are_held_against_their_checksums(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub(web, {"config.json": b"{}", "model.safetensors": b"weights"}, monkeypatch, stored={"model.safetensors": "0" * 64})
    assert main(["hub:org/small", str(tmp_path)]) == 2
    assert "what arrived as model.safetensors is another file (sha256" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARK]


def test_the_hub_alone_is_told_the_token(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(web, {"config.json": b"{}", "model.safetensors": b"weights"}, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serving(monkeypatch) as storage:
        storage.files["/blob"] = b"weights"
        web.redirects[f"/org/small/resolve/{COMMIT}/model.safetensors"] = f"{storage.address}/blob"
        assert main(["hub:org/small", str(tmp_path)]) == 0
        assert {secret for _, secret in web.secrets} == {"Bearer secret"}
        assert storage.secrets == [("/blob", None)]


def test_a_sharded_model_comes_from_any_server_by_its_index(web: Web, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"2"}
    web.files |= {f"/m/{name}": content for name, content in files.items()}
    assert main(["pythia/70M", str(tmp_path), "--base-url", f"{web.address}/m/"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(files)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pythia/70"], r"no release is called pythia/70; did you mean pythia/70M\?"),
        (["20B", "--revision", "main"], r"20B has no revisions; leave --revision out"),
        (["hub:small"], r"hub:small is no name of a model on the hub; it should be hub:OWNER/NAME"),
        (["hub:org/.."], r"hub:org/\.\. is no name of a model on the hub"),
        (["hub:org/other"], r"the hub has no list of the files of org/other at main \(http.*: HTTP 404 .*\); check the name"),
        (["hub:org/empty"], r"org/empty at main holds no weights that are read here, but README\.md"),
        (["hub:org/page"], r"answers something else than the hub's list of files; check HF_ENDPOINT"),
    ],
)
def test_what_is_not_there_is_one_sentence(words: list[str], said: str, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(web, {}, monkeypatch)
    web.files["/api/models/org/empty/revision/main?blobs=true"] = json.dumps({"sha": "1", "siblings": [{"rfilename": "README.md"}]}).encode()
    web.files["/api/models/org/page/revision/main?blobs=true"] = b"<html>"
    options = download.parse(words)
    with pytest.raises((ConfigError, DataError), match=said):
        release_named(options.what, revision=options.revision)
