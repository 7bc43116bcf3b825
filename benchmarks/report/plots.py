"""Drawing, with matplotlib, which need not be installed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def drawing(path: Path, rows: int, columns: int, **options) -> Iterator[tuple]:
    """The figure and its panels, [rows, columns], for the block; then written to `path`.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("matplotlib is not installed: it draws the plots") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(rows, columns, squeeze=False, **options)
    try:
        yield figure, panels
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)
