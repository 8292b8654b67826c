#!/usr/bin/env bash
# Compress a model, and let the job pass or fail by its gates and by the committed baseline.
#
#   ci/gate.sh MODEL OUT [more flags of train-and-export]
#   ci/gate.sh --accept OUT            make this run the baseline, to be committed
#
# Copy this folder into a repository that ships a model; nothing else is needed but soco-export itself.
# The exit code is soco-export's: 0 fine, 3 a gate failed (the model's fault), 2 and 4 the job's own (recipe, machine).
# A speed that noise leaves undecided is a warning; STRICT=1 makes it a failure, for a machine of your own.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
baseline=${BASELINE:-$here/baseline.json}

if [ "$1" = --accept ]; then
    cp "$2/results.json" "$baseline" && echo "$baseline is what the next runs are held against: commit it"
    exit
fi
model=$1 out=$2
shift 2

soco-export train-and-export --model "$model" --recipe "$here/gates.yaml" --out "$out" "$@"
code=$?
if [ $code -ne 0 ] && [ $code -ne 3 ]; then
    echo "there is no verdict on $model: soco-export ended with exit code $code"
    exit $code
fi

against=()
if [ -f "$baseline" ]; then
    against=(--baseline "$baseline")
else
    echo "there is no $baseline yet: ci/gate.sh --accept $out makes one"
fi
verdict=$(soco-export gate "$out" "${against[@]}" ${STRICT:+--strict})
code=$?
echo "$verdict"
[ $code -eq 0 ] && echo "$model passes all gates" || echo "$model fails a gate; $out/report.html has the figures"

# GitHub shows these lines beside the commit, and what is written to the summary on the job's page.
if [ -n "${GITHUB_ACTIONS:-}" ]; then
    grep '^FAILED ' <<<"$verdict" | sed 's/^FAILED /::error title=soco-export::/'
    grep '^unsure ' <<<"$verdict" | sed 's/^unsure /::warning title=soco-export::/'
fi
{
    cat "$out/comment.md"
    printf '\n<details><summary>Gates and baseline</summary>\n\n```text\n%s\n```\n\n</details>\n' "$verdict"
} >"$out/comment-ci.md"
if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then
    cat "$out/comment-ci.md" >>"$GITHUB_STEP_SUMMARY"
fi
exit $code
