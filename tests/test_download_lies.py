"""Servers that announce other lengths than they send, send other parts than were asked for, or web pages, or send their clients elsewhere."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lite.data.download import fetch
from megatron_lite.errors import DataError
from tests.web import CONTENT, Web, serving


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with serving(monkeypatch) as offered:
        yield offered


def test_an_answer_that_cannot_be_the_rest_of_the_file_is_refused_before_any_of_it_is_kept(web: Web, tmp_path: Path) -> None:
    file = web.offer("b.bin", sha256=None)
    (tmp_path / "b.bin.part").write_bytes(CONTENT[:1000])
    web.starts["/b.bin"] = 500
    with pytest.raises(DataError, match=r"it sends another part than was asked for \(bytes 500-102399/102400\)"):
        fetch(file, tmp_path)
    assert (tmp_path / "b.bin.part").read_bytes() == CONTENT[:1000]


def test_without_a_checksum_a_web_page_is_no_file(web: Web, tmp_path: Path) -> None:
    web.kinds["/b.bin"] = "text/html; charset=utf-8"
    with pytest.raises(DataError, match="it answers with a web page"):
        fetch(web.offer("b.bin", sha256=None, size=None), tmp_path)


def test_without_checksum_size_and_length_nobody_could_tell_whether_all_has_arrived(web: Web, tmp_path: Path) -> None:
    web.says_lengths = False
    file = web.offer("b.bin", sha256=None, size=None)
    with pytest.raises(DataError, match="it does not say how many bytes the file has"):
        fetch(file, tmp_path)
    assert fetch(replace(file, size=len(CONTENT)), tmp_path).read_bytes() == CONTENT


def test_a_server_that_announces_too_much_is_given_up_and_nothing_appears(web: Web, tmp_path: Path) -> None:
    file = web.offer("b.bin", sha256=None, size=None)
    web.lengths["/b.bin"], web.knows_ranges = 200_000, False
    with pytest.raises(DataError, match="the connection ended 97,600 bytes too early"):
        fetch(file, tmp_path)
    assert not (tmp_path / "b.bin").exists()


def test_an_endless_file_is_cut_off_where_it_is_longer_than_announced_before(web: Web, tmp_path: Path) -> None:
    web.says_lengths = False
    with pytest.raises(DataError, match="it sends more than the 50,000 bytes that the file has"):
        fetch(web.offer("b.bin", size=50_000), tmp_path)
    assert not (tmp_path / "b.bin").exists()


def test_a_redirect_is_followed_but_not_to_where_nothing_is_trusted(web: Web, tmp_path: Path) -> None:
    file = web.offer("b.bin")
    web.redirects = {"/old.bin": f"{web.address}/b.bin", "/away.bin": "http://example.com/b.bin", "/local.bin": "file:///etc/hostname"}
    (tmp_path / "b.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(replace(file, urls=(f"{web.address}/old.bin",)), tmp_path).read_bytes() == CONTENT
    assert web.asked == [("/old.bin", "bytes=1000-"), ("/b.bin", "bytes=1000-")]
    for name, said in (("away.bin", "only https is trusted"), ("local.bin", "is not allowed")):
        with pytest.raises(DataError, match=said):
            fetch(replace(file, name=name, urls=(f"{web.address}/{name}",)), tmp_path)
