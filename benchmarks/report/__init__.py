"""docs/results.md and its plots, made of the results."""
