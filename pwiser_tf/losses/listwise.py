"""Losses of the rows of one group against each other: JRC and ListCE."""

import tensorflow as tf

from pwiser_tf.losses import inputs


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
    logits = inputs.scores(logits, "logits")
    energy = inputs.scores(inputs.beside(energy, "energy", logits), "energy")
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
    logits = inputs.scores(logits, "logits")
    y = inputs.labels(labels, logits)
    index, groups = inputs.groups(group, logits)
    share = _log_share(tf.math.log_sigmoid(tf.cast(logits, tf.float64)), index, groups)
    positives = tf.math.unsorted_segment_sum(y, index, groups)  # [groups]: each one's C
    cost = tf.math.divide_no_nan(tf.math.unsorted_segment_sum(-y * share, index, groups), positives)
    counted = tf.math.count_nonzero(positives, dtype=tf.float64)
    loss = tf.math.divide_no_nan(tf.reduce_sum(cost), counted)
    return tf.cast(loss + inputs.nan_unless_finite(tf.cast(logits, tf.float64)), logits.dtype)


def _log_share(values: tf.Tensor, index: tf.Tensor, groups: tf.Tensor) -> tf.Tensor:
    """Log-softmax of each value, float [batch], among those of its own group."""
    # About a constant: it cancels in the result, and so in the gradient.
    highest = tf.stop_gradient(tf.math.unsorted_segment_max(values, index, groups))
    values -= tf.gather(highest, index)
    total = tf.math.unsorted_segment_sum(tf.exp(values), index, groups)
    return values - tf.gather(tf.math.log(total), index)
