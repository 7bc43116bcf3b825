"""What `scripts/gpu_acceptance.sh` found, as a part of the page."""

from et_moe.benchmarks.report.markdown import source, table


def _found(step: dict) -> str:
    """The outcome of a step in a few words."""
    found = step["found"]
    if step["name"] == "kernel tests" and found:
        return f"{found['passed']} tests passed, {found['failed']} failed"
    if step["name"] == "models" and found:
        wrong = [check for check in found["checks"] if check["error"]]
        models = {check["model"] for check in found["checks"]}
        return f"{len(found['checks'])} checks of {len(models)} models, {len(wrong)} failed"
    if step["name"] == "compute-sanitizer" and found:
        runs = (f"{run['tool']} ({run['mode']}): {run['summary'][0]}" for run in found["runs"])
        return "; ".join(runs)
    return ""


def condense(result: dict) -> dict:
    """The report of the acceptance run without what its steps printed."""
    steps = [
        {key: step[key] for key in ("name", "status", "reason", "seconds")}
        | {"found": _found(step)}
        for step in result["steps"]
    ]
    return {key: value for key, value in result.items() if key != "packed"} | {"steps": steps}


def section(result: dict) -> list[str]:
    """Markdown of a condensed report."""
    rows = [
        [s["name"], s["status"], s["found"] or s["reason"] or "", f"{s['seconds']:.0f}"]
        for s in result["steps"]
    ]
    return [
        "## Acceptance on the GPU",
        "",
        *source(result),
        f"The run {result['status']}. It compares programs of the demo model and of random ones, "
        "with and without CUDA graphs, with the CPU's tokens and logits.",
        "",
        *table(("step", "outcome", "found", "seconds"), rows, text_columns=3),
    ]
