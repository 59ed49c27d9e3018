#!/usr/bin/env bash
# bash run_all.sh [dataset] [model] [method] [options of run.py]     e.g. bash run_all.sh textvqa llava rel_att
# Runs on every visible GPU, or on those named here or in GPUS="0 2 3" bash run_all.sh ...; on the CPU where there is none.
# Killed? The same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")"

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
count=$("$python" -c 'import torch; print(torch.cuda.device_count())')

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
"$python" get_score.py --data_dir "$results" --save_path .
