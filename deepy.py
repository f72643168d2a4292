#!/usr/bin/env python3
"""Starts a script with GPT-NeoX configuration files on all GPUs: ./deepy.py generate.py configs/20B.yml -i prompts.txt"""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else Ctrl-C is to be ignored, as under `&` in a script
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends this process at once, in whatever import it is, until it has others to end

# last, because a top-level evaluate.py must not shadow the `evaluate` package that lm-eval imports
ROOT = Path(__file__).resolve().parent
sys.path[:] = [*(folder for folder in sys.path if folder != str(ROOT)), str(ROOT)]

# `make demo` installs into .venv; who has not activated it means it all the same
PYTHON = ROOT / ".venv" / "bin" / "python"
if find_spec("torch") is None and PYTHON.exists() and Path(sys.prefix) != ROOT / ".venv":
    os.execv(PYTHON, [str(PYTHON), *sys.argv])

from launcher.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
