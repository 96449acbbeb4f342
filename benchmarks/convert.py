"""CSV to TFRecord against the csv module with tf.train.Example, at the same record layout.

    python -m benchmarks.convert [--rows=300000]

The file is generated (tools.make_sample), 82 columns. Ours is the command line from start to end:
interpreter, imports, scan, vocabularies, validation split, checks, shards, schema. The baseline is
what most projects write: csv.reader, one packed Example a row, TFRecordWriter; it makes no
vocabulary, no split and no check, and its clock starts after its imports. The two take turns; the
fastest of --repeats runs counts. Peak memory is of the whole process. Linux only.
"""

import csv
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import flags

from pwiser_tf import command_line
from tools import aliexpress

ROOT = pathlib.Path(__file__).parent.parent


def define_flags() -> None:
    """Defines the flags of this command line."""
    flags.DEFINE_integer("rows", 300_000, "Rows of the generated file.", lower_bound=1)
    flags.DEFINE_integer("repeats", 3, "Runs of each; the fastest counts.", lower_bound=1)
    flags.DEFINE_bool("baseline_too", True, "Whether to run the baseline, which is slow.")
    # For the processes that this one starts.
    flags.DEFINE_string("run_baseline", None, "Only convert this file with the baseline.")
    flags.DEFINE_string("output_dir", None, "Where --run_baseline writes.")


def baseline(path: str, folder: str, shards: int = 16) -> None:
    """Converts a processed AliExpress file as most projects do; prints the seconds it took."""
    import tensorflow as tf

    started = time.perf_counter()
    writers = [tf.io.TFRecordWriter(f"{folder}/train-{i:05d}") for i in range(shards)]

    def integers(values):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

    with open(path, newline="") as file:
        reader = csv.reader(file)
        place = {name: i for i, name in enumerate(next(reader))}
        categorical = [place[name] for name in aliexpress.CATEGORICAL]
        numerical = [place[name] for name in aliexpress.NUMERICAL]
        click, conversion, group = (place[n] for n in ("click", "conversion", "search_id"))
        for number, row in enumerate(reader):
            feature = {
                "categorical": integers([int(row[i]) + 1 for i in categorical]),
                "numerical": tf.train.Feature(
                    float_list=tf.train.FloatList(value=[float(row[i]) for i in numerical])
                ),
                "grade": integers([int(row[click]) + int(row[conversion])]),
                "group": integers([int(row[group])]),
            }
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writers[number % shards].write(example.SerializeToString())
    for writer in writers:
        writer.close()
    print(time.perf_counter() - started)


def measure(arguments: list[str]) -> tuple[float, float, str]:
    """Runs a Python module as a process; returns its seconds, its peak MB and its output."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            raise RuntimeError(f"{arguments} failed")
        out.seek(0)
        return seconds, usage.ru_maxrss / 1024, out.read()


def main() -> None:
    """Prints rows/s, the ratio and the peak memory of each, as a Markdown table."""
    values = flags.FLAGS
    if values.run_baseline:
        baseline(values.run_baseline, values.output_dir)
        return
    with tempfile.TemporaryDirectory() as folder:
        # One test row: nearly everything is in the file that both read.
        fraction = 1 / values.rows
        measure(
            ["tools.make_sample", f"--output_dir={folder}/sample", f"--rows={values.rows + 1}",
             f"--test_fraction={fraction}"]
        )  # fmt: skip
        train = f"{folder}/sample/AliExpress_XX/train.csv"
        size = os.path.getsize(train) / 1e6
        seconds: dict[str, list[float]] = {"ours": [], "baseline": []}
        peak = dict.fromkeys(seconds, 0.0)
        for repeat in range(values.repeats):
            output = f"{folder}/ours-{repeat}"
            taken, memory, _ = measure(
                ["tools.csv_to_tfrecord", "--format=aliexpress", f"--train={train}",
                 f"--output_dir={output}"]
            )  # fmt: skip
            seconds["ours"].append(taken)
            peak["ours"] = max(peak["ours"], memory)
            if values.baseline_too:
                output = f"{folder}/baseline-{repeat}"
                os.mkdir(output)
                _, memory, printed = measure(
                    ["benchmarks.convert", f"--run_baseline={train}", f"--output_dir={output}"]
                )
                seconds["baseline"].append(float(printed.split()[-1]))
                peak["baseline"] = max(peak["baseline"], memory)
        print(f"{values.rows:,} rows, 82 columns, {size:.0f} MB, {os.cpu_count()} cores")
        print("| converter | rows/s | ratio | peak MB |\n|---|---|---|---|")
        best = {name: values.rows / min(taken) for name, taken in seconds.items() if taken}
        for name, speed in best.items():
            ratio = speed / best["baseline"] if "baseline" in best else 1.0
            print(f"| {name} | {speed:,.0f} | {ratio:.1f} | {peak[name]:.0f} |")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
