#!/usr/bin/env bash
# From pairs of images and prompts to a submission, on one machine with one GPU or several:
#
#   image-to-prompts weights get open_clip:ViT-L-14-336-quickgelu open_clip:EVA02-L-14-336 open_clip:convnext_xxlarge
#   PAIRS="data/a data/b" IMAGES=data/competition/images bash tools/leaderboard.sh
#
# PAIRS are folders of images with a table of their prompts (PAIRS in image_to_prompts/pipeline.py names public ones), IMAGES what is to be
# predicted. Each command does only what is not done yet, so the script may be stopped and started again. For hours and
# images see docs/recipes.md. `SIZE=tiny bash tools/leaderboard.sh` does the same with stand-ins: minutes on two cores.
set -euo pipefail
RUN=${RUN:-runs/leaderboard}
SIZE=${SIZE:-full}
one=("${PYTHON:-python}" -m image_to_prompts)
profile=full folds=16
towers=("--recipe vit-l-336" "--recipe eva02-l-336" "--recipe convnext-xxl")

# Several GPUs: a process each.
gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)
every=("${one[@]}")
if [ "$gpus" -gt 1 ]; then
  every=(accelerate launch --multi_gpu --num_processes "$gpus" -m image_to_prompts)
fi
stage() { "${one[@]}" "$@" --run "$RUN" --profile "$profile"; }
on_all() { "${every[@]}" "$@" --run "$RUN" --profile "$profile"; }

# Without pairs and weights: emoji scenes, and three small towers for a few steps.
if [ "$SIZE" = tiny ]; then
  profile=embedded folds=4
  small="--recipe embedded --image-size 64 --epochs 1"
  towers=("$small" "$small --seed 1 --learning-rate 1e-3" "$small --backbone timm:tf_efficientnet_lite0")
  PAIRS=$RUN/scenes IMAGES=$RUN/asked KEY=$RUN/prompts/asked.csv
  stage generate --count 120 --out "$RUN/prompts/scenes.csv"
  on_all render --metadata "$RUN/prompts/scenes.csv" --out "$PAIRS"
  stage generate --count 20 --seed 1 --out "$KEY"
  on_all render --metadata "$KEY" --out "$IMAGES"
fi

: "${PAIRS:?folders of pairs}" "${IMAGES:?folder of the images to predict}"

# 1. Pairs: each set's prompts, without those that are near to one of an earlier set.
images=() metadata=()
for pairs in $PAIRS; do
  name=$(basename "$pairs")
  stage generate --source pairs --input "$pairs" --name "$name" --out "$RUN/prompts/$name-pairs.csv"
  kept=$RUN/data_meta/$name.csv
  stage dedupe --prompts "$RUN/prompts/$name-pairs.csv" --against "${metadata[@]}" --out "$kept" --folds $folds
  images+=("$pairs") metadata+=("$kept")
done

# 2. Three towers, one after the other.
checkpoints=()
for number in "${!towers[@]}"; do
  out=$RUN/checkpoints/tower-$number
  # shellcheck disable=SC2086
  on_all finetune ${towers[$number]} --images "${images[@]}" --metadata "${metadata[@]}" --out "$out"
  checkpoints+=("$out")
done

# 3. Their blend, with weights fitted on what all three validated; 4. the check.
on_all infer --images "$IMAGES" --checkpoint "${checkpoints[@]}" --out "$RUN/submission.csv" ${KEY:+--key "$KEY"}
"${one[@]}" check-submission "$RUN/submission.csv" --images "$IMAGES"
