#!/usr/bin/env bash
# The demo checkpoint: quantized, exported, and run; prints a continuation with the stats, and a chat.
# Usage: scripts/demo.sh [PROMPT]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
prompt=${1:-"Return a new list containing"}

et-moe export --model-dir examples/qwen3_5_moe/demo_checkpoint --output-dir build/demo \
  --qlinear 4w --qlinear-group-size 32 --qembedding 8w
build/runner/qwen3_5_moe_runner \
  --model_path build/demo/model.pte --data_path build/demo/model.ptd \
  --tokenizer_path build/demo/tokenizer.json \
  --prompt "$prompt" --max_new_tokens 100 --temperature 0.7 --top_p 0.95 --seed 1

questions=("My name is Ada." "What does os.path.join do?" "What is my name?")
printf '\nA chat. Asked:\n'
printf '  %s\n' "${questions[@]}"
printf 'Answered:\n'
printf '%s\n' "${questions[@]}" | et-moe chat build/demo 2>&1

echo
echo "Chat with it:   .venv/bin/et-moe chat build/demo"
echo "Serve it:       .venv/bin/et-moe serve build/demo"
