"""The errors that end a program with one sentence and exit code 2, without a traceback."""

INTERRUPTED = 75
"""Exit code of a program that was asked to stop (SIGTERM), has saved, and goes on when it is started again: EX_TEMPFAIL."""


class UserError(Exception):
    """Something the person who started the program can change. The message is the whole report: what was found, what was needed, where, what to do."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, stated twice, or asks for what is not built."""


class LayoutError(UserError):
    """The model cannot be cut, or the machine cannot be filled, the way that was asked."""


class FitError(UserError):
    """The model does not fit in the memory that is there."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, damaged, or of another model."""


class TokenizerError(UserError):
    """A tokenizer file is missing, damaged, or does not belong to the model."""


class DataError(UserError):
    """An input file is missing, unreadable, empty or malformed."""


class OutputError(UserError):
    """A result cannot be written where it was asked for."""


class TrainingError(UserError):
    """A training cannot go on: its numbers are no longer finite, a process hangs, or its loss is not that of scoring."""
