"""One conversation with a web server: what is trusted, what a failure means, and how to go on where the line broke."""

import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from functools import cache
from http.client import HTTPException, HTTPResponse
from typing import IO, TypeVar
from urllib.parse import urlsplit

from megatron_lite.data.hub import endpoint

CHUNK = 1 << 20  # bytes
PATIENCE = 30.0  # seconds without a byte
TRIES = 5
PAUSE = 1.0  # seconds after the first failure; doubled after each further one
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
NO_HEAD = (403, 405, 501)  # codes of servers that do not answer HEAD

Result = TypeVar("Result")


class BrokenError(Exception):
    """A transfer that failed in a way that may not last."""


class RefusedError(Exception):
    """An answer that asking again will not change."""

    def __init__(self, reason: str, code: int = 0) -> None:
        super().__init__(reason)
        self.code = code


class NothingMissingError(Exception):
    """The server has no bytes after those that are there. `total` is how many it says the file has."""

    def __init__(self, total: int | None) -> None:
        super().__init__()
        self.total = total


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str) -> urllib.request.Request | None:
        check_trusted(newurl)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
        if request is not None:
            request.method = req.get_method()  # the library would make a GET of a HEAD
        return request


@cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirects)


def check_trusted(url: str) -> None:
    if urlsplit(url).scheme != "https" and not (urlsplit(url).scheme == "http" and urlsplit(url).hostname in LOOPBACK):
        raise RefusedError("only https is trusted")


@contextmanager
def opened(url: str, *, start: int = 0, method: str = "GET") -> Iterator[HTTPResponse]:
    """The server's answer, from byte `start` on if the server can. Raises BrokenError, RefusedError or NothingMissingError."""
    check_trusted(url)
    request = urllib.request.Request(url, headers={"User-Agent": "deepy"}, method=method)
    if start:
        request.add_header("Range", f"bytes={start}-")
    if (token := os.environ.get("HF_TOKEN")) and url.startswith(endpoint() + "/"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # the hub's storage has other hosts, which need not know it
    try:
        answer = _opener().open(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        raise _failure(error, start) from None
    except (OSError, HTTPException) as error:
        raise broken(error) from None
    with answer:
        yield answer


def _failure(error: urllib.error.HTTPError, start: int) -> Exception:
    reason = f"HTTP {error.code} {error.reason}"
    error.close()
    if error.code == 416 and start:
        _, _, total = (error.headers.get("Content-Range") or "").partition("/")
        return NothingMissingError(int(total) if total.isdigit() else None)
    if (error.code >= 500 and error.code not in NO_HEAD) or error.code in (408, 429):
        return BrokenError(reason)
    return RefusedError(reason, error.code)


def announced(answer: HTTPResponse) -> int | None:
    """Bytes of the body as the server says, if it does."""
    length = answer.headers.get("Content-Length") or ""
    return int(length) if length.isdigit() else None


def size_of(url: str) -> int | None:
    """How large the file is, if the server says so without sending it. Raises BrokenError or RefusedError."""
    try:
        with opened(url, method="HEAD") as answer:
            return announced(answer)
    except RefusedError as error:
        if error.code in NO_HEAD:
            return None
        raise


def read_text(url: str, *, most: int = 1 << 24) -> str:
    """A small file, at once. Raises BrokenError or RefusedError."""
    with opened(url) as answer:
        content = b"".join(limited(chunks(answer), most))
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise RefusedError("it is no text") from None


def chunks(answer: HTTPResponse) -> Iterator[bytes]:
    """What arrives, up to the announced end; an OSError here is the line's, not the disk's."""
    left = announced(answer)
    while True:
        try:
            chunk = answer.read1(CHUNK)
        except (OSError, HTTPException) as error:
            raise broken(error) from None
        if not chunk:
            break
        left = left - len(chunk) if left is not None else None
        yield chunk
    if left:
        raise BrokenError(f"the connection ended {left:,} bytes too early")


def limited(pieces: Iterator[bytes], most: int) -> Iterator[bytes]:
    """The pieces, as long as they are not more than `most` bytes together."""
    count = 0
    for piece in pieces:
        count += len(piece)
        if count > most:
            raise RefusedError(f"it sends more than {most:,} bytes")
        yield piece


def insist(attempt: Callable[[], Result], arrived: Callable[[], int] = lambda: 0, *, tries: int = TRIES) -> Result:
    """Attempts again what broke, until it breaks several times without a byte more in between."""
    failures = 0
    while True:
        before = arrived()
        try:
            return attempt()
        except BrokenError:
            failures = 1 if arrived() > before else failures + 1
            if failures == tries:
                raise
            time.sleep(PAUSE * 2 ** (failures - 1))


def broken(error: Exception) -> BrokenError:
    return BrokenError(str(getattr(error, "reason", error)) or type(error).__name__)
