#!/usr/bin/env bash
# Every run of the grid, then the analysis. Finished runs are not repeated: what was stopped goes on where it was.
#
#   ./run_all.sh                    everything: real data where they are to be had, 4 seeds, hours on a laptop
#   ./run_all.sh --quick            the same questions with little synthetic data and 3 seeds, minutes on two cores
#   ./run_all.sh --list [teachers | students]      print the commands, one a line; students need all the teachers
#   SEEDS=10 JOBS=4 OUT=/shared/runs ./run_all.sh  more seeds, four runs at a time (2 without), another folder
#   FLAGS="--device cuda:1" ./run_all.sh           flags for every run
#
# Seeds are 0 .. SEEDS-1. The plain runs are the teachers: seed 1 teaches seed 0, seed 2 seed 1 and so on; the last seed
# is taught by the one before it, which makes two students of one teacher.
set -u
cd "$(dirname "$0")" || exit 2
fail() { echo "run_all.sh: error: $1" >&2; exit 2; }

quick='' list=''
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=yes ;;
    --list) list='teachers students'; case ${2:-} in teachers | students) list=$2; shift ;; esac ;;
    *) fail "unknown argument $1; known are --quick and --list [teachers | students]" ;;
  esac
  shift
done
SEEDS=${SEEDS:-$([ $quick ] && echo 3 || echo 4)} JOBS=${JOBS:-2} OUT=${OUT:-runs${quick:+-quick}}
for number in "$SEEDS" "$JOBS"; do
  case $number in
    '' | *[!0-9]* | 0* | ?????*) fail "SEEDS and JOBS must be whole numbers in 1..9999, not $number" ;;
  esac
done
PYTHON=${PYTHON:-python}
"$PYTHON" -c 'import torch' 2>/dev/null || fail "$PYTHON lacks torch; activate the virtual environment or set PYTHON"

mnist='train_mnist.py' sva='train_sva.py'
if [ $quick ]; then
  mnist="$mnist --data synthetic --examples 6000" sva="$sva --data synthetic --examples 6000"
else  # Fetched here and once, not by each of JOBS runs; what can't be had is told once.
  "$PYTHON" -c 'import train_mnist; train_mnist.load_mnist("data")' >&2 2>/dev/null ||
    { mnist="$mnist --data synthetic"; echo "run_all.sh: MNIST is not in data/ nor to be had: SYNTHETIC digits" >&2; }
  [ "$(ls data/agr_50_mostcommon_10K.tsv{,.gz} data/numpred.train 2>/dev/null)" ] ||
    { sva="$sva --data synthetic"; echo "run_all.sh: no real sentences in data/ (README, Data): SYNTHETIC ones" >&2; }
fi

# runs STAGE FLAGS "MODELS" "TEACHER/STUDENT ..." -> the commands of that stage, one a line
runs() {
  local stage=$1 flags=$2 models=$3 pairs=$4 seed name last=$((SEEDS > 1 ? SEEDS - 1 : 1)) common
  common="--out $(printf %q "$OUT")${FLAGS:+ $FLAGS}"
  for seed in $(seq 0 $last); do
    if [ "$stage" = teachers ]; then
      for name in $models; do echo "$PYTHON $flags --student $name --seed $seed $common"; done
    elif [ "$seed" -lt "$SEEDS" ]; then
      for name in $pairs; do
        echo "$PYTHON $flags --teacher ${name%/*} --student ${name#*/} --kd --seed $seed" \
             "--teacher-seed $((seed < last ? seed + 1 : seed - 1)) $common"
      done
    fi
  done
}
commands() {
  local seq=transformer-seq lm="$sva --objective lm" four='lstm transformer transformer-seq ut-seq' teacher
  runs "$1" "$mnist" 'mlp cnn' "$(echo {mlp,cnn}/{mlp,cnn})"
  if [ $quick ]; then
    runs "$1" "$sva" "lstm $seq" "$(echo {lstm,$seq}/{lstm,$seq})"
    runs "$1" "$lm --epochs 6" "lstm $seq" "lstm/$seq $seq/$seq"
  else
    runs "$1" "$sva" "$four" "$(for teacher in $four; do echo $teacher/{lstm,transformer,$seq,ut-seq}; done)"
    runs "$1" "$lm" "lstm $seq lstm-small $seq-small" \
         "$(echo {lstm,$seq}/{lstm,$seq} {lstm,$seq}-small/{lstm,$seq}-small) lstm-small/$seq"
  fi
}
if [ "$list" ]; then
  for stage in $list; do
    [ "$list" = "$stage" ] || echo "# $stage"
    commands "$stage"
  done
  exit
fi

mkdir -p "$OUT" 2>/dev/null && [ -w "$OUT" ] || fail "can't write to $OUT; choose another folder with OUT"
cores=$("$PYTHON" -c 'import os; print(os.cpu_count())')
[ "$JOBS" -gt 1 ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > JOBS ? cores / JOBS : 1))}
total=$({ commands teachers; commands students; } | wc -l | tr -d ' ') begin=$(date +%s)
log=$(mktemp)  # a line for each command that has ended
trap 'rm -f "$log"' EXIT
trap 'exit 130' INT TERM
run_one() {
  local start status=ok done left
  start=$(date +%s)
  eval "$1 --quiet" || status=FAILED
  echo "$status $1" >>"$log"
  done=$(($(wc -l <"$log")))
  left=$((($(date +%s) - begin) * (total - done) / done / 60))
  echo "$done/$total  $status  $(($(date +%s) - start)) s, about $left min left  ${1#* }"
}
export log total begin
export -f run_one
for stage in teachers students; do
  commands $stage | tr '\n' '\0' | xargs -0 -n 1 -P "$JOBS" bash -c 'run_one "$1"' _
done

set -o pipefail
status=0
"$PYTHON" analyze.py "$OUT" --json "$OUT/analysis.json" | tee "$OUT/analysis.md" || status=1
if grep '^FAILED' "$log" >&2; then
  echo "run_all.sh: these failed (their messages are above); the same command tries them again" >&2
  status=1
fi
exit $status
