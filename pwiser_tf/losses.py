"""PWiseR, the pairwise loss that trusts clicks which led to a conversion (arXiv 2406.02163).

For the scores p of one head and the grades of one batch (0 exposure only, 1 click without
conversion, 2 conversion), with N0, N1 and M rows of each:

    PWiseR = 1/(N1 M) sum_{i: grade 1} sum_{j: grade 2} max(0, margin_click    - (p_j - p_i))^2
           + 1/(N0 M) sum_{k: grade 0} sum_{j: grade 2} max(0, margin_nonclick - (p_j - p_k))^2

It is added to a task's binary cross-entropy: BCE + weight * PWiseR. It ranks a head's own
predictions by grade, so it serves single-task models as well as any head of a multi-task one.

What the paper (Durmus et al.) leaves open, and what is done here:

- The margins and the weight are not settled by the published text. The defaults (.05 and .1, in
  probability units; a weight of .1) are those that left calibration intact on generated data;
  `strength` carries a setting from one data set to another. Strong settings ruin calibration.
- Nor is the head that the scores come from. The function takes any head's scores; the trainer's
  flag names the tasks.
- The printed formula divides each sum by the number of lower-graded rows alone, N1 or N0. The
  loss then grows with the number of conversions in the batch, and its best weight changes with
  the batch size. The default is the mean over pairs; `normalization="negatives"` is the formula
  as printed.

The losses that PWiseR is compared with stand below it, each a function of logits:

    pairwise_logistic   RankNet, on PWiseR's own pairs
    combined_pair       RankNet, on the pairs of one binary label          (arXiv 2403.14144)
    jrc                 softmax among the rows of one group, per class     (arXiv 2208.06164)
    listce              softmax cross-entropy of a group's probabilities   (arXiv 2211.01494)
    focal               cross-entropy that looks away from easy rows       (arXiv 1708.02002)

All but focal are terms to be added to BCE with a weight. Where a paper mixes alpha * BCE +
(1 - alpha) * term, that is the same up to scale as BCE + (1 - alpha) / alpha * term.
"""

import math

import tensorflow as tf
import tf_keras as keras

NORMALIZATIONS = ("pairs", "negatives")

# Upper rows whose pairs with all others are in memory at a time.
_PAIR_BLOCK = 8


def pwiser(
    scores: tf.Tensor,
    grade: tf.Tensor,
    margin_click: float = 0.05,
    margin_nonclick: float = 0.1,
    normalization: str = "pairs",
    group: tf.Tensor | None = None,
) -> tf.Tensor:
    """PWiseR over every pair of the batch, exactly, in O(n log M) time and O(n) memory.

    Only the M conversions are sorted. A lower-graded row b, with u = p_b + margin, has an open
    hinge with the conversions whose score s lies below u. Those are the first k of the sorted
    ones, so prefix sums S of s replace the pairs:

        dL/dp_b = 2 w_b (k_b u_b - S[k_b])            w_b = 1 / (pairs of the row's grade)
        dL/ds_j = 2 sum_{b: u_b > s_j} w_b (s_j - u_b)
        L       = (sum_b u_b dL/dp_b + sum_j s_j dL/ds_j) / 2

    With `group` only pairs within a group count, and the mean is over these. Then all rows are
    sorted, by (group, u or s): the open hinges of b are with the conversions from its group's first
    on to k_b, and each prefix sum becomes a difference of two. O(n log n).

    The last line is Euler's identity: L is homogeneous of degree 2 in (u, s). Sums are float64,
    about a centre amid the conversions: in float32 they lose every digit where scores cluster.

    A term without pairs is 0, with gradients of 0. A score that is not finite makes the loss NaN.
    The gradient is continuous everywhere (the hinge is squared). Asking for second derivatives
    raises LookupError.

    It works eagerly, in a tf.function, with any Keras, and in each replica of a tf.distribute
    strategy over that replica's pairs. Runs repeat bit by bit on CPU. A `jit_compile=True` function
    is refused (InvalidArgumentError at its first call): XLA has no binary search, it would compare
    all rows with all rows in n^2 memory. Keras 3 may compile a training step by itself: pass
    `jit_compile=False` to `compile`.

    Args:
      scores: float [batch] or [batch, 1], any float type; the default margins suit probabilities.
      grade: integer or float [batch] or [batch, 1] in {0, 1, 2}. Another value is an error on
        CPU (InvalidArgumentError).
      margin_click: how far a conversion must lie above a click, in units of the scores, >= 0.
      margin_nonclick: the same above an exposure without a click, >= 0.
      normalization: "pairs", each sum divided by its number of pairs, or "negatives", by its
        number of lower-graded rows.
      group: integer [batch] or [batch, 1], any values, or None: all rows are one group.

    Returns:
      The loss, a scalar of the scores' type.

    Raises:
      TypeError: scores that are not floating point.
      ValueError: other shapes, a negative or non-finite margin, an unknown normalization. Batch
        sizes that turn out unequal only when a graph runs give InvalidArgumentError.
    """
    _check_settings(margin_click, margin_nonclick, normalization)
    scores = _scores(scores)
    grade = _classes(grade, "grade", scores)
    if group is None:
        index, groups = tf.zeros_like(grade), 1
    else:
        index, groups = _groups(group, scores)
    counts = tf.reshape(_count(index * 3 + grade, groups * 3), [groups, 3])
    conversions = counts[:, 2]  # [groups]
    weight_of_grade = _weights_of_lower_classes(counts, normalization)
    margin_of_grade = tf.constant([margin_nonclick, margin_click, 0.0], tf.float64)
    weight = tf.gather(weight_of_grade, grade)  # [batch]; 0 for conversions
    margin = tf.gather(margin_of_grade, grade)  # [batch]
    conversion_rows = tf.where(tf.equal(grade, 2))  # [M, 1]

    @tf.custom_gradient
    def loss_of(scores):
        p = tf.cast(scores, tf.float64)
        s = tf.gather_nd(p, conversion_rows)
        # Centred before they are sorted: what is not finite spreads to all, and sorting is safe.
        centre = tf.math.divide_no_nan(tf.reduce_sum(s), tf.reduce_sum(conversions))
        u = p - centre + margin
        if group is None:
            s = s - centre
            order = tf.argsort(s)
            rows, s = tf.gather(conversion_rows, order), tf.gather(s, order)
            below = tf.raw_ops.LowerBound(sorted_inputs=s[tf.newaxis], values=u[tf.newaxis])[0]
        else:
            rows, below = _sort_in_groups(u, tf.equal(grade, 2), index)
            s = tf.gather_nd(u, rows)  # their margin is 0
        sums = tf.cumsum(tf.pad(s, [[1, 0]]))
        count, sum_below = tf.cast(below, tf.float64), tf.gather(sums, below)
        weight_above = _sum_above(weight, below, tf.size(s))
        weighted_u_above = _sum_above(weight * u, below, tf.size(s))
        if group is not None:
            # Less the conversions of the groups that come before the row's own.
            before = tf.gather(tf.cumsum(tf.cast(conversions, tf.int32), exclusive=True), index)
            count -= tf.cast(before, tf.float64)
            sum_below -= tf.gather(sums, before)
            weight_above -= _sum_above(weight, before, tf.size(s))
            weighted_u_above -= _sum_above(weight * u, before, tf.size(s))
        lower_slope = weight * (count * u - sum_below)  # [batch]
        conversion_slope = s * weight_above - weighted_u_above  # [M]

        loss = tf.tensordot(u, lower_slope, 1) + tf.tensordot(s, conversion_slope, 1)

        def gradient(upstream):
            slope = tf.tensor_scatter_nd_add(lower_slope, rows, conversion_slope)
            # Multiplied before the cast: half precision needs its loss scale applied first.
            slope = tf.cast(2.0 * tf.cast(upstream, tf.float64) * slope, scores.dtype)
            # What was computed above does not know `scores`: a second derivative would be wrong.
            return tf.raw_ops.PreventGradient(
                input=slope, message="pwiser has no second derivatives"
            )

        return tf.cast(loss + _nan_unless_finite(p), scores.dtype), gradient

    return loss_of(scores)


class PairLoss(keras.losses.Loss):
    """Base of the Keras (tf_keras) losses below: a batch's loss is one number, a mean over pairs.

    It is not one for each row. So every `reduction` (AUTO, SUM, NONE, SUM_OVER_BATCH_SIZE) gives
    that number itself. Under a tf.distribute strategy each replica has the number of its own
    pairs, whose mean over replicas is wanted: `compile` and `fit` divide by the number of replicas
    with AUTO; in a loop of one's own Keras refuses AUTO, so pass SUM or NONE and divide by
    `strategy.num_replicas_in_sync` (not by the global batch size: the number is a mean already).

    Calling it takes y_true and y_pred, [batch] or [batch, 1] each, and raises what the function
    raises, and ValueError for a `sample_weight`: weights belong to rows, this loss to pairs.
    """

    def __call__(self, y_true, y_pred, sample_weight=None) -> tf.Tensor:
        if sample_weight is not None:
            raise ValueError(
                f"{type(self).__name__} takes no sample_weight (nor class_weight): weights belong "
                "to rows, this loss to pairs. Weight the cross-entropy, or scale this loss as a "
                "whole."
            )
        return super().__call__(y_true, y_pred)


@keras.utils.register_keras_serializable(package="pwiser_tf")
class PWiseRLoss(PairLoss):
    """`pwiser` as a Keras loss: y_true is the grade, y_pred one head's output. See `PairLoss`.

    Args:
      margin_click, margin_nonclick, normalization: see `pwiser`.
      from_logits: y_pred holds logits. Their sigmoid is taken first, in float32 at least; the
        margins stay in units of probability.
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
    """How hard weight * PWiseR pushes a conversion up, in units of BCE's own push, on the CTR head.

    Where predictions are far below the margins every hinge is open by about its whole margin, and
    the push on each of the M conversions of a batch is 2 weight (margin_click + margin_nonclick)
    / M ("pairs" normalization, both terms present). BCE, the mean over n rows, pushes it by
    1 / (n CTR) = CVR / M where the prediction is the base rate. The ratio of the two is the
    strength. On generated data up to about .4 did no harm, and 1.6 cost AUC and calibration
    unless the model was undertrained (docs/explain/when-pwiser-helps.md). For a head that learns
    CTCVR, BCE's push is 1 / M: pass a cvr of 1.

    Args:
      weight: what PWiseR is multiplied by in the loss.
      margin_click, margin_nonclick: as in `pwiser`.
      cvr: conversions / clicks of the training data, in (0, 1].

    Raises:
      ValueError: a cvr outside (0, 1]; without conversions there is nothing to push.
    """
    if not 0 < cvr <= 1:
        raise ValueError(f"cvr: found {cvr}, expected conversions / clicks, in (0, 1]")
    return 2 * weight * (margin_click + margin_nonclick) / cvr


def pairwise_logistic(logits: tf.Tensor, grade: tf.Tensor) -> tf.Tensor:
    """RankNet (Burges et al. 2005; BPR is the same) on PWiseR's own pairs, every one of the batch.

        1/(N1 M) sum_{i: grade 1} sum_{j: grade 2} log(1 + exp(-(s_j - s_i)))
      + 1/(N0 M) sum_{k: grade 0} sum_{j: grade 2} log(1 + exp(-(s_j - s_k)))

    RankNet takes any pairs; these are those of PWiseR, so that only the shape of the loss differs.
    It has no margins: a pair pushes on, however far apart it is, with sigmoid(-(s_j - s_i)).

    Unlike a squared hinge this sum has no prefix sums: the pairs are computed one by one, some
    conversions against all rows at a time, in time O(n M) and memory O(n). Sums are float64. For
    what else holds (terms without pairs, values that are not finite, second derivatives) see
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
    logits = _scores(logits, "logits")
    return _logistic_of_classes(logits, _classes(grade, "grade", logits), 3)


def combined_pair(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """The ranking term of Combined-Pair (Lin et al., arXiv 2403.14144), over every pair.

        1/(P N) sum_{i: label 1} sum_{j: label 0} log(1 + exp(-(s_i - s_j)))

    It is RankNet between the positives P and the negatives N of the label that BCE learns, mean
    over pairs (as in the authors' code). The paper mixes alpha * BCE + (1 - alpha) * this.

    Computed as `pairwise_logistic` is, in time O(N P).

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
    logits = _scores(logits, "logits")
    return _logistic_of_classes(logits, _classes(labels, "labels", logits), 2)


def jrc(logits: tf.Tensor, energy: tf.Tensor, labels: tf.Tensor, group: tf.Tensor) -> tf.Tensor:
    """The ranking term of JRC (Sheng et al., arXiv 2208.06164): a row's share of its group.

    A head has a logit for each class, f0 = energy and f1 = energy + logit, so that sigmoid(f1 -
    f0) is the probability and BCE does not see the energy. With y the label of row i, in group g:

        mean over rows i of  -log( exp(f_y(i)) / sum_{j in g} exp(f_y(j)) )

    All rows of the group stand in the denominator, those of the same label too, and negatives
    compete among themselves through f0 as positives do through f1: so the paper's equation has
    it. The mean over rows is what Alibaba's EasyRec computes; the mixture in the paper is alpha *
    BCE + (1 - alpha) * this. A group ("context") is a session there; of which rows a batch holds
    the paper says nothing: a row that is alone in the batch costs 0, so keep groups together.

    Time O(n), by segments; log-sum-exp about each group's maximum, in float64.

    Args:
      logits: float [batch] or [batch, 1], any float type.
      energy: the same, of the logits' type.
      labels: bool, integer or float [batch] or [batch, 1] in {0, 1}. Another value is an error on
        CPU (InvalidArgumentError).
      group: integer [batch] or [batch, 1], any values.

    Returns:
      The loss, a scalar of the logits' type; 0 for an empty batch, NaN where a logit or an energy
      is not finite.

    Raises:
      TypeError: logits or energies that are not floating point.
      ValueError: other shapes.
    """
    logits = _scores(logits, "logits")
    energy = _scores(_beside(energy, "energy", logits), "energy")
    y = _labels(labels, logits)
    index, groups = _groups(group, logits)
    f0 = tf.cast(energy, tf.float64)
    f1 = f0 + tf.cast(logits, tf.float64)
    share = tf.where(y > 0, _log_share(f1, index, groups), _log_share(f0, index, groups))
    loss = tf.math.divide_no_nan(-tf.reduce_sum(share), tf.cast(tf.size(share), tf.float64))
    return tf.cast(loss + _nan_unless_finite(f1), logits.dtype)


def listce(logits: tf.Tensor, labels: tf.Tensor, group: tf.Tensor) -> tf.Tensor:
    """Regression-compatible ListCE (Bai et al., arXiv 2211.01494), with the sigmoid.

    For a group of rows with labels y, C of them positive, and probabilities p = sigmoid(s):

        -1/C sum_i y_i log( p_i / sum_j p_j )

    Softmax cross-entropy, with log p in the place of the logits: its minimum is where p is
    proportional to y, which BCE's minimum is too. Groups without a positive have no loss. The
    mean is over the groups with a positive: that is our choice (the paper's text could not be had).
    The paper mixes (1 - alpha) * BCE + alpha * this.

    Time O(n), by segments; log p and log-sum-exp never leave log space, in float64. Rows that are
    alone in the batch cost 0, so keep groups together.

    Args:
      logits: float [batch] or [batch, 1], any float type.
      labels: bool, integer or float [batch] or [batch, 1] in {0, 1}. Another value is an error on
        CPU (InvalidArgumentError).
      group: integer [batch] or [batch, 1], any values.

    Returns:
      The loss, a scalar of the logits' type; 0 without positives, NaN where a logit is not finite.

    Raises:
      TypeError: logits that are not floating point.
      ValueError: other shapes.
    """
    logits = _scores(logits, "logits")
    y = _labels(labels, logits)
    index, groups = _groups(group, logits)
    share = _log_share(tf.math.log_sigmoid(tf.cast(logits, tf.float64)), index, groups)
    positives = tf.math.unsorted_segment_sum(y, index, groups)  # [groups]: each one's C
    cost = tf.math.divide_no_nan(tf.math.unsorted_segment_sum(-y * share, index, groups), positives)
    counted = tf.math.count_nonzero(positives, dtype=tf.float64)
    loss = tf.math.divide_no_nan(tf.reduce_sum(cost), counted)
    return tf.cast(loss + _nan_unless_finite(tf.cast(logits, tf.float64)), logits.dtype)


def focal(logits: tf.Tensor, labels: tf.Tensor, gamma: float = 2.0) -> tf.Tensor:
    """Focal loss (Lin et al., arXiv 1708.02002): (1 - p_t)^gamma * cross-entropy, one a row.

    p_t is the probability given to the row's own label. It takes the place of
    `tf.nn.sigmoid_cross_entropy_with_logits`, and has its shape: it is a loss of rows, not of
    pairs. gamma 0 is cross-entropy. The paper's alpha, a weight for each class, is left out (for
    rare positives it found a weight below 1/2 for them best, with gamma 2). The minimum is not at
    the true probability: focal pulls predictions to 1/2. Keras has BinaryFocalCrossentropy, which
    clips probabilities; this one stays in log space, with finite gradients at any logit.

    Args:
      logits: float [batch] or [batch, 1], any float type.
      labels: bool, integer or float [batch] or [batch, 1] in {0, 1}. Another value is an error on
        CPU (InvalidArgumentError).
      gamma: how much easy rows are turned down, >= 0.

    Returns:
      The losses, [batch], of the logits' type.

    Raises:
      TypeError: logits that are not floating point.
      ValueError: other shapes; a gamma that is negative or not finite.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma: found {gamma}, expected a finite number of at least 0")
    logits = _scores(logits, "logits")
    towards = tf.where(
        _labels(labels, logits) > 0, logits, -logits
    )  # the log-odds of the row's own label
    cross_entropy = tf.nn.softplus(-towards)
    return tf.exp(gamma * tf.math.log_sigmoid(-towards)) * cross_entropy


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
    """`_logistic` of every class below the last against it, each class's pairs with mean weight 1.

    Args:
      logits: float [batch]. classes: int32 [batch] in 0..size - 1.
    """
    weights = _weights_of_lower_classes(_count(classes, size)[tf.newaxis], "pairs")
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
        # No tape sees what is inside: the gradient is known, and XLA could not keep a tape's notes.
        x = tf.stop_gradient(tf.cast(logits, tf.float32) if half else logits)
        above = tf.gather_nd(x, upper_rows)
        count = tf.size(above)
        # XLA compiles for one size of each input: only the batch's may matter, not M.
        above = tf.pad(above, [[0, tf.size(x) - count + _PAIR_BLOCK]])
        loss, slope, upper_slope = _logistic_blocks(x, weight, above, count)

        def gradient(upstream):
            total = tf.tensor_scatter_nd_sub(slope, upper_rows, upper_slope[:count])
            # Multiplied before the cast: half precision needs its loss scale applied first.
            total = tf.cast(tf.cast(upstream, tf.float64) * total, logits.dtype)
            # A second derivative would be wrong, or none at all: tied to the logits again, to
            # have it refused.
            return tf.raw_ops.PreventGradient(
                input=total + 0 * logits, message="pairwise losses have no second derivatives"
            )

        return tf.cast(loss + _nan_unless_finite(tf.cast(x, tf.float64)), logits.dtype), gradient

    return loss_of(logits)


@tf.function(jit_compile=True, reduce_retracing=True)
def _logistic_blocks(x, weight, above, count):
    """The pairs of `_logistic`, _PAIR_BLOCK upper rows against all rows at a time.

    Elementwise float32 (for float32 logits), summed in float64.

    Args:
      x: float [batch]. weight: float64 [batch]. above: float [batch + _PAIR_BLOCK], the upper
      rows' logits, then anything finite. count: M, an int32 scalar.

    Returns:
      The loss, float64; dloss/dx without the upper rows' own part, float64 [batch]; minus
      dloss/dabove, float64 [batch + _PAIR_BLOCK], of which the first M count.
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


def _log_share(values: tf.Tensor, index: tf.Tensor, groups: tf.Tensor) -> tf.Tensor:
    """Log-softmax of each value, float [batch], among those of its own group."""
    # About a constant: it cancels in the result, and so in the gradient.
    highest = tf.stop_gradient(tf.math.unsorted_segment_max(values, index, groups))
    values -= tf.gather(highest, index)
    total = tf.math.unsorted_segment_sum(tf.exp(values), index, groups)
    return values - tf.gather(tf.math.log(total), index)


def _sum_above(weights: tf.Tensor, below: tf.Tensor, conversions: tf.Tensor) -> tf.Tensor:
    """For sorted conversion j, the sum of the weights of the rows with below > j.

    Args:
      weights: float64 [batch].
      below: int32 [batch] in 0..M, how many conversions lie below each row.
      conversions: M, an int32 scalar.

    Returns:
      float64 [M].
    """
    # As a matrix of one row: then a single thread sums in order, always the same way, and still
    # several times faster than tf.math.unsorted_segment_sum.
    totals = tf.raw_ops.DenseBincount(
        input=below[tf.newaxis], size=conversions + 1, weights=weights[tf.newaxis]
    )[0]
    return tf.cumsum(totals[1:], reverse=True)


def _sort_in_groups(values: tf.Tensor, upper: tf.Tensor, index: tf.Tensor):
    """Sorts rows by (group, value), and counts the upper ones that come before each.

    Args:
      values: float64 [batch]. upper: bool [batch]. index: each row's group, int32 [batch].

    Returns:
      The upper rows in that order, int32 [M, 1], and int32 [batch], how many come before each row.
    """
    # A NaN has no place in an order, and sorting must not see one: its sums will be NaN anyhow.
    by_value = tf.argsort(tf.where(tf.math.is_finite(values), values, 0.0), stable=True)
    order = tf.gather(by_value, tf.argsort(tf.gather(index, by_value), stable=True))
    upper = tf.gather(upper, order)
    before = tf.cumsum(tf.cast(upper, tf.int32), exclusive=True)
    before = tf.scatter_nd(order[:, tf.newaxis], before, tf.shape(order))
    return tf.boolean_mask(order, upper)[:, tf.newaxis], before


def _weights_of_lower_classes(counts: tf.Tensor, normalization: str) -> tf.Tensor:
    """What one pair counts with each lower class, given the rows of each class, the upper last.

    Args:
      counts: float64 [groups, classes]. normalization: see `pwiser`.

    Returns:
      float64 [classes]; 0 for the upper class, and where there are no pairs.
    """
    lower = counts[:, :-1]
    divisor = tf.reduce_sum(lower * counts[:, -1:] if normalization == "pairs" else lower, axis=0)
    return tf.pad(tf.math.divide_no_nan(tf.constant(1.0, tf.float64), divisor), [[0, 1]])


def _count(classes: tf.Tensor, size: int) -> tf.Tensor:
    """The rows of each class, float64 [size]; an InvalidArgumentError on CPU for other classes."""
    return tf.raw_ops.DenseBincount(input=classes, size=size, weights=tf.zeros([0], tf.float64))


def _scores(values, name: str = "scores") -> tf.Tensor:
    """Floating-point [batch] or [batch, 1] to [batch]."""
    values = _vector(values, name)
    if not values.dtype.is_floating:
        raise TypeError(f"{name}: found {values.dtype.name}, expected a floating-point type")
    return values


def _beside(values, name: str, scores: tf.Tensor) -> tf.Tensor:
    """[batch] or [batch, 1] to [batch], as many as there are scores."""
    values = _vector(values, name)
    if not scores.shape.is_compatible_with(values.shape):
        found = f"{name}: found shape {values.shape}"
        raise ValueError(f"{found}, expected {scores.shape} as the scores")
    if None in (scores.shape[0], values.shape[0]):
        # A graph knows sizes only when it runs: one score must not be broadcast to many grades.
        # Nothing reads the values before the check, or another operation's message might win.
        message = f"{name}: expected as many as there are scores"
        check = tf.debugging.assert_equal(tf.size(values), tf.size(scores), message)
        with tf.control_dependencies([check]):
            values = tf.identity(values)
    return values


def _classes(values, name: str, scores: tf.Tensor) -> tf.Tensor:
    """Grades or labels of any type, [batch] or [batch, 1], to int32 [batch]."""
    values = _beside(values, name, scores)
    return tf.cast(tf.round(values) if values.dtype.is_floating else values, tf.int32)


def _labels(values, scores: tf.Tensor) -> tf.Tensor:
    """Labels of any type, [batch] or [batch, 1], to float64 [batch], 0 or 1."""
    # Looked up, and not cast, so that another value is an error.
    return tf.gather(tf.constant([0.0, 1.0], tf.float64), _classes(values, "labels", scores))


def _groups(group, scores: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Each row's group as an index, int32 [batch], and how many groups there are, a scalar."""
    values, index = tf.unique(_beside(group, "group", scores))
    return index, tf.size(values)


def _nan_unless_finite(values: tf.Tensor) -> tf.Tensor:
    """0 where all values are finite, else NaN: a scalar of their type, without gradients."""
    zero, nan = tf.constant(0, values.dtype), tf.constant(math.nan, values.dtype)
    return tf.where(tf.reduce_all(tf.math.is_finite(values)), zero, nan)


def _vector(values, name: str) -> tf.Tensor:
    """[batch] or [batch, 1] to [batch]; ValueError for every other shape, an unknown one too."""
    values = tf.convert_to_tensor(values, name=name)
    shape = values.shape
    if shape.rank == 2 and shape[1] in (1, None):
        return tf.squeeze(values, axis=1)
    if shape.rank != 1:
        raise ValueError(f"{name}: found shape {shape}, expected [batch] or [batch, 1]")
    return values


def _check_settings(margin_click: float, margin_nonclick: float, normalization: str) -> None:
    for name, margin in (("margin_click", margin_click), ("margin_nonclick", margin_nonclick)):
        if not (math.isfinite(margin) and margin >= 0):
            raise ValueError(f"{name}: found {margin}, expected a finite number of at least 0")
    if normalization not in NORMALIZATIONS:
        expected = " or ".join(map(repr, NORMALIZATIONS))
        raise ValueError(f"normalization: found {normalization!r}, expected {expected}")
