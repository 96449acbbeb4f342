"""PWiseR, a pairwise loss that trusts clicks with a conversion more (arXiv 2406.02163).

For the scores p of one head and the grades of one batch (0 exposure only, 1 click without
conversion, 2 conversion), with N0, N1 and M rows of these grades:

    PWiseR = 1/(N1 M) sum_{i: grade 1} sum_{j: grade 2} max(0, margin_click    - (p_j - p_i))^2
           + 1/(N0 M) sum_{k: grade 0} sum_{j: grade 2} max(0, margin_nonclick - (p_j - p_k))^2

It is added to a task's binary cross-entropy: BCE + weight * PWiseR. It ranks the predictions of one
head by grade, so it can be used with single-task models and with any head of a multi-task model.

What the paper (Durmus et al.) leaves open, and what is done here:

- The published text does not fix the margins and the weight. The defaults (0.05 and 0.1, in units
  of probability; a weight of 0.1) did not harm calibration on generated data. `strength` converts
  a setting from one data set to another. Strong settings make calibration much worse.
- The text does not fix the head that the scores come from. The function takes the scores of any
  head; in training --loss_tasks names the tasks.
- The printed formula divides each sum only by the number of lower-graded rows, N1 or N0. The loss
  then grows with the number of conversions in the batch, and its best weight changes with the
  batch size. The default is the mean over pairs; `normalization="negatives"` is the formula as
  printed.
"""

import math

import tensorflow as tf
import tf_keras as keras

from pwiser_tf.losses import inputs

NORMALIZATIONS = ("pairs", "negatives")


def pwiser(
    scores: tf.Tensor,
    grade: tf.Tensor,
    margin_click: float = 0.05,
    margin_nonclick: float = 0.1,
    normalization: str = "pairs",
) -> tf.Tensor:
    """PWiseR over every pair of the batch, exactly, in O(n log M) time and O(n) memory.

    Only the M conversions are sorted. A lower-graded row b, with u = p_b + margin, has a positive
    hinge with the conversions that have a score s below u. These are the first k of the sorted
    conversions, so prefix sums S of s replace the pairs:

        dL/dp_b = 2 w_b (k_b u_b - S[k_b])            w_b = 1 / (pairs of the row's grade)
        dL/ds_j = 2 sum_{b: u_b > s_j} w_b (s_j - u_b)
        L       = (sum_b u_b dL/dp_b + sum_j s_j dL/ds_j) / 2

    The last line is Euler's identity: L is homogeneous of degree 2 in (u, s). Sums are float64, and
    the mean score of the conversions is subtracted first: with float32 sums all digits would be
    lost if the scores are close to each other.

    A term without pairs is 0, with gradients of 0. A score that is not finite makes the loss NaN.
    The gradient is continuous everywhere (the hinge is squared). A second derivative raises
    LookupError.

    The function works eagerly, in a tf.function, and with Keras 2 and 3. In a tf.distribute
    strategy each replica has the loss of its own pairs. Results are bitwise reproducible on CPU. A
    function with `jit_compile=True` is refused (InvalidArgumentError at its first call): XLA has no
    binary search and would compare all rows with all rows in n^2 memory. Keras 3 may compile a
    training step by itself: pass `jit_compile=False` to `compile`.

    Args:
      scores: float [batch] or [batch, 1], any float type; the default margins suit probabilities.
      grade: integer or float [batch] or [batch, 1] in {0, 1, 2}. Another value is an error on
        CPU (InvalidArgumentError).
      margin_click: how far a conversion should score above a click, in units of the scores, >= 0.
      margin_nonclick: the same for an exposure without a click, >= 0.
      normalization: "pairs", each sum divided by its number of pairs, or "negatives", by its
        number of lower-graded rows.

    Returns:
      The loss, a scalar of the scores' type.

    Raises:
      TypeError: scores that are not floating point.
      ValueError: other shapes, a negative or non-finite margin, an unknown normalization.
      InvalidArgumentError: unequal batch sizes that are known only when a graph runs.
    """
    _check_settings(margin_click, margin_nonclick, normalization)
    scores = inputs.scores(scores)
    grade = inputs.classes(grade, "grade", scores)
    counts = inputs.count(grade, 3)
    weight_of_grade = inputs.weights_of_lower_classes(counts, normalization)
    margin_of_grade = tf.constant([margin_nonclick, margin_click, 0.0], tf.float64)
    weight = tf.gather(weight_of_grade, grade)  # [batch]; 0 for conversions
    margin = tf.gather(margin_of_grade, grade)  # [batch]
    conversion_rows = tf.where(tf.equal(grade, 2))  # [M, 1]

    @tf.custom_gradient
    def loss_of(scores):
        p = tf.cast(scores, tf.float64)
        s = tf.gather_nd(p, conversion_rows)
        # Centred before the sort: one score that is not finite then makes all of them not finite.
        centre = tf.math.divide_no_nan(tf.reduce_sum(s), counts[2])
        u, s = p - centre + margin, s - centre
        order = tf.argsort(s)
        rows, s = tf.gather(conversion_rows, order), tf.gather(s, order)
        below = tf.raw_ops.LowerBound(sorted_inputs=s[tf.newaxis], values=u[tf.newaxis])[0]
        sums = tf.cumsum(tf.pad(s, [[1, 0]]))
        count, sum_below = tf.cast(below, tf.float64), tf.gather(sums, below)
        weight_above = _sum_above(weight, below, tf.size(s))
        weighted_u_above = _sum_above(weight * u, below, tf.size(s))
        lower_slope = weight * (count * u - sum_below)  # [batch]
        conversion_slope = s * weight_above - weighted_u_above  # [M]

        loss = tf.tensordot(u, lower_slope, 1) + tf.tensordot(s, conversion_slope, 1)

        def gradient(upstream):
            slope = tf.tensor_scatter_nd_add(lower_slope, rows, conversion_slope)
            # Multiplied before the cast: half precision needs its loss scale applied first.
            slope = tf.cast(2.0 * tf.cast(upstream, tf.float64) * slope, scores.dtype)
            # The slopes have no gradient to `scores`: a second derivative would be wrong.
            return tf.raw_ops.PreventGradient(
                input=slope, message="pwiser has no second derivatives"
            )

        return tf.cast(loss + inputs.nan_unless_finite(p), scores.dtype), gradient

    return loss_of(scores)


class PairLoss(keras.losses.Loss):
    """Base of the pairwise Keras (tf_keras) losses: the loss of a batch is a mean over pairs.

    There is no loss per row, so every `reduction` (AUTO, SUM, NONE, SUM_OVER_BATCH_SIZE) returns
    the same scalar. Under a tf.distribute strategy each replica has the loss of its own pairs, and
    the total should be the mean over replicas. `compile` and `fit` with AUTO divide by the number
    of replicas. In a custom training loop Keras refuses AUTO: pass SUM or NONE, and divide by
    `strategy.num_replicas_in_sync` (not by the global batch size, as the loss is already a mean).

    Call: y_true and y_pred, [batch] or [batch, 1] each, to a scalar. It raises the errors of the
    loss function, and ValueError for a `sample_weight`: weights are per row, this loss is per pair.
    """

    def __call__(self, y_true, y_pred, sample_weight=None) -> tf.Tensor:
        if sample_weight is not None:
            raise ValueError(
                f"{type(self).__name__} takes no sample_weight or class_weight: weights are per "
                "row, this loss is per pair. Weight the cross-entropy, or multiply this loss by a "
                "number."
            )
        return super().__call__(y_true, y_pred)


@keras.utils.register_keras_serializable(package="pwiser_tf")
class PWiseRLoss(PairLoss):
    """`pwiser` as a Keras loss: y_true is the grade, y_pred one head's output. See `PairLoss`.

    Args:
      margin_click, margin_nonclick, normalization: see `pwiser`.
      from_logits: y_pred holds logits. Their sigmoid is computed first, at least in float32; the
        margins are in units of probability.
      reduction, name: as in every Keras loss.
    """

    def __init__(
        self,
        margin_click: float = 0.05,
        margin_nonclick: float = 0.1,
        from_logits: bool = False,
        normalization: str = "pairs",
        reduction: str = keras.losses.Reduction.AUTO,
        name: str = "pwiser",
    ):
        super().__init__(reduction=reduction, name=name)
        _check_settings(margin_click, margin_nonclick, normalization)
        self.margin_click = margin_click
        self.margin_nonclick = margin_nonclick
        self.from_logits = from_logits
        self.normalization = normalization

    def call(self, y_true, y_pred) -> tf.Tensor:
        y_pred = tf.convert_to_tensor(y_pred)
        if self.from_logits:
            half = y_pred.dtype in (tf.float16, tf.bfloat16)
            y_pred = tf.sigmoid(tf.cast(y_pred, tf.float32) if half else y_pred)
        return pwiser(y_pred, y_true, self.margin_click, self.margin_nonclick, self.normalization)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "margin_click": self.margin_click,
            "margin_nonclick": self.margin_nonclick,
            "from_logits": self.from_logits,
            "normalization": self.normalization,
        }


def strength(weight: float, margin_click: float, margin_nonclick: float, cvr: float) -> float:
    """The gradient of weight * PWiseR on a conversion, relative to that of BCE, on the CTR head.

    If predictions are far below the margins, every hinge is about as large as its margin. Then the
    gradient on each of the M conversions of a batch is 2 weight (margin_click + margin_nonclick)
    / M ("pairs" normalization, with both terms). The gradient of BCE, the mean over n rows, is
    1 / (n CTR) = CVR / M if the prediction is the base rate. The ratio of the two is the strength.
    On generated data a strength of up to about 0.4 did no harm; 1.6 reduced AUC and calibration
    unless the model was undertrained (docs/explain/when-pwiser-helps.md). For a head that learns
    CTCVR the gradient of BCE is 1 / M: pass a cvr of 1.

    Args:
      weight: the factor of PWiseR in the loss.
      margin_click, margin_nonclick: as in `pwiser`.
      cvr: conversions / clicks of the training data, in (0, 1].

    Raises:
      ValueError: a cvr outside (0, 1], such as 0 for data without conversions.
    """
    if not 0 < cvr <= 1:
        raise ValueError(f"cvr: found {cvr}, expected conversions / clicks, in (0, 1]")
    return 2 * weight * (margin_click + margin_nonclick) / cvr


def _sum_above(weights: tf.Tensor, below: tf.Tensor, conversions: tf.Tensor) -> tf.Tensor:
    """For sorted conversion j, the sum of the weights of the rows with below > j.

    Args:
      weights: float64 [batch].
      below: int32 [batch] in 0..M, the number of conversions below each row.
      conversions: M, an int32 scalar.

    Returns:
      float64 [M].
    """
    # As a matrix with one row, so that one thread sums in a fixed order. It is still several times
    # faster than tf.math.unsorted_segment_sum.
    totals = tf.raw_ops.DenseBincount(
        input=below[tf.newaxis], size=conversions + 1, weights=weights[tf.newaxis]
    )[0]
    return tf.cumsum(totals[1:], reverse=True)


def _check_settings(margin_click: float, margin_nonclick: float, normalization: str) -> None:
    for name, margin in (("margin_click", margin_click), ("margin_nonclick", margin_nonclick)):
        if not (math.isfinite(margin) and margin >= 0):
            raise ValueError(f"{name}: found {margin}, expected a finite number of at least 0")
    if normalization not in NORMALIZATIONS:
        expected = " or ".join(map(repr, NORMALIZATIONS))
        raise ValueError(f"normalization: found {normalization!r}, expected {expected}")
