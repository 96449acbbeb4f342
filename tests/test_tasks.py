import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_recommenders as tfrs

from pwiser_tf import losses
from pwiser_tf.tasks import LOSSES, LossConfig, TaskLoss

GRADE = tf.constant([0, 0, 1, 2, 0, 1], tf.int64)
LOGITS = tf.constant([-2.0, 0.5, -1.0, 1.5, -3.0, 0.0])
ENERGY = tf.constant([0.3, -0.2, 0.1, 0.7, 0.0, -1.0])
GROUP = tf.constant([7, 7, 7, 9, 9, 7], tf.int64)
PROBABILITIES = 1 / (1 + np.exp(-LOGITS.numpy().astype(np.float64)))
CLICKED, CONVERTED = np.array([0, 0, 1, 1, 0, 1]), np.array([0, 0, 0, 1, 0, 0])


def _loss(task, **config):
    labels = {"grade": GRADE, "group": GROUP}
    predictions = {"logits": LOGITS, "energy": ENERGY}
    return float(TaskLoss(task, LossConfig(**config))(labels, predictions))


def _bce(positive, weights=None):
    p = np.where(positive, PROBABILITIES, 1 - PROBABILITIES)
    return np.average(-np.log(p), weights=weights)


def test_plain_loss_is_bce_on_the_tasks_own_label():
    assert _loss("ctr") == pytest.approx(_bce(CLICKED), rel=1e-6)
    assert _loss("ctcvr") == pytest.approx(_bce(CONVERTED), rel=1e-6)


def test_conversion_weight_counts_conversions_so_often():
    weights = [1, 1, 1, 3, 1, 1]
    expected = _bce(CLICKED, weights)
    assert _loss("ctr", conversion_weight=3.0) == pytest.approx(expected, rel=1e-6)
    # The same as three copies of the row in the batch.
    labels = {"grade": tf.concat([GRADE, [2, 2]], axis=0)}
    predictions = {"logits": tf.concat([LOGITS, [1.5, 1.5]], axis=0)}
    found = float(TaskLoss("ctr", LossConfig())(labels, predictions))
    assert found == pytest.approx(expected, rel=1e-6)


def test_pwiser_is_added_with_its_weight_and_margins():
    term = float(losses.pwiser(tf.sigmoid(LOGITS), GRADE, 0.2, 0.4))
    assert term > 0
    config = {"pwiser_weight": 0.7, "margin_click": 0.2, "margin_nonclick": 0.4}
    found = _loss("ctcvr", loss="pwiser", **config)
    assert found == pytest.approx(_bce(CONVERTED) + 0.7 * term, rel=1e-6)


def test_pwiser_in_logits():
    term = float(losses.pwiser(LOGITS, GRADE, 2.0, 3.0))
    assert term > 0
    found = _loss("ctr", loss="pwiser", margin_click=2.0, margin_nonclick=3.0, score_space="logit")
    assert found == pytest.approx(_bce(CLICKED) + 0.1 * term, rel=1e-6)


@pytest.mark.parametrize(("task", "positive"), [("ctr", CLICKED), ("ctcvr", CONVERTED)])
@pytest.mark.parametrize(
    ("loss", "term"),
    [
        ("ranknet", lambda positive: losses.pairwise_logistic(LOGITS, GRADE)),
        ("combined_pair", lambda positive: losses.combined_pair(LOGITS, positive)),
        ("jrc", lambda positive: losses.jrc(LOGITS, ENERGY, positive, GROUP)),
        ("listce", lambda positive: losses.listce(LOGITS, positive, GROUP)),
    ],
)
def test_a_rivals_term_is_added_with_its_weight(loss, term, task, positive):
    value = float(term(positive))
    assert value > 0
    found = _loss(task, loss=loss, ranking_weight=0.7)
    assert found == pytest.approx(_bce(positive) + 0.7 * value, rel=1e-6)


def test_focal_takes_the_place_of_bce():
    p = np.where(CLICKED, PROBABILITIES, 1 - PROBABILITIES)
    of_rows = -((1 - p) ** 1.5) * np.log(p)
    found = _loss("ctr", loss="focal", focal_gamma=1.5)
    assert found == pytest.approx(np.mean(of_rows), rel=1e-6)
    found = _loss("ctr", loss="focal", focal_gamma=1.5, conversion_weight=3.0)
    assert found == pytest.approx(np.average(of_rows, weights=[1, 1, 1, 3, 1, 1]), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "field", "value"),
    [
        ("bce", "loss", "focal"),
        ("bce", "conversion_weight", 2.0),
        ("pwiser", "pwiser_weight", 0.3),
        ("pwiser", "margin_click", 0.3),
        ("pwiser", "margin_nonclick", 0.3),
        ("pwiser", "score_space", "logit"),
        ("ranknet", "ranking_weight", 0.3),
        ("focal", "focal_gamma", 1.0),
    ],
)
def test_every_setting_changes_the_result(loss, field, value):
    settings = {"loss": loss, "margin_click": 0.9, "margin_nonclick": 0.9}
    assert _loss("ctcvr", **settings) != pytest.approx(
        _loss("ctcvr", **{**settings, field: value}), rel=1e-3
    )


def test_all_settings_but_the_tasks_share_are_in_that_test():
    # The share is the model's to apply, and tested there.
    tested = test_every_setting_changes_the_result.pytestmark[0].args[1]
    fields = {field.name for field in dataclasses.fields(LossConfig)}
    assert {field for _, field, _ in tested} == fields - {"weight"}


def test_all_losses_differ():
    settings = {"margin_nonclick": 0.9, "ranking_weight": 0.5}
    found = {loss: _loss("ctr", loss=loss, **settings) for loss in LOSSES}
    assert len({round(value, 4) for value in found.values()}) == len(LOSSES)


@pytest.mark.parametrize(
    ("loss", "weight"), [("pwiser", "pwiser_weight"), ("jrc", "ranking_weight")]
)
def test_a_weight_of_zero_is_bce(loss, weight):
    assert _loss("ctr", loss=loss, **{weight: 0.0}) == _loss("ctr")


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_finite_with_finite_gradients_at_extreme_logits(loss):
    logits = tf.Variable([-1e4, 1e4, 1e4, -1e4, 0.0, 50.0])
    energy = tf.Variable([1e4, -1e4, 0.0, -1e4, 0.0, 1e4])
    task = TaskLoss("ctr", LossConfig(loss=loss, pwiser_weight=1.0, ranking_weight=1.0))
    with tf.GradientTape() as tape:
        loss = task({"grade": GRADE, "group": GROUP}, {"logits": logits, "energy": energy})
    assert np.isfinite(loss)
    gradients = tape.gradient(loss, [logits, energy], unconnected_gradients="zero")
    assert np.isfinite(gradients).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_tfrs_task_in_a_graph_of_unknown_batch_size(loss):
    task = tfrs.tasks.Ranking(loss=TaskLoss("ctr", LossConfig(loss=loss)))

    @tf.function(input_signature=[tf.TensorSpec([None]), tf.TensorSpec([None], tf.int64)])
    def run(logits, grade):
        predictions = {"logits": logits, "energy": tf.zeros_like(logits)}
        return task(labels={"grade": grade, "group": grade}, predictions=predictions)

    labels = {"grade": GRADE, "group": GRADE}
    predictions = {"logits": LOGITS, "energy": tf.zeros_like(LOGITS)}
    expected = float(TaskLoss("ctr", LossConfig(loss=loss))(labels, predictions))
    assert float(run(LOGITS, GRADE)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", [name for name, entry in LOSSES.items() if entry.needs_groups])
def test_a_group_loss_without_groups_is_refused(loss):
    with pytest.raises(ValueError, match=f"loss '{loss}' compares the rows of one group"):
        TaskLoss("ctr", LossConfig(loss=loss))(
            {"grade": GRADE}, {"logits": LOGITS, "energy": ENERGY}
        )


@pytest.mark.parametrize("field", ["loss", "score_space"])
def test_unknown_names_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}: found 'other', expected one of"):
        LossConfig(**{field: "other"})
