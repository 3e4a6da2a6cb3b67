#!/usr/bin/env bash
# Gathers points for `tprune predict-recovery` (P2 law, arXiv 2411.10272): prunes MODEL at some rates, trains each for
# some numbers of epochs, and writes POINTS.csv.
#   recipes/p2-law.sh POINTS.csv [MODEL] [further options of tprune llm-weights, such as --recover-data FILE]
set -euo pipefail
if [ $# -lt 1 ]; then
  echo "usage: $0 POINTS.csv [MODEL] [OPTIONS OF tprune llm-weights]" >&2
  exit 2
fi
points=$1
model=${2:-smollm2-135m}
shift; [ $# -gt 0 ] && shift
echo "parameters,tokens,rate,dense_loss,loss" > "$points"
for rate in ${RATES:-0.1 0.2 0.3}; do
  for epochs in ${EPOCHS:-1 2 4}; do
    tprune llm-weights --method "${METHOD:-shortgpt}" --sparsity "$rate" --recover "lora:epochs=$epochs" \
      --length "${LENGTH:-512}" --json "$@" "$model" | python3 -c '
import json, math, sys
report, length = json.load(sys.stdin), int(sys.argv[1])
tokens = report["recovery"]["steps"] * report["recovery"]["batch"] * length
dense = report["parameters"] / (1 - report["budget"]["over_all_parameters"])
row = round(dense), tokens, report["budget"]["achieved"]
print(*row, *(math.log(report[side]["perplexity"]) for side in ("dense", "pruned")), sep=",")
' "${LENGTH:-512}" >> "$points"
  done
done
tprune predict-recovery "$points"
