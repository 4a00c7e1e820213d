#!/bin/bash
# The comparison of methods (docs/results/methods.md):
#   planted | planted-rules | ioi | ioi-rules | greater-than | english | indonesian | xnli
#   bash benchmarks/compare.sh ioi
# NusaX and XNLI are scored in their proxy checkpoints (cdt-lens transfer benchmarks/nusax.toml --out
# runs/nusax, and benchmarks/xnli.toml --out runs/xnli), with the data sets under data/. A run that was
# cut off goes on where it was.
set -euo pipefail
compare() { cdt-lens compare --same-examples --draws 3 --baseline-examples 300 "$@"; }

plain=models/smollm2-135m
sweeps=exact,cdt:stable,cdt:shared,cdt:two-ended
rules=cdt:attention=half+context=both,cdt:official,cdt:activation=averaged+product=half
# One rule at a time, changed from the preset `stable`.
single=cdt:norm=frozen,cdt:attention=decomposed,cdt:activation=frozen,cdt:activation=averaged
single=$single,cdt:product=half,cdt:product=gate,cdt:bias=proportional,cdt:sign=true,cdt:context=both
backward=one-pass,one-pass:shared,one-pass:two-ended,one-pass:linear
backward=$backward,one-pass:norm=frozen+attention=tangent
backward=$backward,attribution-patching,integrated-gradients,direct,random
case "${1:?name a task: planted, planted-rules, ioi, ioi-rules, greater-than, english, indonesian, xnli}" in
  planted) cdt-lens compare --planted all --out runs/compare-planted \
         --methods "$sweeps,cdt:official,cdt:attention=half+context=both,$backward" ;;
  planted-rules) cdt-lens compare --planted all --out runs/compare-planted-rules \
         --methods "$sweeps,$single" ;;
  ioi) compare --model $plain --task ioi --examples 16 --held-out 16 --out runs/compare-ioi \
         --methods "$sweeps,$rules,$backward" ;;
  ioi-rules) compare --model $plain --task ioi --examples 16 --held-out 16 \
         --out runs/compare-ioi-rules --methods "$sweeps,$rules,$single" ;;
  greater-than) compare --model $plain --task greater-than --examples 16 --held-out 16 \
         --out runs/compare-greater-than --methods "$sweeps,cdt:official,$backward" ;;
  english | indonesian) compare --model runs/nusax/proxy --task nusax-senti --data data \
         --language "$1" --examples 9 --held-out 12 --out "runs/compare-$1" \
         --methods "$sweeps,$backward" ;;
  xnli) compare --model runs/xnli/proxy --task xnli --data data --language en \
         --examples 6 --held-out 9 --out runs/compare-xnli --methods "$sweeps,$backward" ;;
  *) echo "unknown task: $1" >&2; exit 2 ;;
esac
