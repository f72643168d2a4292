"""Random weights in GPT-J's own layout and as Hugging Face folders: the original's leaves and bytes, and small ones for real, read back."""

from pathlib import Path

import pytest

from megatron_lite.checkpoint.find import find_checkpoint
from megatron_lite.checkpoint.mesh_transformer import leaves
from megatron_lite.checkpoint.synthetic import leaf_shape, slim_size
from megatron_lite.config.load import load_config
from megatron_lite.inference.generate import generate
from megatron_lite.models.spec import spec_of
from megatron_lite.run import open_run
from tests.runs import BYTES, records, write_config
from tools.synthesize_checkpoint import main

ROOT = Path(__file__).resolve().parents[1]
GPTJ = """
{"architecture": "gptj", "num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "seq_length": 64, "max_position_embeddings": 64, "pos_emb": "rotary",
 "gpt_j_residual": true, "gpt_j_tied": true, "no_weight_tying": true, "use_bias_in_attn_linear": false, "bias_gelu_fusion": true, "load": "checkpoint",
 "tokenizer_type": "CharLevelTokenizer", "padded_vocab_size": 512}
"""


def test_gpt_j_s_own_layout_and_a_hugging_face_folder_are_written_and_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gptj.yml").write_text(GPTJ)
    for kind, words in (("mesh-transformer", ["--step", "383500"]), ("huggingface", [])):
        assert main(["gptj.yml", kind, "--format", kind, "--workers", "2", *words]) == 0
        assert find_checkpoint(Path(kind)).format == kind
        with open_run(load_config([Path("gptj.yml")], {"load": kind, "maximum_tokens": 5, "sample_output_file": f"{kind}.jsonl"})) as run:
            generate(run)
        assert records(Path(f"{kind}.jsonl"))[0]["length"]
    found = find_checkpoint(Path("mesh-transformer"))
    assert (found.tag, found.tp, len(found.array_files(7))) == ("step_383500", 8, 16)


def test_gpt_j_s_slim_checkpoint_has_its_leaves_and_bytes() -> None:
    spec = spec_of(load_config([ROOT / "configs" / "gpt-j-6B.yml"]).model, vocab=50400, dtype="bfloat16")
    shapes = [leaf_shape(leaf, spec, 8) for leaf in leaves(28)]
    assert shapes[:6] == [(4096,), (6300, 4096), (4096, 512), (4096, 512), (4096, 512), (512, 4096)]
    assert shapes[6:12] == [(2048,), (4096, 2048), (4096,), (2048, 4096), (4096,), (4096,)]
    assert slim_size(spec, 8) == 6_053_381_344  # as its README counts: vectors that all shards hold are counted eight times


def test_what_mesh_transformer_jax_could_not_have_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, BYTES)
    assert main([str(config), str(tmp_path / "new"), "--format", "mesh-transformer", "--model-parallel-size", "2"]) == 2
    assert capsys.readouterr().err.strip() == "mesh-transformer-jax wrote GPT-J in bfloat16, heads and vocabulary in 2 equal shards; give such a model"
