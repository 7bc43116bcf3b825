#!/usr/bin/env bash
# From a fresh Linux machine to .venv and build/runner/qwen3_5_moe_runner. Run it again at any time:
# what is up to date stays. With ET_MOE_APT=no, which demo.sh and test.sh pass on, no system package is
# installed: those that are missing are named, and it ends. `--for-tests` installs what tests alone
# need, too.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(g++ python3-dev python3-venv libpcre2-dev libutf8proc-dev nlohmann-json3-dev libcli11-dev
  libxxhash-dev libsodium-dev libgtest-dev)
if [ "${1:-}" = --for-tests ]; then
  packages+=(ccache)
  # A browser for the page's tests, which are skipped where there is none. Only Debian has this package.
  if grep -qs '^ID=debian' /etc/os-release; then packages+=(chromium-headless-shell); fi
fi
python_headers='import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'

install_system_packages() {
  local missing=()
  for package in "${packages[@]}"; do
    case $package in
      g++) command -v g++ >/dev/null || missing+=("$package") ;;
      ccache) command -v ccache >/dev/null || missing+=("$package") ;;
      python3-dev) python3 -c "$python_headers" 2>/dev/null || missing+=("$package") ;;
      python3-venv) python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=("$package") ;;
      *) dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package") ;;
    esac
  done
  [ ${#missing[@]} -eq 0 ] && return
  if [ "${ET_MOE_APT:-yes}" = no ]; then
    echo "setup: these system packages are missing, and ET_MOE_APT=no says not to install them:" >&2
    echo "  apt-get install ${missing[*]}" >&2
    exit 1
  fi
  local sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    if ! sudo -n true 2>/dev/null; then
      echo "setup: these system packages are missing, and installing them needs root:" >&2
      echo "  sudo apt-get install ${missing[*]}" >&2
      exit 1
    fi
    sudo=(sudo -n)
  fi
  echo "setup: apt-get installs ${missing[*]} (ET_MOE_APT=no refuses)"
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
}

install_python_packages() {
  if ! python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'; then
    echo "setup: python3 is $(python3 --version 2>&1), expected 3.11, 3.12 or 3.13" >&2
    exit 1
  fi
  [ -x .venv/bin/python ] || python3 -m venv .venv
  local stamp
  stamp=$(cat pyproject.toml requirements/*.txt | sha256sum)
  [ "$(cat .venv/et_moe_stamp 2>/dev/null)" = "$stamp" ] && return
  echo "setup: installing Python packages into .venv"
  # First all that scripts/lock.sh has locked is installed, checked by hash, and then the project.
  local install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps
    --no-compile)
  local locked=("${install[@]}" --require-hashes --requirement)
  "${locked[@]}" requirements/lock.txt
  # The CPU build is taken where pip's indices have it.
  "${locked[@]}" requirements/torch-cpu.txt 2>/dev/null || "${locked[@]}" requirements/torch-cuda.txt
  "${install[@]}" --no-build-isolation --editable .
  # What pip would do on one core. Some packages have files for other versions of Python.
  .venv/bin/python -m compileall -qq -j 0 .venv/lib/python*/site-packages || true
  echo "$stamp" >.venv/et_moe_stamp
}

build_runner() {
  export PATH="$PWD/.venv/bin:$PATH"
  cmake --preset release -DPython3_EXECUTABLE="$PWD/.venv/bin/python" --log-level=WARNING
  cmake --build --preset release
}

install_system_packages
install_python_packages
build_runner
