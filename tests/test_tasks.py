import numpy as np
import pytest
import tensorflow as tf

from pwiser_tf.losses import pwiser
from pwiser_tf.tasks import LossConfig, TaskLoss

GRADE = tf.constant([0, 0, 1, 2, 0, 1], tf.int64)
LOGITS = tf.constant([-2.0, 0.5, -1.0, 1.5, -3.0, 0.0])
PROBABILITIES = 1 / (1 + np.exp(-LOGITS.numpy().astype(np.float64)))


def _loss(task, **config):
    return float(TaskLoss(task, LossConfig(**config))(GRADE, LOGITS))


def _bce(positive, weights=None):
    p = np.where(positive, PROBABILITIES, 1 - PROBABILITIES)
    return np.average(-np.log(p), weights=weights)


def test_plain_loss_is_bce_on_the_tasks_own_label():
    assert _loss("ctr") == pytest.approx(_bce([0, 0, 1, 1, 0, 1]), rel=1e-6)
    assert _loss("ctcvr") == pytest.approx(_bce([0, 0, 0, 1, 0, 0]), rel=1e-6)


def test_conversion_weight_counts_conversions_so_often():
    weights = [1, 1, 1, 3, 1, 1]
    expected = _bce([0, 0, 1, 1, 0, 1], weights)
    assert _loss("ctr", conversion_weight=3.0) == pytest.approx(expected, rel=1e-6)
    # The same as three copies of the row in the batch.
    grade = tf.concat([GRADE, [2, 2]], axis=0)
    logits = tf.concat([LOGITS, [1.5, 1.5]], axis=0)
    assert float(TaskLoss("ctr", LossConfig())(grade, logits)) == pytest.approx(expected, rel=1e-6)


def test_pwiser_is_added_with_its_weight_and_margins():
    term = float(pwiser(tf.sigmoid(LOGITS), GRADE, 0.2, 0.4))
    assert term > 0
    found = _loss("ctcvr", pwiser_weight=0.7, margin_click=0.2, margin_nonclick=0.4)
    assert found == pytest.approx(_bce([0, 0, 0, 1, 0, 0]) + 0.7 * term, rel=1e-6)


def test_loss_is_finite_with_finite_gradients_at_extreme_logits():
    logits = tf.Variable([-1e4, 1e4, 1e4, -1e4, 0.0, 50.0])
    with tf.GradientTape() as tape:
        loss = TaskLoss("ctr", LossConfig(pwiser_weight=1.0))(GRADE, logits)
    assert np.isfinite(loss)
    assert np.isfinite(tape.gradient(loss, logits)).all()
