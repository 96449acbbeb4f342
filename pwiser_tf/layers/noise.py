"""The observed click: a genuine one or an accident (see click_noise)."""

import numpy as np
import tensorflow as tf

from pwiser_tf.click_noise import ClickNoise
from pwiser_tf.schema import OUT_OF_VOCABULARY, Schema


class AccidentalClicks(tf.Module):
    """Features (see data.batches) to P(accidental click) as `ClickNoise.accidental`, float32 [B].

    A cell that training did not see has the share of the cells that have no evidence: q = 1.
    """

    def __init__(self, noise: ClickNoise, schema: Schema):
        super().__init__(name="accidental_clicks")
        self._noise = noise
        column = {feature.name: k for k, feature in enumerate(schema.id_features)}
        self._columns = [[column[name] for name in field.features] for field in noise.fields]

    def __call__(self, features: dict[str, tf.Tensor]) -> tf.Tensor:
        ids = features["categorical"]
        log_quality = log_ratio = tf.zeros_like(ids[:, 0], tf.float32)
        for field, columns in zip(self._noise.fields, self._columns, strict=True):
            cell = tf.zeros_like(ids[:, 0])
            for column, size in zip(columns, field.sizes, strict=True):
                known = (ids[:, column] >= 0) & (ids[:, column] < size)
                cell = cell * size + tf.where(known, ids[:, column], OUT_OF_VOCABULARY)
            log_quality += tf.gather(tf.constant(np.log(field.quality), tf.float32), cell)
            log_ratio += tf.gather(tf.constant(np.log(field.click_ratio), tf.float32), cell)
        quality = tf.exp(log_quality)
        rate = tf.minimum(self._noise.ctr * tf.exp(log_ratio), 1.0)
        accident = tf.math.divide_no_nan(rate * (1 - quality), 1 - rate * quality)
        return tf.clip_by_value(accident, 0.0, self._noise.largest_accident)


def observed_logits(logits: tf.Tensor, accidental: tf.Tensor) -> tf.Tensor:
    """The logit of P(click) = g + (1 - g) a, from that of g = P(genuine click) and from a, [B].

    P(click) / (1 - P(click)) = (exp(z) + a) / (1 - a). Neither it nor its gradient overflows, and
    where a is 0 it is z exactly.
    """
    some = accidental > 0
    log_accidental = tf.math.log(tf.where(some, accidental, 1.0))
    added = tf.where(some, tf.nn.softplus(log_accidental - logits), 0.0)
    return logits + added - tf.math.log1p(-accidental)
