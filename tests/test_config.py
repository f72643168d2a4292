"""Configuration files of NeoX's dialect become one typed, frozen RunConfig."""

import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_lite.config.load import load_config
from megatron_lite.config.sections import RunConfig
from megatron_lite.config.show import settings

SHAPE = '"num-layers": 2, "hidden_size": 64, "num-attention-heads": 4, "seq_length": 32, "max-position-embeddings": 32, "pos-emb": "rotary",'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> Path:
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


def load(more: str = "", overrides: Mapping[str, object] | None = None) -> RunConfig:
    """A model's shape in line 2, then these lines."""
    return load_config([write("model.yml", f"{{\n{SHAPE}\n{more}\n}}\n")], overrides or {})


DIALECT = """# A header
{
  # comments in between
  "num-layers": 2, # and behind
  "hidden_size": 64,
  "num_attention-heads": 4,
  seq_length: "32",
  "max-position-embeddings": 32.0,
  "pos-emb": "rotary",
  "rotary-pct": 1,
  "no-weight-tying": True, "gpt_j_residual": true,
  "layernorm-epsilon": 1e-6,
  "min_lr": "1e-5",
  "optimizer": {
    "type": "Adam",
    "params": {"lr": 0.97e-4, "betas": [0.9, 0.95], "eps": 1e-8,},
  },
  "extra-save-iters": [0,1,2,],
  "wandb_run_name": 2023-01-01,
}
"""


def test_neox_own_dialect_is_read_as_it_is_written():
    config = load_config([write("dialect.yml", DIALECT)])
    assert (config.model.num_layers, config.model.seq_length, config.model.max_position_embeddings) == (2, 32, 32)
    assert (config.model.rotary_pct, config.model.no_weight_tying, config.model.gpt_j_residual) == (1.0, True, True)
    assert (config.model.layernorm_epsilon, config.training.min_lr) == (1e-6, 1e-5)
    assert config.deepspeed["optimizer"] == {"type": "Adam", "params": {"lr": 0.97e-4, "betas": [0.9, 0.95], "eps": 1e-8}}
    assert config.checkpoint.extra_save_iters == (0, 1, 2)
    assert config.logging.wandb_run_name == "2023-01-01"


def test_block_yaml_and_json_with_tabs_are_read_too():
    block = "num-layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nseq_length: 32\nmax_position_embeddings: 32\n"
    block += "pos_emb: rotary\noptimizer:\n  params: {eps: 1e-8}\n"
    json = '{\n\t"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32,\n'
    json += '\t"max_position_embeddings": 32, "pos_emb": "rotary", "optimizer": {"params": {"eps": 1e-8}}\n}'
    one, other = load_config([write("block.yml", block)]), load_config([write("tabs.json", json)])
    assert one.model == other.model
    assert one.deepspeed == other.deepspeed == {"optimizer": {"params": {"eps": 1e-8}}}


def test_a_silent_file_means_what_it_means_to_neox():
    config = load()
    assert (config.parallel.pipe_parallel_size, config.parallel.model_parallel_size) == (0, 1)
    assert (config.generation.maximum_tokens, config.generation.temperature, config.generation.prompt_end) == (64, 0.0, "\n")
    assert config.generation.sample_output_file == Path("samples.txt")
    assert (config.training.seed, config.training.warmup, config.training.weight_decay) == (1234, 0.01, 0.1)
    assert (config.tokenizer.make_vocab_size_divisible_by, config.generation.generation_batch_size) == (128, 16)


def test_a_later_file_wins_and_the_command_line_wins_over_all():
    first = write("first.yml", f'{{{SHAPE} "temperature": 0.1, "top_k": 1,\n"seed": 1}}')
    second = write("second.yml", '{"temperature": 0.2,\n"top-k": 2}')
    config = load_config([first, second], {"temperature": "0.3"})
    assert (config.generation.temperature, config.generation.top_k, config.training.seed) == (0.3, 2, 1)
    assert (config.where("temperature"), config.where("top-k"), config.where("seed")) == ("command line", "second.yml line 2", "first.yml line 2")
    assert config.where("top_p") == "default"
    assert config.files == (first, second)


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("stop", "###", ("###",)),
        ("stop", '["\\n\\n", "###"]', ("\n\n", "###")),
        ("prompt_end", "###", "###"),
        ("prompt_end", '"\\n\\n"', "\n\n"),
        ("sample_output_file", "null", None),
        ("sample_output_file", "007", Path("007")),
        ("temperature", "1e-1", 0.1),
        ("top-k", "40", 40),
        ("return_logits", "true", True),
        ("maximum_tokens", 5, 5),
    ],
)
def test_words_of_the_command_line_are_values_as_in_a_file(key: str, word: object, value: object):
    assert getattr(load(overrides={key: word}).generation, key.replace("-", "_")) == value


def test_a_value_inside_of_a_block_is_reached_with_dots():
    config = load('"optimizer": {"type": "Adam", "params": {"lr": 1e-4, "eps": 1e-8}}', {"optimizer.params.lr": "2e-5", "fp16.enabled": "true"})
    assert config.deepspeed["optimizer"] == {"type": "Adam", "params": {"lr": 2e-5, "eps": 1e-8}}
    assert config.precision == "fp16"


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("", "fp32"),
        ('"fp16": {"enabled": true, "loss_scale": 0}', "fp16"),
        ('"fp16": {"fp16": true, "enabled": false}', "fp32"),
        ('"bf16": {"enabled": true}', "bfloat16"),
        ('"precision": "bfloat16", "bf16": {"enabled": true}', "bfloat16"),
        ('"precision": "bfloat16", "fp16": {"enabled": false}', "bfloat16"),
        ('"fp16": {"enabled": true, "type": "bfloat16"}', "bfloat16"),
        ('"precision": "fp16"', "fp16"),
    ],
)
def test_the_number_format_has_three_spellings(text: str, precision: str):
    assert load(text).precision == precision


def test_the_last_source_that_asks_for_a_number_format_wins():
    config = load('"fp16": {"enabled": true},\n"optimizer": {"type": "Adam"}', {"precision": "fp32"})
    assert (config.precision, config.where("precision")) == ("fp32", "command line")
    assert config.deepspeed == {"optimizer": {"type": "Adam"}}
    assert load('\n"fp16": {"enabled": true}').where("precision") == "model.yml line 4"


def test_older_names_and_units_are_understood():
    older = '"gas": 4, "save-interval": 500, "warmup_iters": 500, "lr_decay_iters": 48000, "decay_lr_to": 0.1, "optimizer": {"params": {"lr": 2e-4}}'
    config = load(older)
    assert (config.training.gradient_accumulation_steps, config.checkpoint.checkpoint_factor) == (4, 500)
    assert config.training.warmup == 500 / 48000
    assert config.training.min_lr == pytest.approx(2e-5)


def test_keys_without_effect_load_and_say_why_once():
    config = load('"rope_fusion": false,\n"synchronize-each-layer": true,\n"attention-config": [[["flash"], 2]]')
    assert config.notes == (
        "model.yml line 4: synchronize_each_layer has no effect here: torch recomputes activations, and has no such choice; no number changes",
    )


def test_the_configuration_cannot_be_changed_and_travels_between_processes():
    config = load('"temperature": 0.5')
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.generation.temperature = 1.0


def test_a_dry_run_shows_what_differs_what_matters_and_who_set_it():
    rows = {key: (value, origin) for key, value, origin in settings(load('"fp16": {"enabled": true},\n"stop": "END"', {"top_k": "40"}))}
    assert rows["num_layers"] == ("2", "model.yml line 2")
    assert rows["precision"] == ("fp16", "model.yml line 3")
    assert rows["stop"] == ("['END']", "model.yml line 4")
    assert rows["top_k"] == ("40", "command line")
    assert rows["seed"] == ("1234", "default")
    assert rows["fp16"] == ("{enabled: true}", "model.yml line 3")
    assert "wandb_host" not in rows


def test_reading_a_configuration_imports_no_torch():
    program = "import sys, megatron_lite.config.load, megatron_lite.config.show; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=False).returncode == 0
