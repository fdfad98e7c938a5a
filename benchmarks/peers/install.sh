#!/usr/bin/env bash
# Installs the libraries that benchmarks/throughput.py measures metaft against into a folder of their own:
#
#     benchmarks/peers/install.sh [DEST]      DEST: $METAFT_PEERS or benchmarks/peers/.site, where the benchmark looks
#
# Nothing outside DEST changes, torch least of all: each package is installed without what it depends on, and what is
# missing then is named below. PYTHON is the interpreter that will run the benchmark (default: .venv/bin/python).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$here/../../.venv/bin/python}
dest=${1:-${METAFT_PEERS:-$here/.site}}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

mkdir -p "$dest"
dest=$(cd "$dest" && pwd)

into_dest() { "$python" -m pip install --quiet --no-deps --upgrade --target "$dest" "$@"; }

echo "higher and TorchOpt, with the optree and graphviz that TorchOpt imports; easyfsl, of which its methods alone"
into_dest higher==0.2.1 torchopt==0.7.3 optree==0.20.0 graphviz==0.21 easyfsl==1.5.0

# learn2learn's last release holds C files that an old Cython wrote; they do not compile on Python 3.11 and newer
# (learn2learn#413), and are written anew here.
echo "learn2learn, rebuilt"
"$python" -m venv "$scratch/venv"
builder=$scratch/venv/bin/python
"$builder" -m pip install --quiet 'setuptools<81' wheel 'Cython<3' numpy
"$builder" -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest "$scratch" learn2learn==0.2.0
tar -xzf "$scratch"/learn2learn-0.2.0.tar.gz -C "$scratch"
(
  cd "$scratch/learn2learn-0.2.0"
  rm -f learn2learn/data/*.c
  "$builder" setup.py --quiet build_ext bdist_wheel > "$scratch/build.log" 2>&1 || {
    cat "$scratch/build.log" >&2
    exit 1
  }
)
into_dest "$scratch"/learn2learn-0.2.0/dist/*.whl \
  gym==0.26.2 gym_notices cloudpickle requests urllib3 idna certifi charset-normalizer
# numpy, scipy, tqdm and torchvision, which it imports too, are metaft's own.

echo "installed in $dest: $(ls -d "$dest"/*.dist-info | xargs -n 1 basename | sed 's/\.dist-info//' | tr '\n' ' ')"
