#!/usr/bin/env bash
# Sets up an environment when there is none, then runs a recipe or the tests. See --help.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
  cat <<'TEXT'
usage: ./launch.sh RECIPE [OPTIONS] [section.key=value ...]   the main job, e.g. ./launch.sh recipes/quickstart.yaml
       ./launch.sh init TARGET --data F [--gpus N]            write a recipe that runs, e.g. ./launch.sh init Qwen/Qwen3-8B --data chats.jsonl
       ./launch.sh test [PYTEST OPTIONS]                      lint, types and tests, e.g. ./launch.sh test -k topology; those of servers only when named: test tests/served
       ./launch.sh prepare|evaluate|export|report RECIPE      one stage alone, e.g. ./launch.sh report recipes/quickstart.yaml
       ./launch.sh watch RUN [--once] [--html FILE]           how a run is, by the files of its output_dir, e.g. ./launch.sh watch output/quickstart
       ./launch.sh serve-check RECIPE --python P              does a real vLLM serve the exports as they were trained
       ./launch.sh capture RECIPE [OPTIONS]                   hidden states by all ranks, e.g. ./launch.sh capture RECIPE --num_gpus 8
       ./launch.sh data inspect|check|regenerate ...          look at rows, judge all, let the target answer, e.g. ./launch.sh data inspect RECIPE
       ./launch.sh plan RECIPE [--gpus N --gpu-memory GIB]    what it costs, how long it may be, e.g. ./launch.sh plan RECIPE --gpus 8
       ./launch.sh store verify|info|import ...               hidden states on disk, e.g. ./launch.sh store verify output/cache/hidden-0
       ./launch.sh cache list|prune ...                       what the cache folder holds, and removing what nobody uses, e.g. ./launch.sh cache list RECIPE
       ./launch.sh doctor [--head-dim D] [--hostfile F]       versions, devices, which attention kernels run here; a table of hosts

  --hostfile F          hosts of a multi-node run          --hostfile recipes/2nodes.hostfile
  --num_gpus N          ranks per host (or --num_ranks)    --num_gpus 8
  --num_nodes N         first N hosts of the hostfile      --num_nodes 2
  --include SPEC        only these hosts or slots          --include node-0@node-1:0,2
  --exclude SPEC        not these hosts or slots           --exclude node-1:0
  --master_addr A       address of the first host          --master_addr 10.0.0.1
  --master_port P       rendezvous port (else a free one)  --master_port 29501
  --launcher L          pdsh (default), openmpi, mpich, impi, mvapich, slurm, torchrun   --launcher slurm
  --ds_config F         DeepSpeed JSON                     --ds_config ds_configs/zero3.json
  --dry-run             print recipe, mesh, places, command; start nothing   --dry-run --num_gpus 8
  --resume              go on from the newest checkpoint   train.steps=200 --resume
  --resume auto         from the newest intact one, or from the start when there is none   --resume auto
  --max-restarts N      start a failed run again           --max-restarts 3
  --log-level L         least important lines to tell      --log-level warning
  --overwrite           replace the run in output_dir      train.seed=1 --overwrite
  --no-install          never install; say what to run     --no-install
  section.key=value     any key of docs/recipe.md          parallel.ulysses=4 data.max_length=131072
  --version             versions of eagle3-ds, torch, deepspeed, transformers
  exit status           0 done, 2 a mistake of yours, 75 stopped and to be resumed by --resume, else failed
TEXT
}

# Every requirement, not only torch: a half-installed environment is not taken. Found, not imported, which takes seconds.
usable() {
  "$1" - "$2" >/dev/null 2>&1 <<'PYTHON'
import sys
from importlib.util import find_spec
names = ["eagle3_ds", "torch", "deepspeed", "transformers", "datasets", "pydantic", "yaml", "safetensors", "tokenizers",
         "jinja2", "tqdm", "rich", "click", "matplotlib", "numpy"]
tools = ["pytest", "xdist", "hypothesis", "ruff", "mypy"] if sys.argv[1] == "test" else []
sys.exit(any(find_spec(name) is None for name in names + tools))
PYTHON
}

find_python() {
  for candidate in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} python3 python "$root/.venv/bin/python"; do
    if command -v "$candidate" >/dev/null 2>&1 && usable "$candidate" "$1"; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

install() {
  local python=python3
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "launch.sh: Python 3.10 or newer is needed." >&2; exit 2; }
  local command=("$root/.venv/bin/python" -m pip install -c "$root/constraints.txt" -e "$root[dev]")
  if [ "$no_install" = 1 ]; then
    echo "launch.sh: no environment has eagle3_ds and its dependencies, and --no-install was given. Run:" >&2
    echo "  $python -m venv $root/.venv && ${command[*]}" >&2
    exit 2
  fi
  echo "launch.sh: no environment has eagle3_ds and its dependencies; making $root/.venv" >&2
  [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
  echo "launch.sh: ${command[*]}" >&2
  "${command[@]}" >&2
  echo "launch.sh: made. Without this script: $root/.venv/bin/eagle3-ds launch RECIPE (or source $root/.venv/bin/activate first)" >&2
}

no_install=0
arguments=()
for argument in "$@"; do
  if [ "$argument" = --no-install ]; then no_install=1; else arguments+=("$argument"); fi
done
set -- "${arguments[@]+"${arguments[@]}"}"
case "${1:-}" in
  "") usage >&2; exit 2 ;;
  -h | --help) usage; exit 0 ;;
esac

mode=run
[ "$1" = test ] && mode=test
if ! python="$(find_python "$mode")"; then
  install
  python="$root/.venv/bin/python"
  usable "$python" "$mode" || { echo "launch.sh: the packages in $root/.venv do not import; remove it and retry." >&2; exit 2; }
fi

# The environment's own build tools first: where an extension is compiled, two versions of ninja would do it in turns.
PATH="$(cd "$(dirname "$python")" && pwd):$PATH"
export PATH

if [ "$mode" = test ]; then
  shift
  cd "$root"
  "$python" -m ruff check .
  "$python" -m ruff format --check --quiet .
  "$python" -m mypy
  # All tests, unless some are named. In two processes, which tests/conftest.py says how to share; `-n 0` runs them in one.
  case " $*" in
    *" tests/"*) exec "$python" -m pytest --numprocesses 2 "$@" ;;
    *) exec "$python" -m pytest tests --numprocesses 2 "$@" ;;
  esac
fi
# Commands that the run ends with are to be copied, so they call this script as it was called.
case "$0" in
  */*) export EAGLE3_DS_CALLED="$0" ;;
  *) export EAGLE3_DS_CALLED="./$0" ;;
esac
case "$1" in
  --version | init | prepare | capture | evaluate | export | serve-check | report | watch | plan | data | doctor | store | cache) exec "$python" -m eagle3_ds.cli "$@" ;;
  *) exec "$python" -m eagle3_ds.cli launch "$@" ;;
esac
