"""Checkpoints by the name that they have on the Hugging Face hub."""

from pathlib import Path

from et_moe.pipeline.bundle import COPIED_FILES
from et_moe.pipeline.checkpoint import INDEX, SINGLE, indexed_files
from et_moe.pipeline.config import ConfigError

_SMALL = ("config.json", *COPIED_FILES, INDEX)


def download(model_id: str) -> Path:
    """Downloads the files of a checkpoint that are read, or finds them in the hub's cache.

    huggingface_hub shows the progress, resumes what was cut off, and heeds HF_ENDPOINT, HF_TOKEN
    and HF_HOME.

    Args:
        model_id: "ORG/NAME".

    Returns:
        The directory with the files.

    Raises:
        ConfigError: there is no such checkpoint, no access to it, or no connection.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(snapshot_download(model_id, allow_patterns=list(_SMALL)))
        weights = indexed_files(folder / INDEX) if (folder / INDEX).is_file() else [SINGLE]
        return Path(snapshot_download(model_id, allow_patterns=[*_SMALL, *weights]))
    except (HfHubHTTPError, HFValidationError, OSError) as e:
        reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise ConfigError(f"--model-id {model_id}: {reason}") from None
