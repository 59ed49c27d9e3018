#!/usr/bin/env bash
# bash run_all.sh [dataset] [model] [method]        e.g. bash run_all.sh textvqa llava rel_att
# Runs on every visible GPU, or on those named: GPUS="0 2 3" bash run_all.sh ...; on the CPU where there is none.
# Killed? The same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")"

dataset=${1:-demo} model=${2:-llava_tiny} method=${3:-rel_att}
python=${PYTHON:-python}
if ! "$python" -c 'import torch' 2> /dev/null; then
    python=.venv/bin/python  # what `make demo` has installed
    [[ -x $python ]] || { echo "run_all.sh: no torch here: pip install -r requirements.txt, or make demo" >&2; exit 1; }
fi
if [[ -n ${GPUS:-} ]]; then
    export CUDA_VISIBLE_DEVICES=${GPUS// /,}
fi
count=$("$python" -c 'import torch; print(torch.cuda.device_count())')

launch=("$python")
if (( count > 1 )); then
    launch=("$python" -m accelerate.commands.launch --multi_gpu --num_processes "$count"
            --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no)
fi
"${launch[@]}" run.py --task "$dataset" --model "$model" --method "$method"
"$python" get_score.py --data_dir data/results --save_path .
