"""Raw values to features, and features to one vector.

Shapes: B rows in a batch, C id features, N numbers, L values of a list (the longest in the batch),
D = embedding_dim.
"""

import numpy as np
import tensorflow as tf
import tf_keras as keras

from pwiser_tf.layers.blocks import l2
from pwiser_tf.records import PADDING
from pwiser_tf.schema import (
    OUT_OF_VOCABULARY,
    UNKNOWN_INTEGER,
    Categorical,
    Numerical,
    Schema,
    Vector,
    missing_value,
)


class RawFeatures(tf.Module):
    """Raw values, one tensor a column, to the features a model is called with, as a graph.

    It states `Categorical.ids`, `Numerical.apply` and `Numerical.buckets` of the schema again, for
    the served model. A missing value in a list is no value of the list.
    """

    def __init__(self, schema: Schema):
        super().__init__(name="raw_features")
        self._schema = schema
        self._tables = {}
        for feature in (*schema.categorical, *schema.lists):
            # TensorFlow refuses a table without entries.
            if not feature.shares and feature.vocabulary:
                if isinstance(feature.vocabulary, range):
                    continue
                keys = tf.constant(feature.vocabulary, feature.dtype, [len(feature.vocabulary)])
                ids = tf.range(1, feature.size, dtype=tf.int64)
                initializer = tf.lookup.KeyValueTensorInitializer(keys, ids)
                self._tables[feature.name] = tf.lookup.StaticHashTable(
                    initializer, OUT_OF_VOCABULARY
                )

    def __call__(self, raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """{column: [B], of a list [B, L], of a vector [B, length]} to the features of
        `data.batches`."""
        schema, features = self._schema, {}
        ids = [self._ids(feature, raw[feature.name]) for feature in schema.categorical]
        values = []
        for feature in schema.numerical:
            if feature.transform == "quantiles":
                ids.append(_buckets(feature, raw[feature.name]))
            else:
                values.append(_transformed(feature, raw[feature.name])[:, tf.newaxis])
        values += [_bounded(raw[vector.name], vector) for vector in schema.vectors]
        if ids:
            features["categorical"] = tf.stack(ids, axis=1)
        if values:
            features["numerical"] = tf.concat(values, axis=1)
        for feature in schema.lists:
            column = raw[feature.name]
            present = tf.not_equal(column, missing_value(feature.dtype))
            number = tf.cumsum(tf.cast(present, tf.int32), axis=1)  # of each value, from 1
            # The converter keeps as many.
            if feature.kind == "sequence" and feature.newest == "last":
                number = number[:, -1:] - number + 1
            kept = present & (number <= feature.max_length)
            features[f"ids/{feature.name}"] = tf.where(
                kept, self._ids(feature, column), tf.constant(PADDING, tf.int64)
            )
            if feature.weighted:
                features[f"weights/{feature.name}"] = raw[f"{feature.name}.weights"]
        return features

    def _ids(self, feature: Categorical, values: tf.Tensor) -> tf.Tensor:
        if feature.hash_buckets:
            text = tf.strings.as_string(values) if feature.dtype == "int64" else values
            hashed = tf.strings.to_hash_bucket_fast(text, feature.hash_buckets) + 1
            present = tf.not_equal(values, missing_value(feature.dtype))
            if feature.dtype == "int64":
                present &= tf.not_equal(values, UNKNOWN_INTEGER)
            return tf.where(present, hashed, tf.constant(OUT_OF_VOCABULARY, tf.int64))
        owner = feature.shares or feature.name
        if owner in self._tables:
            return self._tables[owner].lookup(values)
        if not feature.vocabulary:
            return tf.fill(tf.shape(values), tf.constant(OUT_OF_VOCABULARY, tf.int64))
        known = (values >= 0) & (values < len(feature.vocabulary))
        return tf.where(known, values + 1, OUT_OF_VOCABULARY)


def _transformed(feature: Numerical, values: tf.Tensor) -> tf.Tensor:
    """`Numerical.apply` as a graph: float32 [B]."""
    values = _bounded(tf.cast(values, tf.float64), feature)
    if feature.transform == "log":
        values = tf.sign(values) * tf.math.log1p(tf.abs(values))
    return tf.cast((values - feature.offset) / feature.scale, tf.float32)


def _bounded(values: tf.Tensor, feature: Numerical | Vector) -> tf.Tensor:
    """Missing numbers filled, all clipped to the range of training."""
    fill = tf.constant(np.float32(feature.fill_value), values.dtype)
    values = tf.where(tf.math.is_finite(values), values, fill)
    if np.isnan(feature.low):
        return values
    return tf.clip_by_value(values, np.float32(feature.low), np.float32(feature.high))


def _buckets(feature: Numerical, values: tf.Tensor) -> tf.Tensor:
    """`Numerical.buckets` as a graph: int64 [B]."""
    boundaries = tf.constant(np.array(feature.boundaries, np.float32))
    bucket = tf.searchsorted(boundaries, values, side="right", out_type=tf.int64) + 1
    return tf.where(tf.math.is_finite(values), bucket, tf.constant(OUT_OF_VOCABULARY, tf.int64))


class Encoder(keras.layers.Layer):
    """Features to one vector: an embedding an id feature and a list, and all numbers as one more.

    The fields are those of MTReclib, C embeddings of size D from one table with an offset a
    feature and one linear map of the numbers to size D; and for each list the mean of its values'
    embeddings, weighted by its weights where it has them (0 where it is empty). Ids outside a
    feature's vocabulary become id 0 here; numbers that are not finite become the feature's fill
    value, and are clipped to the range of training: no input, served or read from a file, can
    address a row of another feature, or move a prediction out of what was learnt.

    Call: features {"categorical": int64 [B, C], "numerical": float32 [B, N], "ids/NAME": int64
    [B, L] filled up with -1, "weights/NAME": float32 [B, L]} to float32 [B, fields * D].
    """

    def __init__(self, schema: Schema, embedding_dim: int, weight_decay: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        owners = [f for f in (*schema.id_features, *schema.lists) if not _shares(f)]
        ends = np.cumsum([0, *(feature.size for feature in owners)])
        start = dict(zip((f.name for f in owners), ends.tolist(), strict=False))
        self._rows = int(ends[-1])
        self._sizes = np.array([feature.size for feature in schema.id_features], np.int64)
        self._offsets = np.array([start[_owner(f)] for f in schema.id_features], np.int64)
        self._lists = {f.name: (f.size, start[_owner(f)], f.weighted) for f in schema.lists}
        numbers = [*schema.value_features, *schema.vectors]
        widths = [getattr(feature, "length", 1) for feature in numbers]
        bounds = np.array([_bounds(feature) for feature in numbers], np.float32).reshape(-1, 3)
        self._fill, self._low, self._high = np.repeat(bounds, widths, axis=0).T
        self._embedding_dim = embedding_dim
        self._regularizer = l2(weight_decay)
        self._linear = None
        if numbers:
            self._linear = keras.layers.Dense(embedding_dim, kernel_regularizer=self._regularizer)

    def build(self, input_shape):
        if self._rows:
            self.embeddings = self.add_weight(
                "embeddings",
                [self._rows, self._embedding_dim],
                initializer=keras.initializers.GlorotUniform(),
                regularizer=self._regularizer,
            )
        super().build(input_shape)

    def call(self, features: dict[str, tf.Tensor]) -> tf.Tensor:
        fields = []
        if len(self._sizes):
            ids = features["categorical"]  # [B, C]
            ids = tf.where((ids >= 0) & (ids < self._sizes), ids, OUT_OF_VOCABULARY)
            vectors = tf.gather(self.embeddings, ids + self._offsets)  # [B, C, D]
            fields.append(tf.reshape(vectors, [-1, len(self._sizes) * self._embedding_dim]))
        for name, (size, offset, weighted) in self._lists.items():
            weights = features[f"weights/{name}"] if weighted else None
            fields.append(self._mean(features[f"ids/{name}"], weights, size, offset))
        if self._linear is not None:
            values = features["numerical"]  # [B, N]
            values = tf.where(tf.math.is_finite(values), values, self._fill)
            values = tf.clip_by_value(values, self._low, self._high)
            fields.append(self._linear(values))  # [B, D]
        return tf.concat(fields, axis=1)

    def _mean(self, ids, weights, size: int, offset: int) -> tf.Tensor:
        """The weighted mean of a list's embeddings, float32 [B, D]."""
        present = tf.cast(ids != PADDING, tf.float32)  # [B, L]
        if weights is not None:
            # A weight that is no number counts as none; the sum must not vanish.
            weights = tf.where(tf.math.is_finite(weights), tf.maximum(weights, 0.0), 0.0)
            present *= weights
        ids = tf.where((ids >= 0) & (ids < size), ids, OUT_OF_VOCABULARY)
        vectors = tf.gather(self.embeddings, ids + offset)  # [B, L, D]
        total = tf.einsum("bl,bld->bd", present, vectors)
        return tf.math.divide_no_nan(total, tf.reduce_sum(present, axis=1, keepdims=True))


def _shares(feature) -> bool:
    return bool(getattr(feature, "shares", None))


def _owner(feature) -> str:
    return getattr(feature, "shares", None) or feature.name


def _bounds(feature: Numerical | Vector) -> np.ndarray:
    """What the model sees of a missing number, of the least and of the greatest: float32 [3]."""
    if np.isnan(feature.low):
        return np.array([feature.apply(np.array([np.nan]))[0], -np.inf, np.inf])
    return feature.apply(np.array([np.nan, feature.low, feature.high]))
