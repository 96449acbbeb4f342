"""Gates: mixtures of experts. Shapes: B rows in a batch, E experts."""

import tensorflow as tf
import tf_keras as keras

from pwiser_tf.layers.blocks import l2


class Gate(keras.layers.Layer):
    """Mixes experts with softmax weights that depend on the input.

    Call: input float32 [B, inputs] and a list of E experts' outputs, float [B, units] each, to
    float32 [B, units].
    """

    def __init__(self, experts: int, weight_decay: float, **kwargs):
        super().__init__(**kwargs)
        self._weights = keras.layers.Dense(
            experts, activation="softmax", kernel_regularizer=l2(weight_decay)
        )

    def call(
        self, inputs: tf.Tensor, experts: list[tf.Tensor], training: bool = False
    ) -> tf.Tensor:
        # The compiled function does not write the stack of all experts to memory.
        mix = _compiled_mix if training else _mix
        return mix(self._weights(inputs), experts)


def _mix(weights: tf.Tensor, experts: list[tf.Tensor]) -> tf.Tensor:
    experts = tf.cast(tf.stack(experts, axis=1), weights.dtype)  # [B, E, units]
    return tf.einsum("be,beu->bu", weights, experts)


_compiled_mix = tf.function(_mix, jit_compile=True)
