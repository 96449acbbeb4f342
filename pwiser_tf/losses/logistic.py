"""RankNet on the pairs of PWiseR, and on the pairs of one label."""

import tensorflow as tf
import tf_keras as keras

from pwiser_tf.losses import inputs
from pwiser_tf.losses.pairwise import PairLoss

# The number of upper rows that are compared with all rows at a time; it limits the memory.
_PAIR_BLOCK = 8


def pairwise_logistic(logits: tf.Tensor, grade: tf.Tensor) -> tf.Tensor:
    """RankNet (Burges et al. 2005; BPR is the same) on all pairs of PWiseR in the batch.

        1/(N1 M) sum_{i: grade 1} sum_{j: grade 2} log(1 + exp(-(s_j - s_i)))
      + 1/(N0 M) sum_{k: grade 0} sum_{j: grade 2} log(1 + exp(-(s_j - s_k)))

    RankNet works on any pairs. These are the pairs of PWiseR, so that only the shape of the loss
    differs. It has no margins: the gradient of a pair, sigmoid(-(s_j - s_i)), is never 0.

    Unlike for a squared hinge, prefix sums cannot replace the pairs. All pairs are computed, a
    block of conversions against all rows at a time, in time O(n M) and memory O(n). Sums are
    float64. Terms without pairs, values that are not finite and second derivatives are as in
    `pwiser`.

    Args:
      logits: float [batch] or [batch, 1], any float type.
      grade: integer or float [batch] or [batch, 1] in {0, 1, 2}. Another value is an error on
        CPU (InvalidArgumentError).

    Returns:
      The loss, a scalar of the logits' type.

    Raises:
      TypeError: logits that are not floating point.
      ValueError: other shapes.
    """
    logits = inputs.scores(logits, "logits")
    return _logistic_of_classes(logits, inputs.classes(grade, "grade", logits), 3)


def combined_pair(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """The ranking term of Combined-Pair (Lin et al., arXiv 2403.14144), over every pair.

        1/(P N) sum_{i: label 1} sum_{j: label 0} log(1 + exp(-(s_i - s_j)))

    It is RankNet between the P positives and the N negatives of the label that BCE learns, as a
    mean over pairs (as in the authors' code). The loss in the paper is alpha * BCE + (1 - alpha) *
    this term. It is computed like `pairwise_logistic`, in time O(N P).

    Args:
      logits: float [batch] or [batch, 1], any float type.
      labels: bool, integer or float [batch] or [batch, 1] in {0, 1}. Another value is an error on
        CPU (InvalidArgumentError).

    Returns:
      The loss, a scalar of the logits' type.

    Raises:
      TypeError: logits that are not floating point.
      ValueError: other shapes.
    """
    logits = inputs.scores(logits, "logits")
    return _logistic_of_classes(logits, inputs.classes(labels, "labels", logits), 2)


@keras.utils.register_keras_serializable(package="pwiser_tf")
class PairwiseLogisticLoss(PairLoss):
    """`pairwise_logistic` as a Keras loss: y_true is the grade, y_pred logits. See `PairLoss`."""

    def __init__(
        self, reduction: str = keras.losses.Reduction.AUTO, name: str = "pairwise_logistic"
    ):
        super().__init__(reduction=reduction, name=name)

    def call(self, y_true, y_pred) -> tf.Tensor:
        return pairwise_logistic(y_pred, y_true)


@keras.utils.register_keras_serializable(package="pwiser_tf")
class CombinedPairLoss(PairLoss):
    """`combined_pair` as a Keras loss: y_true is the label, y_pred logits. See `PairLoss`."""

    def __init__(self, reduction: str = keras.losses.Reduction.AUTO, name: str = "combined_pair"):
        super().__init__(reduction=reduction, name=name)

    def call(self, y_true, y_pred) -> tf.Tensor:
        return combined_pair(y_pred, y_true)


def _logistic_of_classes(logits: tf.Tensor, classes: tf.Tensor, size: int) -> tf.Tensor:
    """The sum over the lower classes of the mean of `_logistic` over the pairs with the last class.

    Args:
      logits: float [batch]. classes: int32 [batch] in 0..size - 1.
    """
    weights = inputs.weights_of_lower_classes(inputs.count(classes, size))
    return _logistic(logits, tf.gather(weights, classes), tf.equal(classes, size - 1))


def _logistic(logits: tf.Tensor, weight: tf.Tensor, upper: tf.Tensor) -> tf.Tensor:
    """sum_b weight_b sum_{j: upper} log(1 + exp(logits_b - logits_j)), a scalar of their type.

    Args:
      logits: float [batch]. weight: float64 [batch], 0 for the upper rows. upper: bool [batch].
    """
    upper_rows = tf.where(upper)  # [M, 1]

    @tf.custom_gradient
    def loss_of(logits):
        half = logits.dtype in (tf.float16, tf.bfloat16)
        # Hidden from gradient tapes: the gradient is given below, and XLA cannot record one here.
        x = tf.stop_gradient(tf.cast(logits, tf.float32) if half else logits)
        above = tf.gather_nd(x, upper_rows)
        count = tf.size(above)
        # XLA compiles for fixed input sizes, so pad to a size that does not depend on M.
        above = tf.pad(above, [[0, tf.size(x) - count + _PAIR_BLOCK]])
        sums, slope, upper_slope = _logistic_blocks(x, weight, above, count)

        def gradient(upstream):
            total = tf.tensor_scatter_nd_sub(slope, upper_rows, upper_slope[:count])
            # Multiplied before the cast: half precision needs its loss scale applied first.
            total = tf.cast(tf.cast(upstream, tf.float64) * total, logits.dtype)
            # A second derivative would be wrong or missing. With `0 * logits` it is refused.
            return tf.raw_ops.PreventGradient(
                input=total + 0 * logits, message="pairwise losses have no second derivatives"
            )

        loss = sums + inputs.nan_unless_finite(tf.cast(x, tf.float64))
        return tf.cast(loss, logits.dtype), gradient

    return loss_of(logits)


@tf.function(jit_compile=True, reduce_retracing=True)
def _logistic_blocks(x, weight, above, count):
    """The pairs of `_logistic`, _PAIR_BLOCK upper rows against all rows at a time.

    Elementwise float32 (for float32 logits), summed in float64.

    Args:
      x: float [batch]. weight: float64 [batch]. above: float [batch + _PAIR_BLOCK], the logits of
      the M upper rows, then any finite numbers. count: M, an int32 scalar.

    Returns:
      The loss, float64; dloss/dx with `above` as constants, float64 [batch]; -dloss/dabove,
      float64 [batch + _PAIR_BLOCK], of which only the first M are valid.
    """

    def add_block(start, losses, slopes, upper_slopes):
        positions = start + tf.range(_PAIR_BLOCK)
        difference = x - tf.slice(above, [start], [_PAIR_BLOCK])[:, tf.newaxis]  # [block, batch]
        small = tf.exp(-tf.abs(difference))
        loss = tf.nn.relu(difference) + tf.math.log1p(small)
        slope = tf.where(difference >= 0, tf.ones_like(small), small) / (1 + small)
        loss, slope = tf.cast(loss, tf.float64), tf.cast(slope, tf.float64)
        counted = tf.cast(positions < count, tf.float64)[:, tf.newaxis]
        return (
            start + _PAIR_BLOCK,
            losses + tf.reduce_sum(counted * loss, axis=0),
            slopes + tf.reduce_sum(counted * slope, axis=0),
            tf.tensor_scatter_nd_update(
                upper_slopes, positions[:, tf.newaxis], tf.reduce_sum(weight * slope, axis=1)
            ),
        )

    none = tf.zeros_like(weight)
    _, losses, slopes, upper_slopes = tf.while_loop(
        lambda start, *_: start < count,
        add_block,
        (0, none, none, tf.zeros_like(above, tf.float64)),
    )
    return tf.tensordot(weight, losses, 1), weight * slopes, upper_slopes
