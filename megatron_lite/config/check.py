"""Rules between settings. A broken rule is the key to look at and a sentence that says what it needs."""

from collections.abc import Iterator, Mapping
from typing import cast

from megatron_lite.config.kinds import Section, shown
from megatron_lite.config.lora import broken_targets
from megatron_lite.config.sections import DataSection, Family, ModelSection, ParallelSection, TrainingSection

Broken = Iterator[tuple[str, str]]

# What a family demands of settings in which families differ.
DEMANDS: dict[Family, dict[str, object]] = {
    "neox": {
        "norm": "layernorm",
        "activation": "gelu",
        "mlp_type": "regular",
        "gpt_j_tied": False,
        "use_bias_in_norms": True,
        "use_bias_in_attn_linear": True,
        "use_bias_in_mlp": True,
    },
    "gptj": {"norm": "layernorm", "activation": "gelu", "mlp_type": "regular", "pos_emb": "rotary", "gpt_j_residual": True},
    "llama": {
        "norm": "rmsnorm",
        "pos_emb": "rotary",
        "gpt_j_residual": False,
        "gpt_j_tied": False,
        "bias_gelu_fusion": False,
        "use_bias_in_attn_linear": False,
    },
}


def broken_rules(sections: Mapping[str, Section]) -> Broken:
    """Every broken rule between the settings of these sections; one that could not be read is left out."""
    if "model" in sections:
        model = cast(ModelSection, sections["model"])
        yield from _shape(model)
        yield from _positions(model)
        yield from _family(model)
    if "model" in sections and "parallel" in sections:
        yield from _stages(cast(ModelSection, sections["model"]), cast(ParallelSection, sections["parallel"]))
    if "training" in sections:
        training = cast(TrainingSection, sections["training"])
        yield from _schedule(training)
        if training.lora is not None and "model" in sections:
            yield from (("lora", problem) for problem in broken_targets(training.lora, cast(ModelSection, sections["model"]).family))
    if "data" in sections:
        yield from _data(cast(DataSection, sections["data"]))


def _shape(model: ModelSection) -> Broken:
    hidden, heads = model.hidden_size, model.num_attention_heads
    if hidden % heads:
        yield "num_attention_heads", f"num_attention_heads {heads} does not divide hidden_size {hidden}"
    if model.seq_length > model.max_position_embeddings:
        yield "seq_length", f"seq_length {model.seq_length} is more than the {model.max_position_embeddings} positions of max_position_embeddings"
    if model.num_kv_heads and heads % model.num_kv_heads:
        yield "num_kv_heads", f"num_kv_heads {model.num_kv_heads} does not divide num_attention_heads {heads}"
    if model.intermediate_size and model.expansion_factor:
        yield "expansion_factor", "intermediate_size and expansion_factor both state the width of the MLP; keep one"


def _stages(model: ModelSection, parallel: ParallelSection) -> Broken:
    blocks, stages = parallel.pipe_stage_layers, max(1, parallel.pipe_parallel_size)
    if blocks is not None and len(blocks) != stages:
        yield (
            "pipe_stage_layers",
            f"pipe_stage_layers has {len(blocks)} numbers ({shown(blocks)}); pipe_parallel_size is {stages}, one for each stage is needed",
        )
    elif blocks is not None and sum(blocks) != model.num_layers:
        yield "pipe_stage_layers", f"pipe_stage_layers {shown(blocks)} are {sum(blocks)} blocks in all; the model has {model.num_layers} (num_layers)"


def _positions(model: ModelSection) -> Broken:
    if model.pos_emb == "learned":
        yield "pos_emb", "learned positions (NeoX's default) are not built; needed is pos_emb: rotary, and a model that was trained with it"
    dims = int(model.hidden_size // model.num_attention_heads * model.rotary_pct)
    if model.pos_emb == "rotary" and (dims == 0 or dims % 2):
        yield "rotary_pct", f"rotary_pct {model.rotary_pct} rotates {dims} dimensions of every head; an even number above 0 is needed"


def _family(model: ModelSection) -> Broken:
    family = model.family
    reason = "architecture" if model.architecture else {"neox": "neither rmsnorm nor a gated MLP", "llama": "rmsnorm or a gated MLP"}[family]
    for key, needed in DEMANDS[family].items():
        if (found := getattr(model, key)) != needed:
            yield key, f"{key}: {shown(found)} is not built for a model of the {family} family ({reason}), which needs {key}: {shown(needed)}"
    if family == "neox" and model.num_kv_heads not in (None, model.num_attention_heads):
        yield "num_kv_heads", "num_kv_heads other than num_attention_heads is not built for a model of the neox family"
    if family == "llama" and not model.gated:
        yield "activation", "a model of the llama family needs activation: swiglu (or, in older files, silu together with mlp_type: llama)"
    if family == "llama" and model.use_bias_in_mlp and "use_bias_in_mlp" in model.model_fields_set:  # NeoX's own files leave it out
        yield "use_bias_in_mlp", "a model of the llama family needs use_bias_in_mlp: false"
    if family != "llama" and model.activation == "silu":
        yield "activation", "activation silu is built together with mlp_type: llama only, where it means swiglu"


def _schedule(training: TrainingSection) -> Broken:
    for first, second in (("train_iters", "train_epochs"), ("lr_decay_iters", "lr_decay_fraction")):
        if getattr(training, first) is not None and getattr(training, second) is not None:
            yield second, f"{first} and {second} say the same thing in two ways; keep one"


def _data(data: DataSection) -> Broken:
    for part in ("train", "valid", "test"):
        paths, weights = getattr(data, f"{part}_data_paths"), getattr(data, f"{part}_data_weights")
        if paths and data.data_path:
            yield f"{part}_data_paths", f"data_path and {part}_data_paths both say what to read; keep one"
        if weights and len(weights) != len(paths or ()):
            yield f"{part}_data_weights", f"{len(weights)} {part}_data_weights for {len(paths or ())} {part}_data_paths; one for each is needed"
