"""What is wrong with a configuration is said in one sentence each, with file and line, all at once."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from megatron_lite.config.load import load_config
from megatron_lite.errors import ConfigError

SHAPE = '"num-layers": 2, "hidden_size": 64, "num-attention-heads": 4, "seq_length": 32, "max-position-embeddings": 32, "pos-emb": "rotary",'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complaint(text: str, overrides: Mapping[str, object] | None = None) -> str:
    Path("x.yml").write_text(text, encoding="utf-8")
    return complaint_about(["x.yml"], overrides)


def complaint_about(names: Sequence[str], overrides: Mapping[str, object] | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_config([Path(name) for name in names], overrides or {})
    return str(error.value)


def complaint_in_model(line: str) -> str:
    """What is said about this line, the third of a file whose second is a model's shape."""
    return complaint(f"{{\n{SHAPE}\n{line}\n}}")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('"hiden-size": 3', "x.yml line 3: unknown key 'hiden_size'; did you mean 'hidden_size'?"),
        ('"zzz": 3', "x.yml line 3: unknown key 'zzz'; docs/configuration.md lists every key"),
        ('"save-intervall": 3', "x.yml line 3: unknown key 'save_intervall'; did you mean 'save_interval'?"),
        ('"train_iters": "many"', "x.yml line 3: train_iters needs a whole number of at least 1, found 'many'"),
        ('"train_iters": true', "x.yml line 3: train_iters needs a whole number of at least 1, found true"),
        ('"train_iters": 1.5', "x.yml line 3: train_iters needs a whole number of at least 1, found 1.5"),
        ('"model_parallel_size": 0', "x.yml line 3: model_parallel_size needs a whole number of at least 1, found 0"),
        ('"top_p": 2', "x.yml line 3: top_p needs a number from 0 to 1, found 2"),
        ('"recompute": "often"', "x.yml line 3: recompute needs true or false, found 'often'"),
        ('"maximum_tokens": null', "x.yml line 3: maximum_tokens needs a whole number of at least 1, found null"),
        ('"stop": {"a": 1}', "x.yml line 3: stop needs a text or a list of texts, found {a: 1}"),
        ('"extra_save_iters": [1, x]', "x.yml line 3: extra_save_iters needs a list of whole numbers, found 'x'"),
        ('"load": [1]', "x.yml line 3: load needs a path, found [1]"),
        ('"precision": "bf16"', "x.yml line 3: precision needs one of fp16, bfloat16, fp32, found 'bf16'"),
        ('"fp16": true', "x.yml line 3: fp16 needs a mapping such as {enabled: true}, found true"),
        ('"norm": "scalenorm"', "x.yml line 3: norm: 'scalenorm' is refused: only layernorm and rmsnorm are built"),
        ('"moe_num_experts": 8', "x.yml line 3: moe_num_experts: 8 is refused: mixtures of experts are not built; the model has one MLP per block"),
        ('"gpt_j_tied": true', "x.yml line 3: gpt_j_tied: true is not built for a model of the neox family"),
        ('"num_kv_heads": 3', "x.yml line 3: num_kv_heads 3 does not divide num_attention_heads 4"),
        ('"rotary_pct": 0.33', "x.yml line 3: rotary_pct 0.33 rotates 5 dimensions of every head; an even number above 0 is needed"),
        ('"train_iters": 5, "train_epochs": 2', "x.yml line 3: train_iters and train_epochs say the same thing in two ways; keep one"),
        ('"data_path": "a", "train_data_paths": ["b"]', "x.yml line 3: data_path and train_data_paths both say what to read; keep one"),
        ('"train_data_paths": ["a", "b"], "train_data_weights": [1]', "x.yml line 3: 1 train_data_weights for 2 train_data_paths; one for each is needed"),
        ('"warmup_iters": 10', "x.yml line 3: warmup_iters needs a number, and lr_decay_iters or train_iters beside it, found 10; or state warmup instead"),
    ],
)
def test_a_wrong_setting_is_named_with_its_line(line: str, sentence: str):
    assert complaint_in_model(line).startswith(sentence)


def test_shapes_that_cannot_be_are_said_in_words():
    said = complaint('{"num_layers": 2, "hidden_size": 66, "num_attention_heads": 4, "seq_length": 64,\n"max_position_embeddings": 32, "pos_emb": "rotary"}')
    assert said.splitlines()[:2] == [
        "x.yml line 1: num_attention_heads 4 does not divide hidden_size 66",
        "x.yml line 1: seq_length 64 is more than the 32 positions of max_position_embeddings",
    ]


def test_learned_positions_are_refused_also_where_the_file_is_silent():
    said = complaint("{" + SHAPE.replace('"pos-emb": "rotary",', "") + "}")
    assert said == "learned positions (NeoX's default) are not built; needed is pos_emb: rotary, and a model that was trained with it"


def test_a_key_stated_twice_names_both_lines():
    assert complaint(f'{{\n{SHAPE}\n"lr-decay-style": cosine,\n"lr_decay_style": linear}}') == (
        "x.yml lines 3 and 4: 'lr_decay_style' is stated twice (as 'lr-decay-style' and as 'lr_decay_style'); keep one"
    )
    assert complaint(f'{{\n{SHAPE}\n"gas": 1,\n"gradient_accumulation_steps": 1}}').endswith("(as 'gas' and as 'gradient_accumulation_steps'); keep one")
    assert (
        complaint(f'{{\n{SHAPE}\n"optimizer": {{"params": {{"lr": 1,\n"lr": 2}}}}}}') == "x.yml lines 3 and 4: 'optimizer.params.lr' is stated twice; keep one"
    )


def test_two_number_formats_in_one_file_contradict_each_other():
    said = complaint_in_model('"fp16": {"enabled": true},\n"bf16": {"enabled": true}')
    assert said == "the number format is stated twice: fp16 by fp16 (x.yml line 3) and bfloat16 by bf16 (x.yml line 4); keep one"


def test_missing_shapes_are_listed_with_what_to_do():
    assert complaint('{"temperature": 1.0}') == (
        "num_layers, hidden_size, num_attention_heads, seq_length, max_position_embeddings must be set, and are not in x.yml; "
        "name a model's own configuration file as well, such as configs/20B.yml"
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{\n"a": 1\n"b": 2}', "x.yml line 3: not valid YAML: expected ',' or '}', but got ':'; look for a missing comma"),
        ('{\n"a": "b"\n"c": 2}', "x.yml line 3: not valid YAML: expected ',' or '}', but got another value; look for a missing comma"),
        ('{"a": [1, 2}', "x.yml line 1: not valid YAML: "),
        ("", "x.yml: a configuration is a mapping of keys to values"),
        ("- 1\n- 2", "x.yml: a configuration is a mapping of keys to values"),
        ('{"a": !!python/object:os.system {}}', "x.yml line 1: not valid YAML: could not determine a constructor"),
        ('{"a":\t1}', "x.yml line 1: not valid YAML: found character '\\t' that cannot start any token; use spaces instead of tabs"),
        ("{" * 500, "x.yml: not valid YAML: its brackets are nested too deeply"),
        ('{"a": "\x07"}', "x.yml: not valid YAML: unacceptable character #x0007: special characters are not allowed"),
    ],
)
def test_a_file_that_is_no_configuration_is_said_to_be_none(text: str, sentence: str):
    said = complaint(text)
    assert said.startswith(sentence)
    assert "must be set" not in said, "what an unreadable file lacks is not known"


def test_a_file_that_cannot_be_read_is_one_sentence(folder: Path):
    assert complaint_about(["nowhere.yml"]) == "nowhere.yml: no such configuration file"
    (folder / "sub.yml").mkdir()
    assert complaint_about(["sub.yml"]) == "sub.yml: the configuration file cannot be read: Is a directory"
    (folder / "latin.yml").write_bytes(b'{"wandb_group": "\xe9"}')
    assert complaint_about(["latin.yml"]) == "latin.yml: the configuration file is not UTF-8 text"


def test_everything_wrong_with_every_file_is_reported_at_once():
    Path("a.yml").write_text(f'{{{SHAPE}\n"hiden_size": 1, "top_p": 7,\n"seed": 1, "seed": 2}}', encoding="utf-8")
    Path("b.yml").write_text('{"moe-num-experts": 4}', encoding="utf-8")
    Path("c.yml").write_text('{"a": ', encoding="utf-8")
    said = complaint_about(["a.yml", "b.yml", "c.yml"], {"top_k": "few", "modle": 1}).splitlines()
    assert [re.split(r": | is ", line)[0] for line in said] == [
        "a.yml line 3",
        "c.yml line 1",
        "b.yml line 1",
        "a.yml line 2",
        "command line",
        "command line",
        "a.yml line 2",
    ]


def test_a_word_of_the_command_line_that_is_no_yaml_is_named():
    Path("x.yml").write_text(f"{{{SHAPE}}}", encoding="utf-8")
    assert complaint_about(["x.yml"], {"eval_tasks": "[piqa"}) == "command line: eval_tasks=[piqa cannot be read as a value; put quotes around it"
