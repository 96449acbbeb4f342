"""Losses that compare the rows of one group: JRC and ListCE."""

import tensorflow as tf

from pwiser_tf.losses import inputs


def jrc(logits: tf.Tensor, energy: tf.Tensor, labels: tf.Tensor, group: tf.Tensor) -> tf.Tensor:
    """The ranking term of JRC (Sheng et al., arXiv 2208.06164): a row's share of its group.

    A head has a logit for each class, f0 = energy and f1 = energy + logit, so that sigmoid(f1 -
    f0) is the probability and BCE does not see the energy. With y the label of row i, in group g:

        mean over rows i of  -log( exp(f_y(i)) / sum_{j in g} exp(f_y(j)) )

    As in the paper's equation, the denominator has all rows of the group, including those with the
    same label. So negatives compete with each other through f0, and positives through f1. The mean
    over rows is what Alibaba's EasyRec computes. The loss in the paper is alpha * BCE +
    (1 - alpha) * this term. A group ("context") in the paper is a session. The paper does not say
    which rows are in a batch. If a batch has only one row of a group, that row costs 0, so keep
    groups together.

    Time O(n), with segment operations. Log-sum-exp subtracts each group's maximum, in float64.

    Args:
      logits: float [batch] or [batch, 1], any float type.
      energy: of the same shape and type as the logits.
      labels: bool, integer or float [batch] or [batch, 1] in {0, 1}. Another value is an error on
        CPU (InvalidArgumentError).
      group: integer [batch] or [batch, 1], any values.

    Returns:
      The loss, a scalar of the logits' type; 0 for an empty batch, NaN if a logit or an energy is
      not finite.

    Raises:
      TypeError: logits or energies that are not floating point.
      ValueError: other shapes.
    """
    logits = inputs.scores(logits, "logits")
    energy = inputs.scores(inputs.one_per_score(energy, "energy", logits), "energy")
    y = inputs.labels(labels, logits)
    index, groups = inputs.groups(group, logits)
    f0 = tf.cast(energy, tf.float64)
    f1 = f0 + tf.cast(logits, tf.float64)
    share = tf.where(y > 0, _log_share(f1, index, groups), _log_share(f0, index, groups))
    loss = tf.math.divide_no_nan(-tf.reduce_sum(share), tf.cast(tf.size(share), tf.float64))
    return tf.cast(loss + inputs.nan_unless_finite(f1), logits.dtype)


def listce(logits: tf.Tensor, labels: tf.Tensor, group: tf.Tensor) -> tf.Tensor:
    """Regression-compatible ListCE (Bai et al., arXiv 2211.01494), with the sigmoid.

    For a group of rows with labels y, C of them positive, and probabilities p = sigmoid(s):

        -1/C sum_i y_i log( p_i / sum_j p_j )

    This is softmax cross-entropy with log p instead of the logits. At its minimum p is proportional
    to y, which is also true at the minimum of BCE. Groups without a positive have no loss. The mean
    is over the groups with a positive; this is our choice, because the text of the paper was not
    available. The loss in the paper is (1 - alpha) * BCE + alpha * this term.

    Time O(n), with segment operations; log p and log-sum-exp are computed in log space, in float64.
    If a batch has only one row of a group, that row costs 0, so keep groups together.

    Args:
      logits: float [batch] or [batch, 1], any float type.
      labels: bool, integer or float [batch] or [batch, 1] in {0, 1}. Another value is an error on
        CPU (InvalidArgumentError).
      group: integer [batch] or [batch, 1], any values.

    Returns:
      The loss, a scalar of the logits' type; 0 without positives, NaN if a logit is not finite.

    Raises:
      TypeError: logits that are not floating point.
      ValueError: other shapes.
    """
    logits = inputs.scores(logits, "logits")
    y = inputs.labels(labels, logits)
    index, groups = inputs.groups(group, logits)
    share = _log_share(tf.math.log_sigmoid(tf.cast(logits, tf.float64)), index, groups)
    positives = tf.math.unsorted_segment_sum(y, index, groups)  # C of each group, [groups]
    cost = tf.math.divide_no_nan(tf.math.unsorted_segment_sum(-y * share, index, groups), positives)
    counted = tf.math.count_nonzero(positives, dtype=tf.float64)
    loss = tf.math.divide_no_nan(tf.reduce_sum(cost), counted)
    return tf.cast(loss + inputs.nan_unless_finite(tf.cast(logits, tf.float64)), logits.dtype)


def _log_share(values: tf.Tensor, index: tf.Tensor, groups: tf.Tensor) -> tf.Tensor:
    """Log-softmax of each value, float [batch], over the values of its group."""
    # The subtracted maximum cancels in the result, and so in the gradient.
    highest = tf.stop_gradient(tf.math.unsorted_segment_max(values, index, groups))
    values -= tf.gather(highest, index)
    total = tf.math.unsorted_segment_sum(tf.exp(values), index, groups)
    return values - tf.gather(tf.math.log(total), index)
