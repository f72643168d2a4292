"""One logger for the whole program: a fact per line on stderr. Rank 0 tells what happens, the other ranks only warn."""

import logging
import os
import sys

logger = logging.getLogger("deepy")


class _Line(logging.Formatter):
    """The bare sentence; who says it and how urgent it is only where that is news."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.speaker = f"rank {rank}: " if rank else ""

    def format(self, record: logging.LogRecord) -> str:
        urgency = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return self.speaker + urgency + record.getMessage()


class _Stderr(logging.Handler):
    """Writes to whatever sys.stderr is at the moment, so that redirection after the set-up is honoured."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def set_up_logging() -> None:
    """Gives this process its voice, from RANK (absent: 0). Calling it again starts afresh."""
    rank = int(os.environ.get("RANK", "0"))
    handler = _Stderr()
    handler.setFormatter(_Line(rank))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING if rank else logging.INFO)
    logger.propagate = False  # libraries put handlers on the root logger; every line would come twice
