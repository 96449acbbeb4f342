"""--score: parsing, values by arithmetic, the search, and the outputs of evaluate and export."""

import json
import math

import numpy as np
import pytest
import tensorflow as tf

from pwiser_tf import evaluation, export, metrics, report, runs, score
from pwiser_tf.errors import DataError
from pwiser_tf.schema import Schema
from pwiser_tf.score import Score


@pytest.mark.parametrize(
    ("text", "exponents"),
    [
        ("ctr", {"ctr": 1.0}),
        ("ctr^0.75*ctcvr^0.25", {"ctr": 0.75, "ctcvr": 0.25}),
        (" interest ^ 2 * cvr^-.5 ", {"interest": 2.0, "cvr": -0.5}),
        ("ctr^1e-1", {"ctr": 0.1}),
    ],
)
def test_parsing(text, exponents):
    assert Score.parse(text).exponents == exponents
    assert Score.parse(str(Score.parse(text))) == Score.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found ''"),
        ("ctr*", "found ''"),
        ("ctr+cvr", "found 'ctr+cvr', expected factors"),
        ("ctr**2", "found ''"),
        ("ctr^x", "found 'ctr^x'"),
        ("2*ctr", "unknown output 2"),
        ("gmv^2", "unknown output gmv; expected ctr, cvr, ctcvr, interest"),
        ("ctr*ctr^2", "ctr is there twice"),
        ("ctr^0", "exponent of ctr is 0"),
        ("ctr^1e9", "exponent of ctr is 1e+09"),
        ("ctr^nan", "found 'ctr^nan'"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(DataError) as caught:
        Score.parse(text)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"--score={text}")


def test_an_output_that_the_model_lacks_is_named():
    with pytest.raises(DataError, match=r"no output interest, only ctr, cvr, ctcvr"):
        Score.parse("ctr*interest").require({"ctr": 0, "cvr": 0, "ctcvr": 0})
    Score.parse("ctr").require(["ctr"])


def test_values_are_the_product_in_numpy_and_in_the_graph():
    outputs = {"ctr": np.float32([0.5, 0.04, 1.0]), "ctcvr": np.float32([0.25, 0.01, 1.0])}
    found = Score.parse("ctr^0.5*ctcvr^2").values(outputs)
    np.testing.assert_allclose(found, [0.5**0.5 / 16, 0.2e-4, 1], rtol=1e-6)
    assert found.dtype == np.float32
    in_graph = Score.parse("ctr^0.5*ctcvr^2").add_to(
        {k: tf.constant(v) for k, v in outputs.items()}
    )
    assert list(in_graph) == ["ctr", "ctcvr", "score"]
    np.testing.assert_allclose(in_graph["score"], found, rtol=1e-6)


def test_extreme_values_give_finite_scores_in_order():
    p = np.float32([0.0, 1e-38, 1e-20, 0.5, 1.0])
    for text, sign in (("ctr^0.3", 1), ("ctr^10", 1), ("ctr^-10", -1)):
        for values in (
            Score.parse(text).values({"ctr": p}),
            Score.parse(text).add_to({"ctr": tf.constant(p)})["score"].numpy(),
        ):
            assert np.isfinite(values).all()
            assert (values > 0).all()
            assert (sign * np.diff(values) >= 0).all()


def test_ranking_by_hand():
    grade = np.array([0, 1, 0, 2])
    found = score.ranking(grade, np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 0, 1, 1]))
    # Clicks (.2, .4) against (.1, .3): 3 of 4 pairs. In each group the clicked row is first.
    assert found["click_auc"] == 0.75
    assert found["click_gauc"] == 1
    assert found["conversion_auc"] == found["conversion_gauc"] == 1
    alone = score.ranking(np.array([0, 1]), np.array([0.1, 0.2]))
    assert alone == {
        "click_auc": 1.0,
        "click_gauc": None,
        "conversion_auc": None,
        "conversion_gauc": None,
    }


def test_the_search_takes_the_best_blend_for_conversions():
    # The conversion is first by ctr^.5*ctcvr^.5 alone: ctr ranks it third, ctcvr second.
    grade = np.array([2, 1, 0, 1])
    predictions = {
        "ctr": np.array([0.4, 0.9, 0.5, 0.1]),
        "ctcvr": np.array([0.05, 0.01, 0.03, 0.06]),
    }
    best, tried = score.search(grade, predictions)
    products = {w: predictions["ctr"] ** (1 - w) * predictions["ctcvr"] ** w for w in score.WEIGHTS}
    expected = {w: metrics.auc(grade == 2, values) for w, values in products.items()}
    assert {entry["weight"]: entry["conversion_auc"] for entry in tried} == expected
    assert max(expected.values()) > max(expected[0.0], expected[1.0])
    assert metrics.auc(grade == 2, best.values(predictions)) == max(expected.values())
    for bad, message in (
        ({"ctr": predictions["ctr"]}, "no conversions"),
        (predictions, "with and without a conversion"),
    ):
        with pytest.raises(DataError, match=message):
            score.search(np.minimum(grade, 1), bad)


def test_the_table_names_the_choice():
    ranked = dict.fromkeys(("click_auc", "click_gauc", "conversion_auc", "conversion_gauc"), 0.5)
    tried = [{"weight": w, "click_auc": 0.6, "conversion_auc": 0.7} for w in score.WEIGHTS]
    measured = {
        "formula": "ctr^0.5*ctcvr^0.5",
        **ranked,
        "outputs": {"ctr": ranked},
        "search": tried,
    }
    lines = report.score_table({"a": measured}).split("\n")
    assert "on the validation split; best for conversions: ctr^0.5*ctcvr^0.5" in lines[0]
    assert [line.split()[0] for line in lines[2:8]] == ["0", "0.1", "0.25", "0.5", "0.75", "1"]
    assert lines[-2].split() == ["ctr^0.5*ctcvr^0.5", *["0.5000"] * 4]
    assert "of b" in report.score_table({"a": measured, "b": measured})


def test_the_command_measures_a_score_and_searches_one(command, trained, dataset, tmp_path):
    def run(text, split="test"):
        return command(
            "evaluate",
            f"--workdir={trained}",
            f"--output_dir={tmp_path / 'out'}",
            f"--score={text}",
            f"--split={split}",
        )

    result = run("ctr^0.75*ctcvr^0.25")
    assert result.returncode == 0, result.stderr
    model, _, _ = runs.load_run(trained)
    predictions, grade, group = evaluation.predict(model, dataset, Schema.load(dataset), "test")
    product = predictions["ctr"] ** 0.75 * predictions["ctcvr"] ** 0.25
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["test"]["score"]
    assert found["formula"] == "ctr^0.75*ctcvr^0.25"
    assert found["conversion_auc"] == pytest.approx(metrics.auc(grade == 2, product), abs=1e-4)
    assert found["click_gauc"] == pytest.approx(
        metrics.gauc(grade >= 1, product, group)[0], abs=1e-3
    )
    assert f"{found['conversion_auc']:.4f}" in result.stdout

    result = run("search")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["test"]["score"]
    predictions, grade, _ = evaluation.predict(model, dataset, Schema.load(dataset), "validation")
    assert found["search"] == score.search(grade, predictions)[1]
    assert "on the validation split" in result.stdout

    for text, message in (
        ("ctr*interest", "the model has no output interest, only ctr, cvr, ctcvr"),
        ("ctr^", "found 'ctr^', expected factors"),
    ):
        result = run(text)
        assert result.returncode == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


def test_the_exported_graph_has_the_score(command, trained, tmp_path):
    result = command(
        "export", f"--workdir={trained}", f"--export_dir={tmp_path}", "--score=ctr^.75*ctcvr^.25"
    )
    assert result.returncode == 0, result.stderr
    loaded = tf.saved_model.load(str(tmp_path / "pwiser" / "1"))
    for name in ("serving_default", "predict_raw", "predict"):
        assert set(loaded.signatures[name].structured_outputs) == {"ctr", "cvr", "ctcvr", "score"}
    found = loaded.signatures["predict"](
        categorical=np.int64([[1, 2, 0], [3, 0, 1]]), numerical=np.float32([[0.5, 1], [-1, 0]])
    )
    found = {name: value.numpy() for name, value in found.items()}
    np.testing.assert_allclose(
        found["score"], found["ctr"] ** 0.75 * found["ctcvr"] ** 0.25, rtol=1e-5
    )
    result = command(
        "export", f"--workdir={trained}", f"--export_dir={tmp_path}", "--score=interest"
    )
    assert result.returncode == 2
    assert "no output interest" in result.stderr
    assert [path.name for path in (tmp_path / "pwiser").iterdir()] == ["1"]


def test_without_a_score_there_is_none(trained, tmp_path):
    exported = export.export(trained, tmp_path, "m")
    outputs = tf.saved_model.load(str(exported)).signatures["predict"].structured_outputs
    assert "score" not in outputs


def test_training_refuses_a_score_before_it_begins(command, dataset, tmp_path):
    for arguments, message in (
        (["--score=ctr"], "only read with --export_dir"),
        (["--score=gmv", f"--export_dir={tmp_path / 'models'}"], "unknown output gmv"),
    ):
        result = command(
            "train", f"--data_dir={dataset}", f"--workdir={tmp_path / 'run'}", *arguments
        )
        assert result.returncode == 2
        assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_weight_of_0_or_1_is_one_output():
    assert str(Score.blend(0.0)) == "ctr"
    assert str(Score.blend(1.0)) == "ctcvr"
    assert str(Score.blend(0.25)) == "ctr^0.75*ctcvr^0.25"
    assert math.isclose(sum(Score.blend(0.1).exponents.values()), 1)
