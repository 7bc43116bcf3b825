#!/usr/bin/env bash
# Makes the folder that scripts/gpu_acceptance.sh takes, on a machine that needs no GPU.
# Usage: scripts/pack_acceptance.sh [--cuda-arch sm_90,sm_80] FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
exec python scripts/pack_acceptance.py "$@"
