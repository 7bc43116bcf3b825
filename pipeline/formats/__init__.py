"""Checkpoint formats: how a weight stands in the files of a checkpoint. One file each.

A format says which stored tensors make up a weight, and reads it from them. Adding one takes a file
here and a line in `FORMATS`.
"""

from et_moe.pipeline.formats.compressed_tensors import CompressedTensors
from et_moe.pipeline.formats.executorch import ExecuTorch
from et_moe.pipeline.formats.format import Contents, Format
from et_moe.pipeline.formats.fp8 import BlockFp8
from et_moe.pipeline.formats.gptq import Gptq
from et_moe.pipeline.formats.unquantized import Unquantized

FORMATS: tuple[type[Format], ...] = (
    ExecuTorch,
    BlockFp8,
    Gptq,
    CompressedTensors,
    Unquantized,
)
"""The first that matches a checkpoint is taken."""


def format_for(contents: Contents) -> Format:
    """The format of a checkpoint with these contents.

    Raises:
        ConfigError: a format or a variant of one that is not supported.
    """
    return next(kind for kind in FORMATS if kind.matches(contents))(contents)
