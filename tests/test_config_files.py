"""Every configuration that ships loads and is the model it says; so do the shapes of NeoX's other families."""

from pathlib import Path

import pytest

from megatron_lite.config.load import load_config
from megatron_lite.config.sections import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.models.memory import parameters
from megatron_lite.models.spec import spec_of

CONFIGS = Path(__file__).parents[1] / "configs"
# Settings to be named beside a model's own file.
OVERLAYS = {"text_generation.yml", "local_setup.yml", "finetune.yml", "finetune-cpu.yml", "lora.yml", "tiny-train.yml"}
FILES = sorted(CONFIGS.rglob("*.yml"))

# Published sizes: every parameter once, vocabulary padded for the cut that the model was trained with.
PARAMETERS = {
    "20B.yml": 20_554_567_680,
    "pythia/14M.yml": 14_067_712,
    "pythia/31M.yml": 30_494_720,
    "pythia/70M.yml": 70_426_624,
    "pythia/160M.yml": 162_322_944,
    "pythia/410M.yml": 405_334_016,
    "pythia/1B.yml": 1_011_781_632,
    "pythia/1.4B.yml": 1_414_647_808,
    "pythia/2.8B.yml": 2_775_208_960,
    "pythia/6.9B.yml": 6_857_302_016,
    "pythia/12B.yml": 11_846_072_320,
}


def loaded(path: Path) -> RunConfig:
    return load_config([CONFIGS / "20B.yml", path] if path.name in OVERLAYS else [path])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_configuration_loads(path: Path):
    config = loaded(path)
    assert config.where("num_layers") != "default"
    assert config.model.max_position_embeddings >= config.model.seq_length


@pytest.mark.parametrize(("name", "published"), PARAMETERS.items())
def test_a_configuration_describes_a_model_of_the_published_size(name: str, published: int):
    config = loaded(CONFIGS / name)
    multiple = config.tokenizer.make_vocab_size_divisible_by * config.parallel.model_parallel_size
    vocab = -(-50277 // multiple) * multiple
    assert parameters(spec_of(config.model, vocab=vocab, dtype="float16")) == published


def test_20b_trains_as_it_was_trained():
    config = loaded(CONFIGS / "20B.yml")
    assert config.deepspeed["optimizer"] == {"type": "Adam", "params": {"lr": 0.97e-4, "betas": [0.9, 0.95], "eps": 1e-8}}
    assert (config.parallel.pipe_parallel_size, config.parallel.model_parallel_size, config.precision) == (4, 2, "fp16")
    replicas = 96 // (4 * 2)
    sequences = config.training.train_micro_batch_size_per_gpu or 0
    assert sequences * config.training.gradient_accumulation_steps * replicas * config.model.seq_length == 3_145_728
    assert config.model.bias_gelu_fusion, "20B uses the tanh form"


@pytest.mark.parametrize("path", sorted((CONFIGS / "pythia").glob("*.yml")), ids=lambda path: path.stem)
def test_every_pythia_saw_two_million_tokens_a_step(path: Path):
    config = loaded(path)
    header = path.read_text(encoding="utf-8").splitlines()[0]  # "# Pythia 14M: 6 layers, ... trained on the Pile on 32 GPUs."
    replicas = int(header.split()[-2]) // config.parallel.model_parallel_size
    sequences = config.training.train_micro_batch_size_per_gpu or 0
    assert sequences * config.training.gradient_accumulation_steps * replicas * config.model.seq_length == 2_097_152
    optimizer = config.deepspeed["optimizer"]
    assert isinstance(optimizer, dict)
    assert config.training.min_lr == pytest.approx(optimizer["params"]["lr"] / 10)


def shape(layers: int, hidden: int, heads: int, more: str, positions: int = 2048) -> str:
    """A model's file in NeoX's dialect: the keys that all families share, and these lines."""
    return f"""# Model
{{
  "pipe-parallel-size": 1,
  "model_parallel_size": 1,
  # shape
  "num-layers": {layers}, "hidden-size": {hidden}, "num-attention-heads": {heads},
  "seq-length": {positions}, "max_position_embeddings": {positions},
  "pos-emb": "rotary", "rotary-pct": 1,
  "no-weight-tying": true, "output_layer_parallelism": "column",
  "scaled-upper-triang-masked-softmax-fusion": True,
{more}
}}
"""


GPT = '"norm": "layernorm", "gpt_j_residual": false, "bias-gelu-fusion": False, "init_method": "small_init", "hostfile": "/mock",'
LLAMA = '"norm": "rmsnorm", "rms_norm_epsilon": 1.0e-6, "bias_gelu_fusion": false, "use_bias_in_norms": false, "use_bias_in_attn_linear": false,'
OLD = LLAMA + '"mlp_type": "llama", "activation": "silu",'
NEW = LLAMA + '"activation": "swiglu", "mlp_multiple_of": 256,'

SHAPES = [
    ("19M", shape(6, 512, 8, GPT + '"deepspeed_extra_args": {"comms_logger": {"enabled": true,},}'), "neox", 2048),
    ("49M", shape(10, 640, 10, GPT), "neox", 2560),
    ("125M", shape(12, 768, 12, GPT), "neox", 3072),
    ("350M", shape(24, 1024, 16, GPT), "neox", 4096),
    ("760M", shape(24, 1536, 16, GPT), "neox", 6144),
    ("1-3B", shape(24, 2048, 16, GPT), "neox", 8192),
    ("6-7B", shape(32, 4096, 32, GPT), "neox", 16384),
    ("13B", shape(40, 5120, 40, GPT), "neox", 20480),
    ("175B", shape(96, 12288, 96, GPT), "neox", 49152),
    ("llama 7B", shape(32, 4096, 32, NEW + '"intermediate_size": 32768, "use_bias_in_mlp": false,'), "llama", 11008),
    ("llama 13B", shape(40, 5120, 40, NEW + '"intermediate_size": 40960,'), "llama", 13824),
    ("llama 30B", shape(60, 6656, 52, NEW + '"intermediate_size": 53248,'), "llama", 17920),
    ("llama 65B", shape(80, 8192, 64, NEW + '"intermediate_size": 65536,'), "llama", 22016),
    ("llama 7B, older", shape(32, 4096, 32, OLD), "llama", 11008),
    ("llama 65B, older", shape(80, 8192, 64, OLD), "llama", 22016),
    ("llama2 13B", shape(40, 5120, 40, NEW + '"intermediate_size": 41472,', 4096), "llama", 13824),
    ("llama2 70B", shape(80, 8192, 64, NEW + '"intermediate_size": 86016, "num_kv_heads": 8, "rotary_emb_base": 1000000,', 4096), "llama", 28672),
    ("mistral 7B, without its window", shape(32, 4096, 32, OLD + '"intermediate_size": 14336, "num_kv_heads": 8,', 8192), "llama", 14336),
]


@pytest.mark.parametrize(("text", "family", "width"), [row[1:] for row in SHAPES], ids=[row[0] for row in SHAPES])
def test_neox_other_shapes_load_with_their_family_and_width(tmp_path: Path, text: str, family: str, width: int):
    path = tmp_path / "shape.yml"
    path.write_text(text, encoding="utf-8")
    model = load_config([path]).model
    assert (model.family, model.mlp_width) == (family, width)


SOFTMAX = "torch's attention is one fused kernel with a softmax in fp32"
REFUSED = [
    ("Mamba", '"norm": "rmsnorm", "attention_config": [[["mamba"], 24]], "mamba_inner_func_fusion": true, "activation": "silu"', "attention_config"),
    ("RWKV", '"norm": "rmsnorm", "attention_config": [[["rwkv"], "all"]], "activation": "silu"', "attention_config"),
    ("gMLP", '"attention_config": [[["gmlp"], "all"]], "gmlp_attn_dim": 64', "attention_config"),
    ("sparse", '"attention_config": [[["local", "global"], "all"]], "sparsity_config": {"block": 16}', "attention_config"),
    ("experts", '"moe_num_experts": 8, "moe_top_k": 2', "moe_num_experts"),
    ("TransformerEngine", '"te_mha": true, "te_layernorm_mlp": false', "te_mha"),
    ("OLMo", '"norm": "non_parametric_layernorm", "activation": "swiglu"', "norm"),
    ("mistral", OLD + '"sliding_window_width": 4096', "sliding_window_width"),
    ("preferences", '"train_impl": "dpo", "dpo_beta": 0.2', "train_impl"),
    ("muP", '"use_mup": true, "mup_width_scale": 4', "use_mup"),
    ("soft prompts", '"soft_prompt_tuning": {"enabled": true, "num_tokens": 10}', "soft_prompt_tuning"),
    ("curriculum", '"curriculum_learning": {"enabled": true, "curriculum_type": "seqlen"}', "curriculum_learning"),
    ("no training", '"do_train": false', "do_train"),
    ("DeepSpeed's schedule", '"scheduler": {"type": "WarmupLR", "params": {}}', "scheduler"),
    ("Apex", '"amp": {"enabled": true, "opt_level": "O1"}', "amp"),
]


@pytest.mark.parametrize(("lines", "key"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_not_built_is_refused_by_its_own_name_only(tmp_path: Path, lines: str, key: str):
    path = tmp_path / "shape.yml"
    path.write_text(shape(24, 768, 12, lines), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config([path])
    said = str(error.value).splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"{path} line 11: {key}: ")
    assert " is refused: " in said[0]


@pytest.mark.parametrize(
    "lines",
    [
        '"moe_num_experts": 1, "use_mup": false, "te_mha": false, "train_impl": "normal", "soft_prompt_tuning": null',
        '"sequence_parallel": False, "sliding_window_width": null, "dataset_impl": "gpt2", "autotuning": null',
        '"do_train": true, "scheduler": null, "amp": {"enabled": false}, "data_impl": "mmap", "num_workers": 2',
        '"soft_prompt_tuning": {"enabled": false}, "curriculum_learning": {"enabled": false}, "attention_config": [[["global"], 12], [["flash"], 12]]',
    ],
)
def test_a_refused_key_loads_where_it_asks_for_nothing(tmp_path: Path, lines: str):
    path = tmp_path / "shape.yml"
    path.write_text(shape(24, 768, 12, lines), encoding="utf-8")
    assert load_config([path]).notes == (f"{path} line 10: scaled_upper_triang_masked_softmax_fusion has no effect here: " + SOFTMAX,)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ('"norm": "rmsnorm"', "a model of the llama family needs activation: swiglu (or, in older files, silu together with mlp_type: llama)"),
        (
            '"activation": "silu"',
            "activation: 'silu' is not built for a model of the neox family (neither rmsnorm nor a gated MLP), which needs activation: 'gelu'",
        ),
        ('"activation": "swiglu"', "norm: 'layernorm' is not built for a model of the llama family (rmsnorm or a gated MLP), which needs norm: 'rmsnorm'"),
        (NEW + '"use_bias_in_mlp": true', "a model of the llama family needs use_bias_in_mlp: false"),
        ('"num_kv_heads": 4', "num_kv_heads other than num_attention_heads is not built for a model of the neox family"),
        ('"architecture": "gptj"', "gpt_j_residual: false is not built for a model of the gptj family (architecture), which needs gpt_j_residual: true"),
        ('"intermediate_size": 8, "expansion_factor": 2', "intermediate_size and expansion_factor both state the width of the MLP; keep one"),
    ],
)
def test_a_mixture_that_no_family_has_is_refused(tmp_path: Path, lines: str, sentence: str):
    path = tmp_path / "shape.yml"
    path.write_text(shape(24, 768, 12, lines), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config([path])
    assert sentence in str(error.value)


def test_gpt_j_is_named():
    config = load_config([CONFIGS / "20B.yml"], {"architecture": "gptj", "gpt_j_tied": True, "use_bias_in_attn_linear": False})
    assert config.model.family == "gptj"
