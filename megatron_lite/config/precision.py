"""The number format of a run, from the three places where NeoX's files state it."""

from collections.abc import Mapping
from typing import get_args

from megatron_lite.config.kinds import shown
from megatron_lite.config.read import Setting
from megatron_lite.config.sections import Precision

BLOCKS: dict[str, Precision] = {"fp16": "fp16", "bf16": "bfloat16"}


def stated_precision(settings: Mapping[str, Setting]) -> tuple[Precision, list[str]]:
    """What `precision`, `fp16` and `bf16` ask for, fp32 if nothing; with a sentence for every contradiction.

    Of statements from several places the last place counts, as with any key.
    """
    statements: list[tuple[int, Precision, str]] = []
    problems: list[str] = []
    for key in ("precision", *BLOCKS):
        setting = settings.get(key)
        if setting is None or setting.value is None:
            continue
        if key in BLOCKS and not isinstance(setting.value, dict):
            problems.append(f"{setting.origin}: {key} needs a mapping such as {{enabled: true}}, found {shown(setting.value)}")
        elif (precision := _stated(key, setting.value)) is not None:
            statements.append((setting.source, precision, f"{key} ({setting.origin})"))
    if not statements:
        return "fp32", problems
    last = max(source for source, _, _ in statements)
    agreed: dict[Precision, str] = {precision: place for source, precision, place in statements if source == last}
    if len(agreed) > 1:
        found = " and ".join(f"{precision} by {place}" for precision, place in agreed.items())
        problems.append(f"the precision is stated twice: {found}; keep one")
    return next(iter(agreed)), problems


def _stated(key: str, value: object) -> Precision | None:
    if key == "precision":
        return next((precision for precision in get_args(Precision) if precision == value), None)  # another value is reported as a wrong type
    if not isinstance(value, dict) or value.get("enabled") is not True:
        return None
    # Files of NeoX 1.0 say bfloat16 inside of fp16.
    return "bfloat16" if value.get("type") == "bfloat16" else BLOCKS[key]


def without_other_precisions(deepspeed: Mapping[str, object], precision: Precision) -> dict[str, object]:
    """DeepSpeed's keys, less an fp16 or bf16 block that another setting overruled."""
    return {key: value for key, value in deepspeed.items() if _stated(key, value) in (None, precision)}
