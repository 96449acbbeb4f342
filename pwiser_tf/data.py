"""TFRecord files to tf.data: shards are read whole, parsed whole and shuffled whole.

The converter deals its rows out to the shards in turn (whole groups by a hash, where there are
groups), so each shard is an even sample of the data set. A shuffled order of shards, each shuffled
whole, therefore mixes as a shuffle of everything does, at the price of holding two shards in
memory; and a position in an epoch is a number of rows, from which reading goes on without
replaying what came before.
"""

import os
import pathlib

import numpy as np
import tensorflow as tf

from pwiser_tf import records
from pwiser_tf.errors import DataError
from pwiser_tf.schema import Schema, Split


def batches(
    folder: str | os.PathLike,
    schema: Schema,
    split: str,
    batch_size: int,
    *,
    shuffle_seed: tuple[int, int] | None = None,
    keep_groups: bool = False,
    skip_rows: int = 0,
    drop_remainder: bool = False,
) -> tf.data.Dataset:
    """The batches of one pass over a split.

    Args:
      folder: where the records are; schema: the data set's.
      split: "train", "validation" or "test".
      batch_size: rows a batch; the last one has fewer, or is dropped by `drop_remainder`.
      shuffle_seed: (seed, epoch), which fix the order; None keeps the files' own order.
      keep_groups: shuffle whole groups, so that the rows of one come one after the other (but a
        batch may end amid a group). The schema must have a group.
      skip_rows: begin after so many rows of that same order.

    Returns:
      A dataset of (features, grade): features {"categorical": int64 [B, C], "numerical":
      float32 [B, N], "group": int64 [B]} (those the schema has), grade int64 [B].
    """
    shards = schema.split(split).shards
    order, seeds = np.arange(len(shards)), np.zeros([len(shards), 2], np.int64)
    if shuffle_seed is not None:
        random = np.random.default_rng(shuffle_seed)
        order = random.permutation(order)
        seeds = random.integers(2**62, size=seeds.shape)
    files, rows, skips = [], [], []
    for position in order:
        shard = shards[position]
        files.append(str(pathlib.Path(folder) / shard.file))
        rows.append(shard.rows)
        skips.append(min(skip_rows, shard.rows))
        skip_rows -= skips[-1]
    # Shards that are skipped whole need not be read.
    first = sum(skip == count for skip, count in zip(skips, rows, strict=True))
    spec = records.parse_spec(schema)

    def load(file, rows, skip, seed):
        serialized = tf.data.TFRecordDataset(file, buffer_size=8 << 20).batch(rows)
        parsed = tf.io.parse_example(serialized.get_single_element(), spec)
        chosen = tf.range(rows)
        if shuffle_seed is not None:
            shuffle = tf.random.experimental.stateless_shuffle
            chosen = _shuffled(parsed["group"], seed) if keep_groups else shuffle(chosen, seed)
        features = {name: tf.gather(values, chosen[skip:]) for name, values in parsed.items()}
        return features, features.pop("grade")

    columns = [np.array(column)[first:] for column in (files, rows, skips, seeds)]
    dataset = tf.data.Dataset.from_tensor_slices(tuple(columns))
    # One shard ahead of the one in use; more would only hold more memory.
    dataset = dataset.map(load).prefetch(1)
    return dataset.rebatch(batch_size, drop_remainder=drop_remainder).prefetch(4)


def _shuffled(group: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """The positions [rows] of a shard's rows in random order, those of one group together."""
    _, number = tf.unique(group)  # [rows], groups counted from 0
    groups = tf.reduce_max(number) + 1
    rank = tf.random.experimental.stateless_shuffle(tf.range(groups), seed)  # [groups]
    return tf.argsort(tf.gather(rank, number), stable=True)


def check(folder: str | os.PathLike, schema: Schema, split: str) -> Split:
    """Checks that a split's files are those that the schema lists, by name and size.

    Records of one data set all have one length, so a size that differs means a truncated file or
    the schema of another data set. DataError names the file. Returns the split.
    """
    found = schema.split(split)
    for shard in found.shards:
        path = pathlib.Path(folder) / shard.file
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DataError("no such file, but schema.json lists it", file=path) from None
        if size != shard.bytes or size != shard.rows * records.record_bytes(schema):
            raise DataError(
                f"found {size} bytes, expected {shard.bytes} ({shard.rows} records): the file was "
                "truncated, or schema.json belongs to another data set",
                file=path,
            )
    return found


def explain(error: tf.errors.OpError, folder: str | os.PathLike, schema: Schema, split: str):
    """Finds the file behind an error that reading a split raised.

    Raises:
      DataError: naming the first damaged or foreign file; where every file is sound, `error`
      itself, which then has another cause.
    """
    spec = records.parse_spec(schema)
    for shard in check(folder, schema, split).shards:
        path = pathlib.Path(folder) / shard.file
        for number, record in enumerate(records.read(path), start=1):
            try:
                tf.io.parse_single_example(record, spec)
            except tf.errors.InvalidArgumentError:
                raise DataError(
                    f"record {number} is not laid out as schema.json says", file=path
                ) from None
    raise error
