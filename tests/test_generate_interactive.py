"""Conversations: on a real terminal with one process and with several, and the parts that decide what may be printed when."""

import codecs
import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_lite.config.load import load_config
from megatron_lite.inference.generate import generate
from megatron_lite.inference.interactive import Prompts, Stream
from megatron_lite.run import open_run
from tests.runs import BYTES, spelling, write_chain, write_config

ROOT = Path(__file__).resolve().parents[1]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
QUESTION = "Context prompt >>> "
END_OF_INPUT = "\x04"


class Session:
    """A program that owns a terminal, and what it has printed on it."""

    def __init__(self, *words: str | Path) -> None:
        self.screen, terminal = pty.openpty()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.program = subprocess.Popen([sys.executable, *map(str, words)], stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
        os.close(terminal)
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.seen = ""

    def until(self, text: str, *, seconds: float = 60) -> str:
        """What is printed up to and with this text."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.screen], [], [], max(0.0, deadline - time.monotonic()))
            try:
                more = os.read(self.screen, 4096) if ready else b""
            except OSError:  # the program has left the terminal
                more = b""
            assert more, f"{text!r} did not come after {self.seen!r}"
            self.seen += self.decoder.decode(more)
        before, found, self.seen = self.seen.partition(text)
        return (before + found).replace("\r\n", "\n")

    def ask(self, prompt: str) -> str:
        """Types a prompt; what stands between it and the next question."""
        os.write(self.screen, prompt.encode())
        return self.until(QUESTION).partition(prompt)[2].removesuffix(QUESTION)

    def end(self) -> int:
        os.write(self.screen, END_OF_INPUT.encode())
        return self.program.wait(20)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A model that continues the alphabet; after A come a character of three bytes and B."""
    write_chain(tmp_path / "checkpoint", spelling(ALPHABET, then=0) | spelling("A€B", then=1) | {1: 0})
    return write_config(tmp_path, BYTES, text_gen_type="interactive", stop=["xy", "B"], log_dir=str(tmp_path / "logs"))


def test_a_session_on_a_terminal(config: Path) -> None:
    session = Session(ROOT / "generate.py", config)
    assert "A prompt ends with '\\n'; Ctrl-D quits.\n" in session.until(QUESTION)
    assert session.ask("a\n") == ALPHABET[1:23] + "\n"
    assert session.ask("once more: t\n") == "uvw\n"
    assert session.ask("much too " + "long " * 20 + "\n") == (
        "that prompt has 108 tokens; the model's context is 64 (seq_length), and one must be free for the answer\n"
    )
    assert session.ask("A\n") == "€\n"
    assert session.ask("z\n") == "WARNING: text generation did not start; the model ended the text at once\n"
    assert session.ask("s\n") == "tuvw\n"
    assert session.end() == 0


STARTERS = {
    "deepy": [ROOT / "deepy.py", "generate.py"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node=2", ROOT / "generate.py"],
}


@pytest.mark.parametrize("starter", ["deepy", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_of_several_processes_one_owns_the_terminal_and_all_answer_together(starter: str, config: Path) -> None:
    session = Session(*STARTERS[starter], config, "model-parallel-size=2", "prompt_end=##")
    assert "A prompt ends with '##'; Ctrl-D quits.\n" in session.until(QUESTION)
    assert session.ask("two lines\nend in a##\n") == ALPHABET[1:23] + "\n"
    assert session.ask("t##\n") == "uvw\n"
    assert session.ask("much too " + "long " * 20 + "##\n").startswith("that prompt has 108 tokens")
    assert session.ask("r##\n") == "stuvw\n"
    assert session.end() == 0


def converse(config: Path, typed: str | bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, **overrides: object) -> list[str]:
    """The answers to what is typed into a conversation in this process."""
    source = io.BytesIO(typed if isinstance(typed, bytes) else typed.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(source, encoding="utf-8"))
    with open_run(load_config([config], overrides)) as run:
        generate(run)
    return capsys.readouterr().out.split(QUESTION)[1:]


def test_the_end_of_input_ends_the_last_prompt_too(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert converse(config, "t\n\nu", capsys, monkeypatch)[:1] == ["uvw\n"]
    assert converse(config, "t\nu", capsys, monkeypatch) == ["uvw\n", "vw\n", "\n"]


def test_prompts_pasted_in_one_piece_are_all_answered(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert converse(config, "t## u##v##", capsys, monkeypatch, prompt_end="##") == ["uvw\n", "vw\n", "w\n", "\n"]


def test_without_a_prompt_end_all_input_is_one_prompt(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert converse(config, "several\nlines\nt\n", capsys, monkeypatch, prompt_end="") == ["uvw\n", "\n"]


def test_bytes_that_are_no_text_do_not_end_the_session(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert converse(config, b"\xff\xfe t\nu\n", capsys, monkeypatch) == ["uvw\n", "vw\n", "\n"]


def streamed(stop: tuple[str, ...], *texts: str, final: str) -> list[str]:
    """What is let out for every state of a growing text, and in the end."""
    stream = Stream(stop)
    return [*(stream.more(text) for text in texts), stream.rest(final)]


def test_half_of_a_character_waits_for_the_other_half() -> None:
    assert streamed((), "a", "a\ufffd", "a\ufffd\ufffd", "a€", "a€b", final="a€b") == ["a", "", "", "€", "b", ""]


def test_what_may_become_a_stop_string_waits_until_it_is_none() -> None:
    assert streamed(("END",), "a", "aE", "aEN", "aENd", final="aENd") == ["a", "", "", "ENd", ""]
    assert streamed(("END",), "aE", "aEN", "aEND", final="a") == ["a", "", "", ""]
    assert streamed(("END", "\n\n"), "a\n", "a\nE", "a\nEx", final="a\nEx") == ["a", "\n", "Ex", ""]


def test_a_stop_string_inside_of_a_token_is_not_printed() -> None:
    assert streamed(("\n",), "one", "one\nQuestion", final="one") == ["one", "", ""]


def test_the_end_of_a_text_lets_out_what_waited() -> None:
    assert streamed(("END",), "aEN", final="aEN") == ["a", "EN"]
    assert streamed((), "a\ufffd", final="a\ufffd") == ["a", "\ufffd"]


def test_a_prompt_that_is_only_white_space_is_empty() -> None:
    prompts = Prompts(io.StringIO(" \n\nlast"), "\n")
    assert [prompts.ask(), prompts.ask(), prompts.ask(), prompts.ask()] == ["", "", "last", None]
