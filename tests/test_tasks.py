import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from pwiser_tf import losses
from pwiser_tf.errors import DataError
from pwiser_tf.tasks import LOSSES, LossConfig, Task

GRADE = tf.constant([0, 0, 1, 2, 0, 1], tf.int64)
LOGITS = tf.constant([-2.0, 0.5, -1.0, 1.5, -3.0, 0.0])
ENERGY = tf.constant([0.3, -0.2, 0.1, 0.7, 0.0, -1.0])
GROUP = tf.constant([7, 7, 7, 9, 9, 7], tf.int64)
PROBABILITIES = 1 / (1 + np.exp(-LOGITS.numpy().astype(np.float64)))
CLICKED, CONVERTED = np.array([0, 0, 1, 1, 0, 1]), np.array([0, 0, 0, 1, 0, 0])


def _loss(task, **config):
    labels = {"grade": GRADE, "group": GROUP}
    predictions = {"logits": LOGITS, "energy": ENERGY}
    return float(Task(task, LossConfig(**{"name": "bce", **config}))(labels, predictions))


def _bce(positive, weights=None):
    p = np.where(positive, PROBABILITIES, 1 - PROBABILITIES)
    return np.average(-np.log(p), weights=weights)


def test_plain_loss_is_bce_on_the_tasks_own_label():
    assert _loss("ctr") == pytest.approx(_bce(CLICKED), rel=1e-6)
    assert _loss("ctcvr") == pytest.approx(_bce(CONVERTED), rel=1e-6)


def test_conversion_weight_counts_conversions_that_many_times():
    weights = [1, 1, 1, 3, 1, 1]
    expected = _bce(CLICKED, weights)
    assert _loss("ctr", conversion_weight=3.0) == pytest.approx(expected, rel=1e-6)
    # The same as three copies of the row in the batch.
    labels = {"grade": tf.concat([GRADE, [2, 2]], axis=0)}
    predictions = {"logits": tf.concat([LOGITS, [1.5, 1.5]], axis=0)}
    found = float(Task("ctr", LossConfig(name="bce"))(labels, predictions))
    assert found == pytest.approx(expected, rel=1e-6)


def test_pwiser_is_added_with_its_weight_and_margins():
    term = float(losses.pwiser(tf.sigmoid(LOGITS), GRADE, 0.2, 0.4))
    assert term > 0
    config = {"pwiser_weight": 0.7, "margin_click": 0.2, "margin_nonclick": 0.4}
    found = _loss("ctcvr", name="pwiser", **config)
    assert found == pytest.approx(_bce(CONVERTED) + 0.7 * term, rel=1e-6)


def test_pwiser_in_logits():
    term = float(losses.pwiser(LOGITS, GRADE, 2.0, 3.0))
    assert term > 0
    found = _loss("ctr", name="pwiser", margin_click=2.0, margin_nonclick=3.0, score_space="logit")
    assert found == pytest.approx(_bce(CLICKED) + 0.1 * term, rel=1e-6)


def test_pwiser_as_the_paper_prints_it():
    grade = tf.constant([0, 0, 1, 2, 2, 1], tf.int64)

    def term(normalization):
        config = LossConfig(normalization=normalization)
        return float(Task("ctr", config)({"grade": grade}, {"logits": LOGITS})) - _bce(grade > 0)

    # Each sum has two conversions per lower-graded row.
    assert term("pairs") > 0.01
    assert term("negatives") == pytest.approx(2 * term("pairs"), rel=1e-4)


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
def test_the_term_of_another_loss_is_added_with_its_weight(loss, term, task, positive):
    value = float(term(positive))
    assert value > 0
    found = _loss(task, name=loss, ranking_weight=0.7)
    assert found == pytest.approx(_bce(positive) + 0.7 * value, rel=1e-6)


def test_focal_replaces_bce():
    p = np.where(CLICKED, PROBABILITIES, 1 - PROBABILITIES)
    of_rows = -((1 - p) ** 1.5) * np.log(p)
    found = _loss("ctr", name="focal", focal_gamma=1.5)
    assert found == pytest.approx(np.mean(of_rows), rel=1e-6)
    found = _loss("ctr", name="focal", focal_gamma=1.5, conversion_weight=3.0)
    assert found == pytest.approx(np.average(of_rows, weights=[1, 1, 1, 3, 1, 1]), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "field", "value"),
    [
        ("bce", "name", "focal"),
        ("bce", "conversion_weight", 2.0),
        ("pwiser", "pwiser_weight", 0.3),
        ("pwiser", "margin_click", 0.3),
        ("pwiser", "margin_nonclick", 0.3),
        ("pwiser", "score_space", "logit"),
        ("pwiser", "loss_tasks", ("ctr",)),
        ("ranknet", "ranking_weight", 0.3),
        ("focal", "focal_gamma", 1.0),
    ],
)
def test_every_setting_changes_the_result(loss, field, value):
    settings = {"name": loss, "margin_click": 0.9, "margin_nonclick": 0.9}
    assert _loss("ctcvr", **settings) != pytest.approx(
        _loss("ctcvr", **{**settings, field: value}), rel=1e-3
    )


def test_every_setting_except_task_weights_is_tested():
    # The model applies the task weights and corrects clicks; tests of models cover them.
    tested = test_every_setting_changes_the_result.pytestmark[0].args[1]
    fields = {field.name for field in dataclasses.fields(LossConfig)}
    elsewhere = {"ctr_weight", "ctcvr_weight", "normalization", "click_noise_fields"}
    assert {field for _, field, _ in tested} == fields - elsewhere


def test_all_losses_differ():
    settings = {"margin_nonclick": 0.9, "ranking_weight": 0.5}
    found = {loss: _loss("ctr", name=loss, **settings) for loss in LOSSES}
    assert len({round(value, 4) for value in found.values()}) == len(LOSSES)


@pytest.mark.parametrize(
    ("loss", "weight"), [("pwiser", "pwiser_weight"), ("jrc", "ranking_weight")]
)
def test_a_weight_of_zero_is_bce(loss, weight):
    assert _loss("ctr", name=loss, **{weight: 0.0}) == _loss("ctr")


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_finite_with_finite_gradients_at_extreme_logits(loss):
    logits = tf.Variable([-1e4, 1e4, 1e4, -1e4, 0.0, 50.0])
    energy = tf.Variable([1e4, -1e4, 0.0, -1e4, 0.0, 1e4])
    task = Task("ctr", LossConfig(name=loss, pwiser_weight=1.0, ranking_weight=1.0))
    with tf.GradientTape() as tape:
        loss = task({"grade": GRADE, "group": GROUP}, {"logits": logits, "energy": energy})
    assert np.isfinite(loss)
    gradients = tape.gradient(loss, [logits, energy], unconnected_gradients="zero")
    assert np.isfinite(gradients).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_task_in_a_graph_of_unknown_batch_size(loss):
    task = Task("ctr", LossConfig(name=loss))

    @tf.function(input_signature=[tf.TensorSpec([None]), tf.TensorSpec([None], tf.int64)])
    def run(logits, grade):
        predictions = {"logits": logits, "energy": tf.zeros_like(logits)}
        return task(labels={"grade": grade, "group": grade}, predictions=predictions)

    labels = {"grade": GRADE, "group": GRADE}
    predictions = {"logits": LOGITS, "energy": tf.zeros_like(LOGITS)}
    expected = float(Task("ctr", LossConfig(name=loss))(labels, predictions))
    assert float(run(LOGITS, GRADE)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", [name for name, entry in LOSSES.items() if entry.needs_groups])
def test_a_group_loss_without_groups_is_refused(loss):
    with pytest.raises(ValueError, match=f"loss '{loss}' compares the rows of one group"):
        Task("ctr", LossConfig(name=loss))({"grade": GRADE}, {"logits": LOGITS, "energy": ENERGY})


@pytest.mark.parametrize("field", ["name", "score_space"])
def test_unknown_names_are_refused(field):
    with pytest.raises(DataError, match="=other: expected one of"):
        LossConfig(**{field: "other"})


def test_means_over_an_epoch_compare_runs_of_different_losses():
    found = {}
    for name in ("bce", "pwiser", "focal"):
        task = Task("ctr", LossConfig(name=name, conversion_weight=2.0, margin_click=0.5))
        for logits in (LOGITS, -LOGITS):
            task({"grade": GRADE}, {"logits": logits})
        found[name] = {metric.name: float(metric.result()) for metric in task.metrics}
    entropies = [
        tf.nn.sigmoid_cross_entropy_with_logits(CLICKED.astype(np.float32), x).numpy().mean()
        for x in (LOGITS, -LOGITS)
    ]
    for values in found.values():
        assert values["ctr_cross_entropy"] == pytest.approx(np.mean(entropies), rel=1e-6)
    terms = [
        float(losses.pwiser(tf.sigmoid(x), GRADE, margin_click=0.5)) for x in (LOGITS, -LOGITS)
    ]
    assert found["pwiser"]["ctr_ranking"] == pytest.approx(np.mean(terms), rel=1e-6)
    assert found["pwiser"]["ctr_loss"] == pytest.approx(
        found["bce"]["ctr_loss"] + 0.1 * np.mean(terms), rel=1e-5
    )
    assert set(found["bce"]) == {"ctr_loss", "ctr_cross_entropy"}
