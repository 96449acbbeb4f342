"""The blocks of an MLP, and the head of a tower. Shapes: B rows in a batch."""

from collections.abc import Sequence

import tensorflow as tf
import tf_keras as keras

_BATCH_NORM_MOMENTUM = 0.9
_BATCH_NORM_EPSILON = 1e-5


class Block(keras.layers.Layer):
    """Dense, batch normalisation, ReLU, dropout: MTReclib's block, with fewer passes over memory.

    TensorFlow computes the matrix product. In training everything after it is one fused function
    forward and one backward, compiled by XLA; the dropout mask has one random byte per unit.
    benchmarks/training.py compares it with PyTorch. The mask depends only on the variables (salt,
    count), so a run that resumes from a checkpoint gets the same masks as without interruption.

    With `mixed_precision`, training uses bfloat16 products and outputs, like Keras's
    mixed_bfloat16. Weights, statistics and inference stay float32.

    Call: float [B, inputs] to float [B, units].
    """

    def __init__(
        self,
        units: int,
        dropout: float = 0.0,
        weight_decay: float = 0.0,
        mixed_precision: bool = False,
        **kwargs,
    ):
        # Without autocast, as Keras would cast bfloat16 outputs of the previous block to float32.
        super().__init__(autocast=False, **kwargs)
        self._units = units
        # The mask compares a byte with a threshold: the rate is rounded to a multiple of 1/256.
        self._threshold = round(dropout * 256)
        if not 0 <= self._threshold < 256:
            raise ValueError(f"dropout: found {dropout}, expected a rate in [0, 1)")
        self._regularizer = l2(weight_decay)
        self._training_dtype = tf.bfloat16 if mixed_precision else tf.float32

    def build(self, input_shape):
        # No bias, because batch normalisation would subtract it again.
        self.kernel = self.add_weight(
            "kernel",
            [input_shape[-1], self._units],
            initializer=keras.initializers.GlorotUniform(),
            regularizer=self._regularizer,
        )
        vector = [self._units]
        self.gamma = self.add_weight("gamma", vector, initializer="ones")
        self.beta = self.add_weight("beta", vector, initializer="zeros")
        self.mean = self.add_weight("mean", vector, initializer="zeros", trainable=False)
        self.variance = self.add_weight("variance", vector, initializer="ones", trainable=False)
        self.salt_and_count = self.add_weight(
            "salt_and_count",
            [2],
            dtype=tf.int64,
            initializer=lambda shape, dtype=None: tf.stack(
                [tf.random.uniform([], maxval=2**62, dtype=tf.int64), 0]
            ),
            trainable=False,
        )
        super().build(input_shape)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training:
            scale = self.gamma * tf.math.rsqrt(self.variance + _BATCH_NORM_EPSILON)
            x = tf.matmul(inputs, self.kernel)  # [B, units]
            return tf.nn.relu(x * scale + (self.beta - self.mean * scale))
        dtype = self._training_dtype
        x = tf.matmul(tf.cast(inputs, dtype), tf.cast(self.kernel, dtype))  # [B, units]
        y, mean, variance = _normalize_relu_dropout(
            x, self.gamma, self.beta, self._random_bytes(tf.shape(x)[0]), self._threshold
        )
        self.mean.assign_add((1 - _BATCH_NORM_MOMENTUM) * (mean - self.mean))
        self.variance.assign_add((1 - _BATCH_NORM_MOMENTUM) * (variance - self.variance))
        return y

    def _random_bytes(self, rows: tf.Tensor) -> tf.Tensor:
        """One random byte per unit, uint8 [rows, units]; [rows, 0] without dropout."""
        if not self._threshold:
            return tf.zeros([rows, 0], tf.uint8)
        seed = self.salt_and_count.read_value()
        self.salt_and_count.assign_add([0, 1])
        words = -(-self._units // 8)
        bits = tf.random.stateless_uniform(
            [rows, words], seed, minval=None, maxval=None, dtype=tf.uint64
        )
        return tf.reshape(tf.bitcast(bits, tf.uint8), [rows, words * 8])[:, : self._units]


class MLP(keras.layers.Layer):
    """A sequence of blocks. Call: float [B, inputs] to float [B, units[-1]]."""

    def __init__(
        self,
        units: Sequence[int],
        dropout: float,
        weight_decay: float,
        mixed_precision: bool,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        self._blocks = [Block(size, dropout, weight_decay, mixed_precision) for size in units]

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        for block in self._blocks:
            inputs = block(inputs, training=training)
        return inputs


class Head(keras.layers.Layer):
    """The end of a tower: its logit and, if `energy`, a second output for the loss JRC.

    The energy starts at 0 and uses no random number, so with and without it a model with the same
    seed starts as the same function.

    Call: float [B, units] to float32 [B, 1], or [B, 2] with the energy in the second column.
    """

    def __init__(self, bias: float, weight_decay: float, energy: bool = False, **kwargs):
        super().__init__(**kwargs)
        regularizer = l2(weight_decay)
        self._columns = [
            keras.layers.Dense(
                1,
                kernel_regularizer=regularizer,
                bias_initializer=keras.initializers.Constant(bias),
            )
        ]
        if energy:
            self._columns.append(
                keras.layers.Dense(1, kernel_initializer="zeros", kernel_regularizer=regularizer)
            )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.concat([column(inputs) for column in self._columns], axis=1)


def l2(weight_decay: float) -> keras.regularizers.Regularizer | None:
    """L2 with the gradient weight_decay * weight, as the weight decay of PyTorch's Adam."""
    return keras.regularizers.L2(weight_decay / 2) if weight_decay else None


def _normalize_relu_dropout(x, gamma, beta, mask_bytes, threshold: int):
    """Batch normalisation, ReLU and dropout of x [B, units]; also the batch's mean and variance.

    The backward pass recomputes intermediate values from x instead of reading them from memory.
    """

    @tf.custom_gradient
    def apply(x, gamma, beta):
        y, mean, variance = _forward(x, gamma, beta, mask_bytes, threshold)

        def gradient(dy, unused_dmean, unused_dvariance):
            return _backward(x, gamma, beta, mask_bytes, threshold, mean, variance, dy)

        return (y, mean, variance), gradient

    return apply(x, gamma, beta)


def _dropout(values, mask_bytes, threshold):
    """Keeps values where the byte reaches the threshold, scaled so that the mean is the same."""
    if not threshold:
        return values
    kept = tf.cast(mask_bytes >= threshold, values.dtype)
    return values * kept * (256.0 / (256 - threshold))


@tf.function(jit_compile=True)
def _forward(x, gamma, beta, mask_bytes, threshold):
    """All arithmetic is float32; y has the type of x."""
    dtype, x = x.dtype, tf.cast(x, tf.float32)
    mean = tf.reduce_mean(x, axis=0)
    variance = tf.reduce_mean(tf.square(x - mean), axis=0)
    scale = gamma * tf.math.rsqrt(variance + _BATCH_NORM_EPSILON)
    y = _dropout(tf.nn.relu((x - mean) * scale + beta), mask_bytes, threshold)
    return tf.cast(y, dtype), mean, variance


@tf.function(jit_compile=True)
def _backward(x, gamma, beta, mask_bytes, threshold, mean, variance, dy):
    """Gradients of x (in its type), gamma and beta."""
    dtype, x, dy = x.dtype, tf.cast(x, tf.float32), tf.cast(dy, tf.float32)
    inverse = tf.math.rsqrt(variance + _BATCH_NORM_EPSILON)
    normalized = (x - mean) * inverse
    dz = _dropout(dy, mask_bytes, threshold)
    dz = tf.where(normalized * gamma + beta > 0, dz, 0.0)
    dbeta = tf.reduce_sum(dz, axis=0)
    dgamma = tf.reduce_sum(dz * normalized, axis=0)
    rows = tf.cast(tf.shape(x)[0], tf.float32)
    dx = gamma * inverse * (dz - (dbeta + normalized * dgamma) / rows)
    return tf.cast(dx, dtype), dgamma, dbeta
