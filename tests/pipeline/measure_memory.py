"""Peak resident memory of calibrating, quantizing and exporting checkpoints of 2 and 4 wide layers.

Usage: measure_memory.py DIRECTORY; prints {task: {layers: bytes}} and the bytes of a layer as JSON.
Each task runs in a fork of this process, so that their peaks do not hide each other.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoints import storages

from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline.bundle import Bundle, write_bundle
from et_moe.pipeline.calibrate import Calibration
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.export import ExportOptions, export
from et_moe.pipeline.make_checkpoint import make_checkpoint
from et_moe.pipeline.quantize import QuantizedCheckpoint

LAYERS = (2, 4)
WIDE = {
    "hidden_size": 512,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_experts": 40,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}


def peak_memory(task: Callable[[], None]) -> int:
    """The largest resident set of a process that runs `task`, in bytes."""
    child = os.fork()
    if child == 0:
        try:
            task()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    assert status == 0
    return usage.ru_maxrss * 1024


def main() -> None:
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    peaks: dict[str, dict[int, int]] = {"calibrate": {}, "quantize": {}, "export": {}}
    for layers in LAYERS:
        checkpoint, bundle = directory / f"checkpoint{layers}", directory / f"bundle{layers}"
        kinds = ["linear_attention", "full_attention"] * (layers // 2)
        arguments = (checkpoint, MODEL, "tiny", 0, None, WIDE | {"layer_types": kinds})
        peak_memory(lambda arguments=arguments: make_checkpoint(*arguments))

        def quantize(checkpoint=checkpoint, bundle=bundle) -> None:
            source = QuantizedCheckpoint(Checkpoint(checkpoint), storages("4w", 32), "minmax")
            write_bundle(source, bundle)

        def run_export(bundle=bundle, output=directory / f"program{layers}") -> None:
            export(Bundle(bundle), output, ExportOptions(max_seq_len=32))

        def calibrate(checkpoint=checkpoint) -> None:
            Calibration(Checkpoint(checkpoint), torch.zeros(2, 32, dtype=torch.int64)).run()

        peaks["calibrate"][layers] = peak_memory(calibrate)
        peaks["quantize"][layers] = peak_memory(quantize)
        peaks["export"][layers] = peak_memory(run_export)
    layer = (directory / "checkpoint4" / "model-00001-of-00001.safetensors").stat().st_size // 4
    print(json.dumps(peaks | {"layer": layer}))


if __name__ == "__main__":
    main()
