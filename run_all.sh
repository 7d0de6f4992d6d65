#!/usr/bin/env bash
# Every run of the grid, then the analysis. Finished runs are not repeated: start it again to go on.
#
#   ./run_all.sh                 real data, 4 seeds, hours
#   ./run_all.sh --quick         the same questions on little synthetic data, 3 seeds, minutes;
#                                without loss barriers, which python analyze.py runs-quick adds
#   ./run_all.sh --list          the commands, plain runs first: the taught ones need them
#   SEEDS=10 JOBS=4 OUT=/shared/runs DATA=/shared/data FLAGS="--device cuda:1" ./run_all.sh
#
# Plain runs have the seeds 0 .. SEEDS, taught ones 0 .. SEEDS-1: seed 1 teaches seed 0, and so on.
# A line of --list is a whole command, to be started in this folder, on any machine: one run; with
# --quick, whose runs are short, all seeds of a setup, which saves starts of Python.
set -eu
cd "$(dirname "$0")"

quick=''
list=''
for argument; do
  case $argument in
    --quick) quick=yes ;;
    --list) list=yes ;;
    *)
      echo "run_all.sh: error: $argument is neither --quick nor --list" >&2
      exit 2
      ;;
  esac
done

seq=transformer-seq
if [ $quick ]; then
  SEEDS=${SEEDS:-3}
  stages='plain taught'
  seeds_in_a_command=99
  OUT=${OUT:-runs-quick}
  barriers=--no-barriers
  # Small batches need few epochs, and gain nothing by bfloat16.
  mnist='--data synthetic --no-amp --examples 4000 --batch-size 128 --epochs 14'
  sva='--data synthetic --no-amp --examples 500 --batch-size 16 --epochs 10'
  lm='--data synthetic --no-amp --examples 400 --batch-size 16 --objective lm'
  digits='cnn mlp'
  pairs='cnn/mlp mlp/mlp'
  classifiers="$seq lstm"
  classifier_pairs="lstm/$seq $seq/$seq"
  lms=$classifiers
  lm_pairs=$classifier_pairs
else
  stages='first plain taught'
  seeds_in_a_command=1
  barriers=''
  mnist='--data mnist'
  sva='--data linzen'
  lm='--data linzen --objective lm'
  digits='cnn cnn-shuffled mlp'
  pairs="$(echo {mlp,cnn}/{mlp,cnn}) cnn-shuffled/mlp"
  classifiers="lstm transformer $seq ut-seq"
  classifier_pairs=$(echo {lstm,transformer,$seq,ut-seq}/{lstm,transformer,$seq,ut-seq})
  lms="lstm $seq ut-seq"
  lm_pairs="$(echo {lstm,$seq}/{lstm,$seq}) lstm/ut-seq ut-seq/ut-seq"
fi
SEEDS=${SEEDS:-4}
OUT=${OUT:-runs}
DATA=${DATA:-data}
FLAGS=${FLAGS:-}
JOBS=${JOBS:-2}
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

whole_command() {  # SCRIPT FLAG ...: quoted, so that the line runs as it stands
  printf '%q' "$PYTHON"
  printf ' %q' "$@" --out "$OUT" --data-dir "$DATA" $FLAGS
  echo
}
plain() {  # "SCRIPT FLAGS" MODEL ...
  seq 0 "$SEEDS" | xargs -n $seeds_in_a_command | while read -r seeds; do
    for model in "${@:2}"; do
      whole_command $1 --student "$model" --seed $seeds
    done
  done
}
taught() {  # "SCRIPT FLAGS" KD TEACHER/STUDENT ...
  seq 0 $((SEEDS - 1)) | xargs -n $seeds_in_a_command | while read -r seeds; do
    for pair in "${@:3}"; do
      whole_command $1 --teacher "${pair%/*}" --student "${pair#*/}" --seed $seeds --kd "$2"
    done
  done
}
commands() {  # first, plain or taught; the longest first: then no core is idle at the end
  case $1 in
    first)  # of each script: it fetches the data
      whole_command train_mnist.py $mnist --student mlp --seed 0
      whole_command train_sva.py $sva --student lstm --seed 0
      ;;
    plain)
      plain "train_sva.py $lm" $lms
      plain "train_sva.py $sva" $classifiers
      plain "train_mnist.py $mnist" $digits
      ;;
    taught)
      taught "train_sva.py $lm" offline $lm_pairs
      taught "train_sva.py $sva" offline $classifier_pairs
      taught "train_mnist.py $mnist" offline $pairs
      if [ ! $quick ]; then
        for control in permuted hard; do
          taught "train_sva.py $sva" $control lstm/$seq
        done
        for control in permuted hard confidence ratios; do
          taught "train_mnist.py $mnist" $control cnn/mlp
        done
      fi
      ;;
  esac
}

if [ $list ]; then
  commands plain
  commands taught
  exit
fi

status=0
for stage in $stages; do
  total=$(commands $stage | wc -l | tr -d ' ')
  export stage total
  # xargs starts a bash for each line; $1 is the line's number and the command.
  commands $stage | cat -n | tr '\n' '\0' | xargs -0 -n 1 -P "$JOBS" bash -c '
    read -r number command <<< "$1"
    if eval "$command" > /dev/null; then
      echo "ok     $number/$total of $stage: $command"
    else
      echo "FAILED $number/$total of $stage: $command" >&2
      exit 1
    fi' _ || status=1
done

# One process on all cores. Its threads sleep while they wait: else, beside other busy processes,
# they would take most of the time from each other.
unset OMP_NUM_THREADS
OMP_WAIT_POLICY=passive "$PYTHON" analyze.py "$OUT" --data-dir "$DATA" --csv "$OUT/runs.csv" \
  $barriers > "$OUT/analysis.md" || status=1
cat "$OUT/analysis.md"
if [ $status != 0 ]; then
  echo "run_all.sh: some runs FAILED: start it again to retry" >&2
fi
exit $status
