"""TensorBoard behind the interface of metrics, where its package is installed."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from megatron_lite.errors import OutputError
from megatron_lite.log import logger


class TensorBoard:
    """Event files in a folder. What an earlier run wrote there of steps behind `after` is no longer shown: they are taken again."""

    def __init__(self, folder: Path, *, after: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=None if after is None else after + 1)

    def log(self, values: Mapping[str, float], *, step: int | None = None) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, step: int | None = None) -> None:
        lines = [list(columns), ["---"] * len(columns), *rows]
        self._writer.add_text(name, "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _cell(value: object) -> str:
    """As a cell of a Markdown table shows it."""
    return str(value).replace("|", "\\|").replace("\n", "<br>")


def open_tensorboard(folder: Path, *, after: int | None = None) -> TensorBoard | None:
    """None where the package is missing, which is said: published files of NeoX name a folder whether anybody looks at it or not."""
    try:
        import_module("tensorboard")
    except ImportError:
        logger.warning(
            f"tensorboard_dir is {folder}, but the package tensorboard is not installed, and nothing is written there; "
            "run `pip install tensorboard`, or set tensorboard_dir to null"
        )
        return None
    try:
        return TensorBoard(folder, after=after)
    except OSError as error:
        raise OutputError(f"TensorBoard's files cannot be written to {folder}: {error.strerror or error}; set tensorboard_dir to another folder") from None
