"""What is asked of compiled kernels: no spills, shared memory that the GPU has, tensor-core
instructions, and weights that are loaded 16 bytes at a time."""

from et_moe.backends.cuda.gpu import gpu_for
from et_moe.benchmarks.static.collect import Demands, Job


def faults(job: Job, demands: Demands, row: dict) -> list[str]:
    """What is wrong with a compiled kernel."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["spilled_bytes"]:
        found.append(f"{row['spilled_bytes']} bytes spilled")
    limit = gpu_for(job.arch).shared_memory_per_block
    if row["shared_memory"] > limit:
        found.append(f"{row['shared_memory']} bytes of shared memory, {limit} available")
    wanted = "wgmma.mma_async" if demands.wgmma and job.arch == "sm_90" else None
    if demands.tensor_cores and not (row["int8_mma"] and row["tensor_instructions"]):
        found.append("no int8 tensor-core instructions")
    elif wanted and wanted not in row["int8_mma"]:
        found.append(f"no int8 {wanted}")
    for name in sorted(demands.streams):
        widths = row["load_widths"].get(name, [])
        if not widths or min(widths) < 16:
            found.append(f"{name} is loaded {widths or 'never'} bytes at a time, expected 16")
    return found
