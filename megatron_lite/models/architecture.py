"""What every file in models/ offers, and which of them a configuration describes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from torch import nn

from megatron_lite.errors import ConfigError
from megatron_lite.models.spec import ModelSpec
from megatron_lite.models.weights import WeightMap
from megatron_lite.parallel.mesh import Axis

LayerPlan = dict[int, "partial[nn.Module]"]
"""Layer number -> class and arguments, not yet built. Numbers are those of NeoX's files."""


@dataclass(frozen=True)
class Architecture:
    """One family of models: its layers, and its names, config.json and model_type in Hugging Face folders."""

    name: str
    plan: Callable[[ModelSpec, Axis], LayerPlan]
    huggingface: Callable[[ModelSpec], WeightMap]
    config: Callable[[ModelSpec], dict[str, object]]
    model_type: str


ARCHITECTURES = {name: f"megatron_lite.models.{name}" for name in ("neox", "gptj", "llama")}


def architecture_named(name: str) -> Architecture:
    """The architecture of that name; raises ConfigError for one that is not built."""
    if name not in ARCHITECTURES:
        raise ConfigError(f"the configuration describes a {name} model; this version builds {', '.join(ARCHITECTURES)}")
    return import_module(ARCHITECTURES[name]).ARCHITECTURE
