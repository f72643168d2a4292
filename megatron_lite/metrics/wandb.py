"""Weights & Biases behind the interface of metrics: on where it is asked for or a key is found, offline where the network fails."""

import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from megatron_lite.config.sections import LoggingSection
from megatron_lite.errors import ConfigError
from megatron_lite.log import logger

if TYPE_CHECKING:
    import wandb

PATIENCE = 30.0  # seconds for the server to answer; wandb itself would wait for minutes


class Wandb:
    """One run at Weights & Biases."""

    def __init__(self, run: "wandb.Run") -> None:
        self.run = run

    def log(self, values: Mapping[str, float], *, step: int | None = None) -> None:
        self.run.log(dict(values), step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, step: int | None = None) -> None:
        import wandb

        self.run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def close(self) -> None:
        self.run.finish()


def is_wanted(section: LoggingSection) -> bool:
    """What use_wandb says; where it is silent, whether somebody has set wandb up: a mode, a key in the environment or in .netrc."""
    if section.use_wandb is not None:
        return section.use_wandb
    mode = os.environ.get("WANDB_MODE", "")
    return mode not in ("", "disabled") or (mode == "" and (bool(os.environ.get("WANDB_API_KEY")) or _has_login(section.wandb_host)))


def _has_login(host: str) -> bool:
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(str(path)).authenticators(urlsplit(host).hostname or host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def open_wandb(section: LoggingSection, settings: Mapping[str, object]) -> Wandb:
    """A new run. Falls back to an offline one, which `wandb sync` can send later, where the server does not answer."""
    try:
        import wandb
        from wandb.errors import CommError, UsageError
    except ImportError:
        raise ConfigError("use_wandb is true, but the package wandb is not installed; run: pip install wandb, or set use_wandb to false") from None
    try:
        return Wandb(_start(section, settings, None))
    except UsageError as error:
        raise ConfigError(
            f"Weights & Biases cannot be used ({str(error).splitlines()[0]}); run `wandb login`, set WANDB_MODE=offline, or set use_wandb to false"
        ) from None
    except (CommError, TimeoutError) as error:
        logger.warning(f"Weights & Biases does not answer ({str(error).splitlines()[0]}); the run is kept offline, `wandb sync` sends it later")
        wandb.teardown()  # else the id of the run counts as taken
        return Wandb(_start(section, settings, "offline"))


def _start(section: LoggingSection, settings: Mapping[str, object], mode: str | None) -> "wandb.Run":
    import wandb

    return wandb.init(
        project=section.wandb_project,
        group=section.wandb_group,
        name=section.wandb_run_name,
        entity=section.wandb_team,
        config=dict(settings),
        mode=mode,  # pyright: ignore[reportArgumentType]
        settings=wandb.Settings(base_url=section.wandb_host, init_timeout=PATIENCE, save_code=False, console="off", silent=True),
    )
