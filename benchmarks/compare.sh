#!/bin/bash
# The comparison of methods (docs/results/methods.md):
#   planted | planted-rules | ioi | greater-than | english | indonesian | xnli
#   bash benchmarks/compare.sh ioi
# NusaX and XNLI are scored in their proxy checkpoints (cdt-lens transfer benchmarks/nusax.toml --out
# runs/nusax, and benchmarks/xnli.toml --out runs/xnli), with the data sets under data/. A run that was
# cut off goes on where it was.
set -euo pipefail
plain=models/smollm2-135m
sweeps=exact,cdt:stable,cdt:shared,cdt:two-ended
# One rule at a time, changed from the preset `stable`.
single=cdt:norm=frozen,cdt:attention=decomposed,cdt:activation=frozen,cdt:activation=averaged
single=$single,cdt:product=half,cdt:product=gate,cdt:bias=proportional,cdt:sign=true,cdt:context=both
backward=one-pass,one-pass:shared,one-pass:two-ended,one-pass:linear,one-pass:gim
backward=$backward,attribution-patching,integrated-gradients,expected-gradients,direct,random
# Generated prompts are short: a sweep of 16 for each method. Sentences cost six times as much a pass:
# 1,120 passes, which sweep 4 prompts with `two-ended`.
few=estimate:two-ended,cdt:stable,exact,one-pass:two-ended,gates,integrated-gradients,random
many=estimate:two-ended,cdt:two-ended,cdt:stable,exact,gates,one-pass:two-ended,one-pass
many=$many,integrated-gradients,expected-gradients,attribution-patching,replay:two-ended,ensemble
many=$many,one-pass:gim,random
generated() {
  cdt-lens compare --model $plain --task "$1" --examples 128 --held-out 128 --draws 3 \
    --baseline-examples 128 --methods "$many" --out "runs/compare-$1"
}
sentences() {
  cdt-lens compare --data data --examples 128 --draws 2 --baseline-examples 300 --budget 1120 \
    --methods "$few" "$@"
}

case "${1:?name a task: planted, planted-rules, ioi, greater-than, english, indonesian, xnli}" in
  planted) cdt-lens compare --planted all --out runs/compare-planted \
         --methods "estimate:two-ended,$sweeps,cdt:official,gates,replay:two-ended,ensemble,$backward" ;;
  planted-rules) cdt-lens compare --planted all --out runs/compare-planted-rules \
         --methods "$sweeps,$single" ;;
  ioi | greater-than) generated "$1" ;;
  english | indonesian) sentences --model runs/nusax/proxy --task nusax-senti --language "$1" \
         --out "runs/compare-$1" ;;
  xnli) sentences --model runs/xnli/proxy --task xnli --language en --out runs/compare-xnli ;;
  *) echo "unknown task: $1" >&2; exit 2 ;;
esac
