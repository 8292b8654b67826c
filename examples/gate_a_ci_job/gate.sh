#!/usr/bin/env bash
# Compress a model and let the job pass or fail by its gates.
#
#   examples/gate_a_ci_job/gate.sh MODEL OUT [more flags of train-and-export]
#
# The exit code is soco-export's: 0 fine, 3 a gate failed (the model's fault), 2 and 4 the job's own (recipe, machine).
set -uo pipefail
model=$1 out=$2
shift 2

soco-export train-and-export --model "$model" --recipe "$(dirname "$0")/gates.yaml" --out "$out" "$@"
code=$?
case $code in
    0) echo "$model passes all gates" ;;
    3) echo "$model fails a gate; $out/report.md has the figures" ;;
    *) echo "there is no verdict on $model: soco-export ended with exit code $code" ;;
esac
# GitHub shows what is written to this file on the job's page.
if [ -f "$out/report.md" ] && [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then
    cat "$out/report.md" >>"$GITHUB_STEP_SUMMARY"
fi
exit "$code"
