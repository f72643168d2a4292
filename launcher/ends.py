"""What exit codes say of processes, or of hosts, that were asked to stop: None runs, 0 has ended well, 75 has saved, negative is a signal."""

from collections.abc import Hashable, Mapping
from signal import Signals
from typing import TypeVar

from launcher.job import SIGNALS, SIGNALS_OF_SAVERS
from megatron_lite.errors import INTERRUPTED

STOPS = frozenset(sign * Signals[name] + shift for name in (*SIGNALS, *SIGNALS_OF_SAVERS) for sign, shift in ((-1, 0), (1, 128)))
Key = TypeVar("Key", bound=Hashable)


def failures(codes: Mapping[Key, int | None]) -> dict[Key, int]:
    """Those that failed instead of stopping. Where one stopped without a save the complaints of its neighbours follow from that, and are none."""
    if is_stopped(codes):
        return {}
    return {key: code for key, code in codes.items() if code not in {None, 0, INTERRUPTED, *STOPS} and code is not None}


def stopped(codes: Mapping[Key, int | None], received: Signals) -> Mapping[Key, int] | Signals:
    """What became of those that were asked to stop and have not failed: 75 where they have saved, nothing where all were done, else the signal."""
    if INTERRUPTED in codes.values():
        return dict.fromkeys(codes, INTERRUPTED)
    return {} if set(codes.values()) == {0} else received


def is_stopped(codes: Mapping[Key, int | None]) -> bool:
    """Whether a signal ended one of them and nobody has saved. All save together or none does, so that no other will."""
    return INTERRUPTED not in codes.values() and any(code in STOPS for code in codes.values())
