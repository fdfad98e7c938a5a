#!/usr/bin/env bash
# Checks and measures the GPU path on a machine that reaches no registry, in two halves:
#
#     benchmarks/gpu.sh carry [FOLDER]      here: what that machine lacks goes into FOLDER (.gpu)
#     benchmarks/gpu.sh run [FOLDER] [OUT]  there, from the repository: figures go into OUT/gpu.json (runs/gpu)
#
# FOLDER travels with the repository: what writes TOML for metaft, pytest, the peers, and Omniglot's pixels as one file (from
# $METAFT_DATA, where it is there). There Python is `python3`, here PYTHON or .venv/bin/python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

carry() {
  local folder=${1:-.gpu} python=${PYTHON:-.venv/bin/python}
  rm -rf "$folder/wheels" # two versions of a wheel would stop the installation there
  mkdir -p "$folder/wheels" "$folder/peers"
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --dest "$folder/wheels" typing-extensions tomli-w fonttools \
    pytest pluggy iniconfig packaging pygments \
    torchopt==0.7.3 optree==0.20.0 graphviz==0.21 higher==0.2.1
  # learn2learn has no wheel, and its data part is compiled; its algorithms are plain Python and need none of it.
  "$python" -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest "$folder" learn2learn==0.2.0
  tar -xzf "$folder"/learn2learn-0.2.0.tar.gz -C "$folder"
  rm -rf "$folder"/peers/learn2learn
  mkdir "$folder"/peers/learn2learn "$folder"/peers/learn2learn/algorithms
  cp "$folder"/learn2learn-0.2.0/learn2learn/utils/__init__.py "$folder"/peers/learn2learn/utils.py
  cp "$folder"/learn2learn-0.2.0/learn2learn/algorithms/{base_learner,maml}.py "$folder"/peers/learn2learn/algorithms/
  echo 'from learn2learn import algorithms, utils' > "$folder"/peers/learn2learn/__init__.py
  echo 'from learn2learn.algorithms.maml import MAML' > "$folder"/peers/learn2learn/algorithms/__init__.py
  rm -rf "$folder"/learn2learn-0.2.0*
  if [ -n "${METAFT_DATA:-}" ]; then
    "$python" -m benchmarks.gpu --pack "$folder/omniglot.npz"
  else
    echo "METAFT_DATA is not set: Omniglot stays behind, and its section will be skipped" >&2
  fi
  du -sh "$folder"
}

run() {
  local folder=${1:-.gpu} out=${2:-runs/gpu}
  python3 -m pip install --quiet --no-index --no-deps --no-compile --target /tmp/metaft-gpu-site --upgrade \
    "$folder"/wheels/*.whl
  export PYTHONPATH=$PWD:/tmp/metaft-gpu-site METAFT_PEERS=$PWD/$folder/peers
  python3 -m benchmarks.gpu --out "$out" --omniglot "$folder/omniglot.npz"
}

case ${1:-} in
  carry | run) "$@" ;;
  *)
    sed -n '2,9p' "$0"
    exit 2
    ;;
esac
