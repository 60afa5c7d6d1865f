"""What `from_pretrained` says of what it loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmray.errors import CheckpointError


def check_complete(info: Mapping[str, Any], location: object) -> None:
    """Raises CheckpointError where the files lack weights of the model, which transformers fills with noise.

    info: what `output_loading_info=True` gives.
    """
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise CheckpointError(f"{location}: lacks weights of the model: {missing}")
