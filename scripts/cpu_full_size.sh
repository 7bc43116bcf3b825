#!/usr/bin/env bash
# Qwen3.5-35B-A3B at full size on this machine's CPU, in one command: random weights of the true
# shape, the program, and the end-to-end benchmark. Needs what scripts/setup.sh makes, 24 GB of memory
# and 40 GB of disk. Results go to FOLDER/results; of these
# `python -m et_moe.benchmarks report FOLDER/results` makes a part of docs/results.md.
# Usage: scripts/cpu_full_size.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
mkdir -p "${1:?usage: $0 FOLDER}/results"
folder=$(cd "$1" && pwd)
rm -f "$folder/results/e2e_cpu.tsv"

et_moe() {  # also writes down how long it took
  local begin=$SECONDS
  et-moe "$@"
  printf '%s\tet-moe %s\n' $((SECONDS - begin)) "${*//"$folder"/FOLDER}" \
    >>"$folder/results/e2e_cpu.tsv"
}

et_moe make-checkpoint --preset 35b --quantized --recipe 4w --output-dir "$folder/bundle"
et_moe export --prequantized "$folder/bundle" --max-seq-len 1024 --output-dir "$folder/program"
python -m et_moe.benchmarks e2e --program "int8=$folder/program" --model-dir "$folder/bundle" \
  --prompts 128 --new-tokens 64 --warmup 1 --num-iters 3 --out "$folder/results/e2e_cpu.json"
