#!/usr/bin/env bash
# One of the paper's tables on a machine with 8 GPUs: train every row, sample the answers, judge them.
#
#   examples/table1.sh paper/qwen2.5/table1
#
# Training and the judge take turns on the GPUs. vLLM is best in an environment of its own: VLLM=/path/to/vllm.
# Whatever is interrupted, the same command continues.

set -uo pipefail
RECIPE=$1
VLLM=${VLLM:-vllm}
PORT=${PORT:-8000}

# It ends with exit code 4 when all is trained, measured and answered, and the judge is not there yet.
aligndistil train "$RECIPE" --processes 8
code=$?
run=$(aligndistil recipes show "$RECIPE" | sed -n 's/^output_dir: //p')
if [ "$code" -ne 4 ] || ! grep -q "is not judged yet" "$run/report/comparison.json"; then
    exit "$code"
fi

"$VLLM" serve Qwen/Qwen2.5-72B-Instruct --tensor-parallel-size 8 --max-model-len 16384 --port "$PORT" \
    --generation-config vllm &
server=$!
trap 'kill "$server" 2> /dev/null; wait "$server"' EXIT
until curl --silent --fail "http://localhost:$PORT/health" > /dev/null; do
    kill -0 "$server" 2> /dev/null || { echo "the judge's server ended; its words are above" >&2; exit 4; }
    sleep 5
done
aligndistil train "$RECIPE"
