"""study/worlds.py on tiny worlds: each protocol end to end, what seeds share, and the table."""

import json
import math

import numpy as np
import pytest

from pwiser_tf import metrics
from pwiser_tf.study import paired, worlds, worlds_report

ROWS = 8000


@pytest.fixture(scope="module")
def data():
    return worlds.draw("slot", 1, ROWS)


@pytest.fixture(scope="module", params=worlds.PROTOCOLS)
def study(request, tmp_path_factory):
    """A tiny study of each protocol: (protocol, what it found, its folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    one_pass = request.param == "one_pass"
    settings = worlds.Settings(request.param, ROWS, 1 if one_pass else 2, 0 if one_pass else 1)
    grid = (0.01, 0.02) if one_pass else (0.01,)
    found = worlds.study(settings, ["clean", "slot"], 2, grid, 1, folder)
    worlds_report.write({**found, "command": "none"}, folder)
    return request.param, found, folder


def test_a_study_has_every_row_of_every_world(study):
    protocol, found, folder = study
    assert set(found["worlds"]) == {"clean", "slot"}
    reruns = {f"bce, rerun {k}" for k in range(1, worlds.RERUNS + 1)}
    expected = (
        {"bce", *worlds.PWISER, *reruns}
        if protocol == "paper"
        else {*worlds.LOSSES, *worlds.BLENDS, "planted"}
    )
    for jobs in found["worlds"].values():
        assert len(jobs) == 2
        for job in jobs:
            assert set(job) == expected
            assert all(math.isfinite(row["interest_auc"]) for row in job.values())
    text = (folder / "table.md").read_text()
    assert all(f"| {name} |" in text for name in expected)
    assert (folder / "differences.png").stat().st_size > 0


def test_a_rate_is_searched_for_each_loss(study):
    protocol, found, _ = study
    if protocol != "one_pass":
        return
    assert set(found["rates"]) == set(worlds.LOSSES)
    for name in found["tuning"][0]:
        mean = np.mean([tuned[name] for tuned in found["tuning"]], axis=0)
        assert found["rates"][name] == (0.01, 0.02)[int(np.argmax(mean))]


def test_holm_is_over_all_comparisons_of_the_table(study):
    _, _, folder = study
    content = json.loads((folder / "results.json").read_text())["comparisons"]
    assert [e["holm"] for e in content] == paired.holm([e["p"] for e in content])


def test_a_finished_study_is_not_repeated_and_other_settings_are_refused(study, monkeypatch):
    _, found, folder = study
    names = ("protocol", "rows", "epochs", "patience")
    settings = worlds.Settings(**{name: found["settings"][name] for name in names})
    grid = tuple(found["settings"]["grid"])
    monkeypatch.setattr(worlds, "draw", lambda *_: pytest.fail("trained again"))
    again = worlds.study(settings, ["clean", "slot"], 2, grid, 1, folder)
    assert again["worlds"] == found["worlds"]
    with pytest.raises(worlds.DataError, match="other settings"):
        worlds.study(settings, ["clean"], 2, (0.5,), 1, folder)


def test_a_seed_draws_the_same_world_rows_and_first_weights(data):
    again, other = worlds.draw("slot", 1, ROWS), worlds.draw("slot", 2, ROWS)
    assert (again.train.grade == data.train.grade).all()
    assert (other.train.grade != data.train.grade).any()
    assert [len(rows) for rows in data.splits] == [ROWS, ROWS // 4, ROWS // 2]
    first, second = (worlds.first_weights(data.schema, seed) for seed in (1, 1))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_training_again_after_another_seed_gives_the_same(data):
    settings = worlds.Settings("one_pass", ROWS, 1, 0)
    outputs = []
    for seed in (1, 2, 1):
        weights = worlds.first_weights(data.schema, seed)
        outputs.append(worlds.train("pwiser", data, settings, weights, 0.01, seed).test["ctr"])
    assert (outputs[0] == outputs[2]).all()
    assert (outputs[0] != outputs[1]).any()


def test_without_evidence_the_correction_is_cross_entropy(study):
    protocol, found, _ = study
    if protocol == "paper":
        return
    for job in found["worlds"]["clean"]:
        if not any(job[worlds.FORWARD]["guards"]):
            assert job[worlds.FORWARD]["interest_auc"] == job["bce"]["interest_auc"]


def test_the_guard_can_be_switched_off():
    hetero = worlds.draw("hetero", 1, 60_000)
    guarded, unguarded = (worlds.corrected(hetero, on)[1] for on in (True, False))
    for field, free in zip(guarded.fields, unguarded.fields, strict=True):
        assert free.guard in (0.0, 1.0)
        if field.has_evidence:
            assert free.guard == 1
            assert free.quality.min() < 1


def test_a_blend_by_hand():
    outputs = {"ctr": np.array([0.1, 0.2]), "ctcvr": np.array([0.01, 0.02])}
    expected = [0.75 * math.log(0.1) + 0.25 * math.log(0.01),
                0.75 * math.log(0.2) + 0.25 * math.log(0.02)]  # fmt: skip
    assert worlds.blend(outputs, 0.25) == pytest.approx(expected)


def test_metrics_are_those_of_the_planted_truth(data):
    truth = data.test.truth
    outputs = {"ctr": truth["ctr"], "ctcvr": truth["ctcvr"], "interest": truth["interest"]}
    found = worlds.measure(data.test, outputs)
    assert found["interest_auc"] == metrics.expected_auc(truth["interest"], truth["interest"])
    assert found["interest_auc"] > worlds.measure(data.test, outputs, truth["ctr"])["interest_auc"]
    searches = truth["interest"].reshape(-1, 10)
    assert found["top1_interest"] == pytest.approx(searches.max(axis=1).mean())


def test_pcoc_by_hand_before_and_after_platt(data):
    validation, test = (
        {task: (2 * rows.truth[task]).clip(0, 0.99).astype(np.float32) for task in ("ctr", "ctcvr")}
        for rows in (data.validation, data.test)
    )
    found = worlds.calibrated(data, worlds.Trained(validation, test, 0.0, 1))
    assert found["ctr_pcoc"] == pytest.approx(2, abs=0.05)
    assert found["ctr_pcoc_platt"] == pytest.approx(1, abs=0.25)


def test_differences_by_hand():
    jobs = [
        {
            "bce": {"ctr_auc": 0.7, "top1_interest": 0.1},
            "x": {"ctr_auc": value, "top1_interest": 0.11},
        }
        for value in (0.71, 0.72)
    ]
    found = worlds_report.compare(jobs, "x", "ctr_auc")
    assert found["mean"] == pytest.approx(150)
    # t with one degree of freedom: 12.706 standard errors of 50.
    assert found["high"] - found["mean"] == pytest.approx(12.706 * 50, rel=1e-3)
    assert worlds_report.compare(jobs, "x", "top1_interest")["mean"] == pytest.approx(10)


def test_the_best_of_reruns_by_hand():
    names = [*worlds.PWISER, *(f"bce, rerun {k}" for k in range(1, worlds.RERUNS + 1))]
    job = {name: {"ctr_drawn": 0.6, "ctcvr_drawn": 0.6} for name in names}
    job["bce"] = {"ctr_drawn": 0.65, "ctcvr_drawn": 0.65}
    job["bce, rerun 2"] = {"ctr_drawn": 0.66, "ctcvr_drawn": 0.67}
    job["pwiser"] = {"ctr_drawn": 0.655, "ctcvr_drawn": 0.6}
    found = worlds_report.paper({"clean": [job]})
    assert (found["cells"], found["pwiser"], found["reruns"]) == (2, 1, 2)
    assert found["reruns_gain"] == pytest.approx(150)
