"""The settings of `lora: {...}`, and which layers of a family can be its targets."""

from collections.abc import Iterator
from difflib import get_close_matches

from pydantic import Field

from megatron_lite.config.kinds import Count, Positive, Section, Share, Texts

TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
# Our layers in the words of others: these together are that layer.
OTHER_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "neox": {"dense_h_to_4h": ("linear1",), "dense_4h_to_h": ("linear2",)},
    "gptj": {"query_key_value": ("q_proj", "k_proj", "v_proj"), "dense": ("out_proj",), "dense_h_to_4h": ("fc_in",), "dense_4h_to_h": ("fc_out",)},
    "llama": {
        "query_key_value": ("q_proj", "k_proj", "v_proj"),
        "dense": ("o_proj",),
        "dense_h_to_4h": ("up_proj", "gate_proj"),
        "dense_4h_to_h": ("down_proj",),
    },
}


class LoraSection(Section):
    """Low-rank adapters: what is trained instead of the weights. Every target gets B A x * alpha / rank added, with A [rank, inputs] and B [outputs, rank]."""

    rank: Count = Field(16, description="rows of A and columns of B")
    alpha: Positive = Field(32.0, description="what is added is scaled by alpha / rank")
    targets: Texts = Field(("query_key_value",), description="layers of every block that get an adapter")
    dropout: Share = Field(0.0, description="must be 0: dropout is not built")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def layers(self, family: str) -> tuple[str, ...]:
        """The targets under our names, in the order of TARGETS."""
        others = OTHER_NAMES[family]
        return tuple(name for name in TARGETS if name in self.targets or set(others.get(name, ("",))) <= set(self.targets))


def broken_targets(lora: LoraSection, family: str) -> Iterator[str]:
    """A sentence for every target that is no layer of this family, or only a part of one."""
    others = OTHER_NAMES[family]
    whole = {name: parts for parts in others.values() for name in parts}
    if not lora.targets:
        yield f"lora.targets is empty; name at least one of {', '.join(TARGETS)}"
    for name in lora.targets:
        if name in TARGETS or set(whole.get(name, ("",))) <= set(lora.targets):
            continue
        if name in whole:
            ours = next(ours for ours, parts in others.items() if parts == whole[name])
            yield f"lora.targets has {name}, which is one matrix with {_listed(whole[name], name)} here; name all of them, or {ours}"
        else:
            nearest = get_close_matches(name, [*TARGETS, *whole], n=1, cutoff=0.6)
            meant = f"did you mean {nearest[0]}? Known are" if nearest else "known are"
            yield f"lora.targets has {name}, which is no layer of a {family} model; {meant} {', '.join(TARGETS)}"
    if lora.dropout:
        yield f"lora.dropout is {lora.dropout}, but dropout is not built; set it to 0, or leave it out"


def _listed(names: tuple[str, ...], without: str) -> str:
    return " and ".join(name for name in names if name != without)
