"""What config.json of a Hugging Face folder says about the model, held against our configuration."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isclose
from pathlib import Path
from typing import cast

from megatron_lite.errors import CheckpointError
from megatron_lite.models.spec import Activation, DType, Family, ModelSpec


@dataclass(frozen=True)
class Fact:
    """Something that config.json and our configuration both state: a field of ModelSpec, NeoX's key, and the keys it has in config.json."""

    field: str
    neox: str
    keys: tuple[str, ...]


FACTS = (
    Fact("layers", "num_layers", ("num_hidden_layers", "n_layer")),
    Fact("hidden", "hidden_size", ("hidden_size", "n_embd")),
    Fact("heads", "num_attention_heads", ("num_attention_heads", "n_head")),
    Fact("kv_heads", "num_kv_heads", ("num_key_value_heads",)),
    Fact("ffn", "intermediate_size", ("intermediate_size", "n_inner")),
    Fact("parallel_residual", "gpt_j_residual", ("use_parallel_residual",)),
    Fact("tied_head", "no_weight_tying (its opposite)", ("tie_word_embeddings",)),
    Fact("norm_eps", "layernorm_epsilon", ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps")),
    Fact("rotary_share", "rotary_pct (and pos_emb: rotary)", ("partial_rotary_factor", "rotary_pct")),
    Fact("rotary_dim", "rotary_pct (its share of the head)", ("rotary_dim",)),
    Fact("rotary_base", "rotary_emb_base", ("rope_theta", "rotary_emb_base")),
    Fact("head_dim", "num_attention_heads", ("head_dim",)),
)
# What transformers takes for granted where config.json is silent
DEFAULTS: dict[str, dict[str, object]] = {
    "gpt_neox": {
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "hidden_act": "gelu",
    },
    "gptj": {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-5, "rotary_dim": 64, "activation_function": "gelu_new"},
    "llama": {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu"},
}
FAMILIES: dict[str, Family] = {"gpt_neox": "neox", "gptj": "gptj", "llama": "llama"}
ACTIVATIONS: dict[object, Activation] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
FORMS_OF_GELU: set[Activation] = {"gelu", "gelu_tanh"}


def read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check its permissions, or fetch it again") from None
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a JSON object was expected")
    return content


def stated_facts(folder: Path) -> dict[str, object]:
    """What config.json says, or leaves to transformers' defaults, with what it says about rotary positions among the rest."""
    stated = read_json(folder / "config.json")
    rotary = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    if not isinstance(rotary, dict):
        raise CheckpointError(f"{folder / 'config.json'} says rope_parameters {rotary}; a JSON object was expected")
    return {**DEFAULTS.get(str(stated.get("model_type")), {}), **stated, **rotary}


def stated_activation(folder: Path, spec: ModelSpec) -> Activation:
    """The activation that the folder's model was saved with: of the two forms of GELU its own, else the one of our configuration. Raises CheckpointError for
    a model of another family, of which nothing else needs to be said."""
    facts, path = stated_facts(folder), folder / "config.json"
    _check_family(facts, path, spec.family)
    stated = facts.get("hidden_act", facts.get("activation_function"))
    found = ACTIVATIONS.get(stated)
    if found is None:
        raise CheckpointError(f"{path} says hidden_act {stated}; built are {', '.join(map(str, ACTIVATIONS))}")
    if found != spec.activation and not {found, spec.activation} <= FORMS_OF_GELU:
        raise CheckpointError(
            f"{path} says hidden_act {stated}, the configuration gives {spec.activation}; set activation to what the checkpoint was trained with"
        )
    return found


def _check_family(stated: Mapping[str, object], path: Path, family: Family) -> None:
    kind = stated.get("model_type")
    if FAMILIES.get(str(kind)) != family:
        ours = next(name for name, each in FAMILIES.items() if each == family)
        raise CheckpointError(f"{path} is of a {kind} model; the configuration describes {family} ({ours}): name the YAML of this model, or its own folder")


def check_config(folder: Path, spec: ModelSpec) -> None:
    """Raises CheckpointError where config.json describes another model than our configuration."""
    stated, path = stated_facts(folder), folder / "config.json"
    _check_family(stated, path, spec.family)
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind not in (None, "default"):
        raise CheckpointError(f"{path} says rope_type {kind}; only plain rotary positions (default) are built")
    ours = {**asdict(spec), "rotary_share": spec.rotary_dim / spec.head_dim}
    for fact in FACTS:
        key = next((key for key in fact.keys if stated.get(key) is not None), None)
        if key and not _same(stated[key], ours[fact.field]):
            raise CheckpointError(
                f"{path} says {key} {stated[key]}, the configuration gives {ours[fact.field]}; set {fact.neox} to what the checkpoint was trained with"
            )


def _same(theirs: object, ours: object) -> bool:
    if isinstance(theirs, float) and isinstance(ours, float):
        return isclose(theirs, ours, rel_tol=1e-6)
    return theirs == ours


def stated_spec(folder: Path, *, dtype: DType) -> ModelSpec:
    """The model that config.json describes; raises CheckpointError for one that is not built."""
    stated, path = stated_facts(folder), folder / "config.json"
    family = FAMILIES.get(str(stated.get("model_type")))
    if family is None:
        raise CheckpointError(f"{path} is of a {stated.get('model_type')} model; built are {', '.join(FAMILIES)}")
    known = {fact.field: next((stated[key] for key in fact.keys if stated.get(key) is not None), None) for fact in FACTS}
    if missing := [fact.keys[0] for fact in FACTS[:3] if known[fact.field] is None]:
        raise CheckpointError(f"{path} does not say {', '.join(missing)}; fetch it again")
    layers, hidden, heads = (cast(int, known[field]) for field in ("layers", "hidden", "heads"))
    head_dim = hidden // heads
    share = cast(float, 1.0 if known["rotary_share"] is None else known["rotary_share"])
    spec = ModelSpec(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=cast(int, known["kv_heads"] or heads),
        head_dim=head_dim,
        ffn=cast(int, known["ffn"] or 4 * hidden),
        vocab=0,
        max_positions=cast(int, stated.get("max_position_embeddings", stated.get("n_positions", 2048))),
        rotary_dim=cast(int, known["rotary_dim"]) if family == "gptj" else int(head_dim * share),
        rotary_base=cast(float, known["rotary_base"] or 10000.0),
        norm_eps=cast(float, known["norm_eps"]),
        activation="silu" if family == "llama" else "gelu",
        parallel_residual=family == "gptj" or bool(known["parallel_residual"]),
        tied_head=bool(known["tied_head"]),
        dtype=dtype,
        family=family,
    )
    return replace(spec, activation=stated_activation(folder, spec))
