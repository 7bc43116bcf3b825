"""The code that measures the project and checks its machine code: `python -m et_moe.benchmarks`."""
