#!/usr/bin/env bash
# Every run of the grid, then the analysis. Finished runs are not repeated: start it again to go on.
#
#   ./run_all.sh                 everything: real data where they can be had, 4 seeds, hours
#   ./run_all.sh --quick         the same questions with little synthetic data, 3 seeds, minutes
#   ./run_all.sh --list [teachers | students]      print the commands; students need all teachers
#   SEEDS=10 JOBS=4 OUT=/shared/runs DATA=/shared/data ./run_all.sh
#   FLAGS="--device cuda:1" ./run_all.sh           flags for every run
#
# Plain runs have the seeds 0 .. SEEDS, taught ones 0 .. SEEDS-1: the plain run of seed 1 teaches
# seed 0, and so on. A grid grows by raising SEEDS.
set -u
cd "$(dirname "$0")" || exit 2
fail() { echo "run_all.sh: error: $1" >&2; exit 2; }

quick='' list='' stages='teachers students' seeds=4 out=runs
for argument; do
  case $argument in
    --quick) quick=yes seeds=3 out=runs-quick ;;
    --list) list=yes ;;
    teachers | students) stages=$argument ;;
    *) fail "unknown argument $argument; known are --quick and --list [teachers | students]" ;;
  esac
done
SEEDS=${SEEDS:-$seeds} JOBS=${JOBS:-2} OUT=${OUT:-$out} DATA=${DATA:-data} PYTHON=${PYTHON:-python}
for number in "$SEEDS" "$JOBS"; do
  [[ $number =~ ^[1-9][0-9]{0,3}$ ]] || fail "SEEDS and JOBS must be in 1..9999, not $number"
done
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' 2>/dev/null ||
  fail "$PYTHON lacks torch; activate the virtual environment or set PYTHON"
cores=$(getconf _NPROCESSORS_ONLN)
threads=${OMP_NUM_THREADS:-$((cores > JOBS ? cores / JOBS : 1))}

# Real data are fetched here and once; damaged files end it all.
source_of() { "$PYTHON" -c "import sys, common, $1; sys.argv[0] = '$1.py'
common.run_main(lambda _: print($1.$2))" "$DATA"; }
mnist=synthetic sva=synthetic digits=' --examples 6000' sentences=' --examples 5000'
if [ ! $quick ]; then
  digits='' sentences=''
  mnist=$(source_of train_mnist 'load_digits("auto", 60, sys.argv[1])[0]') || exit 2
  sva=$(source_of train_sva 'check_data(sys.argv[1])') || exit 2
fi

# runs FLAGS "MODEL ..." "TEACHER/STUDENT ..." -> the commands of $stage, one a line
runs() {
  local prefix="OMP_NUM_THREADS=$threads $(printf %q "$PYTHON") $1" name seed
  local suffix="--data-dir $(printf %q "$DATA") --out $(printf %q "$OUT")${FLAGS:+ $FLAGS}"
  for seed in $(seq 0 "$SEEDS"); do
    if [ "$stage" = teachers ]; then
      for name in $2; do echo "$prefix --student $name --seed $seed $suffix"; done
    elif [ "$seed" -lt "$SEEDS" ]; then
      for name in $3; do
        echo "$prefix --teacher ${name%/*} --student ${name#*/} --kd --seed $seed $suffix"
      done
    fi
  done
}
commands() {
  local stage=$1 seq=transformer-seq
  local classify="train_sva.py --data $sva$sentences" lm
  lm="$classify --objective lm"
  runs "train_mnist.py --data $mnist$digits" 'mlp cnn' "$(echo {mlp,cnn}/{mlp,cnn})"
  if [ $quick ]; then
    runs "$classify" "lstm $seq" "$(echo {lstm,$seq}/{lstm,$seq})"
    runs "$lm --epochs 3" "lstm $seq" "lstm/$seq $seq/$seq"
  else
    runs "$classify" "lstm transformer $seq ut-seq" \
         "$(echo {lstm,transformer,$seq,ut-seq}/{lstm,transformer,$seq,ut-seq})"
    runs "$lm" "lstm $seq ut-seq lstm-small $seq-small" \
         "$(echo {lstm,$seq}/{lstm,$seq} {lstm,ut-seq}/ut-seq lstm-small/$seq \
                 {lstm,$seq}-small/{lstm,$seq}-small)"
  fi
}
if [ $list ]; then
  for stage in $stages; do commands "$stage"; done
  exit
fi

mkdir -p "$OUT" || fail "can't make $OUT; choose another folder with OUT"
trap 'exit 130' INT TERM
total=$({ commands teachers; commands students; } | wc -l | tr -d ' ') begin=$(date +%s)
run_one() {  # PLACE COMMAND
  local start=$(date +%s) result=ok now
  eval "$2 --quiet" || result=FAILED
  now=$(date +%s)
  echo "$1/$total $result in $((now - start)) s, about" \
       "$(((now - begin) * (total - $1) / $1 / 60)) min left: ${2#*.py }"
  [ $result = ok ]
}
export total begin
export -f run_one
status=0 place=0
for stage in $stages; do
  while read -r line; do
    place=$((place + 1))
    printf '%s\0%s\0' $place "$line"
  done < <(commands "$stage") | xargs -0 -n 2 -P "$JOBS" bash -c 'run_one "$@"' _ || status=1
  place=$(commands "$stage" | wc -l)
done
[ $status = 0 ] || echo "run_all.sh: some runs FAILED, see above; start it again to retry" >&2
set -o pipefail
"$PYTHON" analyze.py "$OUT" --data-dir "$DATA" --json "$OUT/analysis.json" |
  tee "$OUT/analysis.md" || status=1
exit $status
