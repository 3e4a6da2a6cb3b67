#!/usr/bin/env bash
# Runs every recipe of a folder and writes one output folder and one JSON report each, as papers' scripts do.
#   recipes/reproduce.sh recipes/vit [OUT] [further options of tprune run, such as --model deit_s --data DIR]
# A recipe that is done already is skipped; the exit code is 1 if any failed.
set -uo pipefail
if [ $# -lt 1 ] || [ ! -d "$1" ]; then
  echo "usage: $0 FOLDER_OF_RECIPES [OUT] [OPTIONS OF tprune run]" >&2
  exit 2
fi
folder=$1
out=${2:-out/$(basename "$folder")}
shift; [ $# -gt 0 ] && shift
mkdir -p "$out" || exit 2
failed=0
for recipe in "$folder"/*.yaml; do
  name=$(basename "$recipe" .yaml)
  if [ -d "$out/$name" ]; then
    echo "$name: done already, in $out/$name"
  elif tprune run "$recipe" --out "$out/$name" --json "$@" > "$out/$name.json.part"; then
    mv "$out/$name.json.part" "$out/$name.json"
    echo "$name: $out/$name"
  else
    rm -f "$out/$name.json.part"
    echo "$name: failed" >&2
    failed=1
  fi
done
exit $failed
