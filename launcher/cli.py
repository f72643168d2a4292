"""deepy's main: everything that can be checked is checked before the first process starts. Imports nothing heavy before the command line is read."""

import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.command import Command, parse_command
from launcher.options import PLAN
from launcher.place import is_one_of_several
from megatron_lite.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parents[1]


def main(words: Sequence[str]) -> int:
    """Runs a command line and returns the exit code: 2 after a sentence on stderr where something is wrong with what was asked."""
    try:
        command = parse_command(words)
        if command.script == PLAN:
            return show_plan(command)
        script = script_file(command.script)
        if is_one_of_several():
            raise ConfigError(
                f"deepy.py starts one process per device itself; start it once, or let torchrun, mpirun or srun start {script.name} with the same words"
            )
        from launcher.run import settle, show, start

        run = settle(command)
        return show(run) if command.dry_run else start(run, script)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `--dry-run | head` has seen enough
        sys.stdout = None
        return 0


def show_plan(command: Command) -> int:
    from launcher.forecast import outlook_of
    from launcher.outlook import show_outlook

    print(show_outlook(outlook_of(command)))
    return 0


def script_file(name: str) -> Path:
    """The file of one of our scripts, or of somebody's own, which has a path."""
    path = Path(name).resolve() if name.endswith(".py") else ROOT / f"{name}.py"
    if not path.is_file():
        raise ConfigError(f"{path.name} is not part of this version")
    return path
