"""lm-eval as a part of a larger program: what it says is meant for its own command line."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Remarks of lm-eval are left out, what it prints goes to stderr. Its estimates of errors stay in this process: forking one that holds a GPU invites
    trouble."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
