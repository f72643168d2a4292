"""Whether the Hugging Face hub can serve a data set: found out in a second, where its own libraries would try for half a minute."""

import os
import socket
import threading
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

PATIENCE = 1.2  # seconds
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


@cache
def is_reachable() -> bool:
    """Whether the hub may be asked, and answers. Behind a proxy only trying tells, so the answer there is yes."""
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE):
        return False
    return any(os.environ.get(name) for name in PROXIES) or _answers(endpoint())


def _answers(address: str) -> bool:
    """Tries in a thread of its own: looking up a name has no time limit."""
    parts = urlsplit(address)
    found = threading.Event()

    def call() -> None:
        try:
            socket.create_connection((parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)), PATIENCE).close()
            found.set()
        except OSError:
            pass

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found.is_set()


def go_offline() -> None:
    """Tells the hub's libraries not to try. To be called before they are imported."""
    os.environ.update(dict.fromkeys(OFFLINE, "1"))


def is_cached(data_set: str) -> bool:
    """Whether a copy of the data set lies in the cache of the datasets library."""
    home = Path(os.environ.get("HF_HOME", Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"))
    folder = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))
    wanted = data_set.replace("/", "___").lower()
    return folder.is_dir() and any(path.name.lower() == wanted and any(path.iterdir()) for path in folder.iterdir() if path.is_dir())
