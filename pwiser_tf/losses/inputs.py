"""Shared by all losses: input checks and class counts."""

import math

import tensorflow as tf


def weights_of_lower_classes(counts: tf.Tensor, normalization: str = "pairs") -> tf.Tensor:
    """The weight of one pair for each lower class.

    Args:
      counts: float64 [classes], the rows of each class; the upper class is the last.
      normalization: see `pairwise.pwiser`.

    Returns:
      float64 [classes]; 0 for the upper class and for classes without pairs.
    """
    lower = counts[:-1]
    divisor = lower * counts[-1] if normalization == "pairs" else lower
    return tf.pad(tf.math.divide_no_nan(tf.constant(1.0, tf.float64), divisor), [[0, 1]])


def count(classes: tf.Tensor, size: int) -> tf.Tensor:
    """The rows of each class, float64 [size]; InvalidArgumentError on CPU for other classes."""
    return tf.raw_ops.DenseBincount(input=classes, size=size, weights=tf.zeros([0], tf.float64))


def scores(values, name: str = "scores") -> tf.Tensor:
    """Reshapes floating-point [batch] or [batch, 1] to [batch]."""
    values = vector(values, name)
    if not values.dtype.is_floating:
        raise TypeError(f"{name}: found {values.dtype.name}, expected a floating-point type")
    return values


def one_per_score(values, name: str, scores: tf.Tensor) -> tf.Tensor:
    """Reshapes [batch] or [batch, 1] to [batch], and checks that the size is that of the scores."""
    values = vector(values, name)
    if not scores.shape.is_compatible_with(values.shape):
        found = f"{name}: found shape {values.shape}"
        raise ValueError(f"{found}, expected {scores.shape}, the shape of the scores")
    if None in (scores.shape[0], values.shape[0]):
        # A graph knows sizes only when it runs, and one score must not be broadcast to many grades.
        # The values wait for the check, so that no other operation fails first.
        message = f"{name}: expected as many values as scores"
        check = tf.debugging.assert_equal(tf.size(values), tf.size(scores), message)
        with tf.control_dependencies([check]):
            values = tf.identity(values)
    return values


def classes(values, name: str, scores: tf.Tensor) -> tf.Tensor:
    """Converts grades or labels of any type, [batch] or [batch, 1], to int32 [batch]."""
    values = one_per_score(values, name, scores)
    return tf.cast(tf.round(values) if values.dtype.is_floating else values, tf.int32)


def labels(values, scores: tf.Tensor) -> tf.Tensor:
    """Converts labels of any type, [batch] or [batch, 1], to float64 [batch], 0 or 1."""
    # A lookup instead of a cast, so that any other value is an error.
    return tf.gather(tf.constant([0.0, 1.0], tf.float64), classes(values, "labels", scores))


def groups(group, scores: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Each row's group as an index, int32 [batch], and the number of groups, a scalar."""
    values, index = tf.unique(one_per_score(group, "group", scores))
    return index, tf.size(values)


def nan_unless_finite(values: tf.Tensor) -> tf.Tensor:
    """0 if all values are finite, otherwise NaN: a scalar of their type, without gradients."""
    zero, nan = tf.constant(0, values.dtype), tf.constant(math.nan, values.dtype)
    return tf.where(tf.reduce_all(tf.math.is_finite(values)), zero, nan)


def vector(values, name: str) -> tf.Tensor:
    """Reshapes [batch] or [batch, 1] to [batch]; ValueError for other and unknown shapes."""
    values = tf.convert_to_tensor(values, name=name)
    shape = values.shape
    if shape.rank == 2 and shape[1] in (1, None):
        return tf.squeeze(values, axis=1)
    if shape.rank != 1:
        raise ValueError(f"{name}: found shape {shape}, expected [batch] or [batch, 1]")
    return values
