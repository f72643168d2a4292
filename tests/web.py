"""A web server on this machine, well-behaved or not."""

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_lite.data import transfer
from megatron_lite.data.download import RemoteFile

NOWHERE = "https://127.0.0.1:9"  # where nobody answers
CONTENT = bytes(range(256)) * 400  # 102,400 bytes


@dataclass
class Web:
    """What the server offers, and how it misbehaves. `asked` are the path and Range of every GET, `heads` the paths of every HEAD."""

    files: dict[str, bytes] = field(default_factory=dict)
    address: str = ""
    knows_ranges: bool = True
    knows_heads: bool = True
    says_lengths: bool = True
    lengths: dict[str, int] = field(default_factory=dict)  # what it announces, where that is a lie
    starts: dict[str, int] = field(default_factory=dict)  # the part it sends, where another was asked for
    kinds: dict[str, str] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    breaks_after: list[int] = field(default_factory=list)  # bytes until the line breaks, one request each
    failures: list[int] = field(default_factory=list)  # HTTP codes, one request each
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    secrets: list[tuple[str, str | None]] = field(default_factory=list)  # path and Authorization

    def offer(self, name: str, content: bytes = CONTENT, **changes: object) -> RemoteFile:
        self.files[f"/{name}"] = content
        file = RemoteFile(name, (f"{self.address}/{name}",), hashlib.sha256(content).hexdigest(), len(content))
        return replace(file, **changes)

    def offer_folder(self, folder: Path, prefix: str = "") -> None:
        self.files |= {f"/{prefix}{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class _Handler(BaseHTTPRequestHandler):
    web: Web

    def do_HEAD(self) -> None:
        self.web.heads.append(self.path)
        if not self.web.knows_heads:
            self.send_error(405)
        elif not self.turned_away():
            self.answer(200, {"Content-Length": str(self.web.lengths.get(self.path, len(self.web.files[self.path])))})

    def do_GET(self) -> None:
        web, asked = self.web, self.headers.get("Range")
        web.asked.append((self.path, asked))
        if self.turned_away():
            return
        content = web.files[self.path]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and web.knows_ranges else 0
        if start >= len(content) and start:
            self.answer(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
            return
        start = web.starts.get(self.path, start)
        length = {"Content-Length": str(web.lengths.get(self.path, len(content)) - start)} if web.says_lengths else {}
        ranges = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.answer(206 if start else 200, {**length, **ranges})
        self.wfile.write(content[start:][: web.breaks_after.pop(0)] if web.breaks_after else content[start:])
        self.close_connection = True

    def turned_away(self) -> bool:
        """Whether the answer is no file."""
        self.web.secrets.append((self.path, self.headers.get("Authorization")))
        if self.web.failures:
            self.send_error(self.web.failures.pop(0))
        elif self.path in self.web.redirects:
            self.answer(302, {"Location": self.web.redirects[self.path], "Content-Length": "0"})
        elif self.path not in self.web.files:
            self.send_error(404)
        else:
            return False
        return True

    def answer(self, code: int, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": self.web.kinds.get(self.path, "application/octet-stream"), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 64


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A web of one server; the pauses between attempts are short."""
    monkeypatch.setattr(transfer, "PAUSE", 0.01)
    offered = Web()
    handler = type("Handler", (_Handler,), {"web": offered})
    with _Server(("127.0.0.1", 0), handler) as server:
        offered.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield offered
        server.shutdown()
