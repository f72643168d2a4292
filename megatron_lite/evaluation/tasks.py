"""Names of tasks -> tasks of lm-eval with their questions: from files on this machine where they are there, else from the hub."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lite.config.sections import EvaluationSection
from megatron_lite.data.hub import endpoint, go_offline, is_reachable
from megatron_lite.data.task_data import OTHER_NAMES, TASK_DATA, TaskData, data_folder, read_documents, require, task_names
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.evaluation.quiet import quiet_harness
from megatron_lite.log import logger

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

# Where lm-eval describes the tasks whose data we know, inside its folder of tasks
DESCRIPTIONS = {"lambada_openai": "lambada/lambada_openai.yaml", "piqa": "piqa/piqa.yaml"}
SEED = 1234  # of lm-eval's draws of examples


@dataclass(frozen=True)
class Unit:
    """A task or a group of tasks that is evaluated at once."""

    name: str
    loaded: "TaskDict"

    @property
    def documents(self) -> int:
        return sum(len(task.eval_docs) for task in self.loaded["tasks"].values())


def find_tasks(settings: EvaluationSection) -> list[Unit]:
    """The tasks that eval_tasks names, with their questions. Raises ConfigError for an unknown name, DataError where questions cannot be had."""
    wanted = settings.eval_tasks or ()
    for name in wanted:
        if name in OTHER_NAMES:
            logger.info(f"{name} is {OTHER_NAMES[name]}: the version of OpenAI, which published results mean")
    if settings.include_path is not None and not settings.include_path.is_dir():
        raise ConfigError(f"include_path {settings.include_path} is no folder; name the one that holds your task definitions")
    with quiet_harness():
        finder = Finder(settings)
        specs = [spec for name in task_names(wanted) for spec in finder.specs(name)]
        units = [_load(finder.manager, name, spec) for name, spec in dict(specs).items()]
        for unit in units:
            for task in unit.loaded["tasks"].values():
                _set_examples(task, settings.num_fewshot)
    return units


class Finder:
    """Looks names up where that is cheap first: reading the index of all of lm-eval's tasks takes ten seconds or more."""

    def __init__(self, settings: EvaluationSection) -> None:
        self.folder = data_folder(settings.eval_data_dir)
        self.few = settings.num_fewshot or 0
        self.include_path = settings.include_path
        self.names = task_names(settings.eval_tasks or ())
        for name in self.names:
            if name in TASK_DATA:
                require(TASK_DATA[name], self.folder)  # before the libraries are imported, which takes seconds
        if any(name not in TASK_DATA for name in self.names) and not is_reachable():
            go_offline()
        from lm_eval.tasks import TaskManager

        self.manager: TaskManager = TaskManager(include_path=_text(self.include_path), include_defaults=False)
        if any(not self._is_simple(name) for name in self.names):
            logger.info("reading the index of lm-eval's tasks")
            self.manager = TaskManager(include_path=_text(self.include_path))

    def _is_simple(self, name: str) -> bool:
        return name in self.manager.all_tasks or name in TASK_DATA

    def specs(self, name: str) -> Iterator[tuple[str, Any]]:
        """Every task that the name stands for, with what lm-eval loads it by (Any: a name, a path or a configuration)."""
        if name in TASK_DATA and not self._is_overridden(name):
            yield name, _spec(TASK_DATA[name], self.folder, few=self.few)
        elif name in self.manager.all_tasks:
            yield name, name
        else:
            # groups and tags would bring their members a second time
            matches = self.manager.match_tasks([name]) if any(sign in name for sign in "*?[") else []
            singles = [match for match in matches if match in self.manager.all_subtasks] or matches
            if not singles:
                raise ConfigError(_unknown(name, self.manager.all_tasks))
            for single in singles:
                yield from self.specs(single)

    def _is_overridden(self, name: str) -> bool:
        """Whether the folder of the user's own tasks has one of this name."""
        entry = self.manager.task_index.get(name)
        return entry is not None and self.include_path is not None and str(entry.yaml_path).startswith(str(self.include_path))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _unknown(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, [*known, *OTHER_NAMES], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them all"
    return f"lm-eval {version('lm-eval')} has no task {name}; {hint}"


def _spec(data: TaskData, folder: Path, *, few: int) -> str | dict[str, object]:
    """lm-eval's own description of a task, made to read the files that are here; its path where they are not. Prompts are the installed lm-eval's."""
    import lm_eval
    import yaml

    path = Path(lm_eval.__file__).parent / "tasks" / DESCRIPTIONS[data.task]
    if not require(data, folder):
        return str(path)
    documents = read_documents(data, folder)
    if few and "train" not in documents:
        logger.warning(f"{data.task}: examples are drawn from the questions themselves, for lack of training data in {folder}; scores cannot be compared")
    described = yaml.safe_load(path.read_text(encoding="utf-8"))
    split = described.get("training_split")
    here = {"dataset_path": str(folder / data.files[0].name), "dataset_name": None, "training_split": split if split in documents else None}
    return described | here | {"custom_dataset": lambda **options: _as_data_set(documents)}


def _as_data_set(documents: dict[str, list[dict[str, object]]]) -> object:
    from datasets import Dataset, DatasetDict

    return DatasetDict({split: Dataset.from_list(each) for split, each in documents.items()})


def _load(manager: "TaskManager", name: str, spec: Any) -> Unit:
    from datasets.exceptions import DatasetNotFoundError

    try:
        return Unit(name, manager.load([spec]))
    except (ConnectionError, FileNotFoundError, DatasetNotFoundError) as error:
        first = str(error).splitlines()[0]
        remedy = "" if is_reachable() else f" ({endpoint()} cannot be reached; run once where it can, with HF_HOME on a disk that both machines see)"
        raise DataError(f"the questions of {name} cannot be had: {first}{remedy}") from None


def _set_examples(task: Any, count: int | None) -> None:
    """How many solved examples precede each question, by lm-eval's rules: a task that says 0 itself keeps it."""
    own = task.get_config("num_fewshot")
    if count is not None and own != 0:
        task.set_config(key="num_fewshot", value=count)
    elif count is not None and count != own:
        logger.warning(f"{task.config.task} is defined without examples; num_fewshot {count} does not change that")
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)
