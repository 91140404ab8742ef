#!/usr/bin/env bash
# Everything that only a GPU can tell, in one unattended run: what is wrong, how fast it is, and why.
#
#   benchmarks/validate_gpu.sh [options] [OUT_DIR] [step...]
#
#   --first         what is wrong and how fast it is, within 330 s: facts compile smoke streams simulator pytest constants bench
#   --second        why, within 330 s: sanitize features tiles autotune host profile figures
#   --seconds N     for all steps together; default 530. A step gets the smaller of its own limit and what is left
#   --full          every case and library in `bench`, without a limit of its own
#   --archive FILE  OUT_DIR as .tar.gz, renewed after every step; wrong results go to FILE.failures.tar.gz
#   --small         tiny shapes, few cases and tests: whether this script works on a GPU
#   --dry-run       tiny shapes on the simulator and stand-ins for the tools: tests this script; writes nothing below benchmarks/results
#   --list          the steps and their limits
#
# For a GPU that is at hand for 15 minutes: --first in one call, --second in the next, kernels compiled before on another machine (benchmarks/README.md).
#
# Each step has a limit of its own, writes OUT_DIR/logs/STEP.log and never keeps the next from running. Steps marked + time nothing and run side by side
# with their neighbours. OUT_DIR/summary.txt, printed at the end and current
# after every step, has their exit codes. Figures go to OUT_DIR/results/GPU/ and from there to benchmarks/results/GPU/. Nothing is installed, and no setting
# of the GPU is changed. PYTHON names the interpreter, CUFLASH_CACHE_DIR the folder for compiled kernels, CUFLASH_CONSTANTS_CUBINS what
# `constants.py --compile` wrote. Both can be made on another machine: `bench_attention.py --compile --arch sm_90`.
set -u

# Name, seconds, + if others may run beside it, what it tells; in the order of their value.
STEPS="
facts      40 - machine, software, clocks, ceilings -> facts.json
compile    70 - every kernel that the other steps need; registers and spills
smoke      75 + both passes against float64, twice, and every feature; wrong results are kept in failures/
streams    40 + streams, CUDA graphs, threads, a second GPU
simulator  60 + GPU against simulator, bit by bit -> simulator.json
pytest    110 + the tests of the GPU -> pytest.xml
constants  60 - what the timing model needs to know -> constants.json
bench     105 - libraries side by side -> attention.csv
sanitize   80 - memcheck, racecheck, initcheck, synccheck, side by side
features   50 - the same on a case of every score feature, kind of lengths and head dimension -> attention.csv
tiles      35 - tiles beside the model's opinion -> tiles.csv
autotune   55 - the tiles that calls on this GPU are to take -> tuning.json
host       20 - microseconds of a warm call -> host.json
profile    45 - Nsight Compute on the worst case and on a common one -> logs/profile-*.txt
figures    25 - tables, figures and a page of all that -> report.html
"
FIRST="facts compile smoke streams simulator pytest constants bench"
SECOND="sanitize features tiles autotune host profile figures"

usage() { sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p;}' "$0"; }

total=530 full="" archive="" dry="" small="" out="" chosen=""
while [ $# -gt 0 ]; do
  case $1 in
    --first) total=330 chosen=$FIRST ;;
    --second) total=330 chosen=$SECOND ;;
    --seconds) total=${2:?--seconds needs a number}; shift ;;
    --archive) archive=${2:?--archive needs a file}; shift ;;
    --full) full=1 ;;
    --small) small=--small ;;
    --dry-run) dry=--dry-run ;;
    --list) printf '%s' "$STEPS"; exit 0 ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "unknown option $1; see --help" >&2; exit 2 ;;
    *)
      if printf '%s' "$STEPS" | grep -q "^$1 "; then
        chosen="$chosen $1"
      elif [ -z "$out" ]; then
        out=$1
      else
        echo "unknown step $1; --list lists them" >&2
        exit 2
      fi ;;
  esac
  shift
done
case $total in '' | *[!0-9]*) echo "--seconds needs a whole number" >&2; exit 2 ;; esac
[ -n "$chosen" ] || chosen=$(printf '%s' "$STEPS" | awk 'NF { print $1 }')

root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
out=${out:-${TMPDIR:-/tmp}/cuflash-validation}
mkdir -p "$out/logs" && out=$(cd "$out" && pwd) || exit 2
[ -z "$archive" ] || { mkdir -p "$(dirname "$archive")" && archive=$(cd "$(dirname "$archive")" && pwd)/$(basename "$archive"); } || exit 2
cd "$root" || exit 2
python=${PYTHON:-$(command -v python3 || command -v python)}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export CUFLASH_CACHE_DIR="${CUFLASH_CACHE_DIR:-${TMPDIR:-/tmp}/cuflash-validation-cache}"
mkdir -p "$CUFLASH_CACHE_DIR"
bench=benchmarks/bench_attention.py calls=benchmarks/sanitize.py
started=$SECONDS
: >"$out/summary.txt"

has_module() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }
say() { printf '%s\n' "$*"; }

# --- Steps: `limit` holds the seconds that this one has ---------------------------------------------------------------------------------------

results_folder() { find "$out/results" -mindepth 1 -maxdepth 1 -type d 2>/dev/null | head -n 1; }

step_facts() {
  command -v nvidia-smi >/dev/null && nvidia-smi
  "$python" -m cuflash info
  "$python" "$bench" $how --facts --output "$results"
  local code=$?
  cp "$results/facts.json" "$out/facts.json"
  [ -z "$dry" ] && nvidia-smi -q -d CLOCK,PERFORMANCE,POWER,TEMPERATURE
  return $code
}

step_compile() { "$python" "$bench" $how --compile --seconds $((limit - 5)); }

step_smoke() { "$python" "$calls" $how --check --seconds $((limit - 5)) --keep "$out/failures"; }

step_streams() { "$python" -X faulthandler "$calls" $how --streams; }

step_pytest() {
  # What takes long says where it is, before its limit ends the process.
  local options=(-p no:cacheprovider -v -rfE --tb=short --junitxml "$out/pytest.xml" --durations=10 -o faulthandler_timeout=20)
  has_module pytest || { say "SUMMARY: pytest is not installed"; return 3; }
  if has_module xdist; then options+=(-n "$(($(nproc) > 8 ? $(nproc) - 4 : $(nproc)))" --dist loadgroup); fi
  if has_module pytest_timeout; then options+=(--timeout 60 --timeout-method thread); fi
  for module in hypothesis ml_dtypes; do has_module $module || say "$module is not installed: the tests will not be collected"; done
  if [ -n "$dry" ]; then
    options+=(-k "sm_80 and test_edge_cases") # a handful on the simulator
  elif [ -n "$small" ]; then
    options+=(-m gpu -k test_graphs)
  else
    options+=(-m gpu)
  fi
  export CUFLASH_CALIBRATION_OUT="$results/calibration.json"
  export CUFLASH_TEST_DEADLINE=$(($(date +%s) + limit - 20)) OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
  # Interrupted rather than killed, so that the report of what has run is written. A shell's background jobs ignore that signal unless told otherwise.
  local begin="import signal, sys, pytest; signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(pytest.main(sys.argv[1:]))"
  timeout -s INT -k 5 $((limit - 8)) "$python" -X faulthandler -c "$begin" "${options[@]}" tests
  local code=$?
  local counts
  counts=$(grep -aE '^[=!]* ?[0-9]+ (passed|failed|errors?|skipped|deselected)' "$out/logs/pytest.log" | tail -n 1)
  [ -n "$counts" ] || counts="stopped: $(grep -ac ' PASSED ' "$out/logs/pytest.log") passed, $(grep -ac ' FAILED ' "$out/logs/pytest.log") failed so far"
  say "SUMMARY: ${counts:-see pytest.log}"
  [ -n "$dry" ] && [ $code -eq 5 ] && return 0 # nothing was collected
  return $code
}

step_constants() {
  [ -f benchmarks/constants.py ] || { say "SUMMARY: there is no benchmarks/constants.py"; return 3; }
  "$python" -X faulthandler benchmarks/constants.py $dry ${CUFLASH_CONSTANTS_CUBINS:+--cubins "$CUFLASH_CONSTANTS_CUBINS"} \
    --output "$results" --seconds $((limit - 8))
}

step_simulator() { "$python" "$calls" $how --simulator --seconds $((limit - 8)) --output "$results/simulator.json"; }

step_sanitize() {
  local tool tools="memcheck racecheck initcheck synccheck" code=0 word="" pids=() options
  local sanitizer
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [ -z "$sanitizer" ] && [ -z "$dry" ]; then say "SUMMARY: compute-sanitizer is not there"; return 3; fi
  for tool in $tools; do
    options=(--tool "$tool" --error-exitcode 86 --print-limit 40)
    [ "$tool" = racecheck ] && options+=(--racecheck-report all)
    local command=("$sanitizer" "${options[@]}" "$python")
    [ -n "$dry" ] && command=("$python")
    timeout -k 5 $((limit - 6)) "${command[@]}" "$calls" $how --seconds $((limit - 20)) >"$out/logs/sanitize-$tool.txt" 2>&1 &
    pids+=($!)
  done
  local index=0
  for tool in $tools; do
    wait "${pids[$index]}"
    local status=$?
    index=$((index + 1))
    say "=== $tool: exit code $status"
    grep -vE '^========= *$' "$out/logs/sanitize-$tool.txt" | head -n 60
    tail -n 5 "$out/logs/sanitize-$tool.txt"
    [ $status -eq 0 ] || code=1
    word="$word $tool $status ($(grep -cE '^(ran|NaN)' "$out/logs/sanitize-$tool.txt") of $("$python" "$calls" $how --count) cases);"
  done
  say "SUMMARY:$word exit code 86 means that the tool found something"
  return $code
}

step_bench() {
  local mode=--quick
  [ -n "$full" ] && mode=--full
  "$python" -X faulthandler "$bench" $how $mode --seconds $((limit - 12)) --output "$results"
}

step_features() { "$python" -X faulthandler "$bench" $how --features --seconds $((limit - 10)) --output "$results"; }

step_tiles() { "$python" -X faulthandler "$bench" $how --tiles --seconds $((limit - 8)) --output "$results"; }

step_autotune() {
  local what=(--effort quick) table="$results/tuning.json" code
  [ -n "$dry$small" ] && what+=(--like "--batch 1 --heads 1 --seqlen 40 --head-dim 16")
  "$python" -X faulthandler -m cuflash autotune "${what[@]}" --output "$table" --budget "$(awk "BEGIN { print ($limit - 15) / 60 }")"
  code=$?
  [ -f "$table" ] || return $code
  say "SUMMARY: $(grep -c '"bucket"' "$table") kernels tuned, $(grep -c '"milliseconds": null' "$table") of $(grep -c '"milliseconds"' "$table") tiles failed"
  return $code
}

step_host() { "$python" "$bench" $how --host --output "$results"; }

step_profile() {
  local ncu case code=0 number=0 cases=("bfloat16 128 4096 causal forward") found
  ncu=$(command -v ncu || ls /usr/local/cuda/bin/ncu /opt/nvidia/nsight-compute/*/ncu 2>/dev/null | head -n 1)
  if [ -z "$ncu" ] && [ -z "$dry" ]; then say "SUMMARY: ncu is not there"; return 3; fi
  if [ -f "$results/attention.csv" ]; then
    found=$("$python" "$bench" --worst "$results/attention.csv") && [ -n "$found" ] && cases=("$found" "${cases[@]}")
  fi
  [ -n "$dry" ] && cases=("bfloat16 64 32 causal forward")
  for case in "${cases[@]}"; do
    number=$((number + 1))
    local command=("$ncu" --clock-control none --kernel-name "regex:(forward_|backward_)" --launch-skip 1 --launch-count 4
      --section SpeedOfLight --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis --section WarpStateStats --section SchedulerStats
      --section Occupancy --section LaunchStats --section InstructionStats "$python")
    [ -n "$dry" ] && command=("$python")
    # shellcheck disable=SC2086
    timeout -k 5 $(((limit - 6) / ${#cases[@]})) "${command[@]}" "$bench" $how --one $case >"$out/logs/profile-$number.txt" 2>&1 || code=1
    say "=== profile-$number.txt: $case"
    grep -E '^ +(forward_|backward_)|Duration|Throughput|Registers Per|Achieved Occ|Theoretical Occ|No Eligible|Issued Warp|Bank|bank|Stall|stall|Error|error' \
      "$out/logs/profile-$number.txt" | head -n 60
  done
  say "SUMMARY: $number cases profiled: ${cases[*]}"
  return $code
}

step_figures() {
  local folder
  folder=$(results_folder)
  [ -n "$folder" ] || { say "SUMMARY: there are no results"; return 3; }
  "$python" benchmarks/report.py "$folder" --output "$folder" | tee "$folder/tables.md"
  return "${PIPESTATUS[0]}"
}

# --- Running them -----------------------------------------------------------------------------------------------------------------------------

finish_step() {
  [ -n "$archive" ] || return 0
  local folder
  folder=$(basename "$out")
  tar -C "$(dirname "$out")" --exclude="$(basename "$archive")*" --exclude="$folder/failures" -czf "$archive.part" "$folder"
  mv -f "$archive.part" "$archive"
  [ -d "$out/failures" ] && tar -C "$out" -czf "$archive.failures.tar.gz" failures
  return 0
}

slug=simulator
if [ -z "$dry" ]; then
  slug=$(nvidia-smi --query-gpu=name --format=csv,noheader -i 0 2>/dev/null | head -n 1 | tr '[:upper:]' '[:lower:]' | sed -E 's/[^a-z0-9]+/-/g;s/^-|-$//g')
  slug=${slug:-gpu}
fi
results=$out/results/$slug
mkdir -p "$results"

# The simulator's core is needed by later steps and takes half a minute: it is built while the first ones run.
setsid "$python" -c "from cuflash.simulator import build; build.library_path()" >"$out/logs/simulator-core.txt" 2>&1 &
core=$!
[ -z "$dry" ] || wait $core # every step of a rehearsal needs it, and some have a limit for each case

how="$dry $small"
export limit out results dry small how full bench calls python
failed=0
running=() # steps that have not ended
declare -A pid_of begun_of limit_of
{
  say "cuflash on $slug, $(date -u +%Y-%m-%dT%H:%M:%SZ)"
  say "step       exit  seconds"
} >>"$out/summary.txt"

# Begin a step in a process group of its own, so that its limit ends whatever it has started.
start_step() {
  local own left
  own=$(printf '%s' "$STEPS" | awk -v step="$1" '$1 == step { print $2 }')
  left=$((total - (SECONDS - started)))
  [ "$1" = bench ] && [ -n "$full" ] && own=$left
  [ -z "$dry$small" ] || own=$((5 * own)) # machines that rehearse are busy
  limit=$((own < left ? own : left))
  if [ $limit -lt 20 ]; then
    printf '%-10s    –        –  no time left\n' "$1" >>"$out/summary.txt"
    failed=1
    return
  fi
  say "--- $1, at most $limit s"
  setsid bash -c '
    eval "$(cat "$1")"
    "step_$2"' step <(declare -f) "$1" >"$out/logs/$1.log" 2>&1 &
  pid_of[$1]=$! begun_of[$1]=$SECONDS limit_of[$1]=$limit
  running+=("$1")
}

# Wait until all running steps have ended or reached their limits.
end_steps() {
  local step pid code still
  while [ ${#running[@]} -gt 0 ]; do
    still=()
    for step in "${running[@]}"; do
      pid=${pid_of[$step]} code=""
      if ! kill -0 "$pid" 2>/dev/null; then
        wait "$pid"
        code=$?
      elif [ $((SECONDS - begun_of[$step])) -ge "${limit_of[$step]}" ]; then
        kill -TERM -- "-$pid" 2>/dev/null
        sleep 2
        # shellcheck disable=SC2046
        kill -KILL -- "-$pid" $(ps -o pid= -s "$pid" 2>/dev/null) 2>/dev/null # also what has a process group of its own
        wait "$pid" 2>/dev/null
        code=124
      fi
      if [ -n "$code" ]; then report_step "$step" "$code"; else still+=("$step"); fi
    done
    running=("${still[@]}")
    [ ${#running[@]} -eq 0 ] || sleep 0.2
  done
}

report_step() {
  local log="$out/logs/$1.log" word
  [ "$2" -eq 0 ] || failed=1
  word=$(grep -a '^SUMMARY:' "$log" | tail -n 1 | cut -c 10-170)
  [ -n "$word" ] || word="last line: $(tail -n 1 "$log" | cut -c 1-140)"
  [ "$2" -eq 124 ] && word="stopped at its limit; $word"
  printf '%-10s %4s  %7s  %s\n' "$1" "$2" "$((SECONDS - begun_of[$1]))" "$word" >>"$out/summary.txt"
  finish_step
}

for step in $chosen; do
  beside=$(printf '%s' "$STEPS" | awk -v step="$step" '$1 == step { print $3 }')
  [ "$beside" = + ] || end_steps
  start_step "$step"
  [ "$beside" = + ] || end_steps
done
end_steps
kill -- -$core 2>/dev/null
if [ -z "$dry" ] && [ "$slug" != gpu ] && [ -n "$(ls "$results" 2>/dev/null)" ]; then
  mkdir -p "benchmarks/results/$slug" && cp -R "$results/." "benchmarks/results/$slug/"
fi

{
  say "$((SECONDS - started)) s in all; logs in $out/logs"
  for step in smoke streams simulator constants tiles compile; do # what is wrong, a few lines of each
    [ -f "$out/logs/$step.log" ] && grep -a -m 4 'WRONG' "$out/logs/$step.log" | cut -c 1-200 | sed "s/^/$step: /"
  done
  [ -f "$out/logs/pytest.log" ] && grep -aE -m 20 '^(FAILED|ERROR) ' "$out/logs/pytest.log" | cut -c 1-200
} >>"$out/summary.txt"
finish_step
cat "$out/summary.txt"
exit $failed
