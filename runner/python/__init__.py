"""The engine and the tokenizer, from the C++ extension `et_moe_engine`, see bindings.cpp.

An installed package has the extension in this folder. A tree of sources takes it from its build
folder: `build`, or what the environment variable `ET_MOE_BUILD_DIR` names.
"""

import os
from pathlib import Path

_BUILD = Path(os.environ.get("ET_MOE_BUILD_DIR", Path(__file__).parents[2] / "build"))
__path__.append(str(_BUILD / "runner" / "python"))

try:
    from et_moe.runner.python.et_moe_engine import (
        Engine,
        EngineBrokenError,
        InvalidRequestError,
        QueueFullError,
        Tokenizer,
    )
except ImportError as error:
    raise ImportError(
        f"the extension et_moe_engine cannot be loaded ({error}): run scripts/setup.sh, or build "
        "with -DET_MOE_PYTHON=ON"
    ) from error

__all__ = ["Engine", "EngineBrokenError", "InvalidRequestError", "QueueFullError", "Tokenizer"]
