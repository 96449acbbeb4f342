"""Batches from TFRecord files: shards are read and shuffled whole, batches are parsed whole.

The converter distributes the rows evenly over the shards (whole groups by a hash, if there are
groups), so each shard is a fair sample of the data set. Shuffling the order of the shards and the
rows of each shard therefore mixes as well as shuffling all rows. It keeps two shards in memory. A
position in an epoch is a number of rows: reading can resume there without repeating the rows
before it.
"""

import os
import pathlib
from collections.abc import Collection

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
    extras: Collection[str] = ("group",),
) -> tf.data.Dataset:
    """The batches of one pass over a split.

    Args:
      folder: the folder of the records.
      schema: the schema of the data set.
      split: "train", "validation" or "test".
      batch_size: rows per batch. The last batch has fewer, or is left out by `drop_remainder`.
      shuffle_seed: (seed, epoch), which fix the order; None keeps the order of the files.
      keep_groups: shuffle whole groups, so that the rows of a group follow each other. A batch may
        still end inside a group. The schema must have a group.
      skip_rows: leave out this many rows at the start of the order.
      extras: which of "group", "weight" and "segments" the caller uses; see records.parse_spec.

    Returns:
      A dataset of (features, grade): features {"categorical": int64 [B, C], "numerical":
      float32 [B, N], "ids/NAME": int64 [B, L] filled up with -1, L being the longest list in the
      batch, "weights/NAME": float32 [B, L], "group": int64 [B], "weight": float32 [B],
      "segments": int64 [B, S]} (those that the schema has; the last three: and `extras`), grade
      int64 [B].
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
    # Shards with only skipped rows are not read.
    first = sum(skip == count for skip, count in zip(skips, rows, strict=True))
    spec = records.parse_spec(schema, extras)
    group_spec = {"group": tf.io.FixedLenFeature([], tf.int64)}

    def load(file, rows, skip, seed):
        dataset = tf.data.TFRecordDataset(file, buffer_size=8 << 20).batch(rows)
        serialized = dataset.get_single_element()
        chosen = tf.range(rows)
        if keep_groups and shuffle_seed is not None:
            group = tf.io.parse_example(serialized, group_spec)["group"]
            chosen = _shuffled(group, seed)
        elif shuffle_seed is not None:
            chosen = tf.random.experimental.stateless_shuffle(chosen, seed)
        return tf.gather(serialized, chosen[skip:])

    def parse(serialized):
        features = tf.io.parse_example(serialized, spec)
        return features, features.pop("grade")

    columns = [np.array(column)[first:] for column in (files, rows, skips, seeds)]
    dataset = tf.data.Dataset.from_tensor_slices(tuple(columns))
    # Load one shard ahead of the one in use; more would only use more memory.
    dataset = dataset.map(load).prefetch(1)
    dataset = dataset.rebatch(batch_size, drop_remainder=drop_remainder)
    return dataset.map(parse, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(4)


def _shuffled(group: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """The positions [rows] of a shard's rows in random order, with the rows of a group together."""
    _, number = tf.unique(group)  # [rows], groups counted from 0
    groups = tf.reduce_max(number) + 1
    rank = tf.random.experimental.stateless_shuffle(tf.range(groups), seed)  # [groups]
    return tf.argsort(tf.gather(rank, number), stable=True)


def check(folder: str | os.PathLike, schema: Schema, split: str) -> Split:
    """Checks that a split's files are those that the schema lists, by name and size.

    DataError names the file. Returns the split.
    """
    found = schema.split(split)
    for shard in found.shards:
        path = pathlib.Path(folder) / shard.file
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DataError("no such file, but schema.json lists it", file=path) from None
        if size != shard.bytes:
            raise DataError(
                f"found {size} bytes, expected {shard.bytes} ({shard.rows} records): the file was "
                "truncated, or schema.json belongs to another data set",
                file=path,
            )
    return found


def explain(error: tf.errors.OpError, folder: str | os.PathLike, schema: Schema, split: str):
    """Finds the file that caused an error while a split was read.

    Raises:
      DataError: names the first file that is damaged or has another layout.
      OpError: `error` itself, if all files are correct.
    """
    spec = records.parse_spec(schema)
    for shard in check(folder, schema, split).shards:
        path = pathlib.Path(folder) / shard.file
        for number, record in enumerate(records.read(path), start=1):
            try:
                tf.io.parse_single_example(record, spec)
            except tf.errors.InvalidArgumentError:
                raise DataError(
                    f"record {number} does not have the layout of schema.json", file=path
                ) from None
    raise error
