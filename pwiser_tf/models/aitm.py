"""AITM: the click tower transfers information to the conversion tower (Xi et al., KDD 2021)."""

import math

import tensorflow as tf
import tf_keras as keras

from pwiser_tf.layers import l2
from pwiser_tf.models.base import CLICK, CONVERSION, TOWERS, ClickConversionModel


class AITM(ClickConversionModel):
    """Adaptive information transfer along the sequence exposure, click, conversion.

    q_t is the output of the bottom MLP of tower t on the shared features, and k its size:

        click        z_1 = q_1
        transfer     p = g(z_1)
        conversion   z_2 = sum over u in {p, q_2} of w_u V(u),
                     w = softmax over u of <K(u), Q(u)> / sqrt(k)
        tower t      sigmoid(MLP_t(z_t))

    g is a block; V, K and Q are linear maps. The calibrator penalizes an impossible prediction, a
    conversion that is more likely than its click:

        L = sum over t of L_t + 0.6 * mean over rows of max(p_conversion - p_click, 0)

    (a mean as in the paper; the authors' code has a sum over the batch, whose weight depends on the
    batch size). The calibrator assumes that both towers predict over all exposures, so only the
    direct head is supported.
    """

    conversion_heads = ("direct",)
    auxiliary_weight = 0.6
    options = ("auxiliary_weight",)
    needs_conversions = True

    def __init__(self, schema, config, loss=None):
        super().__init__(schema, config, loss)
        self._shared_encoder = self._encoder()
        self._bottoms = {tower: self._mlp(config.bottom_units) for tower in TOWERS}
        self._transfer = self._mlp(config.bottom_units[-1:])
        self._attention = _InformationTransfer(config.bottom_units[-1], config.weight_decay)

    def tower_inputs(self, features, training) -> dict[str, tf.Tensor]:
        x = self._shared_encoder(features)  # [B, fields * D]
        q = {tower: self._bottoms[tower](x, training) for tower in TOWERS}  # each [B, k]
        p = self._transfer(q[CLICK], training)  # [B, k]
        z = self._attention(tf.stack([p, q[CONVERSION]], axis=1))  # [B, k]
        return {CLICK: q[CLICK], CONVERSION: z}

    def auxiliary_loss(self, logits, grade) -> tf.Tensor:
        click, conversion = (tf.sigmoid(logits[tower][:, 0]) for tower in TOWERS)
        return tf.reduce_mean(tf.nn.relu(conversion - click))


class _InformationTransfer(keras.layers.Layer):
    """Attention over the transferred vector and the tower's own vector.

    Call: float [B, 2, units] to float32 [B, units].
    """

    def __init__(self, units: int, weight_decay: float, **kwargs):
        super().__init__(**kwargs)
        self._value, self._key, self._query = (
            keras.layers.Dense(units, kernel_regularizer=l2(weight_decay)) for _ in range(3)
        )
        self._scale = 1 / math.sqrt(units)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        agreement = tf.reduce_sum(self._key(x) * self._query(x), axis=2)  # [B, 2]
        weights = tf.nn.softmax(self._scale * agreement, axis=1)  # [B, 2]
        return tf.einsum("bt,btu->bu", weights, self._value(x))
