"""What `lora: {...}` may say, and the sentence for everything else."""

from pathlib import Path

import pytest

from megatron_lite.config.load import load_config
from megatron_lite.config.lora import TARGETS, LoraSection
from megatron_lite.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NEOX, LLAMA, GPTJ = CONFIGS / "tiny.yml", next((CONFIGS / "llama").glob("*.yml")), CONFIGS / "gpt-j-6B.yml"


def lora(config: Path, **overrides: object) -> LoraSection:
    found = load_config([config], overrides).training.lora
    assert found is not None
    return found


def test_a_mapping_with_nothing_in_it_takes_the_defaults() -> None:
    found = lora(NEOX, lora="{}")
    assert (found.rank, found.alpha, found.scale, found.layers("neox")) == (16, 32.0, 2.0, ("query_key_value",))
    assert load_config([NEOX]).training.lora is None


def test_words_of_the_command_line_change_one_setting() -> None:
    found = load_config([NEOX, CONFIGS / "lora.yml"], {"lora.rank": 8}).training.lora
    assert found is not None
    assert (found.rank, found.alpha, found.targets) == (8, 32.0, ("query_key_value",))


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (LLAMA, "q_proj, k_proj, v_proj, o_proj, up_proj, gate_proj, down_proj"),
        (GPTJ, "q_proj, k_proj, v_proj, out_proj, fc_in, fc_out"),
        (NEOX, "query_key_value, dense, linear1, linear2"),
    ],
    ids=["LLaMA", "GPT-J", "NeoX"],
)
def test_layers_may_be_called_as_others_call_them(config: Path, targets: str) -> None:
    assert lora(config, lora=f"{{targets: [{targets}]}}").layers(load_config([config]).model.family) == TARGETS


@pytest.mark.parametrize(
    ("config", "setting", "said"),
    [
        (NEOX, "{rank: 0}", "lora.rank needs a whole number of at least 1, found 0"),
        (NEOX, "{alpha: -1}", "lora.alpha needs a number above 0, found -1"),
        (NEOX, "{r: 8}", "lora needs a mapping with no other keys than rank, alpha, targets, dropout, found r"),
        (NEOX, "yes please", "lora needs a mapping with no other keys than rank, alpha, targets, dropout, found 'yes please'"),
        (NEOX, "{dropout: 0.1}", "lora.dropout is 0.1, but dropout is not built; set it to 0, or leave it out"),
        (NEOX, "{targets: []}", "lora.targets is empty; name at least one of query_key_value, dense, dense_h_to_4h, dense_4h_to_h"),
        (NEOX, "{targets: [query_key_valu]}", "lora.targets has query_key_valu, which is no layer of a neox model; did you mean query_key_value? Known are"),
        (NEOX, "{targets: [q_proj]}", "lora.targets has q_proj, which is no layer of a neox model; known are"),
        (
            LLAMA,
            "{targets: [q_proj, v_proj]}",
            "lora.targets has v_proj, which is one matrix with q_proj and k_proj here; name all of them, or query_key",
        ),
    ],
)
def test_anything_else_is_refused(config: Path, setting: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([config], {"lora": setting})
    assert f"command line: {said}" in str(caught.value)
