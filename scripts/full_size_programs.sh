# Qwen3.5-35B-A3B's programs at full size: name -> flags of `et-moe export`. Sourced by
# pack_full_size.sh, which makes the graphs, and by gpu_full_size.sh, which makes the weights.
declare -A recipe=([mixed]=mixed) # of all others 4w
declare -A drafts=([drafts1]=1 [drafts2]=2)
declare -A flags=(
  [int8]="--max-seq-len 4608 --max-sequences 256"
  [bf16]="--max-seq-len 4608 --max-sequences 256 --moe-activation-dtype bf16"
  [state]="--max-seq-len 4608 --max-sequences 256 --recurrent-state-dtype bfloat16"
  [mixed]="--max-seq-len 4608 --max-sequences 8"
  [drafts1]="--max-seq-len 4608 --max-sequences 8"
  [drafts2]="--max-seq-len 4608 --max-sequences 8"
  [long]="--max-seq-len 40960 --max-sequences 1"
)
