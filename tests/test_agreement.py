"""What can be wrong in study/agreement.py without PyTorch, which only the command needs."""

import dataclasses

import numpy as np
import pytest
from absl import flags
from scipy import stats
from sklearn.metrics import roc_auc_score

from pwiser_tf import data, runs
from pwiser_tf.errors import DataError
from pwiser_tf.schema import Schema
from pwiser_tf.study import agreement
from pwiser_tf.study.agreement import OURS, Epoch


def test_welch_by_arithmetic():
    # Means 2 and 4; variances of the means 1/3 and 4/3, so the error is sqrt(5/3), and there are
    # (5/3)^2 / ((1/3)^2 / 2 + (4/3)^2 / 2) = 50/17 degrees of freedom.
    difference, low, high = agreement.welch([1, 2, 3], [2, 4, 6])
    reach = stats.t.ppf(0.975, 50 / 17) * np.sqrt(5 / 3)
    assert difference == -2
    assert (low, high) == pytest.approx((-2 - reach, -2 + reach))


def test_welch_without_variation():
    assert agreement.welch([0.75, 0.75], [0.5, 0.5]) == (0.25, 0.25, 0.25)


def _run(*epochs):
    """A run from (validation CTR, validation CTCVR, test CTR, test CTCVR) of each epoch."""
    return [
        Epoch({"ctr": a, "ctcvr": b, "served": b}, {"ctr": c, "ctcvr": d, "served": d})
        for a, b, c, d in epochs
    ]


def test_best_is_by_validation():
    # By validation .7, .75 and .6 on average; the test split prefers the others.
    run = _run((0.6, 0.8, 0.7, 0.9), (0.7, 0.8, 0.5, 0.5), (0.4, 0.8, 0.9, 0.9))
    assert agreement.best(run) is run[1]


@pytest.fixture
def programs():
    """Two runs of two epochs each; the best epoch is our second, their first."""
    return {
        OURS: [
            _run((0.6, 0.6, 0.60, 0.80), (0.7, 0.7, 0.62, 0.82)),
            _run((0.6, 0.6, 0.62, 0.82), (0.7, 0.7, 0.64, 0.84)),
        ],
        "near": [
            _run((0.7, 0.7, 0.61, 0.81), (0.6, 0.6, 0.5, 0.5)),
            _run((0.7, 0.7, 0.63, 0.85), (0.6, 0.6, 0.5, 0.5)),
        ],
        "far": [
            _run((0.7, 0.7, 0.630, 0.601), (0.6, 0.6, 0.5, 0.5)),
            _run((0.7, 0.7, 0.632, 0.602), (0.6, 0.6, 0.5, 0.5)),
        ],
    }


# Of two equal AUCs.
@pytest.mark.filterwarnings("ignore:Precision loss")
def test_table(programs):
    header, _, *rows = agreement.table(programs).split("\n")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert all(len(row) == header.count("|") - 1 for row in cells)
    assert [row[:2] for row in cells] == [
        [epoch, program] for epoch in ("1", "2", "best") for program in programs
    ]
    by_place = {(row[0], row[1]): row[2:] for row in cells}
    # Of .62 and .64: the mean .63, and .02 / sqrt(2) = .0141.
    assert by_place["best", OURS] == ["0.6300 (0.0141)", "", "0.8300 (0.0141)", ""]
    assert by_place["1", OURS][0] == "0.6100 (0.0141)"
    assert by_place["best", "near"][0] == "0.6200 (0.0141)"
    assert by_place["2", "near"][0] == "0.5000 (0.0000)"
    # Equal variances of two runs each: 2 degrees of freedom, t = 4.3027, error .0141.
    assert by_place["best", "near"][1] == "+0.0100 [-0.0508, +0.0708]"
    assert by_place["1", "near"][1] == "-0.0100 [-0.0708, +0.0508]"


def test_verdict(programs):
    near, far = agreement.verdict(programs).split("\n")
    # CTCVR decides how far it reaches: difference 0, variances of the means .0001 and .0004.
    low, high = agreement.welch([0.82, 0.84], [0.81, 0.85])[1:]
    assert low == pytest.approx(-high)
    assert near.startswith("near: no difference from ours beyond seed noise")
    assert near.endswith(f"rule out one beyond {high:.4f}")
    # CTR overlaps, CTCVR does not.
    assert far.startswith("far: ours differs in CTCVR by +0.2285 [+")
    assert "CTR by" not in far


def test_aucs_are_those_of_each_task(dataset):
    schema = Schema.load(dataset)
    (features, grade), *others = data.batches(dataset, schema, "test", 1000)
    assert not others

    def predictor(batch):
        click = 1 / (1 + np.exp(-batch["categorical"].numpy()[:, 0] / 4))
        return click, 1 / (1 + np.exp(-batch["numerical"].numpy()[:, 0]))

    click, conversion = predictor(features)
    found = agreement.aucs(predictor, dataset, schema, "test")
    converted = grade.numpy() == 2
    assert found["ctr"] == pytest.approx(roc_auc_score(grade.numpy() >= 1, click))
    assert found["ctcvr"] == pytest.approx(roc_auc_score(converted, conversion))
    assert found["served"] == pytest.approx(roc_auc_score(converted, np.minimum(click, conversion)))
    assert found["served"] != found["ctcvr"]


def test_our_predictor_reads_what_the_model_serves(settings):
    schema = Schema.load(settings.data_dir)
    mmoe = settings.replace(model="mmoe", loss="bce")
    model = runs.build_model(mmoe, schema)
    features, _ = next(iter(data.batches(settings.data_dir, schema, "test", 300)))
    # Else the second tower, which starts at a lower rate, might be below the first in every row.
    model._heads["conversion"]._columns[0].bias.assign_add([1.0])
    click, conversion = agreement.our_predictor(model)(features)
    served = model(features)
    assert (conversion > click).any()
    np.testing.assert_allclose(click, served["ctr"], rtol=1e-5)
    np.testing.assert_allclose(np.minimum(conversion, click), served["ctcvr"], rtol=1e-5)


def _flags(*arguments):
    values = flags.FlagValues()
    agreement.define_flags(values)
    values(["agreement", *arguments])
    return values


def test_settings(dataset):
    found = agreement.settings_of(_flags("--tower_units=8,4", "--epochs=7"), str(dataset))
    model = found.model
    assert (model.name, found.loss.name, model.conversion_head) == ("mmoe", "bce", "direct")
    assert (model.dropout, model.weight_decay, found.training.learning_rate) == (0.2, 1e-6, 1e-3)
    assert (model.tower_units, model.bottom_units) == ((8, 4), (128, 64))
    # Patience that no run of so many epochs can exhaust.
    assert (found.training.epochs, found.training.patience) == (7, 7)


def test_settings_that_train_refuses(dataset):
    with pytest.raises(DataError, match="tower_units"):
        agreement.settings_of(_flags("--tower_units=none"), str(dataset))


def test_data_that_cannot_be_compared(dataset):
    schema = Schema.load(dataset)
    agreement.check(dataset, schema)
    with pytest.raises(DataError, match="no numerical features"):
        agreement.check(dataset, dataclasses.replace(schema, numerical=()))
    test = dataclasses.replace(schema.splits["test"], conversions=0)
    without = dataclasses.replace(schema, splits={**schema.splits, "test": test})
    with pytest.raises(DataError, match="the test split holds no conversion"):
        agreement.check(dataset, without)
