"""Checkpoint formats: how a weight stands in the files of a checkpoint. One file each.

A format says which stored tensors make up a weight, and reads it from them. Adding one takes a file
here and a line in `FORMATS`.
"""

from collections.abc import Mapping
from typing import Any

from et_moe.pipeline.formats.format import Format
from et_moe.pipeline.formats.unquantized import Unquantized

FORMATS: tuple[type[Format], ...] = (Unquantized,)
"""The first that matches a configuration is taken."""


def format_for(config: Mapping[str, Any]) -> Format:
    """The format of a checkpoint with this `config.json`."""
    return next(kind for kind in FORMATS if kind.matches(config))()
