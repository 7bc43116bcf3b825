"""Which kernels a change has given other machine code: two results of the static check compared."""

from collections.abc import Callable


def same_code(old: dict, new: dict) -> bool:
    """Whether two rows have the same machine code, or were made from the same PTX."""
    if old["arch"] != new["arch"] or "error" in old or "error" in new:
        return False
    return old["sass"] == new["sass"] or old["ptx"] == new["ptx"]


def same_name(old: dict, new: dict) -> bool:
    """Whether two rows are of the same kernel in the same configuration."""
    return all(old[key] == new[key] for key in ("arch", "kernel", "configuration"))


def compare_rows(old: list[dict], new: list[dict]) -> dict[str, list[str]]:
    """Descriptions of the kernels that are not as they were.

    Returns:
        "renamed": the same code under another name or configuration; "differ": other code under
        the same name and configuration; "gone" and "new": without a counterpart.
    """
    old, new = list(old), list(new)

    def pair(match: Callable[[dict, dict], bool]) -> list[str]:
        """Takes the pairs that match out of `old` and `new`."""
        found = []
        for row in list(new):
            counterpart = next((other for other in old if match(other, row)), None)
            if counterpart is not None:
                old.remove(counterpart)
                new.remove(row)
                found.append(describe(row))
        return found

    pair(lambda a, b: same_name(a, b) and same_code(a, b))
    renamed, differ = pair(same_code), pair(same_name)
    return {
        "renamed": renamed,
        "differ": differ,
        "gone": [describe(row) for row in old],
        "new": [describe(row) for row in new],
    }


def describe(row: dict) -> str:
    """A row's identity as text."""
    return f"{row['arch']} {row['kernel']} [{row['configuration']}]"
