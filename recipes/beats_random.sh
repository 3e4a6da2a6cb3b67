#!/usr/bin/env bash
# Every method for image classifiers against random drop, on the built-in digits-vit and all its 2,000 test scenes.
#   recipes/beats_random.sh [OUT] [further options of tprune sweep, such as --keep 0.9]
# Random drop, and what else draws, is measured with five seeds: the table gives mean and standard deviation. Then what
# learns is fitted at every budget on the built-in training scenes (two to ten minutes each, seed 0) and joins the table.
# Methods that this model cannot run, or that must learn first, are listed with the reason. Stopped, it goes on where it was.
set -euo pipefail
out=${1:-out/beats_random}
[ $# -gt 0 ] && shift
common=(vit digits-vit --method all --keep 0.7,0.5 --limit 2000 --no-latency --no-pictures --out "$out")
tprune sweep "${common[@]}" --seeds 5 "$@"
tprune sweep "${common[@]}" --fit built-in "$@"
