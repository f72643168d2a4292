"""Data sets that people know by name: where their files come from, and how they become texts."""

import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.data.documents import kind_of
from megatron_lite.data.download import Progress, RemoteFile, fetch_all
from megatron_lite.errors import DataError, OutputError
from megatron_lite.log import logger
from megatron_lite.whole import draft_of

HUGGING_FACE = "https://huggingface.co"
TINY_STORIES = f"{HUGGING_FACE}/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Part:
    """Files of text that become one data set, NAME_text_document."""

    name: str
    texts: tuple[Path, ...]


@dataclass(frozen=True)
class KnownSet:
    """`unpack` makes texts of the fetched files. Without `files` it is not fetched: who has it puts there what `about` names."""

    about: str
    files: tuple[RemoteFile, ...] = ()
    unpack: Callable[[Path], list[Part]] = lambda folder: []


def obtain(name: str, folder: Path, progress: Progress = lambda count: None) -> list[Part]:
    """The texts of a known set, fetched into FOLDER/NAME if they are not there. Raises DataError that says which file to put where."""
    known, place = KNOWN[name], folder / name
    if not known.files:
        return [Part(name, _given(name, known, place))]
    try:
        fetch_all(known.files, place, progress)
    except DataError as error:
        wanted = ", ".join(f"{file.name} ({file.urls[0]})" for file in known.files)
        raise DataError(f"{error}\nThe files of {name} may also be brought from elsewhere and put into {place}: {wanted}") from error
    return known.unpack(place)


def _given(name: str, known: KnownSet, place: Path) -> tuple[Path, ...]:
    texts = tuple(sorted(path for path in place.iterdir() if path.is_file() and kind_of(path))) if place.is_dir() else ()
    if not texts:
        raise DataError(f"{name} cannot be fetched: the links that GPT-NeoX had are dead; if you have it, put {known.about} into {place} and call this again")
    return texts


def _as_it_is(**names: str) -> Callable[[Path], list[Part]]:
    return lambda folder: [Part(part, (folder / name,)) for part, name in names.items()]


def _zipped(archive: str, **members: str) -> Callable[[Path], list[Part]]:
    """Members of an archive as PART.txt."""

    def unpack(folder: Path) -> list[Part]:
        return [Part(part, (_unpacked(folder, archive, member, f"{part}.txt"),)) for part, member in members.items()]

    return unpack


def _unpacked(folder: Path, archive: str, member: str, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        with _unpacking(path) as draft, zipfile.ZipFile(folder / archive) as content, content.open(member) as source, draft.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK)
    return path


@contextmanager
def _unpacking(path: Path) -> Iterator[Path]:
    """A draft of a text that is made of what was fetched."""
    logger.info(f"unpacking {path}")
    try:
        with draft_of(path) as draft:
            yield draft
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; nothing of it was kept: free some space or choose another folder") from None


def _letters(folder: Path) -> list[Part]:
    """Every file of Enron's mail folders as a JSON line, without the header of the mail."""
    path = folder / "enron.jsonl"
    if not path.is_file():
        with _unpacking(path) as draft, draft.open("w", encoding="utf-8") as records:
            for name, letter in _members(folder / ENRON.name):
                record = {"text": _decoded(letter.replace(b"\r\n", b"\n").partition(b"\n\n")[2]), "meta": {"file": name}}
                records.write(json.dumps(record, ensure_ascii=False) + "\n")
    return [Part("enron", (path,))]


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive, mode="r|gz") as content:
        for member in content:
            if file := content.extractfile(member):
                yield member.name, file.read()


def _decoded(letter: bytes) -> str:
    try:
        return letter.decode("utf-8")
    except UnicodeDecodeError:  # mail of the year 2000
        return letter.decode("latin-1")


def _wikitext(number: int) -> Callable[[Path], list[Part]]:
    members = {part: f"wikitext-{number}-raw/wiki.{part}.raw" for part in ("train", "valid", "test")}
    return _zipped(f"wikitext-{number}-raw-v1.zip", **members)


def _brought(files: str, *names: str) -> dict[str, KnownSet]:
    return {name: KnownSet(files) for name in names}


ENRON = RemoteFile(
    "enron_mail_20150507.tar.gz",
    ("https://www.cs.cmu.edu/~enron/enron_mail_20150507.tar.gz",),
    sha256="b3da1b3fe0369ec3140bb4fbce94702c33b7da810ec15d718b3fadf5cd748ca7",
    size=443_254_787,
)
ENWIK8 = RemoteFile(
    "enwik8.zip",
    ("https://mattmahoney.net/dc/enwik8.zip", "https://data.deepai.org/enwik8.zip"),
    sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    size=36_445_475,
)
SHAKESPEARE = RemoteFile(
    "input.txt",
    ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    size=1_115_394,
)
STORIES = (
    RemoteFile(
        "TinyStoriesV2-GPT4-train.txt",
        (f"{TINY_STORIES}/TinyStoriesV2-GPT4-train.txt",),
        sha256="6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
        size=2_227_753_162,
    ),
    RemoteFile(
        "TinyStoriesV2-GPT4-valid.txt",
        (f"{TINY_STORIES}/TinyStoriesV2-GPT4-valid.txt",),
        sha256="6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d",
        size=22_502_601,
    ),
)
WIKITEXT_2 = RemoteFile(
    "wikitext-2-raw-v1.zip",
    (
        "https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
        f"{HUGGING_FACE}/datasets/ggml-org/ci/resolve/927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip",
    ),
    sha256="ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    size=4_721_645,
)
WIKITEXT_103 = RemoteFile(
    "wikitext-103-raw-v1.zip",
    ("https://wikitext.smerity.com/wikitext-103-raw-v1.zip", "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-raw-v1.zip"),
    sha256="91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
    size=191_984_949,
)
GPT2_TOKENIZER = (
    RemoteFile(
        "gpt2-vocab.json",
        (f"{HUGGING_FACE}/openai-community/gpt2/resolve/main/vocab.json",),
        sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        size=1_042_301,
    ),
    RemoteFile(
        "gpt2-merges.txt",
        (f"{HUGGING_FACE}/openai-community/gpt2/resolve/main/merges.txt",),
        sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        size=456_318,
    ),
)

# The second half are names that GPT-NeoX knew, with links that lead nowhere now.
KNOWN: dict[str, KnownSet] = {
    "enwik8": KnownSet("the first 100 MB of Wikipedia, of 2006, with its markup", (ENWIK8,), _zipped("enwik8.zip", enwik8="enwik8")),
    "enron": KnownSet("half a million mails of a company", (ENRON,), _letters),
    "tinyshakespeare": KnownSet("plays by Shakespeare", (SHAKESPEARE,), _as_it_is(tinyshakespeare="input.txt")),
    "tinystories": KnownSet("two million very short stories, written by a model", STORIES, _as_it_is(train=STORIES[0].name, valid=STORIES[1].name)),
    "wikitext-2": KnownSet("600 good articles of Wikipedia", (WIKITEXT_2,), _wikitext(2)),
    "wikitext-103": KnownSet("28 thousand good articles of Wikipedia", (WIKITEXT_103,), _wikitext(103)),
    **_brought("00.jsonl.zst to 29.jsonl.zst", "pile"),
    **_brought("00.jsonl.zst", "pile_subset"),
    **_brought("its .jsonl.zst", "github", "europarl", "freelaw", "nih", "openwebtext2", "ubuntu_irc", "youtube_subtitles"),
    **_brought("its texts in .jsonl or .txt files", "arxiv", "pubmed", "books1", "books3", "hackernews", "stackexchange"),
    **_brought("some of the c4-train.*.json.gz of huggingface.co/datasets/allenai/c4", "c4", "c4_openwebtext"),
}
