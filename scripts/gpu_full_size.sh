#!/usr/bin/env bash
# Qwen3.5-35B-A3B at full size on one GPU, in one command, with random weights of the true shape. Takes
# a folder made by scripts/pack_acceptance.sh and scripts/pack_full_size.sh; needs no network, 70 GB of
# disk, and a python3 with torch, triton and transformers. With FOLDER/llama-bench
# (benchmarks/peers/llama_cpp.py says how it is built) llama.cpp is a peer, too, for 20 GB more.
# Results go to FOLDER/results; of the first five `python -m et_moe.benchmarks report FOLDER/results`
# makes docs/results.md. What is measured, all of it or what is named:
#   e2e          one sequence: prefill and decode with INT8 and bf16 activations
#   batch        many sequences at once
#   activations  INT8 against bf16 activations
#   peers        other engines (after e2e)
#   kernels      the kernels, against those of the ExecuTorch wheel
#   drafts       one to four sequences without and with drafts
#   state        256 sequences with a recurrent state of bfloat16
#   second_turn  the first token of a conversation of 32,000 tokens that goes on with 32 more
#   mixed        one sequence with the recipe "mixed"
# Usage: scripts/gpu_full_size.sh FOLDER [MEASUREMENT...]
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
usage="usage: $0 FOLDER [MEASUREMENT...]"
folder=$(cd "${1:?$usage}" && pwd)
wanted=("${@:2}")
[ ${#wanted[@]} -gt 0 ] ||
  wanted=(e2e batch activations peers kernels drafts state second_turn mixed)
. "$repo/scripts/full_size_programs.sh"
. "$repo/scripts/packed_environment.sh"
cd "$repo"
scratch=$folder/scratch results=$folder/results runner=$folder/bin/qwen3_5_moe_runner
failed=0

empty_scratch() {
  rm -rf "$scratch"
  mkdir -p "$scratch"
  cp "$folder/manifest.json" "$scratch"
}
mkdir -p "$results"
# What another packing has left does not fit.
cmp -s "$folder/manifest.json" "$scratch/manifest.json" || empty_scratch

et_moe() { # also writes down how long it took, for the page that e2e is on
  local begin=$SECONDS
  python3 -m et_moe.pipeline.cli "$@"
  case "$*" in
    *"--draft-tokens 1"* | *"--draft-tokens 2"* | *mixed*) return ;;
  esac
  printf '%s\tet-moe %s\n' $((SECONDS - begin)) "${*//"$folder"/FOLDER}" >>"$results/e2e.tsv"
}

# The bundle of a recipe. There is room for one: that of another recipe goes, with its weights.
bundle() {
  [ -f "$scratch/$1/config.json" ] && return # it is written last
  empty_scratch
  [ "$1" = mixed ] || rm -f "$results/e2e.tsv"
  et_moe make-checkpoint --preset 35b --mtp --quantized --recipe "$1" --output-dir "$scratch/$1"
}

# Weights for a program. Programs that differ in the code alone share them; those with drafts, which
# have weights of their own, give them back with `give_back`.
weights() {
  local name=$1 count=${drafts[$1]:-0} of=${recipe[$1]:-4w}
  local target=$scratch/weights-$of-$count
  if [ ! -f "$folder/full_size/$name/model.pte" ]; then
    echo "$folder: no program $name: run scripts/pack_full_size.sh" >&2
    exit 2
  fi
  bundle "$of"
  [ -f "$target/model.ptd" ] || et_moe export --prequantized "$scratch/$of" --weights-only \
    --backend cuda --max-seq-len 4608 --draft-tokens "$count" --output-dir "$target"
  ln -sfn "$target/model.ptd" "$folder/full_size/$name/model.ptd"
}
give_back() { rm -rf "$scratch/weights-4w-$1"; }

measure() { # COMMAND RESULT FLAGS...
  python3 -m et_moe.benchmarks "$1" --out "$results/$2.json" "${@:3}" || failed=1
}
batch() { # RESULT PROGRAM FLAGS...
  weights "$2"
  measure batch "$1" --runner "$runner" --model-dir "$scratch/${recipe[$2]:-4w}" \
    --program "$folder/full_size/$2" "${@:3}"
}
single() { # RESULT PROGRAM...
  local programs=() name activations
  for name in "${@:2}"; do
    weights "$name"
    activations=int8
    [ "$name" = bf16 ] && activations=bf16
    programs+=(--program "$activations=$folder/full_size/$name")
  done
  measure e2e "$1" --runner "$runner" --model-dir "$scratch/${recipe[$2]:-4w}" "${programs[@]}"
}

few=(--load 1:1600:512 --load 2:1600:512 --load 4:1600:512 --profile)
for what in "${wanted[@]}"; do
  case $what in
    e2e) single e2e int8 bf16 ;;
    batch) batch batch int8 ;;
    activations)
      bundle 4w
      measure activations activations --bundle "$scratch/4w"
      ;;
    peers)
      llama=()
      [ -x "$folder/llama-bench" ] &&
        llama=(--llama-bench "$folder/llama-bench" --gguf "$folder/model.gguf")
      measure peers peers --e2e "$results/e2e.json" --prompts 1600 "${llama[@]}"
      ;;
    kernels) measure kernels kernels ;;
    drafts)
      batch few int8 "${few[@]}"
      for count in 1 2; do
        batch "drafts$count" "drafts$count" "${few[@]}"
        give_back "$count"
      done
      ;;
    state) batch state state --load 256:1700:600 --profile ;;
    second_turn) batch second_turn long --load 1:32032:32 --prefix-cache ;;
    mixed) single mixed mixed ;;
    *)
      echo "$what: no such measurement; $usage" >&2
      exit 2
      ;;
  esac
done
exit $failed
