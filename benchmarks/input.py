"""Rows a second of reading TFRecords, beside what training consumes.

    python -m benchmarks.input

The file is generated, in the AliExpress layout (16 categories, 63 numbers). Compared with ours
(shards parsed and shuffled whole) are the two usual pipelines over the same files: a shuffle of
serialized rows with each batch parsed whole, and with each row parsed by itself. The last row is
what the training step of MMoE at embedding 16 consumes, measured in the same run.
"""

import pathlib
import statistics
import tempfile
import time

import pwiser_tf.quiet  # noqa: F401

# isort: split

import numpy as np
import tensorflow as tf
from absl import flags

from benchmarks import generated, machine
from pwiser_tf import command_line, data, records
from pwiser_tf.schema import Schema, Shard
from pwiser_tf.training import share_cores

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command line."""
    flags.DEFINE_integer("rows", 400_000, "Rows to read.")
    flags.DEFINE_integer("shards", 4, "Files they lie in.")
    flags.DEFINE_integer("batch_size", 2048, "Rows a batch.")
    flags.DEFINE_integer("turns", 5, "Turns of each pipeline.")


def _generate(folder: pathlib.Path) -> Schema:
    """Writes the records and gives their schema."""
    random = np.random.default_rng(0)
    ids, shards = (1000,) * 16, []
    for number in range(FLAGS.shards):
        rows = FLAGS.rows // FLAGS.shards
        numbers = random.random((rows, generated.NUMBERS), np.float32)
        grades = random.choice(3, rows, p=[0.95, 0.045, 0.005])
        categories = random.integers(0, ids[0], (rows, len(ids)))
        made = records.Rows(categories, numbers, grades, np.arange(rows))
        encoded, _ = records.encode(made)
        shards.append(Shard(f"train-{number}.tfrecord", rows, encoded.nbytes))
        encoded.tofile(folder / shards[-1].file)
    return generated.schema(ids, FLAGS.rows, tuple(shards))


def _serialized(folder: pathlib.Path) -> tf.data.Dataset:
    files = sorted(map(str, folder.glob("*.tfrecord")))
    return tf.data.TFRecordDataset(files, buffer_size=8 << 20).shuffle(100_000, seed=0)


def _ours(folder, schema):
    return data.batches(folder, schema, "train", FLAGS.batch_size, shuffle_seed=(0, 0))


def _batch_then_parse(folder, schema):
    spec = records.parse_spec(schema)
    batches = _serialized(folder).batch(FLAGS.batch_size)
    return batches.map(lambda rows: tf.io.parse_example(rows, spec)).prefetch(2)


def _parse_then_batch(folder, schema):
    spec = records.parse_spec(schema)
    rows = _serialized(folder).map(
        lambda row: tf.io.parse_single_example(row, spec), num_parallel_calls=tf.data.AUTOTUNE
    )
    return rows.batch(FLAGS.batch_size).prefetch(2)


PIPELINES = {
    "pwiser-tf: shards shuffled whole, batches parsed whole": _ours,
    "shuffle rows, parse batches": _batch_then_parse,
    "shuffle rows, parse rows": _parse_then_batch,
}


def _rows_per_second(dataset: tf.data.Dataset) -> float:
    start = time.perf_counter()
    batches = dataset.reduce(np.int64(0), lambda count, *_: count + 1).numpy()
    assert batches == -(-FLAGS.rows // FLAGS.batch_size)
    return FLAGS.rows / (time.perf_counter() - start)


def _rows_trained_per_second(folder: pathlib.Path, schema: Schema) -> float:
    """Of MMoE on one batch in memory, so that input costs nothing."""
    model = generated.trainable(schema, embedding_dim=16)
    batches = _ours(folder, schema).take(1).cache().repeat()
    model.fit(batches, steps_per_epoch=3, verbose=0)
    steps, start = 15, time.perf_counter()
    model.fit(batches, steps_per_epoch=steps, verbose=0)
    return steps * FLAGS.batch_size / (time.perf_counter() - start)


def main() -> None:
    """Prints a Markdown table."""
    print(machine.header(), end="\n\n")
    share_cores()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        schema = _generate(folder)
        speeds = {pipeline: [] for pipeline in PIPELINES}
        for _ in range(FLAGS.turns):
            for pipeline, make in PIPELINES.items():
                speeds[pipeline].append(_rows_per_second(make(folder, schema)))
        trained = _rows_trained_per_second(folder, schema)
    print("| | rows/s | times what training consumes |")
    print("|---|---|---|")
    for pipeline, values in speeds.items():
        speed = statistics.median(values)
        print(f"| {pipeline} | {speed:,.0f} | {speed / trained:.1f} |")
    print(f"| training MMoE, embedding 16 | {trained:,.0f} | 1.0 |")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
