#!/usr/bin/env bash
# Every run of the grid, then the analysis. Finished runs are not repeated: start it again to go on.
#
#   ./run_all.sh                 real data, 4 seeds, hours
#   ./run_all.sh --quick         the same questions on little synthetic data, 3 seeds, minutes
#   ./run_all.sh --list          the commands, plain runs first: the taught ones need them
#   SEEDS=10 JOBS=4 OUT=/shared/runs DATA=/shared/data FLAGS="--device cuda:1" ./run_all.sh
#
# Plain runs have the seeds 0 .. SEEDS, taught ones 0 .. SEEDS-1: seed 1 teaches seed 0, and so on.
set -eu
cd "$(dirname "$0")"
seq=transformer-seq quick='' list='' status=0
for argument; do
  case $argument in
    --quick) quick=yes ;;
    --list) list=yes ;;
    *) echo "run_all.sh: error: $argument is neither --quick nor --list" >&2; exit 2 ;;
  esac
done
if [ $quick ]; then
  SEEDS=${SEEDS:-3} OUT=${OUT:-runs-quick}
  mnist='--data synthetic --examples 4000' sva='--data synthetic' classifiers="lstm $seq"
  pairs="cnn/mlp mlp/mlp" classifier_pairs="lstm/$seq $seq/$seq"
  lms=$classifiers lm_pairs=$classifier_pairs
else
  mnist='--data mnist' sva='--data linzen' classifiers="lstm transformer $seq ut-seq"
  pairs=$(echo {mlp,cnn}/{mlp,cnn}) lms="lstm $seq ut-seq"
  classifier_pairs=$(echo {lstm,transformer,$seq,ut-seq}/{lstm,transformer,$seq,ut-seq})
  lm_pairs="$(echo {lstm,$seq}/{lstm,$seq}) lstm/ut-seq ut-seq/ut-seq"
fi
export SEEDS=${SEEDS:-4} OUT=${OUT:-runs} DATA=${DATA:-data} FLAGS=${FLAGS:-} JOBS=${JOBS:-2}
export PYTHON=${PYTHON:-python} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

plain() {  # "SCRIPT FLAGS" MODEL ...
  for seed in $(seq 0 "$SEEDS"); do for model in "${@:2}"; do
    echo "$1 --student $model --seed $seed"; done; done
}
taught() {  # "SCRIPT FLAGS" KD TEACHER/STUDENT ...
  for seed in $(seq 0 $((SEEDS - 1))); do for pair in "${@:3}"; do
    echo "$1 --teacher ${pair%/*} --student ${pair#*/} --seed $seed --kd $2"; done; done
}
commands() {  # the longest first: then no core is idle at the end
  if [ "$1" = first ]; then  # of each script: it fetches the data
    echo "train_mnist.py $mnist --student mlp --seed 0"
    echo "train_sva.py $sva --student lstm --seed 0"
  elif [ "$1" = plain ]; then
    plain "train_sva.py $sva --objective lm" $lms
    plain "train_sva.py $sva" $classifiers
    plain "train_mnist.py $mnist" cnn mlp
  else
    taught "train_sva.py $sva --objective lm" offline $lm_pairs
    taught "train_sva.py $sva" offline $classifier_pairs
    taught "train_mnist.py $mnist" offline $pairs
    [ $quick ] || taught "train_sva.py $sva" permuted lstm/$seq
    [ $quick ] || taught "train_mnist.py $mnist" permuted cnn/mlp
  fi
}
if [ $list ]; then commands plain; commands taught; exit; fi

for stage in first plain taught; do
  total=$(commands $stage | wc -l | tr -d ' ')
  commands $stage | cat -n | xargs -P "$JOBS" -L 1 bash -c '
    if "$PYTHON" "${@:2}" --out "$OUT" --data-dir "$DATA" $FLAGS > /dev/null
    then echo "ok     $1/'$total' of '$stage': ${*:2}"
    else echo "FAILED $1/'$total' of '$stage': ${*:2}" >&2; exit 1; fi' _ || status=1
done
env -u OMP_NUM_THREADS "$PYTHON" analyze.py "$OUT" --data-dir "$DATA" --csv "$OUT/runs.csv" \
  > "$OUT/analysis.md" || status=1
cat "$OUT/analysis.md"
[ $status = 0 ] || echo "run_all.sh: some runs FAILED: start it again to retry" >&2
exit $status
