#!/usr/bin/env bash
# Everything that needs a GPU, in sequence: tests, then benchmarks. About ten minutes on a datacentre GPU.
#
#   benchmarks/gpu.sh                        on CUDA
#   benchmarks/gpu.sh --device cpu --tiny    the same commands on a CPU: shows that they run, measures nothing
#
#   --out DIR          where log.txt is written (default: gpu_benchmarks/<time> under $CLBENCH_RESULTS_ROOT or results/)
#   --device D         cuda (default) | cpu
#   --tiny             the smallest sizes and fewest steps
#   --width N          d_model of the large policy of parts 2 and 5        (default 2048)
#   --layers E,D       its encoder and decoder blocks                      (default 8,16: 1.2 G parameters)
#   --batch N          its samples per step and GPU                        (default 64)
#   --paper            instead: dit_dec_base (CLARE's network, encoders with random weights) on camera images, training
#                      and CLARE's cost, against lerobot-train; makes metaworld_pixels with 4 demonstrations a task
#   -h, --help         this text
#
# Makes the demonstrations of metaworld_quick where they are missing. A part that fails does not stop the others.
set -euo pipefail

out="" device=cuda tiny=0 width=2048 layers=8,16 batch=64 paper=0
while (($#)); do
    case $1 in
        --out) out=$2 && shift ;;
        --device) device=$2 && shift ;;
        --tiny) tiny=1 ;;
        --paper) paper=1 ;;
        --width) width=$2 && shift ;;
        --layers) layers=$2 && shift ;;
        --batch) batch=$2 && shift ;;
        -h | --help)
            sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *)
            echo "gpu.sh: unknown argument '$1' (-h shows what there is)" >&2
            exit 2
            ;;
    esac
    shift
done

# shellcheck source=scripts/bootstrap.sh
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/bootstrap.sh"
clbench_bootstrap
out=$(readlink -m "${out:-${CLBENCH_RESULTS_ROOT:-$CLBENCH_ROOT/results}/gpu_benchmarks/$(date +%Y%m%d-%H%M%S)}")
cd "$CLBENCH_ROOT"

gpus=$("$CLBENCH_PYTHON" -c 'import torch; print(torch.cuda.device_count())')
if [[ $device == cuda && $gpus == 0 ]]; then
    echo "gpu.sh: torch sees no CUDA device. (--device cpu --tiny tries the commands without one.)" >&2
    exit 2
fi

small=(--width 1024) # of parts 3 and 4
one=(--steps 60 --skip 20 --repeats 1) two=(--steps 60 --skip 20 --repeats 3)
model=dit_dec_base pair=(--steps 300 --skip 50 --window 25 --repeats 3 --batch-size 128) cost=(--rounds 12 --steps 20)
if ((tiny)); then
    width=64 layers=1,1 batch=4 small=(--width 64) model=dit_dec_small
    one=(--steps 4 --skip 1 --repeats 1) two=("${one[@]}")
    pair=(--steps 8 --skip 4 --window 4 --repeats 1 --batch-size 8) cost=(--rounds 1 --steps 2 --warm-up 1)
fi
images=("${pair[@]::6}" --repeats 1 --batch-size "$batch")
large=(--width "$width" --encoder-layers "${layers%,*}" --decoder-layers "${layers#*,}" --batch-size "$batch")

failed=()
part() { # part TITLE COMMAND...
    local title=$1 began=$SECONDS
    shift
    printf '\n==== %s\n$ %s\n' "$title" "$*"
    "$@" || failed+=("$title")
    echo "---- $((SECONDS - began)) s"
}

everything() {
    echo "log: $out/log.txt"
    echo "commit: $(git rev-parse HEAD 2>/dev/null || echo unknown), device: $device"
    [[ $device == cpu ]] || nvidia-smi || true
    if ((paper)); then
        the_papers_network
    else
        all_parts
    fi
    printf '\n==== %s\n' "done in $((SECONDS / 60)) min; log: $out/log.txt"
    ((${#failed[@]} == 0)) || {
        printf 'FAILED: %s\n' "${failed[@]}"
        return 1
    }
}

the_papers_network() {
    local python=$CLBENCH_PYTHON base=(--model "$model" --dataset metaworld_pixels --device "$device")
    part "demonstrations" "$python" -m clbench.cli data make metaworld_pixels --demos 4
    part "1/3 clbench against lerobot-train, encoders in every step" \
        "$python" benchmarks/train_vs_lerobot.py "${base[@]}" "${images[@]}" --no-feature-cache
    part "2/3 clbench with kept features against lerobot-train" \
        "$python" benchmarks/train_vs_lerobot.py "${base[@]}" "${images[@]}"
    part "3/3 a step of CLARE against one of full training" \
        "$python" benchmarks/algorithm_cost.py "${base[@]}" --algorithms clare --batch-size "$batch" "${cost[@]}"
}

all_parts() {
    local python=$CLBENCH_PYTHON
    part "demonstrations" "$python" -m clbench.cli data make metaworld_quick
    part "1/5 tests on the GPU (under a minute with one GPU)" "$python" -m pytest -m gpu -rs -s tests/test_gpu.py
    part "2/5 a large policy in bf16: samples/s and peak memory (1 minute on an H200)" \
        "$python" benchmarks/ranks.py --device "$device" --only "1 rank" --precision bf16 "${one[@]}" "${large[@]}"
    part "3/5 clbench against lerobot-train (5 minutes on an H200)" \
        "$python" benchmarks/train_vs_lerobot.py --device "$device" "${small[@]}" "${pair[@]}"
    part "4/5 every algorithm: time per step and memory (3 minutes on an H200)" \
        "$python" benchmarks/algorithm_cost.py --device "$device" --dataset metaworld_quick "${small[@]}" "${cost[@]}"
    if [[ $device == cpu ]] || ((gpus > 1)); then
        part "5/5 two ranks: ddp and zero2 against one (guess: 10 minutes)" \
            "$python" benchmarks/ranks.py --device "$device" --precision bf16 "${two[@]}" "${large[@]}"
    else
        printf '\n==== 5/5 two ranks: left out, there is one GPU\n'
    fi
}

mkdir -p "$out"
everything 2>&1 | tee "$out/log.txt"
