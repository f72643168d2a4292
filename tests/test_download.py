"""Files from the web: whole or not at all, resumed where the line broke, and only the right ones. The web is a server on this machine."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lite.data.download import RemoteFile, fetch, fetch_all, safe_path
from megatron_lite.data.task_data import PIQA, TASK_DATA
from megatron_lite.errors import DataError, OutputError
from tests.web import CONTENT, Web, serving
from tools.download import main


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with serving(monkeypatch) as offered:
        yield offered


def test_a_file_arrives_whole_under_its_name_with_its_folders_and_nothing_else_is_left(web: Web, tmp_path: Path) -> None:
    counts: list[int] = []
    path = fetch(web.offer("a/b.bin"), tmp_path, counts.append)
    assert path == tmp_path / "a" / "b.bin"
    assert path.read_bytes() == CONTENT
    assert sum(counts) == len(CONTENT)
    assert [each.name for each in path.parent.iterdir()] == ["b.bin"]


def test_a_file_that_is_there_is_not_asked_for_again(web: Web, tmp_path: Path) -> None:
    file = web.offer("b.bin")
    fetch(file, tmp_path)
    fetch(file, tmp_path)
    assert len(web.asked) == 1


def test_a_broken_line_is_taken_up_where_it_broke(web: Web, tmp_path: Path) -> None:
    web.breaks_after = [30_000, 0, 0, 50_000]
    counts: list[int] = []
    assert fetch(web.offer("b.bin"), tmp_path, counts.append).read_bytes() == CONTENT
    assert [asked for _, asked in web.asked] == [None, "bytes=30000-", "bytes=30000-", "bytes=30000-", "bytes=80000-"]
    assert sum(counts) == len(CONTENT)


def test_what_an_earlier_run_left_is_taken_up(web: Web, tmp_path: Path) -> None:
    (tmp_path / "b.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(web.offer("b.bin"), tmp_path).read_bytes() == CONTENT
    assert web.asked == [("/b.bin", "bytes=1000-")]


def test_a_server_that_cannot_resume_sends_everything_again(web: Web, tmp_path: Path) -> None:
    (tmp_path / "b.bin.part").write_bytes(CONTENT[:1000])
    web.knows_ranges = False
    counts: list[int] = []
    assert fetch(web.offer("b.bin"), tmp_path, counts.append).read_bytes() == CONTENT
    assert sum(counts) == len(CONTENT)


def test_a_part_that_is_complete_needs_no_server(web: Web, tmp_path: Path) -> None:
    (tmp_path / "b.bin.part").write_bytes(CONTENT)
    assert fetch(web.offer("b.bin"), tmp_path).read_bytes() == CONTENT
    assert web.asked == []


def test_a_wrong_checksum_is_refused_and_nothing_of_it_stays(web: Web, tmp_path: Path) -> None:
    file = web.offer("b.bin", sha256="0" * 64)
    with pytest.raises(DataError, match=r"what arrived as b.bin is another file \(sha256 [0-9a-f]{12}…, expected 000000000000…\); it was deleted"):
        fetch(file, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_more_bytes_than_the_file_has_are_refused_before_they_arrive(web: Web, tmp_path: Path) -> None:
    file = web.offer("b.bin", size=50_000)
    with pytest.raises(DataError, match=r"it announces 102,400 bytes, and the file has 50,000\)"):
        fetch(file, tmp_path)
    assert not (tmp_path / "b.bin").exists()


def test_a_part_longer_than_the_file_is_dropped_and_fetched_anew(web: Web, tmp_path: Path) -> None:
    (tmp_path / "b.bin.part").write_bytes(CONTENT + b"more")
    counts: list[int] = []
    assert fetch(web.offer("b.bin"), tmp_path, counts.append).read_bytes() == CONTENT
    assert sum(counts) == len(CONTENT)


def test_another_file_under_the_name_is_never_replaced(web: Web, tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"b.bin is there, but is another file .*; move it away to fetch the right one"):
        fetch(web.offer("b.bin"), tmp_path)
    assert (tmp_path / "b.bin").read_bytes() == b"mine"


def test_the_next_place_is_asked_where_one_has_no_file_or_fails_for_good(web: Web, tmp_path: Path) -> None:
    file = web.offer("b.bin")
    elsewhere = replace(file, urls=(f"{web.address}/gone.bin", *file.urls))
    assert fetch(elsewhere, tmp_path).read_bytes() == CONTENT
    assert [path for path, _ in web.asked] == ["/gone.bin", "/b.bin"]


def test_a_busy_server_is_asked_again_and_given_up_in_the_end(web: Web, tmp_path: Path) -> None:
    file = web.offer("b.bin")
    web.failures = [503, 429]
    assert fetch(file, tmp_path).read_bytes() == CONTENT
    (tmp_path / "b.bin").unlink()
    web.failures = [500] * 5
    with pytest.raises(DataError, match=r"b.bin cannot be fetched \(http.*: HTTP 500 .*\); try again later, or bring the file from another machine$"):
        fetch(file, tmp_path)
    assert len(web.asked) == 3 + 5


def test_what_has_arrived_is_kept_where_the_server_goes_away(web: Web, tmp_path: Path) -> None:
    file = web.offer("b.bin")
    broken = replace(file, urls=(file.urls[0], "http://127.0.0.1:9/b.bin"))
    web.breaks_after = [70_000, 0, 0, 0, 0, 0]
    with pytest.raises(DataError, match=r"b.bin.part keeps what has arrived"):
        fetch(broken, tmp_path)
    assert (tmp_path / "b.bin.part").read_bytes() == CONTENT[:70_000]


def test_only_https_is_trusted_beyond_this_machine(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"http://example.com/b.bin: only https is trusted"):
        fetch(RemoteFile("b.bin", ("http://example.com/b.bin",), "0" * 64), tmp_path)


@pytest.mark.parametrize("name", ["../b.bin", "/etc/b.bin", "a/../../b.bin", "a\\b.bin", "", ".", "b\n.bin", "b\x1b[2J.bin"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"leads out of .*; nothing was fetched"):
        safe_path(tmp_path, name)


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(tmp_path)
    with pytest.raises(DataError, match="leads out of"):
        safe_path(tmp_path / "inside", "link/b.bin")


def test_too_little_space_is_told_before_anything_is_fetched(web: Web, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"1 files take 1000000.00 GB; .* GB free; choose another folder or free some space"):
        fetch_all([web.offer("b.bin", size=10**15)], tmp_path)
    assert web.asked == []


def test_a_folder_that_cannot_be_written_is_one_sentence(web: Web, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/b.bin cannot be written: File exists; choose another folder"):
        fetch(web.offer("b.bin"), tmp_path / "file")


def test_many_files_come_at_once_and_the_deciding_one_last(web: Web, tmp_path: Path) -> None:
    files = [web.offer(f"{number}.bin", CONTENT[: 1000 * number]) for number in range(1, 9)] + [web.offer("latest", b"step")]
    counts: list[int] = []
    paths = fetch_all(files, tmp_path, counts.append, parallel=4)
    assert [path.stat().st_size for path in paths] == [1000 * number for number in range(1, 9)] + [4]
    assert sum(counts) == 36_004
    assert web.asked[-1] == ("/latest", None)


def test_the_deciding_file_does_not_come_where_another_is_missing(web: Web, tmp_path: Path) -> None:
    files = [web.offer("a.bin"), RemoteFile("gone.bin", (f"{web.address}/gone.bin",)), web.offer("latest", b"step")]
    with pytest.raises(DataError, match=r"gone\.bin cannot be fetched \(http.*: HTTP 404"):
        fetch_all(files, tmp_path, parallel=2)
    assert not (tmp_path / "latest").exists()


def test_the_tool_fetches_the_data_of_tasks(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(TASK_DATA, "piqa", replace(PIQA, files=(web.offer("piqa/valid.jsonl", b"{}"), web.offer("piqa/valid-labels.lst", b"0"))))
    assert main(["eval-data", "piqa", "piqa", "--folder", str(tmp_path)]) == 0
    assert (tmp_path / "piqa" / "valid.jsonl").read_bytes() == b"{}"
    assert capsys.readouterr().out.splitlines()[1] == f"{tmp_path}/piqa/valid-labels.lst: 1 bytes, sha256 5feceb66ffc8…"


def test_the_tool_says_in_one_sentence_what_went_wrong(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(TASK_DATA, "piqa", replace(PIQA, files=(web.offer("piqa/valid.jsonl", sha256="0" * 64),)))
    assert main(["eval-data", "piqa", "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip().endswith("it was deleted, try again")
