# Gives python3 our packages. Source it with `repo` and `folder` (made by pack_acceptance.sh) set.
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
export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
# This tells the commit of sources that were copied without history: see benchmarks/result.py.
ET_MOE_MANIFEST=$(realpath "$folder/manifest.json")
export ET_MOE_MANIFEST
# Triton's own assembler may be one that makes wrong code: see `ptxas` in backends/cuda/gpu.py.
toolkit=${CUDA_HOME:-/usr/local/cuda}/bin/ptxas
if [ -x "$toolkit" ]; then
  export TRITON_PTXAS_PATH=${TRITON_PTXAS_PATH:-$toolkit}
fi
