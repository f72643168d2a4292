"""GPT-J's tar.zstd, unpacked while it arrives: whole shards or a sentence, and nothing beside the folder whatever the archive holds."""

import io
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from megatron_lite.checkpoint.find import find_checkpoint
from megatron_lite.checkpoint.unfinished import MARK
from megatron_lite.data import archive as archives
from megatron_lite.data.archive import Archive, unpack
from megatron_lite.data.download import RemoteFile
from megatron_lite.data.releases import Release
from megatron_lite.errors import CheckpointError, DataError
from tests.slim import random_trees, write_slim
from tests.test_mesh_transformer import SPEC
from tests.web import Web, serving
from tools import download
from tools.download import main

zstandard = pytest.importorskip("zstandard", reason="zstandard is optional")
NAME = "step_383500_slim.tar.zstd"
PLAIN = {f"step_383500/shard_{shard}/{part}.npz": Random(8 * shard + part).randbytes(80_000) for shard in range(2) for part in range(3)}


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with serving(monkeypatch) as offered:
        yield offered


def member(name: str, content: bytes = b"", **changes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


def packed(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return zstandard.compress(plain.getvalue())


def offered(web: Web, content: bytes, count: int = len(PLAIN)) -> Archive:
    web.files[f"/{NAME}"] = content
    file = RemoteFile(NAME, (f"{web.address}/{NAME}",), size=len(content))
    return Archive(file, "step_383500/shard_*/*.npz", count, unpacked=sum(map(len, PLAIN.values())))


def whole() -> bytes:
    return packed(member("step_383500", type=tarfile.DIRTYPE), *(member(f"./{name}", content) for name, content in PLAIN.items()))


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_are_written_without_a_copy_of_the_archive(web: Web, tmp_path: Path) -> None:
    archive, counts = offered(web, whole()), list[int]()
    unpack(archive, tmp_path, counts.append)
    assert written(tmp_path) == PLAIN
    assert sum(counts) == len(web.files[f"/{NAME}"])


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_broken_line_is_taken_up_within_the_archive(knows_ranges: bool, web: Web, tmp_path: Path) -> None:
    web.knows_ranges = knows_ranges
    web.breaks_after = [100_000, 0, 150_000]
    unpack(offered(web, whole()), tmp_path)
    assert written(tmp_path) == PLAIN
    assert len(web.asked) == 4


def test_a_second_call_writes_only_what_is_missing(web: Web, tmp_path: Path) -> None:
    archive = offered(web, whole())
    unpack(archive, tmp_path)
    kept = tmp_path / "step_383500" / "shard_0" / "0.npz"
    (tmp_path / "step_383500" / "shard_1" / "2.npz").unlink()
    stamp = kept.stat().st_mtime_ns
    unpack(archive, tmp_path)
    assert written(tmp_path) == PLAIN
    assert kept.stat().st_mtime_ns == stamp


def test_an_archive_that_is_kept_is_taken_up_by_the_next_call(web: Web, tmp_path: Path) -> None:
    archive = offered(web, whole())
    web.breaks_after = [250_000, 0, 0, 0, 0, 0]
    with pytest.raises(DataError, match=rf"{NAME}\.part keeps what has arrived"):
        unpack(archive, tmp_path, keep=True)
    web.breaks_after, web.asked = [], []
    unpack(archive, tmp_path)
    assert web.asked == [(f"/{NAME}", "bytes=250000-")]
    assert written(tmp_path) == {**PLAIN, NAME: whole()}


@pytest.mark.parametrize(
    ("evil", "said"),
    [
        (member("../outside.npz", b"x"), r"the file name '\.\./outside\.npz' leads out of"),
        (member("/tmp/outside.npz", b"x"), r"leads out of"),
        (member("step_383500/../../outside.npz", b"x"), r"leads out of"),
        (member("step_383500/link", type=tarfile.SYMTYPE, linkname="/tmp"), r"holds 'step_383500/link', which is a link or a device and no plain file"),
        (member("step_383500/hard", type=tarfile.LNKTYPE, linkname="/etc/hostname"), r"which is a link or a device"),
        (member("step_383500/fifo", type=tarfile.FIFOTYPE), r"which is a link or a device"),
        (member("step_383500/large.npz", bytes(600_000)), r"holds more than the 480,000 bytes that were expected"),
    ],
    ids=["dots", "absolute", "dots within", "symbolic link", "hard link", "pipe", "too large"],
)
def test_nothing_is_written_beside_the_folder_whatever_the_archive_holds(evil: tuple[tarfile.TarInfo, bytes], said: str, web: Web, tmp_path: Path) -> None:
    folder = tmp_path / "in" / "gpt-j-6b"
    with pytest.raises(DataError, match=said):
        unpack(offered(web, packed(evil, member("step_383500/link/outside.npz", b"x"))), folder)
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()] == []
    assert not Path("/tmp/outside.npz").exists()


def test_an_archive_that_ends_early_or_is_none_or_another_is_one_sentence(web: Web, tmp_path: Path) -> None:
    for content, said in (
        (whole()[:250_000], "is no whole tar.zstd|with [0-5] files"),
        (b"<html>" * 100, "is no whole tar.zstd"),
        (packed(member("step_383500/shard_0/0.npz", b"x")), r"with 1 files step_383500/shard_\*/\*\.npz, not 6; is it the right archive\?"),
    ):
        folder = tmp_path / str(len(content))
        with pytest.raises(DataError, match=said):
            unpack(offered(web, content), folder)


def test_a_server_that_goes_away_is_given_up_and_what_is_written_stays(web: Web, tmp_path: Path) -> None:
    archive = offered(web, whole())
    web.failures = [503] * 9
    with pytest.raises(DataError, match=rf"{NAME} cannot be fetched \(http.*: HTTP 503 .*\); try again later: the files that are written stay"):
        unpack(archive, tmp_path)
    assert len(web.asked) == 5


def test_without_zstandard_the_sentence_says_what_else_there_is(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match="zstandard is not installed; run: pip install zstandard, or take hub:EleutherAI/gpt-j-6b"):
        unpack(offered(web, whole()), tmp_path)
    assert web.asked == []


def test_the_tool_makes_a_checkpoint_of_gpt_js_archive(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_slim(tmp_path / "true" / "step_383500", random_trees(SPEC, 8))
    files = {str(path.relative_to(tmp_path / "true")): path.read_bytes() for path in (tmp_path / "true").rglob("*.npz")}
    archive = replace(offered(web, packed(*(member(name, content) for name, content in files.items())), count=128), unpacked=sum(map(len, files.values())))
    tokenizer = (web.offer("vocab.json", b"{}"), web.offer("merges.txt", b""))
    release = Release("gpt-j-6B", web.address, tokenizer, Path("gpt-j-6b"), "configs/gpt-j-6B.yml", archive)
    monkeypatch.setattr(download, "release_named", lambda name, **places: release)
    monkeypatch.setattr(archives, "TRIES", 1)
    folder = tmp_path / "gpt-j-6b"
    web.breaks_after = [len(web.files[f"/{NAME}"]) // 2]
    assert main(["gpt-j-6B", str(folder)]) == 2
    assert (folder / MARK).read_text() == f"tools/download.py gpt-j-6B {folder}\n"
    with pytest.raises(CheckpointError, match="is not finished: run the same command again"):
        find_checkpoint(folder)
    assert main(["gpt-j-6B", str(folder)]) == 0
    layout = find_checkpoint(folder)
    assert (layout.format, layout.tag, layout.tp) == ("mesh-transformer", "step_383500", 8)
    assert {path.name for path in folder.iterdir()} == {"step_383500", "vocab.json", "merges.txt"}
    asked = len(web.asked)
    assert main(["gpt-j-6B", str(folder)]) == 0
    assert len(web.asked) == asked
    assert "0.00 GB to fetch" in capsys.readouterr().out
