#!/usr/bin/env bash
# Run the tests that need a GPU, also where there is torch and no network.
set -euo pipefail

usage() {
  cat <<'END'
usage: tests/run_gpu.sh [--wheels FOLDER] [--without-gpu] [PYTEST OPTIONS ...]
       tests/run_gpu.sh --collect FOLDER [--torch VERSION]

Runs the tests marked gpu from this checkout, with the Python that $PYTHON names (python3 by default),
whose torch sees a CUDA device. memfree itself is not installed.

On a machine that has all packages already (make install):

    PYTHON=.venv/bin/python tests/run_gpu.sh

On a machine that has torch and nothing else, and no network: carry the packages there as wheels. On a
machine with a network, the same Python version and the same kind of processor:

    tests/run_gpu.sh --collect wheels --torch 2.14.1     # the version of torch on the GPU machine

and then, with the checkout and the folder copied to the GPU machine:

    tests/run_gpu.sh --wheels wheels

options:
  --wheels FOLDER    unpack all wheels of FOLDER beside torch, for this run alone: in a temporary
                     folder, without a network, without looking at what they require. Wheels of
                     torch and triton are left out: the machine's own are used.
  --collect FOLDER   download the wheels that memfree and its tests need, without torch and the
                     NVIDIA libraries that come with it (those of faiss-gpu are taken along).
  --torch VERSION    with --collect: the torch that they must fit; that of $PYTHON by default.
  --without-gpu      go on where torch sees no GPU: every test is then skipped with its reason.
  -h, --help         this text.

All other options go to pytest: -k guard, -s (prints the memory that was measured), --junitxml FILE (has
the memory as properties). The exit status is pytest's; 2 for what is said in one line. Tests with two
GPUs are skipped where there is one.
END
}

fail() {
  echo "tests/run_gpu.sh: error: $*" >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
wheels='' collect='' version='' without_gpu=''
while [ $# -gt 0 ]; do
  case $1 in
    --wheels | --collect | --torch)
      [ $# -ge 2 ] || fail "$1 needs a value; see --help"
      case $1 in
        --wheels) wheels=$2 ;;
        --collect) collect=$2 ;;
        --torch) version=$2 ;;
      esac
      shift 2
      ;;
    --without-gpu) without_gpu=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) break ;;
  esac
done
command -v "$python" > /dev/null || fail "there is no $python; set PYTHON"
if [ -n "$collect" ]; then
  if [ -z "$version" ]; then
    version=$("$python" -c 'import torch; print(torch.__version__.split("+")[0])' 2> /dev/null) ||
      fail "$python has no torch: say with --torch which version the GPU machine has"
  fi
  mkdir -p "$collect"
  # What pip would install, as name==version lines, without torch and the CUDA that it brings
  # along; nothing is installed.
  "$python" -m pip install --quiet --dry-run --ignore-installed --report - \
    "$root[dev]" "torch==$version" |
    "$python" -c '
import json, re, sys
def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()
found = {plain(one["metadata"]["name"]): one["metadata"] for one in json.load(sys.stdin)["install"]}
there, todo = set(), ["torch"]
while todo:
    name = todo.pop()
    if name in found and name not in there:
        there.add(name)
        needs = found[name].get("requires_dist", [])
        todo += [plain(re.match(r"[\w.-]+", need)[0]) for need in needs]
for name, metadata in found.items():
    brought = name in there and re.match("torch|triton|nvidia-|cuda-", name)
    if name != "memfree" and not brought:
        print(name + "==" + metadata["version"])
' > "$collect/requirements.txt"
  # Wheels alone would leave out packages that are published as source: those are built here.
  "$python" -m pip wheel --quiet --no-deps --wheel-dir "$collect" -r "$collect/requirements.txt"
  echo "$collect: $(ls "$collect"/*.whl | wc -l) wheels for torch $version"
  exit 0
fi

"$python" -c 'import torch' 2> /dev/null || fail "$python has no torch; set PYTHON"
path=$root/src
if [ -n "$wheels" ]; then
  ls "$wheels"/*.whl > /dev/null 2>&1 || fail "--wheels $wheels holds no wheels; see --collect"
  packages=$(mktemp -d)
  trap 'rm -rf "$packages"' EXIT
  for wheel in "$wheels"/*.whl; do
    case $(basename "$wheel") in
      torch-* | triton-*) ;;
      # A wheel is a zip file of what goes beside other packages; no pip is needed to unpack it.
      *) "$python" -m zipfile -e "$wheel" "$packages" ;;
    esac
  done
  for inner in "$packages"/*.data/purelib "$packages"/*.data/platlib; do
    [ ! -d "$inner" ] || cp -r "$inner/." "$packages"
  done
  path=$packages:$path
fi
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1

"$python" -c 'import pytest' 2> /dev/null ||
  fail "pytest is missing: give the packages with --wheels, or install memfree[dev]"
found=$("$python" -c '
import torch
count = torch.cuda.device_count()
names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
print(f"{count} GPUs ({names})" if count else "no GPU", "torch", torch.__version__)')
echo "$found"
case $found in
  "no GPU"*) [ -n "$without_gpu" ] || fail "torch sees no CUDA device (--without-gpu goes on)" ;;
esac
cd "$root"
"$python" -m pytest -m gpu -rs "$@"
