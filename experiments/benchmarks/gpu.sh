#!/usr/bin/env bash
# Everything that a machine with a GPU has to show, in one call of at most eight minutes: the tests that need a GPU, then
# the benchmarks. Their records (JSON) and their output go to a folder.
#
#   bash experiments/benchmarks/gpu.sh [FOLDER]
#   GPU_SH_DEVICE=cpu bash experiments/benchmarks/gpu.sh [FOLDER]     a trial on the CPU: tiny sizes, no limit of eight minutes
#
# A part that fails, or that there is no time for, does not stop the others; the exit status is then 1. Nothing is
# installed: `python` must import torch, torchvision and what else conda.yaml lists.
set -u

device=${GPU_SH_DEVICE:-cuda}
folder=$(realpath -m "${1:-$(mktemp -d)}")
mkdir -p "$folder"
cd "$(dirname "$0")/../.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" CAPEXP_OFFLINE=1
benchmarks=experiments/benchmarks
[ "$device" = cuda ] && slow=1 || slow=20  # how much longer than on a GPU a part may take
deadline=$((SECONDS + 465 * slow))
failed=()

# part NAME SECONDS COMMAND...: run a command for at most SECONDS, and no longer than until the deadline.
part() {
  local name=$1 limit=$(($2 * slow)) left=$((deadline - SECONDS)) start=$SECONDS status
  shift 2
  ((limit > left)) && limit=$left
  if ((limit < 10)); then
    echo "$name: no time left" | tee "$folder/$name.txt"
    failed+=("$name")
    return
  fi
  timeout --kill-after=5 "$limit" "$@" > "$folder/$name.txt" 2>&1
  status=$?
  echo "$name: status $status after $((SECONDS - start)) s"
  if ((status)); then
    failed+=("$name")
    tail -n 15 "$folder/$name.txt"
  else
    grep "fell behind" "$folder/$name.txt"
  fi
}

# bench NAME SECONDS PROGRAM FLAGS...: run a benchmark, and write its record to NAME.json.
bench() {
  local name=$1 limit=$2 program=$3
  shift 3
  part "$name" "$limit" python "$benchmarks/$program.py" --device "$device" --output "$folder/$name.json" "$@"
}

if [ "$device" = cuda ]; then
  training=(--photos 6000 --rounds 2)
  layer=(--rounds 3)
  decoding=(--rounds 1 --no-peaks)
  critical=()
  run=(--photos 6000 --epochs 4)
  search=(--photos 6000 --trials 6 --each 4 --no-runs)
  workers=(1 2 4 8)
  extraction=(--count 4096 --batch-size 128 --rounds 1)
else
  training=(--photos 10 --rounds 1)
  layer=(--rounds 1)
  decoding=(--rounds 1 --photos 4 --one-by-one 2 --no-peaks)
  critical=(--rounds 1)
  run=(--photos 24 --epochs 1)
  search=(--photos 12 --trials 2 --epochs 1 --no-runs)
  workers=(1 2)
  extraction=(--count 2 --rounds 1)
fi

python -c 'import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")' \
  | tee "$folder/machine.txt"
mapfile -t tests < <(grep -rlE 'mark\.gpu\b' tests --include='test_*.py')
part tests 110 python -m pytest -q -m gpu -p no:cacheprovider "${tests[@]}"
bench training 60 bench_training "${training[@]}"
bench vocabulary-layer 20 bench_training --vocabulary-layer "${layer[@]}"
bench decoding 40 bench_decoding "${decoding[@]}"
bench self-critical 40 bench_self_critical ${critical[@]+"${critical[@]}"}
bench search 150 bench_search "${search[@]}" --workers "${workers[@]}"
bench run 110 bench_run "${run[@]}"
bench extraction 60 bench_extraction "${extraction[@]}"
# NVIDIA's MPS lets the kernels of several processes run at the same time, instead of in turn.
if [ "$device" = cuda ] && command -v nvidia-cuda-mps-control > /dev/null; then
  CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d)
  export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
  if nvidia-cuda-mps-control -d; then
    bench search-mps 80 bench_search "${search[@]}" --workers 8
    echo quit | timeout 10 nvidia-cuda-mps-control
  else
    failed+=(mps)
  fi
else
  echo "search-mps: left out, there is no nvidia-cuda-mps-control here"
fi

echo "records and output in $folder"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
