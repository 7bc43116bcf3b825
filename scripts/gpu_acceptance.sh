#!/usr/bin/env bash
# Everything that needs a GPU, in one command: tests of every op, models against the CPU's results,
# compute-sanitizer, benchmarks. Takes a folder made by scripts/pack_acceptance.sh; needs no network,
# but a python3 with torch, triton and transformers. Writes FOLDER/results/acceptance.json and log.txt;
# exit code 0 if nothing failed. At most 9 minutes, with --quick 4.
# Usage: scripts/gpu_acceptance.sh [--quick] FOLDER
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
folder=${!#}
if [ $# -eq 0 ] || [ ! -f "$folder/manifest.json" ]; then
  echo "usage: $0 [--quick] FOLDER, a folder made by scripts/pack_acceptance.sh" >&2
  exit 2
fi
. "$repo/scripts/packed_environment.sh"
python3 "$repo/scripts/gpu_acceptance.py" "$@"
