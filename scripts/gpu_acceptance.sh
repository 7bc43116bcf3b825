#!/usr/bin/env bash
# Everything that needs a GPU, in one command: tests of every op, models against the CPU's results,
# compute-sanitizer, benchmarks. Takes a folder made by scripts/pack_acceptance.sh; needs no network,
# but a python3 with torch, triton and transformers. Writes FOLDER/results/report.json and log.txt;
# exit code 0 if nothing failed. At most 9 minutes, with --quick 4.
# Usage: scripts/gpu_acceptance.sh [--quick] FOLDER
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
folder=${!#}
if [ $# -eq 0 ] || [ ! -f "$folder/manifest.json" ]; then
  echo "usage: $0 [--quick] FOLDER, a folder made by scripts/pack_acceptance.sh" >&2
  exit 2
fi
python3 - "$folder/manifest.json" <<'END'
import json, sys
packed, here = json.load(open(sys.argv[1]))["python"], "%d.%d" % sys.version_info[:2]
if packed != here:
    sys.exit(f"{sys.argv[1]}: its wheels are for Python {packed}, python3 is {here}")
END
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
ln -s "$repo" "$packages/et_moe"
for wheel in "$folder"/wheels/*.whl; do
  python3 -m zipfile -e "$wheel" "$packages"
done
PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}" python3 "$repo/scripts/gpu_acceptance.py" "$@"
