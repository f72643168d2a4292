"""Whole checkpoints from a server on this machine: the release of 20B. An interrupted one is no checkpoint."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lite.checkpoint.find import find_checkpoint
from megatron_lite.checkpoint.unfinished import MARK, unfinished
from megatron_lite.config.load import load_config
from megatron_lite.data.releases import NAMES, Release, release_named
from megatron_lite.errors import CheckpointError, DataError, OutputError
from tests.web import Web, serving
from tools import download
from tools.download import main

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LAYER = "global_step150000/layer_{:02d}-model_{:02d}-model_states.pt"
LAYERS = (0, *range(2, 8), 47, 48)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with serving(monkeypatch) as offered:
        yield offered


@pytest.fixture
def release(web: Web, monkeypatch: pytest.MonkeyPatch) -> Release:
    """Some files of the 20B release under their names, small ones."""
    for number in LAYERS:
        for part in range(2):
            web.files["/slim/" + LAYER.format(number, part)] = bytes([number, part]) * 500
    web.files |= {"/slim/latest": b"global_step150000", "/slim/20B_tokenizer.json": b"{}", "/slim/configs/20B.yml": b"{}"}
    whole = release_named("20B", base_url=f"{web.address}/slim")
    files = [file for file in whole.files if f"/slim/{file.name}" in web.files]
    small = replace(whole, files=tuple(replace(file, least=0, sha256=None, size=None) for file in files))
    monkeypatch.setattr(download, "release_named", lambda name, **places: small)
    return small


def test_every_release_goes_where_its_configuration_looks_for_it(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.files |= {"/m/config.json": b"{}", "/m/model.safetensors": b"", "/m/tokenizer.json": b"{}"}
    for name in NAMES:
        release = release_named(name, base_url=f"{web.address}/m")
        config = load_config([CONFIGS.parent / release.config])
        assert config.checkpoint.load is not None
        assert config.checkpoint.load.resolve() == release.folder.resolve(), name
        for path in (config.tokenizer.vocab_file, config.tokenizer.merge_file):
            assert path is None or path.resolve() in [(release.folder / file.name).resolve() for file in release.files], name


def test_the_20b_release_has_94_layer_files_of_41_gb_and_the_deciding_file_last() -> None:
    release = release_named("20b")
    layers = [file for file in release.files if "layer_" in file.name]
    assert len(layers) == 94
    assert sum(file.least for file in layers) == 41_112_406_080 - 2 * 44 * 24  # of inv_freq, a buffer
    assert release.files[-1].name == "latest"
    assert layers[0].urls[0] == "https://the-eye.eu/public/AI/models/GPT-NeoX-20B/slim_weights/global_step150000/layer_00-model_00-model_states.pt"


def test_the_20b_release_arrives_as_a_checkpoint_cut_for_two(release: Release, web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "20B"
    assert main(["20B", str(folder)]) == 0
    layout = find_checkpoint(folder)
    assert (layout.format, layout.tag, layout.tp, len(layout.numbers)) == ("neox", "global_step150000", 2, 9)
    assert not (folder / MARK).exists()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"20B: 21 files, 0.00 GB, from {web.address}/slim"
    assert said[-1] == f"now: ./deepy.py generate.py configs/20B.yml load={folder} vocab_file={folder}/20B_tokenizer.json -i examples/prompts.txt"
    assert web.asked[-1][0] == "/slim/latest"
    asked = len(web.asked)
    assert main(["20B", str(folder)]) == 0
    assert len(web.asked) == asked


def test_an_interrupted_download_is_no_checkpoint_and_the_same_command_goes_on(
    release: Release, web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, lost = tmp_path / "20B", "/slim/" + LAYER.format(6, 1)
    content = web.files.pop(lost)
    web.files[lost] = content[:0]  # a HEAD still finds it, and what comes is too short
    web.lengths[lost] = len(content)
    web.knows_ranges = False
    assert main(["20B", str(folder), "--parallel", "1"]) == 2
    assert "layer_06-model_01-model_states.pt cannot be fetched" in capsys.readouterr().err
    for place in (folder, folder / "global_step150000"):
        with pytest.raises(CheckpointError, match=rf"the download into {folder} is not finished: run the same command again \(tools/download\.py 20B .*\)"):
            find_checkpoint(place)
    web.files[lost], web.asked = content, []
    assert main(["20B", str(folder)]) == 0
    assert len(find_checkpoint(folder).numbers) == 9
    assert "/slim/" + LAYER.format(2, 0) not in [path for path, _ in web.asked]


def test_a_file_that_another_program_left_broken_is_noticed_before_anything_is_fetched(
    release: Release, web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latest").write_bytes(b"global")
    assert main(["20B", str(tmp_path)]) == 2
    assert "latest is there, but is another file (6 bytes, expected 17); move it away" in capsys.readouterr().err
    assert web.asked == []
    assert not (tmp_path / MARK).exists()


def test_a_missing_file_is_told_before_anything_is_fetched(release: Release, web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del web.files["/slim/" + LAYER.format(7, 0)]
    assert main(["20B", str(tmp_path)]) == 2
    assert "layer_07-model_00-model_states.pt is not to be had (http" in capsys.readouterr().err
    assert (web.asked, list(tmp_path.iterdir())) == ([], [])


def test_listing_and_rehearsing_fetch_nothing(release: Release, web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["20B", str(tmp_path), "--list"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 23
    assert said[0].split() == ["1,000", "bytes", LAYER.format(0, 0)]
    assert main(["20B", str(tmp_path), "--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert (web.asked, list(tmp_path.iterdir())) == ([], [])


def test_servers_that_do_not_answer_head_are_used_all_the_same(release: Release, web: Web, tmp_path: Path) -> None:
    web.knows_heads = False
    assert main(["20B", str(tmp_path)]) == 0
    assert len(find_checkpoint(tmp_path).numbers) == 9


def test_a_web_page_in_place_of_weights_is_too_small(web: Web, tmp_path: Path) -> None:
    for file in release_named("20B").files:
        web.files[f"/slim/{file.name}"] = b"<html>moved</html>"
    with pytest.raises(DataError, match=r"it has 18 bytes, the file at least (309,854,208|453,101,568)"):
        release_named("20B", base_url=f"{web.address}/slim").with_sizes(tmp_path)


def test_two_downloads_do_not_fill_one_folder(tmp_path: Path) -> None:
    with unfinished(tmp_path, "first"), pytest.raises(OutputError, match=f"another process is filling {tmp_path}; wait"), unfinished(tmp_path, "second"):
        pass
    assert not (tmp_path / MARK).exists()
