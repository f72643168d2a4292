"""generate.py's work in this process: prompts in, NeoX's records out, whatever the batch, the layout and the settings of single prompts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_lite.config.load import load_config
from megatron_lite.inference.generate import generate
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.run import open_run, prepare
from tests.runs import BYTES, Lines, Record, records, spelling, write_chain, write_config, write_run
from tests.worlds import in_world

ROOT = Path(__file__).resolve().parents[1]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
KEYS = ["context", "text", "length", "finished", "message", "duration_seconds"]
Generate = Callable[..., list[Record]]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A model that continues the alphabet and ends the text after z."""
    write_chain(tmp_path / "checkpoint", spelling(ALPHABET, then=0))
    return write_config(tmp_path, BYTES)


@pytest.fixture
def written(config: Path) -> Generate:
    """Runs generate with these settings, over a prompt file if its lines are given, and returns its records."""

    def run(lines: str | None = None, *, name: str = "prompts.txt", **overrides: object) -> list[Record]:
        if lines is not None:
            (config.parent / name).write_text(lines)
            overrides = {"sample_input_file": str(config.parent / name), **overrides}
        with open_run(load_config([config], overrides)) as opened:
            generate(opened)
        return records(config.parent / "out.jsonl")

    return run


def texts(found: list[Record]) -> list[object]:
    return [record["text"] for record in found]


def test_a_record_has_the_keys_of_neox_in_their_order_and_their_types(written: Generate) -> None:
    [record] = written("s\n")
    assert list(record) == KEYS
    assert isinstance(record.pop("duration_seconds"), float)
    assert record == {"context": "s", "text": "tuvwxyz", "length": 7, "finished": True, "message": None}


def test_a_text_that_did_not_start_is_null_with_a_message(written: Generate) -> None:
    [record] = written("z\n")
    assert (record["text"], record["length"], record["finished"]) == (None, 0, True)
    assert str(record["message"]).startswith("WARNING: text generation did not start; ")


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_records_come_in_the_order_of_the_prompts_though_texts_end_in_another(rows: int, written: Generate) -> None:
    prompts = "afkpuyb"
    found = written("\n".join(prompts), generation_batch_size=rows)
    assert [record["context"] for record in found] == list(prompts)
    assert texts(found) == [ALPHABET[ALPHABET.index(prompt) + 1 :] for prompt in prompts]


def test_every_line_of_a_jsonl_file_may_have_settings_of_its_own(written: Generate) -> None:
    lines = [
        {"text": "a"},
        {"text": "a", "maximum_tokens": 3},
        {"text": "a", "stop": "f"},
        {"text": "a", "stop": ["kl", "hi"]},
        {"text": "z a", "temperature": 0.7, "top_k": 1, "seed": 3},
        {"text": "m", "top_p": 0.5, "temperature": 1},
    ]
    found = written("\n".join(map(json.dumps, lines)), name="prompts.jsonl", maximum_tokens=10)
    assert texts(found) == ["bcdefghijk", "bcd", "bcde", "bcdefg", "bcdefghijk", "nopqrstuvw"]
    assert [record["context"] for record in found][4:] == ["z a", "m"]


def test_stop_of_the_configuration_holds_for_every_prompt(written: Generate) -> None:
    assert texts(written("a\nh\nq\n", stop="['x', 'jk']")) == ["bcdefghi", "i", "rstuvw"]
    assert texts(written("a\n", stop="m")) == ["bcdefghijkl"]


def test_logits_are_added_where_they_are_asked_for_as_plain_json_numbers(written: Generate, config: Path) -> None:
    [record] = written("v\n", return_logits=True)
    assert list(record) == [*KEYS, "logits"]
    logits = torch.tensor(record["logits"])
    assert logits.shape == (5, 520)  # w x y z, and the end of text
    assert logits.argmax(-1).tolist() == [*b"wxyz", 0]
    json.loads((config.parent / "out.jsonl").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_prompt_end_divides_the_file(written: Generate) -> None:
    assert [record["context"] for record in written("x\ny###a\n###", prompt_end="###")] == ["x\ny", "a"]


@pytest.fixture
def random_config(tmp_path: Path) -> Path:
    return write_run(tmp_path / "random", temperature=1.0, maximum_tokens=12)


def test_texts_out_of_nothing_are_as_many_as_asked_and_all_different(random_config: Path) -> None:
    with open_run(load_config([random_config], {"num_samples": 7})) as run:
        generate(run)
    found = records(random_config.parent / "out.jsonl")
    assert [record["context"] for record in found] == [""] * 7
    assert len(set(texts(found))) == 7


def test_one_seed_gives_one_file_whatever_the_batch_and_another_seed_another(random_config: Path) -> None:
    prompts = random_config.parent / "prompts.txt"
    prompts.write_text("one\na longer second prompt\nx\nfour\nand the fifth\n")
    found = []
    for overrides in ({"generation_batch_size": 1}, {"generation_batch_size": 2}, {}, {"recompute": True}, {"seed": 5}):
        with open_run(load_config([random_config], {"sample_input_file": str(prompts), **overrides})) as run:
            generate(run)
        found.append(texts(records(random_config.parent / "out.jsonl")))
    assert found[0] == found[1] == found[2] == found[3]
    assert all(one != other for one, other in zip(found[0], found[4], strict=True))


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(pp=2, tp=2)], ids=str)
def test_every_layout_writes_the_same_file_once(layout: Layout, random_config: Path) -> None:
    overrides = {"num_samples": 5, "generation_batch_size": 2}
    config = load_config([random_config], overrides)
    with open_run(config) as run:
        generate(run)
    output = random_config.parent / "out.jsonl"
    expected = texts(records(output))
    output.unlink()

    def write(mesh: Mesh) -> None:
        generate(prepare(config, mesh))

    in_world(layout, write)
    assert texts(records(output)) == expected


def test_the_first_texts_are_shown_and_the_closing_line_counts_tokens(written: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    with Lines() as said:
        written("\n".join("uvwxyabc"), maximum_tokens=2)
    assert [line for line in said if line.startswith("8 prompts, 15 tokens in ") and " tokens/s" in line and "written to" in line] == said[-1:]
    shown = capsys.readouterr().out.split("\n\n")
    assert [paragraph.strip() for paragraph in shown] == ["[1] u▏vw", "[2] v▏wx", "[3] w▏xy", "[4] x▏yz", "[5] y▏z"]


def test_a_null_output_file_goes_beside_the_prompts(config: Path) -> None:
    prompts = config.parent / "mine.txt"
    prompts.write_text("x")
    with open_run(load_config([config], {"sample_input_file": str(prompts), "sample_output_file": None})) as run:
        generate(run)
    assert texts(records(config.parent / "mine.txt.output.jsonl")) == ["yz"]


@pytest.mark.parametrize(
    ("overrides", "mode"),
    [
        ({}, "unconditional"),
        ({"sample_input_file": "prompts.txt"}, "input-file"),
        ({"text_gen_type": "interactive"}, "interactive"),
        ({"text_gen_type": "unconditional", "sample_input_file": "prompts.txt"}, "unconditional"),
        ({"text_gen_type": "interactive", "sample_input_file": "prompts.txt"}, "interactive"),
    ],
)
def test_the_mode_follows_text_gen_type_or_the_prompt_file(overrides: dict[str, object], mode: str, config: Path) -> None:
    assert load_config([config], overrides).generation_mode == mode


def test_a_prompt_file_named_on_the_command_line_wins_over_a_mode_in_a_file(config: Path) -> None:
    files = [config, ROOT / "configs" / "text_generation.yml"]
    assert load_config(files).generation_mode == "unconditional"
    assert load_config(files, {"sample_input_file": "mine.txt"}).generation_mode == "input-file"
    assert load_config(files, {"sample_input_file": "mine.txt", "text_gen_type": "unconditional"}).generation_mode == "unconditional"
