#!/usr/bin/env bash
# Makes the environment that tests/served judges by: vLLM on the CPU, speculators and SpecForge, as environment.txt pins them.
#
#   make_environment.sh [DIR]     make it (or find it made) and print the path of its Python
#   make_environment.sh --where   print the folder that it makes when no DIR is given
#
# The default folder is named by a hash of the pins, so another set of pins is another environment and nothing is updated in place.
# A second call waits for the first; a call that was interrupted leaves no mark `complete`, and the next one begins anew.
# Without the wheels that a served draft does not need (torchvision, torchaudio, triton, ...), hence --no-deps.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
pins="$here/environment.txt"
base="${EAGLE3_DS_BASE_PYTHON:-python3}"
version="$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
hash="$({ cat "$pins"; echo "python $version"; } | sha256sum | cut -c1-12)"
mark="environment.txt $hash"

fail() { echo "make_environment.sh: $*" >&2; exit 2; }

directory="${XDG_CACHE_HOME:-$HOME/.cache}/eagle3-ds/served-$hash"
case "${1:-}" in
  --where) echo "$directory"; exit 0 ;;
  -*) fail "unknown option $1; give a folder, --where or nothing" ;;
  ?*) directory="$1" ;;
esac

mkdir -p "$(dirname "$directory")"
exec 9>"$directory.lock"
flock 9 # until this process ends, however it ends
if [ "$(cat "$directory/complete" 2>/dev/null)" = "$mark" ]; then
  echo "$directory/bin/python"
  exit 0
fi
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$base is Python $version, the pins want 3.11 or newer; name another one in EAGLE3_DS_BASE_PYTHON"
if [ -e "$directory" ]; then
  # Only what this script began is removed.
  [ -f "$directory/begun" ] || fail "$directory exists and was not made by this script; name another folder or remove it"
  rm -rf "$directory"
fi
mkdir "$directory"
echo "$mark" >"$directory/begun"
start=$SECONDS
{
  "$base" -m venv "$directory"
  "$directory/bin/python" -m pip install -q --disable-pip-version-check --no-deps --only-binary :all: -r "$pins"
  "$directory/bin/python" -c 'import torch; raise SystemExit(torch.version.cuda or torch.version.hip)' ||
    fail "pip gave a torch for GPUs; point it at a CPU build of torch, e.g. by PIP_INDEX_URL"
  VLLM_ENABLE_V1_MULTIPROCESSING=0 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONPATH='' \
    "$directory/bin/python" -c 'import speculators; from vllm import LLM'
} >&2 9>&-
echo "make_environment.sh: $directory made in $((SECONDS - start)) s, $(du -sm "$directory" | cut -f1) MB" >&2
echo "$mark" >"$directory/complete"
echo "$directory/bin/python"
