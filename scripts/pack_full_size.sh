#!/usr/bin/env bash
# Adds the programs of Qwen3.5-35B-A3B and the wheels of the peers to a folder made by
# scripts/pack_acceptance.sh, for scripts/gpu_full_size.sh. The programs (all of
# scripts/full_size_programs.sh, or those that are named) are compiled from the shape alone, which
# takes about 3 minutes each on two cores.
# Usage: scripts/pack_full_size.sh FOLDER [ARCHS [PROGRAM...]]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
folder=${1:?usage: $0 FOLDER [ARCHS [PROGRAM...]]}
. scripts/full_size_programs.sh
programs=("${@:3}")
[ ${#programs[@]} -gt 0 ] || programs=("${!flags[@]}")
for name in "${programs[@]}"; do
  [ -n "${flags[$name]:-}" ] || { echo "$name: no such program: ${!flags[*]}" >&2; exit 2; }
done
[ -f "$folder/manifest.json" ] || { echo "$folder: not made by pack_acceptance.sh" >&2; exit 2; }
python=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["python"])' \
  "$folder/manifest.json")
# What the ExecuTorch wheel's kernels and model import, as far as torch does not bring it.
mapfile -t peers < <(python -c 'from importlib.metadata import version
print(*(f"{name}=={version(name)}" for name in ("executorch", "ruamel.yaml", "tabulate")), sep="\n")')
python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --implementation cp --python-version "$python" --platform manylinux_2_28_x86_64 \
  --dest "$folder/wheels" "${peers[@]}" \
  flash-linear-attention==0.4.2 fla-core==0.4.2 einops==0.8.2
for name in "${programs[@]}"; do
  # shellcheck disable=SC2086  # several flags
  et-moe export --preset 35b --recipe "${recipe[$name]:-4w}" --graph-only --backend cuda \
    --cuda-arch "${2:-sm_90}" --draft-tokens "${drafts[$name]:-0}" ${flags[$name]} \
    --output-dir "$folder/full_size/$name"
done
