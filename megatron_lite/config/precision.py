"""The number format of a run, from the three places where NeoX's files state it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from megatron_lite.config.kinds import shown
from megatron_lite.config.read import Setting
from megatron_lite.config.sections import Precision, RunConfig
from megatron_lite.errors import ConfigError

BLOCKS: dict[str, Precision] = {"fp16": "fp16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Statement:
    """A number format, and the setting that asks for it."""

    precision: Precision
    setting: Setting


def stated_precision(stated: Mapping[str, Setting]) -> tuple[Statement | None, list[str]]:
    """What `precision`, `fp16` and `bf16` ask for, if anything; with a sentence for every contradiction.

    Of statements from several places the last place counts, as with any key.
    """
    settings = [stated[key] for key in ("precision", *BLOCKS) if key in stated and stated[key].value is not None]
    problems = [
        f"{setting.origin}: {setting.key} needs a mapping such as {{enabled: true}}, found {shown(setting.value)}"
        for setting in settings
        if setting.key in BLOCKS and not isinstance(setting.value, dict)
    ]
    statements = [Statement(precision, setting) for setting in settings if (precision := _asked(setting.key, setting.value))]
    if not statements:
        return None, problems
    last = max(statement.setting.source for statement in statements)
    agreed = [statement for statement in statements if statement.setting.source == last]
    if len({statement.precision for statement in agreed}) > 1:
        found = " and ".join(f"{statement.precision} by {statement.setting.key} ({statement.setting.origin})" for statement in agreed)
        problems.append(f"the number format is stated twice: {found}; keep one")
    return agreed[0], problems


def _asked(key: str, value: object) -> Precision | None:
    if key == "precision":  # a value that is none of them is reported as one of a wrong type
        return next((precision for precision in get_args(Precision) if precision == value), None)
    if key not in BLOCKS or not isinstance(value, dict) or not value.get("enabled"):
        return None
    # Files of NeoX 1.0 say bfloat16 inside of fp16.
    return "bfloat16" if value.get("type") == "bfloat16" else BLOCKS[key]


def check_trainable(config: RunConfig) -> None:
    """Raises ConfigError for weights that are held in a way that cannot be trained."""
    held = config.model.weight_quantization
    if held is not None and config.training.lora is None:
        raise ConfigError(
            f"weight_quantization is {held} ({config.where('weight_quantization')}), and lora is not set: weights of 8 bits stay as they are in a training, "
            "only adapters beside them can learn; set lora, for instance lora.rank=16, or weight_quantization=null to train all weights"
        )


def without_other_precisions(deepspeed: Mapping[str, object], precision: Precision) -> dict[str, object]:
    """DeepSpeed's keys, less an fp16 or bf16 block that another setting overruled."""
    return {key: value for key, value in deepspeed.items() if _asked(key, value) in (None, precision)}
