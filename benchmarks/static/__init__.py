"""Machine code of every kernel for every architecture, made and checked without a GPU."""
