"""Prompt files are read by NeoX's rules or as JSON lines; results are written in whole lines."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.data.jsonl import RecordWriter, check_writable, read_records, trim_cut_line
from megatron_lite.data.prompts import Prompt, read_prompts
from megatron_lite.errors import DataError, OutputError

ROOT = Path(__file__).resolve().parents[1]
Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def file(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_a_text_file_is_split_at_prompt_end_stripped_and_emptied_parts_dropped(file: Write) -> None:
    path = file("prompts.txt", "  Once upon a time \n\n\t\nThe end\r\nÉté")
    assert read_prompts(path) == [Prompt("Once upon a time"), Prompt("The end"), Prompt("Été")]


def test_prompt_end_may_be_any_word_and_prompts_then_keep_their_newlines(file: Write) -> None:
    path = file("prompts.txt", "one\ntwo\n###\nthree###  ###")
    assert read_prompts(path, prompt_end="###") == [Prompt("one\ntwo"), Prompt("three")]


def test_an_empty_prompt_end_makes_the_file_one_prompt(file: Write) -> None:
    assert read_prompts(file("prompts.txt", "one\n\ntwo\n"), prompt_end="") == [Prompt("one\n\ntwo")]


def test_a_byte_order_mark_is_not_part_of_the_first_prompt(file: Write) -> None:
    assert read_prompts(file("prompts.txt", b"\xef\xbb\xbfOnce")) == [Prompt("Once")]
    assert read_prompts(file("prompts.jsonl", b'\xef\xbb\xbf{"text": "Once"}')) == [Prompt("Once")]


def test_a_json_line_keeps_its_text_as_it_stands_and_its_settings(file: Write) -> None:
    lines = '{"text": " Once\\n", "temperature": 0.5, "top_k": 3, "stop": ["\\n", "."], "meta": {"id": 1}}\n\n{"text": ""}\n'
    assert read_prompts(file("prompts.jsonl", lines)) == [Prompt(" Once\n", {"temperature": 0.5, "top_k": 3, "stop": ["\n", "."]}), Prompt("")]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_the_examples_of_the_project_are_prompt_files(name: str) -> None:
    assert len(read_prompts(ROOT / "examples" / name)) >= 4


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", "\n  \n", "a.txt (sample_input_file) holds no prompt; write at least one"),
        ("a.jsonl", "\n", "a.jsonl (sample_input_file) holds no prompt; write at least one"),
        ("a.txt", b"one\ntwo\n\xff\xfe", "a.txt line 3 is not UTF-8; save the file as UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "a.jsonl line 2 is not UTF-8 (byte 11 of the line); save the file as UTF-8"),
        ("a.jsonl", '{"text": "a"}\n\nOnce', "a.jsonl line 3 is not JSON: Expecting value at column 1; every line must hold one whole JSON object"),
        ("a.jsonl", '["a"]', 'a.jsonl line 1 holds a list; every line must hold one JSON object such as {"text": "..."}'),
        ("a.jsonl", '{"prompt": "a"}', 'a.jsonl line 1 has no "text" that is a string; write {"text": "the prompt"}'),
        ("a.jsonl", '{"text": 3}', 'a.jsonl line 1 has no "text" that is a string; write {"text": "the prompt"}'),
        ("a.jsonl", '{"text": "\\ud83d"}', '"text" holds half of a surrogate pair at character 1'),
        ("a.jsonl", '{"text": "a", "temprature": 1}', "a.jsonl line 1 has the unknown key temprature; did you mean temperature?"),
        ("a.jsonl", '{"text": "a", "xyz": 1}', "unknown key xyz; beside text a line may hold temperature, top_k, top_p, maximum_tokens, stop, seed"),
        ("a.jsonl", '{"text": "a", "temperature": "hot"}', "a.jsonl line 1: temperature is 'hot'; it must be a number, 0 or more"),
        ("a.jsonl", '{"text": "a", "top_p": 1.5}', "top_p is 1.5; it must be a number from 0 to 1"),
        ("a.jsonl", '{"text": "a", "top_k": true}', "top_k is True; it must be a whole number, 0 or more"),
        ("a.jsonl", '{"text": "a", "stop": [""]}', "stop is ['']; it must be a string or a list of strings, none of them empty"),
    ],
)
def test_a_faulty_prompt_file_gets_a_sentence_with_file_and_line(file: Write, name: str, content: str | bytes, sentence: str) -> None:
    with pytest.raises(DataError) as error:
        read_prompts(file(name, content))
    assert sentence in str(error.value)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl"])
def test_a_missing_prompt_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}.* cannot be read: No such file or directory"):
        read_prompts(tmp_path / name)


def test_written_records_are_read_back_and_replace_an_older_file(file: Write) -> None:
    path = file("out.jsonl", "of an older run\n" * 9)
    records = [{"context": "Été \u2028 ", "length": 3, "text": None}, {"context": 'line\nbreak "quoted"', "finished": True}]
    with RecordWriter(path) as output:
        for record in records:
            output.write(record)
    assert [record for _, record in read_records(path)] == records
    assert path.read_bytes().count(b"\n") == 2


def test_a_record_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "out.jsonl") as output:
        output.write({"text": "first"})
        assert (tmp_path / "out.jsonl").read_text() == '{"text": "first"}\n'


def test_a_killed_writer_leaves_whole_lines_once_the_cut_one_is_trimmed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    endless = f"""
from itertools import count
from pathlib import Path
from megatron_lite.data.jsonl import RecordWriter
with RecordWriter(Path({str(path)!r})) as output:
    for number in count():
        output.write({{"number": number, "text": "x" * 50_000}})
"""
    process = subprocess.Popen([sys.executable, "-c", endless])
    while not (path.exists() and path.stat().st_size > 1_000_000):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    trim_cut_line(path)
    numbers = [json.loads(line)["number"] for line in path.read_bytes().split(b"\n") if line]
    assert path.read_bytes().endswith(b"\n")
    assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize(
    ("left", "whole"),
    [(b"", b""), (b"cut", b""), (b"one\n", b"one\n"), (b"one\ncut", b"one\n"), (b"one\n" + b"x" * 3_000_000, b"one\n"), (b"x" * 3_000_000, b"")],
)
def test_only_the_piece_behind_the_last_newline_is_trimmed(file: Write, left: bytes, whole: bytes) -> None:
    path = file("out.jsonl", left)
    trim_cut_line(path)
    assert path.read_bytes() == whole


def test_a_full_disk_says_how_many_records_are_safe(tmp_path: Path) -> None:
    """The kernel's limit on the size of files stands for the disk: like it, it takes part of a line before it refuses."""
    script = f"""
import resource, signal
from pathlib import Path
from megatron_lite.data.jsonl import RecordWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
with RecordWriter(Path({str(tmp_path / "out.jsonl")!r})) as output:
    for _ in range(9):
        output.write({{"text": "x" * 20}})
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "out.jsonl: File too large; 3 records are safe in it" in ended.stderr
    assert (tmp_path / "out.jsonl").read_text() == '{"text": "xxxxxxxxxxxxxxxxxxxx"}\n' * 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_no_space_left_is_a_sentence() -> None:
    with RecordWriter(Path("/dev/full")) as output, pytest.raises(OutputError) as error:
        output.write({"text": "a"})
    assert str(error.value) == "/dev/full: No space left on device; 0 records are safe in it; free some space or choose another output"


def test_an_output_that_cannot_be_written_is_refused_and_nothing_is_created(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"there is no folder .*results; create it or choose another output"):
        check_writable(tmp_path / "results" / "out.jsonl")
    with pytest.raises(OutputError, match="it is a folder; name a file in it"):
        check_writable(tmp_path)
    check_writable(tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="is read-only; choose another output"):
        check_writable(tmp_path / "out.jsonl")


def test_the_output_may_not_be_the_prompt_file(file: Write) -> None:
    path = file("prompts.txt", "Once")
    with pytest.raises(OutputError, match="is also the input, which would be overwritten"):
        check_writable(path, source=path)
