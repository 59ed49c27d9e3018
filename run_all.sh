#!/usr/bin/env bash
# usage: bash run_all.sh [dataset] [model] [method] [options of run.py]     e.g. bash run_all.sh textvqa llava rel_att
#
# Answers a dataset's questions, then prints and writes the scores. Default: demo llava_tiny rel_att.
# Runs on every visible GPU, or on those named here or in GPUS="0 2 3" bash run_all.sh ...; on the CPU where there is none.
# ACCELERATE_OPTIONS="--num_machines 2 ..." goes to `accelerate launch`; PYTHON=... is the Python that runs it all.
# Killed? The same command goes on where it stopped. `python run.py --help` lists the options of run.py.
set -euo pipefail
cd "$(dirname "$0")"

for option in "$@"; do
    if [[ $option == --help || $option == -h ]]; then
        sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' run_all.sh
        exit 0
    fi
done

gpus=()                              # e.g. gpus=(0 2 3); empty: all that are visible
accelerate=${ACCELERATE_OPTIONS:-}   # more for `accelerate launch`, such as "--num_machines 2 --machine_rank 0 ..."

dataset=${1:-demo} model=${2:-llava_tiny} method=${3:-rel_att}
python=${PYTHON:-python}
if ! "$python" -c 'import torch' 2> /dev/null; then
    python=.venv/bin/python  # what `make demo` has installed
    [[ -x $python ]] || { echo "run_all.sh: no torch here: pip install -r requirements.txt, or make demo" >&2; exit 1; }
fi
chosen="${GPUS:-${gpus[*]-}}"
if [[ -n $chosen ]]; then
    export CUDA_VISIBLE_DEVICES=${chosen// /,}
fi
# What is wrong on the command line is said here, once, and not by each process.
count=$("$python" -c 'import sys
from vicrop.evaluation.command import parse
parse(sys.argv[1:], "run_all.sh")
import torch
print(torch.cuda.device_count())' --task "$dataset" --model "$model" --method "$method" "${@:4}")

launch=("$python")
if (( count > 1 )) || [[ -n $accelerate ]]; then
    # shellcheck disable=SC2206  (several words)
    launch=("$python" -m accelerate.commands.launch --multi_gpu --num_processes "$(( count > 0 ? count : 1 ))"
            --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no $accelerate)
fi
results=data/results previous=
for option in "${@:4}"; do
    if [[ $previous == --save_path ]]; then results=$option; fi
    if [[ $option == --save_path=* ]]; then results=${option#*=}; fi
    previous=$option
done
"${launch[@]}" run.py --task "$dataset" --model "$model" --method "$method" "${@:4}"
"$python" get_score.py --data_dir "$results"
