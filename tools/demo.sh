#!/usr/bin/env bash
# All steps on generated data: raw CSV, TFRecord files, three losses trained and compared, an
# export, a gRPC server and scored candidates. Run by `make demo`; all output is in one folder.
set -euo pipefail
folder=${1:?usage: tools/demo.sh FOLDER}
accidental=0.5

step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }
say() { printf '$ %s\n' "$*"; "$@"; }

rm -rf "$folder"

step "1. Generate exposure logs in the AliExpress layout; half of the clicks are accidental"
say python -m tools.make_sample --output_dir="$folder/csv" --rows=600000 \
    --accidental_clicks=$accidental --seed=1

step "2. Convert the raw CSV files to TFRecord files and schema.json"
say python -m tools.csv_to_tfrecord --format=aliexpress --input="$folder/csv" \
    --output_dir="$folder/data"

# Not calibrated: the comparison shows what a loss does to the probabilities.
step "3. Train: BCE, BCE with weighted conversions, BCE + PWiseR (configs/sample.flags)"
train() {
    local name=$1
    shift
    say python -m pwiser_tf.train --flagfile=configs/sample.flags --data_dir="$folder/data" \
        --workdir="$folder/runs/$name" --calibration=none "$@"
}
train bce --loss=bce
train bce_weighted --loss=bce --conversion_weight=4
train pwiser --export_dir="$folder/models" --model_name=sample

step "4. Serve the PWiseR model with TF Serving's gRPC API"
python -m pwiser_serving.server --port=0 --model_name=sample \
    --model_base_path="$(pwd)/$folder/models/sample" >"$folder/server.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
address=
for _ in $(seq 300); do
    address=$(grep -om1 'on 0\.0\.0\.0:[0-9]*' "$folder/server.log" | sed 's/.*://') && break
    kill -0 $server 2>/dev/null || break
    sleep 0.2
done
[ -n "$address" ] || { cat "$folder/server.log" >&2; exit 1; }
tail -n 1 "$folder/server.log"

step "5. Compare the test metrics; share of accidental clicks in the data: $accidental"
runs=$folder/runs
say python -m pwiser_tf.evaluate --workdir="$runs/bce,$runs/bce_weighted,$runs/pwiser" \
    --output_dir="$folder/compared"
echo "plots: $folder/compared/*/report-test.png, $folder/compared/comparison.png"

step "6. Score candidates over gRPC"
head -n 11 "$folder"/csv/AliExpress_XX/test.csv >"$folder/candidates.csv"
say python -m pwiser_serving.client score --server="localhost:$address" --model=sample \
    --input="$folder/candidates.csv" --keep=search_id
