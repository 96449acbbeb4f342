#!/usr/bin/env bash
# Builds the wheel, installs it into an empty environment, and uses it from an empty folder.
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
PATH="$folder/venv/bin:$PATH"
# From a copy, as building leaves folders behind.
mkdir "$folder/source" "$folder/used"
cp -r "$source"/{pwiser_tf,pyproject.toml,setup.py,README.md,LICENSE} "$folder/source"
pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir="$folder/wheels" "$folder/source"
pip install --quiet --disable-pip-version-check -c "$source/constraints.txt" "$folder"/wheels/*.whl

cd "$folder/used"
pwiser --help
pwiser sample --output_dir=csv --rows=4000
pwiser convert --format=aliexpress --input=csv --output_dir=data
pwiser train --data_dir=data --workdir=run --model=shared_bottom \
    --embedding_dim=4 --bottom_units=16 --tower_units=8 --batch_size=256 --epochs=1
pwiser evaluate --workdir=run
pwiser export --workdir=run --export_dir=models --model_name=sample
test -s models/sample/1/saved_model.pb

# What needs the extras.
pip install --quiet --disable-pip-version-check -c "$source/constraints.txt" \
    "$(echo "$folder"/wheels/*.whl)[all]"
small=(--model=shared_bottom --embedding_dim=4 --bottom_units=16 --tower_units=8 --epochs=1)
pwiser tune --data_dir=data --workdir=tuned "${small[@]}" --batch_size=256 --trials=1
test -s tuned-tune/best.flags
model=shared_bottom:embedding_dim=4:bottom_units=16:tower_units=8:epochs=1:batch_size=256
pwiser study --data=data --output_dir=table --models="$model" --losses=bce,pwiser --seeds=1
test -s table/table.md
