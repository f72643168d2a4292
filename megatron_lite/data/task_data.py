"""Data of evaluation tasks that lies on this machine: where it belongs, where it comes from, and whether it is the data of the published results."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.data.download import RemoteFile, sha256_of
from megatron_lite.data.hub import endpoint, is_cached, is_reachable
from megatron_lite.data.jsonl import read_records
from megatron_lite.errors import DataError
from megatron_lite.log import logger

Document = dict[str, object]

FOLDER = Path("data")
"""Where the data lies if eval_data_dir does not say otherwise."""


@dataclass(frozen=True)
class TaskData:
    """The files of a task, under lm-eval's name of the task, and how many documents they hold. `hub` is where lm-eval would fetch it from."""

    task: str
    files: tuple[RemoteFile, ...]
    documents: int
    hub: str


LAMBADA = TaskData(
    "lambada_openai",
    (
        RemoteFile(
            "lambada/lambada_test.jsonl",
            (
                "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
                "https://storage.googleapis.com/gpt-2/data/lambada_test.jsonl",
            ),
            sha256="4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
            size=1_819_752,
        ),
    ),
    documents=5153,
    hub="EleutherAI/lambada_openai",
)
PIQA = TaskData(
    "piqa",
    tuple(
        RemoteFile(
            f"piqa/{name}",
            (
                f"https://yonatanbisk.com/piqa/data/{name}",
                f"https://raw.githubusercontent.com/ybisk/ybisk.github.io/master/piqa/data/{name}",
            ),
            sha256=sha256,
            size=size,
        )
        for name, sha256, size in (
            ("valid.jsonl", "93503cc97c679e459b065c3d13e848282e44b2a25213985bed3e5d458abef72d", 495_929),
            ("valid-labels.lst", "b4192dc3a2a0363d9d60ccf79800cbbe2f32ebb17726efdde6970e0b8131bceb", 3_676),
        )
    ),
    documents=1838,
    hub="baber/piqa",
)
TASK_DATA = {data.task: data for data in (LAMBADA, PIQA)}

# The name that old versions of the harness gave to the OpenAI version; today it is a tag, which brings another data set along
OTHER_NAMES = {"lambada": "lambada_openai"}


def data_folder(eval_data_dir: Path | None) -> Path:
    return eval_data_dir or FOLDER


def task_names(names: Sequence[str]) -> list[str]:
    """Names as lm-eval knows them, each once."""
    return list(dict.fromkeys(OTHER_NAMES.get(name, name) for name in names))


def is_here(data: TaskData, folder: Path) -> bool:
    """Whether every file of the task is in the folder; raises DataError where only some of them are."""
    missing = [folder / file.name for file in data.files if not (folder / file.name).is_file()]
    if missing and len(missing) < len(data.files):
        raise DataError(f"the data of {data.task} is incomplete: there is no {missing[0]}; {how_to_get(data, folder)}")
    return not missing


def require(data: TaskData, folder: Path) -> bool:
    """Whether the task's data is in the folder. Where it is not, lm-eval has to fetch it: raises DataError if that cannot succeed."""
    if is_here(data, folder):
        return True
    if not is_reachable() and not is_cached(data.hub):
        raise DataError(f"there is no {folder / data.files[0].name} for the task {data.task}, and {endpoint()} cannot be reached; {how_to_get(data, folder)}")
    return False


def how_to_get(data: TaskData, folder: Path) -> str:
    short = next((name for name, task in OTHER_NAMES.items() if task == data.task), data.task)
    where = "" if folder == FOLDER else f" --folder {folder}"
    return f"`tools/download.py eval-data {short}{where}` fetches it where there is a network, or set eval_data_dir to the folder that has {data.files[0].name}"


def read_documents(data: TaskData, folder: Path) -> dict[str, list[Document]]:
    """The documents of every split, in the shape of lm-eval's tasks. Says in the log where they are not those of the published results."""
    documents = READERS[data.task](folder)
    check(data, folder, len(next(iter(documents.values()))))
    return documents


def check(data: TaskData, folder: Path, documents: int) -> None:
    for file in data.files:
        if file.sha256 and (found := sha256_of(folder / file.name)) != file.sha256:
            logger.warning(
                f"{folder / file.name} is not the file behind the published results (sha256 {found[:12]}… instead of {file.sha256[:12]}…; "
                f"{documents:,} documents, published are {data.documents:,}): scores cannot be compared with them"
            )


def _lambada(folder: Path) -> dict[str, list[Document]]:
    path = folder / "lambada/lambada_test.jsonl"
    documents: list[Document] = []
    for number, record in read_records(path):
        text = record.get("text")
        if not isinstance(text, str) or " " not in text:
            raise DataError(f'{path} line {number} has no "text" of several words; fetch the file again')
        documents.append({"text": text})
    return {"test": _some(documents, path)}


def _piqa(folder: Path) -> dict[str, list[Document]]:
    splits = {"validation": _labelled(folder / "piqa/valid.jsonl", folder / "piqa/valid-labels.lst")}
    train, labels = folder / "piqa/train.jsonl", folder / "piqa/train-labels.lst"
    return splits | {"train": _labelled(train, labels)} if train.is_file() and labels.is_file() else splits


def _labelled(path: Path, labels_path: Path) -> list[Document]:
    records = list(read_records(path))
    for number, record in records:
        if missing := [key for key in ("goal", "sol1", "sol2") if not isinstance(record.get(key), str)]:
            raise DataError(f"{path} line {number} has no {missing[0]}; fetch the file again")
    labels = _lines(labels_path)
    if len(labels) != len(records) or not set(labels) <= {"0", "1"}:
        raise DataError(
            f"{labels_path} must hold a 0 or 1 for each of the {len(records):,} lines of {path}, but holds {len(labels):,} lines; fetch both files again"
        )
    documents = [{key: record[key] for key in ("goal", "sol1", "sol2")} | {"label": int(label)} for (_, record), label in zip(records, labels, strict=True)]
    return _some(documents, path)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch the file again") from None


def _some(documents: Sequence[Document], path: Path) -> list[Document]:
    if not documents:
        raise DataError(f"{path} is empty; fetch the file again")
    return list(documents)


READERS = {"lambada_openai": _lambada, "piqa": _piqa}
