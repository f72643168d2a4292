"""What is said of a file of weights that cannot be opened: that it is not there, may not be read, or is damaged."""

import os
from pathlib import Path

from megatron_lite.errors import CheckpointError


def unopened(path: Path, error: Exception) -> CheckpointError:
    """The sentence for a file whose opening ended in this error, whatever the error itself says: libraries call a forbidden file missing."""
    if not os.access(path, os.F_OK, effective_ids=True):
        return CheckpointError(f"{path} is missing; fetch it again")
    if not os.access(path, os.R_OK, effective_ids=True):
        return CheckpointError(f"{path} cannot be read: Permission denied; check its permissions")
    reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0][:120]
    return CheckpointError(f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged ({reason}); fetch it again")
