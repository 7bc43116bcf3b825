"""Matplotlib for scripts that also run where it is not installed."""


def pyplot():
    """`matplotlib.pyplot` that draws to files, or None (and says so) without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
