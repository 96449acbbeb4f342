"""CSV to TFRecord against the csv module with tf.train.Example, at the same record layout.

    python -m benchmarks.convert [--rows=600000]

The file is generated (pwiser sample), 82 columns. Ours is the command line from start to end:
interpreter, imports, scan, vocabularies, validation split, checks, shards, schema. The baseline is
what most projects write: csv.reader, one packed Example a row, TFRecordWriter; it makes no
vocabulary, no split and no check, and its clock starts after its imports. The two take turns; the
fastest of --repeats runs counts. CPU seconds and peak memory are of the whole process, imports
included; on a machine that others use too, read the CPU seconds: ours spreads over all cores, the
baseline is one thread. Linux only.
"""

import csv
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import flags

from benchmarks import machine
from pwiser_tf import command_line
from pwiser_tf.convert import aliexpress

ROOT = pathlib.Path(__file__).parent.parent


def define_flags() -> None:
    """Defines the flags of this command line."""
    flags.DEFINE_integer("rows", 600_000, "Rows of the generated file.", lower_bound=1)
    flags.DEFINE_integer("repeats", 3, "Runs of each; the fastest counts.", lower_bound=1)
    flags.DEFINE_bool("baseline_too", True, "Run the baseline too, which is slow.")
    # For the processes that this one starts.
    flags.DEFINE_string("run_baseline", None, "Only convert this file with the baseline.")
    flags.DEFINE_string("output_dir", None, "Where --run_baseline writes.")


def baseline(path: str, folder: str, shards: int = 16) -> None:
    """Converts a processed AliExpress file as most projects do; prints the seconds it took."""
    import pwiser_tf.quiet  # noqa: F401

    # isort: split

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


@dataclasses.dataclass(frozen=True)
class Run:
    """A process's seconds, CPU seconds (all threads), peak memory in MB, and what it printed."""

    seconds: float
    cpu: float
    peak: float
    output: str


def measure(arguments: list[str]) -> Run:
    """Runs a Python module as a process to its end."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        out.seek(0)
        if status:
            raise RuntimeError(f"{arguments} failed: {out.read()}")
        cpu = usage.ru_utime + usage.ru_stime
        return Run(seconds, cpu, usage.ru_maxrss / 1024, out.read())


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
            ["pwiser_tf.synthetic", f"--output_dir={folder}/sample", f"--rows={values.rows + 1}",
             f"--test_fraction={fraction}"]
        )  # fmt: skip
        train = f"{folder}/sample/AliExpress_XX/train.csv"
        size = os.path.getsize(train) / 1e6
        runs: dict[str, list[Run]] = {"ours": [], "baseline": []}
        for repeat in range(values.repeats):
            output = f"{folder}/ours-{repeat}"
            runs["ours"].append(
                measure(
                    ["pwiser_tf.convert", "--format=aliexpress", f"--train={train}",
                     f"--output_dir={output}"]
                )
            )  # fmt: skip
            if values.baseline_too:
                output = f"{folder}/baseline-{repeat}"
                os.mkdir(output)
                run = measure(
                    ["benchmarks.convert", f"--run_baseline={train}", f"--output_dir={output}"]
                )
                seconds = float(run.output.split()[-1])
                runs["baseline"].append(dataclasses.replace(run, seconds=seconds))
        print(f"{machine.header()}\n\n{values.rows:,} rows, 82 columns, {size:.0f} MB\n")
        print("| converter | rows/s | ratio | CPU s | peak MB |\n|---|---|---|---|---|")
        slowest = max(min(run.seconds for run in found) for found in runs.values() if found)
        for name, found in runs.items():
            if found:
                seconds = min(run.seconds for run in found)
                print(
                    f"| {name} | {values.rows / seconds:,.0f} | {slowest / seconds:.1f} "
                    f"| {min(run.cpu for run in found):.1f} "
                    f"| {max(run.peak for run in found):.0f} |"
                )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
