"""Losses of single rows: focal."""

import math

import tensorflow as tf

from pwiser_tf.losses import inputs


def focal(logits: tf.Tensor, labels: tf.Tensor, gamma: float = 2.0) -> tf.Tensor:
    """Focal loss (Lin et al., arXiv 1708.02002): (1 - p_t)^gamma * cross-entropy, one per row.

    p_t is the predicted probability of the row's label. The loss replaces
    `tf.nn.sigmoid_cross_entropy_with_logits` and has the same shape: it is a loss of rows, not of
    pairs. With gamma 0 it is cross-entropy. The paper's alpha, a weight for each class, is left out
    (with gamma 2 the paper found a weight below 1/2 best for rare positives). The minimum is not at
    the true probability: focal loss moves predictions towards 1/2. Keras's BinaryFocalCrossentropy
    clips probabilities; this function works in log space, with finite gradients at any logit.

    Args:
      logits: float [batch] or [batch, 1], any float type.
      labels: bool, integer or float [batch] or [batch, 1] in {0, 1}. Another value is an error on
        CPU (InvalidArgumentError).
      gamma: how strongly easy rows are down-weighted, >= 0.

    Returns:
      The losses, [batch], of the logits' type.

    Raises:
      TypeError: logits that are not floating point.
      ValueError: other shapes; a gamma that is negative or not finite.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma: found {gamma}, expected a finite number of at least 0")
    logits = inputs.scores(logits, "logits")
    towards = tf.where(
        inputs.labels(labels, logits) > 0, logits, -logits
    )  # the log-odds of the row's own label
    cross_entropy = tf.nn.softplus(-towards)
    return tf.exp(gamma * tf.math.log_sigmoid(-towards)) * cross_entropy
