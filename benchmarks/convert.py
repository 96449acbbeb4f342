"""Raw logs to TFRecord against the csv module with tf.train.Example, at the same record layout.

    python -m benchmarks.convert [--rows=600000]

Two logs are generated: the AliExpress layout with 82 columns, and a log with ids, a history of up
to 20 items and numbers, as CSV and as Parquet. Ours is the command line from start to end:
interpreter, imports, scan, vocabularies, validation split, checks, shards, schema. The baseline is
what most projects write: csv.reader, one packed Example a row, TFRecordWriter; it makes no
vocabulary, no split and no check, and its clock starts after its imports. They take turns; the
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

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
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
    flags.DEFINE_string("write_lists", None, "Only write the log with lists into this folder.")
    flags.DEFINE_string("output_dir", None, "Where --run_baseline writes.")


IDS = {"user": 50_000, "item": 20_000, "brand": 500, "category": 100, "city": 300, "slot": 6}
NUMBERS = tuple(f"number_{i}" for i in range(6))
LONGEST = 20
FEATURE_FILE = "\n".join(
    [
        '[labels]\nclick = "click"\nconversion = "conversion"\n[columns]\ngroup = "search_id"',
        *(f'[features.{name}]\ndtype = "int64"' for name in IDS),
        *(f'[features.{name}]\ntype = "numerical"' for name in NUMBERS),
        '[features.history]\ntype = "sequence"\nvocabulary = "item"\nseparator = "|"',
        f"max_length = {LONGEST}\n",
    ]
)


def write_lists(folder: str, rows: int) -> None:
    """Writes lists.csv, lists.parquet and lists.toml, a log with histories."""
    rng = np.random.default_rng(0)

    def ids(name: str, size: int) -> np.ndarray:
        # Low ids are common, high ones rare.
        return (IDS[name] * rng.random(size) ** 2.5).astype(np.int64) + 1_000_000

    lengths = rng.integers(0, LONGEST, rows)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    history = pyarrow.ListArray.from_arrays(ends, ids("item", int(ends[-1])))
    click = rng.random(rows) < 0.1
    table = pyarrow.table(
        {
            "search_id": np.arange(rows) // 10,
            **{name: ids(name, rows) for name in IDS},
            **{name: rng.normal(size=rows).round(4) for name in NUMBERS},
            "click": click.astype(int),
            "conversion": (click & (rng.random(rows) < 0.2)).astype(int),
            "history": history,
        }
    )
    pyarrow.parquet.write_table(table, f"{folder}/lists.parquet")
    texts = pyarrow.array("|".join(map(str, values)) for values in history.to_pylist())
    table = table.set_column(table.num_columns - 1, "history", texts)
    options = pyarrow.csv.WriteOptions(quoting_style="none", quoting_header="none")
    pyarrow.csv.write_csv(table, f"{folder}/lists.csv", options)
    pathlib.Path(folder, "lists.toml").write_text(FEATURE_FILE)


def baseline(path: str, folder: str, shards: int = 16) -> None:
    """Converts a CSV as most projects do; prints the seconds it took."""
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
        history = place.get("history")
        names = (
            (aliexpress.CATEGORICAL, aliexpress.NUMERICAL) if history is None else (IDS, NUMBERS)
        )
        categorical, numerical = ([place[name] for name in kind] for kind in names)
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
            if history is not None:
                feature["ids/history"] = integers(
                    [int(x) + 1 for x in row[history].split("|") if x]
                )
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
    """Prints rows/s, the ratio to the baseline and the peak memory of each, as Markdown tables."""
    values = flags.FLAGS
    if values.run_baseline:
        baseline(values.run_baseline, values.output_dir)
        return
    if values.write_lists:
        write_lists(values.write_lists, values.rows)
        return
    with tempfile.TemporaryDirectory() as folder:
        # One test row: nearly everything is in the file that both read.
        fraction = 1 / values.rows
        measure(
            ["pwiser_tf.synthetic", f"--output_dir={folder}/sample", f"--rows={values.rows + 1}",
             f"--test_fraction={fraction}"]
        )  # fmt: skip
        # In a process of its own, as a child's peak memory includes that of its parent.
        measure(["benchmarks.convert", f"--write_lists={folder}", f"--rows={values.rows}"])
        train = f"{folder}/sample/AliExpress_XX/train.csv"
        lists = [f"--features={folder}/lists.toml"]
        print(machine.header())
        _compare(folder, "82 columns", {"ours": (["--format=aliexpress"], train)}, train)
        _compare(
            folder,
            f"ids, numbers, a history of up to {LONGEST}",
            {"ours": (lists, f"{folder}/lists.csv"), "Parquet": (lists, f"{folder}/lists.parquet")},
            f"{folder}/lists.csv",
        )


def _compare(folder: str, title: str, ours: dict[str, tuple[list[str], str]], train: str) -> None:
    """Measures ours, (flags, file) by name, and the baseline on one log; prints a table."""
    values = flags.FLAGS
    runs: dict[str, list[Run]] = {name: [] for name in (*ours, "baseline")}
    for _ in range(values.repeats):
        for name, (arguments, file) in ours.items():
            with tempfile.TemporaryDirectory(dir=folder) as output:
                runs[name].append(
                    measure(
                        ["pwiser_tf.convert", *arguments, f"--train={file}",
                         f"--output_dir={output}/out"]
                    )
                )  # fmt: skip
        if values.baseline_too:
            with tempfile.TemporaryDirectory(dir=folder) as output:
                run = measure(
                    ["benchmarks.convert", f"--run_baseline={train}", f"--output_dir={output}"]
                )
                seconds = float(run.output.split()[-1])
                runs["baseline"].append(dataclasses.replace(run, seconds=seconds))
    size = os.path.getsize(train) / 1e6
    print(f"\n{title}: {values.rows:,} rows, {size:.0f} MB of CSV\n")
    print("| converter | rows/s | ratio | CPU s | peak MB |\n|---|---|---|---|---|")
    slowest = max(min(run.seconds for run in found) for found in runs.values() if found)
    for name, found in runs.items():
        if found:
            seconds = min(run.seconds for run in found)
            print(
                f"| {name} | {values.rows / seconds:,.0f} | {slowest / seconds:.1f} "
                f"| {min(run.cpu for run in found):.1f} | {max(run.peak for run in found):.0f} |"
            )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
