"""Layers from raw values to features, and from features to one vector.

Shapes: B rows in a batch, C categorical and N numerical features, D = embedding_dim.
"""

import numpy as np
import tensorflow as tf
import tf_keras as keras

from pwiser_tf.layers.blocks import l2
from pwiser_tf.schema import OUT_OF_VOCABULARY, Schema


class RawFeatures(tf.Module):
    """A graph from raw values, one tensor per column, to the input features of a model.

    For the served model it implements the rules of `Categorical.ids` and `Numerical.apply` of the
    schema. Missing numbers stay NaN here; `Encoder` replaces them.
    """

    def __init__(self, schema: Schema):
        super().__init__(name="raw_features")
        self._schema = schema
        self._tables = {}
        for feature in schema.categorical:
            # TensorFlow refuses a table without entries.
            if feature.vocabulary and not isinstance(feature.vocabulary, range):
                keys = tf.constant(feature.vocabulary, feature.dtype, [len(feature.vocabulary)])
                ids = tf.range(1, feature.size, dtype=tf.int64)
                initializer = tf.lookup.KeyValueTensorInitializer(keys, ids)
                self._tables[feature.name] = tf.lookup.StaticHashTable(
                    initializer, OUT_OF_VOCABULARY
                )

    def __call__(self, raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """{column: [B]} to {"categorical": int64 [B, C], "numerical": float32 [B, N]}."""
        features = {}
        if self._schema.categorical:
            ids = [self._ids(feature, raw[feature.name]) for feature in self._schema.categorical]
            features["categorical"] = tf.stack(ids, axis=1)
        if self._schema.numerical:
            columns = [raw[feature.name] for feature in self._schema.numerical]
            offset = np.array([feature.offset for feature in self._schema.numerical])
            scale = np.array([feature.scale for feature in self._schema.numerical])
            features["numerical"] = (tf.stack(columns, axis=1) - offset) / scale
        return features

    def _ids(self, feature, values: tf.Tensor) -> tf.Tensor:
        if feature.name in self._tables:
            return self._tables[feature.name].lookup(values)
        if not feature.vocabulary:
            return tf.fill(tf.shape(values), tf.constant(OUT_OF_VOCABULARY, tf.int64))
        known = (values >= 0) & (values < len(feature.vocabulary))
        return tf.where(known, values + 1, OUT_OF_VOCABULARY)


class Encoder(keras.layers.Layer):
    """Features to one vector: an embedding per categorical feature, and one for all numericals.

    The fields are those of MTReclib: C embeddings of size D from one table, in which each feature
    has an offset, and one linear map of the N numericals to size D. Ids outside a feature's
    vocabulary become id 0, so no input, served or from a file, can read the embedding of another
    feature. Numericals that are not finite become the feature's fill value.

    Call: features {"categorical": int64 [B, C], "numerical": float32 [B, N]} to float32
    [B, (C + 1) * D] ([B, C * D] without numericals).
    """

    def __init__(self, schema: Schema, embedding_dim: int, weight_decay: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        self._sizes = np.array([feature.size for feature in schema.categorical], np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self._sizes)[:-1]]).astype(np.int64)
        # The transformed fill value, because missing values are replaced after the transform.
        self._fill = np.array(
            [feature.apply(np.array([np.nan]))[0] for feature in schema.numerical], np.float32
        )
        self._embedding_dim = embedding_dim
        self._regularizer = l2(weight_decay)
        self._linear = None
        if schema.numerical:
            self._linear = keras.layers.Dense(embedding_dim, kernel_regularizer=self._regularizer)

    def build(self, input_shape):
        if len(self._sizes):
            self.embeddings = self.add_weight(
                "embeddings",
                [int(self._sizes.sum()), self._embedding_dim],
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
        if self._linear is not None:
            values = features["numerical"]  # [B, N]
            values = tf.where(tf.math.is_finite(values), values, self._fill)
            fields.append(self._linear(values))  # [B, D]
        return tf.concat(fields, axis=1)
