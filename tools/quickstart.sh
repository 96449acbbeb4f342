#!/usr/bin/env bash
# From generated data to served scores in less than a minute on two cores. Run by `make quickstart`;
# all output is in one folder. QUICKSTART_ROWS sets the number of generated rows.
set -euo pipefail
folder=${1:?usage: tools/quickstart.sh FOLDER}
rows=${QUICKSTART_ROWS:-100000}

step() { printf '\n== %s\n' "$1"; }
say() { printf '$ %s\n' "$*"; "$@"; }

rm -rf "$folder"

step "1. Generate exposure logs: CSV files with features, clicks and conversions"
say pwiser sample --output_dir="$folder/csv" --rows="$rows"

step "2. Convert the CSV files to TFRecord files and schema.json"
say pwiser convert --format=aliexpress --input="$folder/csv" --output_dir="$folder/data"

step "3. Train one small model with BCE + PWiseR, and evaluate it on the test split"
say pwiser train --data_dir="$folder/data" --workdir="$folder/run" --model=shared_bottom \
    --embedding_dim=16 --bottom_units=64,32 --tower_units=16 --batch_size=1024 \
    --learning_rate=2e-3 --epochs=2

step "4. Export it as a SavedModel for TF Serving"
say pwiser export --workdir="$folder/run" --export_dir="$folder/models" --model_name=quickstart

step "5. Serve it, and score ten rows of the test file over gRPC"
# Port 0 means any free port; the server's log names it.
pwiser serve --port=0 --model_name=quickstart \
    --model_base_path="$PWD/$folder/models/quickstart" >"$folder/server.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null && wait $server || true' EXIT
port=
for _ in $(seq 300); do
    port=$(grep -om1 'on 0\.0\.0\.0:[0-9]*' "$folder/server.log" | sed 's/.*://') && break
    kill -0 $server 2>/dev/null || break
    sleep 0.2
done
[ -n "$port" ] || { cat "$folder/server.log" >&2; exit 1; }
head -n 11 "$folder"/csv/AliExpress_XX/test.csv >"$folder/candidates.csv"
say pwiser score --server="localhost:$port" --model=quickstart \
    --input="$folder/candidates.csv" --keep=search_id
