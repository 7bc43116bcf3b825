#!/usr/bin/env bash
# Qwen3.5-35B-A3B at full size on one GPU, in one command: random weights of the true shape, the
# end-to-end benchmark, many sequences at once, INT8 against bf16 activations, the peers, and the kernels against those of
# the ExecuTorch wheel. Takes a folder made by scripts/pack_acceptance.sh and
# scripts/pack_full_size.sh; needs no network, 40 GB of disk, and a python3 with torch, triton and
# transformers. With FOLDER/llama-bench (benchmarks/peers/llama_cpp.py says how it is built)
# llama.cpp is a peer, too, for 20 GB more. Results go to FOLDER/results; of these
# `python -m et_moe.benchmarks report FOLDER/results` makes docs/results.md.
# Usage: scripts/gpu_full_size.sh FOLDER
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
folder=$(cd "${1:?usage: $0 FOLDER}" && pwd)
if [ ! -f "$folder/full_size/int8/model.pte" ]; then
  echo "$folder: no full-size programs: run scripts/pack_full_size.sh" >&2
  exit 2
fi
. "$repo/scripts/packed_environment.sh"
cd "$repo"
scratch=$folder/scratch results=$folder/results
mkdir -p "$scratch" "$results"
rm -f "$results/e2e.tsv"

et_moe() {  # also writes down how long it took
  local begin=$SECONDS
  python3 -m et_moe.pipeline.cli "$@"
  printf '%s\tet-moe %s\n' $((SECONDS - begin)) "${*//"$folder"/FOLDER}" >>"$results/e2e.tsv"
}
measure() {
  python3 -m et_moe.benchmarks "$@" || failed=1
}

et_moe make-checkpoint --preset 35b --quantized --recipe 4w --output-dir "$scratch/bundle"
et_moe export --prequantized "$scratch/bundle" --weights-only --backend cuda \
  --max-seq-len 4608 --output-dir "$scratch/program"
for activations in int8 bf16; do  # they differ in the code, not in the weights
  ln -sfn "$scratch/program/model.ptd" "$folder/full_size/$activations/model.ptd"
done

failed=0
measure e2e --runner "$folder/bin/qwen3_5_moe_runner" --model-dir "$scratch/bundle" \
  --program "int8=$folder/full_size/int8" --program "bf16=$folder/full_size/bf16" \
  --out "$results/e2e.json"
measure batch --runner "$folder/bin/qwen3_5_moe_runner" --model-dir "$scratch/bundle" \
  --program "$folder/full_size/int8" --out "$results/batch.json"
measure activations --bundle "$scratch/bundle" --out "$results/activations.json"
llama=()
if [ -x "$folder/llama-bench" ]; then
  llama=(--llama-bench "$folder/llama-bench" --gguf "$scratch/model.gguf")
fi
measure peers --e2e "$results/e2e.json" --prompts 1600 --out "$results/peers.json" "${llama[@]}"
measure kernels --out "$results/kernels.json"
exit $failed
