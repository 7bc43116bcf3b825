#!/usr/bin/env bash
# Everything that can be tested without a GPU: linters, C++ tests, Python tests.
set -euo pipefail
cd "$(dirname "$0")/.."
# Two tests build much of this again, in folders of their own.
with_ccache=(env CMAKE_CXX_COMPILER_LAUNCHER=ccache)
"${with_ccache[@]}" scripts/setup.sh --for-tests
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
git ls-files '*.cpp' '*.h' | xargs clang-format --dry-run -Werror
# The CUDA delegate, the engine, the loader and the tokenizer are tested under AddressSanitizer and
# UBSan too.
cmake --preset sanitize -DPython3_EXECUTABLE="$PWD/.venv/bin/python" --log-level=WARNING
cmake --build --preset sanitize --target \
  async_engine_check delegate_check executorch_check fake_cuda load_files tokenizer_cli
ctest --test-dir build --output-on-failure --no-tests=error
# One worker more than CI has cores: they wait for other processes a fifth of the time.
"${with_ccache[@]}" python -m pytest -n 3 --dist worksteal --durations=15
