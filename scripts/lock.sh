#!/usr/bin/env bash
# Renews requirements/: all Python packages of the extras below, pinned and with hashes,
# for Python 3.11 to 3.13 on x86-64 Linux. Versions stay where pyproject.toml still allows them; with
# --upgrade they become the newest that it allows.
#   lock.txt         everything but torch
#   torch-cuda.txt   PyPI's build of torch, and the CUDA libraries that it loads
#   torch-cpu.txt    a build without them, for whoever has an index with one: PyPI has none
set -euo pipefail
cd "$(dirname "$0")/.."

# The version of torch, and the sha256 of its wheels for CPUs (Python 3.11).
torch=2.13.0
cpu_hashes=(6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'uv==0.13.*'

# uv reads its settings from the project of the folder that it runs in. What builds this project is
# locked with what it needs.
mkdir "$scratch/cuda" "$scratch/cpu"
python3 -c 'import tomllib
with open("pyproject.toml", "rb") as file:
    print("\n".join(tomllib.load(file)["build-system"]["requires"]))' >"$scratch/build.in"
cat pyproject.toml - >"$scratch/cuda/pyproject.toml" <<'TOML'

[tool.uv]
environments = ["python_version < '3.14' and sys_platform == 'linux' and platform_machine == 'x86_64'"]
TOML
cat "$scratch/cuda/pyproject.toml" - >"$scratch/cpu/pyproject.toml" <<'TOML'

# What a CPU build says that it needs.
[[tool.uv.dependency-metadata]]
name = "torch"
requires-dist = [
  "filelock", "fsspec>=0.8.5", "jinja2", "networkx>=2.5.1", "setuptools>=77.0.3", "sympy>=1.13.3",
  "typing-extensions>=4.10.0",
]
TOML
for name in cpu cuda; do cp "$scratch/build.in" "$scratch/$name"; done

# All of pyproject.toml but ray, which is large and which one test file needs.
extras=(--extra build --extra cuda --extra dev --extra export --extra serve)

# Usage: lock FOLDER OUTPUT OPTION...
lock() {
  (cd "$scratch/$1" && "$scratch/venv/bin/uv" pip compile --quiet --universal --python-version 3.11 \
    --generate-hashes --system-certs "${extras[@]}" --custom-compile-command scripts/lock.sh \
    --output-file "$2" "${@:3}" pyproject.toml build.in)
}

mkdir -p requirements
cp requirements/lock.txt "$scratch/cpu" 2>/dev/null || true
lock cpu lock.txt --no-emit-package torch "$@"
mapfile -t locked < <(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package=\1/p' "$scratch/cpu/lock.txt" | sort -u)
lock cuda torch-cuda.txt --constraints "$scratch/cpu/lock.txt" --no-annotate "${locked[@]}"
grep -q "^torch==$torch " "$scratch/cuda/torch-cuda.txt" || {
  echo "lock: pyproject.toml asks for another torch than $torch: renew cpu_hashes in scripts/lock.sh" >&2
  exit 1
}
cp "$scratch/cpu/lock.txt" "$scratch/cuda/torch-cuda.txt" requirements/
echo "torch==$torch+cpu ${cpu_hashes[*]/#/--hash=sha256:}" >requirements/torch-cpu.txt
