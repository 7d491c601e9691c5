# What the recipes (run_*.sh), run_pipeline.sh and run_tests.sh share: which Python, which devices, which model, and the
# one place that starts a stage. They source this file. By itself: `bash launch.sh set_up` installs the environment.
#
# Read from the environment:
#   MODEL                       model to start from, in place of the one that the recipe chooses
#   OUTPUTS                     folder of all output directories; default outputs
#   NPROC                       processes on this machine; default: one for each visible GPU, else one on the CPU
#   NNODES NODE_RANK            machines, and this machine's number from 0; default 1 and 0
#   MASTER_ADDR MASTER_PORT     address and port of machine 0, where NNODES is above 1; default port 29500
#   PYTHON                      interpreter; default: the active environment's, else .venv's, else python3 if it has torch
#   GPUS                        visible GPUs; counted unless given
#   CPU_BFLOAT16                1 if the CPU has instructions for bfloat16, else 0; found out unless given
#   LAUNCH_DRY=1                print the commands and run none of them

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" # paths in recipes and in their flags are relative to this folder
OUTPUTS=${OUTPUTS:-outputs} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
CPU_BFLOAT16=${CPU_BFLOAT16:-}
SMALL_MODEL=models/SmolLM2-135M-Instruct
COUNT_DEVICES='import torch
try:
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
except (AttributeError, RuntimeError):
    bfloat16 = False
print(torch.accelerator.device_count(), int(bfloat16))'

say() { echo "$*" >&2; }
fail() { say "error: $*"; exit 2; }
has_torch() { "$1" -c 'import importlib.util as i, sys; sys.exit(i.find_spec("torch") is None)' 2>/dev/null; }

# Sets PYTHON, or says how to make an environment.
find_python() {
    if [ -n "${PYTHON:-}" ]; then return; fi
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then PYTHON=$(command -v python) || fail "the active environment has no python"
    elif [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python
    elif has_torch python3; then PYTHON=python3
    else fail "no environment with torch is active and there is no .venv: 'bash launch.sh set_up' makes one"
    fi
}

# Makes .venv where no environment is active.
make_environment() {
    if [ -n "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || [ -x .venv/bin/python ] || has_torch python3; then return; fi
    local candidate found=
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$candidate; break; fi
    done
    [ -n "$found" ] || fail "Python 3.11 or newer is needed; found $(python3 --version 2>&1)"
    say "making .venv with $("$found" --version)"
    "$found" -m venv .venv || { rm -rf .venv; fail "python -m venv failed; its own words are above"; }
}

# Installs a requirements file into the active environment or .venv. A torch that is there stays as it is.
set_up() {
    local requirements=${1:-requirements.txt} constraints=constraints.txt status=0
    make_environment
    find_python
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "the active environment has $("$PYTHON" --version); Python 3.11 or newer is needed. Leave it (deactivate), and a .venv is made"
    "$PYTHON" -m tools.check_environment "$requirements" || status=$?
    if [ $status = 0 ]; then return; fi # nothing to do: a second start needs no network
    if [ $status = 2 ]; then exit 2; fi
    if has_torch "$PYTHON"; then
        constraints=$(mktemp)
        grep -v '^torch==' constraints.txt >"$constraints"
        "$PYTHON" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >>"$constraints"
    fi
    say "installing $requirements into $("$PYTHON" -c 'import sys; print(sys.prefix)')"
    "$PYTHON" -m pip install -r "$requirements" -c "$constraints" >&2 ||
        fail "pip could not install $requirements; its own words are above"
}

# Sets GPUS, NPROC and PRECISION: weights are bfloat16, the adapter is float32, and both are computed with in bfloat16;
# all in float32 on a CPU without instructions for bfloat16.
find_devices() {
    find_python
    local counted
    if [ -z "${GPUS:-}" ] || [ "$GPUS$CPU_BFLOAT16" = 0 ]; then
        counted=$("$PYTHON" -c "$COUNT_DEVICES") ||
            fail "$PYTHON cannot import torch: 'bash launch.sh set_up' installs what is missing"
        GPUS=${GPUS:-${counted% *}} CPU_BFLOAT16=${counted#* }
    fi
    local name
    for name in GPUS NPROC NNODES NODE_RANK; do
        [[ ${!name:-0} =~ ^[0-9]+$ ]] || fail "$name=${!name}: expected a number"
    done
    NPROC=${NPROC:-$((GPUS > 0 ? GPUS : 1))}
    [ "$NPROC" -gt 0 ] || fail "NPROC=$NPROC: expected at least 1"
    PRECISION=(--torch_dtype bfloat16 --bf16)
    # Without instructions for it a CPU computes in bfloat16 some fifty times slower than in float32.
    if [ "$GPUS" = 0 ] && [ "$CPU_BFLOAT16" = 0 ]; then
        PRECISION=(--torch_dtype float32)
        say "precision: float32, since this CPU has no instructions for bfloat16"
    fi
}

# Sets MODEL, unless the environment did, to the first of the directories given that holds a model, else the small model.
choose_model() {
    local folder
    if [ -n "${MODEL:-}" ]; then
        say "model: $MODEL, from MODEL"
    else
        MODEL=$SMALL_MODEL
        for folder in "$@"; do
            if [ -f "$folder/config.json" ]; then MODEL=$folder; break; fi
        done
        say "model: $MODEL$([ "$MODEL" != "$SMALL_MODEL" ] || [ $# = 0 ] || echo ", since there is no $*")"
    fi
    if [ "$MODEL" = "$SMALL_MODEL" ] && [ -z "${LAUNCH_DRY:-}" ]; then "$PYTHON" -m tools.fetch_small_model; fi
}

# Starts a stage script with its flags: plain Python for one process, torchrun for several. Ends with 143 where a signal
# stopped the run after a complete checkpoint, so that a scheduler can start the same command again.
launch() {
    local command=("$PYTHON")
    # DeepSpeed asks for the variables that torchrun sets, also for one process.
    if [ "$NNODES" -gt 1 ] || [ "$NPROC" -gt 1 ] || [[ " $* " == *" --deepspeed"* ]]; then
        command+=(-m tools.launcher --nproc_per_node "$NPROC")
        if [ "$NNODES" -gt 1 ]; then
            [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$NNODES: MASTER_ADDR, the address of machine 0, is missing"
            command+=(--nnodes "$NNODES" --node_rank "$NODE_RANK")
            command+=(--master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
        elif [ -n "${MASTER_PORT:-}" ]; then
            command+=(--master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$MASTER_PORT")
        else
            command+=(--standalone) # a free port, so that two runs on one machine do not meet
        fi
    fi
    command+=("$@")
    show "${command[@]}"
    [ -n "${LAUNCH_DRY:-}" ] || exec "${command[@]}" # in this shell's place, so that a signal to the recipe reaches the run
}

# Prints a command; with LAUNCH_DRY on stdout, for nothing but that is done then.
show() { if [ -n "${LAUNCH_DRY:-}" ]; then printf '%q ' "$@" && echo; else say "+$(printf ' %q' "$@")"; fi; }

# Prints a command and runs it.
run() {
    show "$@"
    [ -n "${LAUNCH_DRY:-}" ] || "$@"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then "$@"; fi
