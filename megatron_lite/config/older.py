"""Settings that older files state in other units, restated as NeoX has them now."""

from collections.abc import Mapping
from dataclasses import replace

from megatron_lite.config.keys import RESTATED
from megatron_lite.config.kinds import shown
from megatron_lite.config.read import Setting


def restated(stated: Mapping[str, Setting]) -> tuple[dict[str, Setting], list[str]]:
    """The same settings with `warmup` for warmup_iters and `min_lr` for decay_lr_to; with a sentence where that cannot be done."""
    steps = _number(stated, "lr_decay_iters") or _number(stated, "train_iters")
    values = {
        "warmup_iters": ("warmup", _quotient(_number(stated, "warmup_iters"), steps), "lr_decay_iters or train_iters"),
        "decay_lr_to": ("min_lr", _product(_number(stated, "decay_lr_to"), _learning_rate(stated)), "optimizer: {params: {lr: ...}}"),
    }
    settings = {key: setting for key, setting in stated.items() if key not in RESTATED}
    problems: list[str] = []
    for older, (key, value, needed) in values.items():
        if older not in stated:
            continue
        old = stated[older]
        if key in settings:
            problems.append(f"{old.origin}: {older} says the same thing as {key} ({settings[key].origin}); keep one")
        elif value is None:
            problems.append(f"{old.origin}: {older} needs a number, and {needed} beside it, found {shown(old.value)}; or state {key} instead")
        else:
            settings[key] = replace(old, key=key, value=value)
    return settings, problems


def _number(stated: Mapping[str, Setting], key: str) -> float | None:
    return _as_number(stated[key].value) if key in stated else None


def _learning_rate(stated: Mapping[str, Setting]) -> float | None:
    """The learning rate among the optimizer's parameters."""
    optimizer = stated["optimizer"].value if "optimizer" in stated else None
    parameters = optimizer.get("params") if isinstance(optimizer, dict) else None
    return _as_number(parameters.get("lr")) if isinstance(parameters, dict) else None


def _as_number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _quotient(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _product(share: float | None, whole: float | None) -> float | None:
    return share * whole if share is not None and whole is not None else None
