import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from pwiser_tf import data, metrics, planted, report
from pwiser_tf.errors import DataError
from pwiser_tf.planted import Truth, measure
from pwiser_tf.schema import Schema
from pwiser_tf.synthetic.worlds import make_world

# A log whose features hold the planted probabilities, so that a record says which row it was.
FEATURES = """
[labels]
click = "click"
conversion = "conversion"
[columns]
group = "search"
time = "day"
[features.interest]
type = "numerical"
transform = "identity"
[features.ctcvr]
type = "numerical"
transform = "identity"
"""


@pytest.fixture
def world(tmp_path):
    """A folder with a log in no order, its groups being texts, and its truth."""
    make_world(tmp_path, "mixed", rows=3000, ctr=0.3, cvr=0.2, items=50)
    for split in ("train", "test"):
        log = pd.read_csv(tmp_path / f"{split}.csv")
        truth = pd.read_parquet(tmp_path / f"truth-{split}.parquet")
        log["interest"], log["ctcvr"] = truth.interest, truth.ctcvr
        order = np.random.default_rng(1).permutation(len(log))
        for table in (log, truth):
            table["search"] = "s-" + table.search.astype(str)
        log.iloc[order].to_csv(tmp_path / f"{split}.csv", index=False)
        truth.iloc[order].to_parquet(tmp_path / f"truth-{split}.parquet")
    (tmp_path / "log.toml").write_text(FEATURES)
    return tmp_path


def converted(command, world, *flags):
    done = command(
        "convert",
        *(f"--features={world}/log.toml", f"--train={world}/train.csv"),
        *(f"--test={world}/test.csv", f"--output_dir={world}/data", *flags),
    )
    assert done.returncode == 0, done.stderr
    return Schema.load(world / "data")


def read_split(world, schema, split):
    """The features, grades and groups of a split's records, in their order."""
    rows = schema.split(split).rows
    ((features, grade),) = data.batches(world / "data", schema, split, rows)
    return features["numerical"].numpy(), grade.numpy(), features["group"].numpy()


@pytest.mark.parametrize("rule", ["time", "group"])
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_the_truth_finds_the_rows_of_the_records(command, world, rule, kind):
    schema = converted(command, world, f"--validation_split={rule}")
    for split in ("train", "validation", "test"):
        path = world / f"truth-{'test' if split == 'test' else 'train'}.parquet"
        if kind == "csv":
            table = pd.read_parquet(path).astype({"genuine": bool})
            path = path.with_suffix(".csv")
            table.to_csv(path, index=False)
        numerical, grade, group = read_split(world, schema, split)
        found = Truth.read(path, schema).of_records(group, grade, split)
        for name, values, feature in zip(
            ("interest", "ctcvr"), numerical.T, schema.value_features, strict=True
        ):
            # Records hold float32, in the range of training.
            expected = np.clip(found[name], feature.low, feature.high)
            np.testing.assert_allclose(values, expected, rtol=1e-5)
        np.testing.assert_array_equal(found["click"], grade >= 1)
        assert 0 < found["genuine"].mean() < found["click"].mean()


def refused(truth: pd.DataFrame, world, command, split="test", *flags) -> str:
    """The message with which a truth file is refused."""
    path = world / "data" / "schema.json"
    schema = Schema.load(path.parent) if path.exists() else converted(command, world, *flags)
    truth.to_parquet(world / "wrong.parquet")
    _, grade, group = read_split(world, schema, split)
    with pytest.raises(DataError) as error:
        Truth.read(world / "wrong.parquet", schema).of_records(group, grade, split)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mismatches_are_refused(command, world):
    truth = pd.read_parquet(world / "truth-test.parquet")
    other = pd.read_parquet(world / "truth-train.parquet")
    message = refused(other, world, command)
    assert "no rows of 60 of the 60 groups of the test split" in message
    message = refused(truth.iloc[1:], world, command)
    assert f"found 9 rows of search {truth.search.iloc[0]}, expected 10 as in the test" in message
    assert "(1 of 60 groups differ)" in message
    message = refused(truth.assign(click=1 - truth.click), world, command)
    assert "column click: found" in message
    assert "(600 of 600 rows differ)" in message
    # Without the labels, a genuine click without a click is noticed.
    bare = truth.drop(columns=["click", "conversion"])
    message = refused(bare.assign(genuine=1), world, command)
    assert "column genuine: found 1, expected 0" in message.replace("1.0", "1")
    # An exchange of two rows of a group, one of them clicked.
    search = truth.groupby("search").click.nunique().idxmax()
    rows = truth.index[truth.search == search]
    label = truth.click[rows]
    exchanged = truth.rename(index={label.idxmax(): label.idxmin(), label.idxmin(): label.idxmax()})
    message = refused(exchanged.loc[truth.index], world, command)
    assert "(2 of 600 rows differ)" in message


def test_torn_groups_are_refused(command, world):
    truth = pd.read_parquet(world / "truth-train.parquet")
    message = refused(truth, world, command, "validation", "--validation_split=random")
    assert "groups must be whole" in message


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("interest", 1.5, "row 3, column interest: found 1.5, expected a probability"),
        ("ctr", None, "row 3, column ctr: found a missing value, expected a probability"),
        ("genuine", 0.5, "row 3, column genuine: found 0.5, expected 0 or 1"),
        ("search", None, "row 3, column search: found a missing value, expected a group"),
    ],
)
def test_cells_that_are_not_valid_are_refused(command, world, column, value, message):
    schema = converted(command, world)
    truth = pd.read_parquet(world / "truth-test.parquet").reset_index(drop=True)
    truth[column] = truth[column].astype(object if column == "search" else float)
    truth.loc[2, column] = value
    truth.to_parquet(world / "wrong.parquet")
    with pytest.raises(DataError, match=message):
        Truth.read(world / "wrong.parquet", schema)


def test_only_labels_are_optional(command, world):
    schema = converted(command, world)
    truth = pd.read_parquet(world / "truth-test.parquet")
    for column in truth:
        truth.drop(columns=column).to_parquet(world / "less.parquet")
        if column in ("genuine", "click", "conversion"):
            assert column not in Truth.read(world / "less.parquet", schema).columns
        else:
            with pytest.raises(DataError, match=f"column {column}: the file has no such column"):
                Truth.read(world / "less.parquet", schema)


GROUP = np.array([7, 7, 7, 3, 3])
TRUTH = {
    "interest": np.array([0.1, 0.4, 0.2, 0.3, 0.5]),
    "ctr": np.array([0.5, 0.4, 0.3, 0.6, 0.7]),
    "ctcvr": np.array([0.05, 0.1, 0.2, 0.3, 0.1]),
    "genuine": np.array([0.0, 1.0, 0.0, 0.0, 1.0]),
}


def test_measures_by_hand():
    ctr = np.array([0.6, 0.2, 0.6, 0.1, 0.9], np.float32)
    score = np.array([1.0, 2.0, 3.0, 8.0, 7.0])
    found = measure({"ctr": ctr, "cvr": ctr, "score": score}, TRUTH, GROUP)
    assert list(found) == ["ctr", "score", "best"]
    # ctr ranks rows 0 and 2 of group 7 first, and row 4 of group 3.
    assert found["ctr"]["top1_interest"] == pytest.approx(((0.1 + 0.2) / 2 + 0.5) / 2)
    assert found["ctr"]["top1_purchase"] == pytest.approx(((0.05 + 0.2) / 2 + 0.1) / 2)
    assert found["ctr"]["pcoc"] == pytest.approx(2.4 / 2.5)
    # Of the six pairs of a genuine click and another row, row 4 wins three and row 1 one.
    assert found["ctr"]["genuine_auc"] == pytest.approx(4 / 6)
    assert found["score"]["top1_interest"] == pytest.approx((0.2 + 0.3) / 2)
    # A score is no probability.
    assert found["score"]["pcoc"] is None
    assert found["best"]["top1_interest"] == pytest.approx((0.4 + 0.5) / 2)
    assert found["best"]["top1_purchase"] == pytest.approx((0.2 + 0.3) / 2)
    assert found["best"]["genuine_auc"] == 1
    assert found["best"]["ctr_auc"] == metrics.expected_auc(TRUTH["ctr"], TRUTH["ctr"])
    assert found["ctr"]["ctcvr_auc"] == metrics.expected_auc(TRUTH["ctcvr"], ctr)
    json.dumps(found, allow_nan=False)


def test_interest_is_measured_and_clicks_only_have_no_purchases():
    truth = {"interest": TRUTH["interest"], "ctr": TRUTH["ctr"]}
    found = measure({"ctr": TRUTH["ctr"], "interest": TRUTH["interest"] / 2}, truth, GROUP)
    assert found["interest"]["pcoc"] == 0.5
    assert found["interest"]["interest_auc"] == found["best"]["interest_auc"]
    for name in ("ctcvr_auc", "top1_purchase", "genuine_auc"):
        assert {measured[name] for measured in found.values()} == {None}


def test_the_table_of_one_and_of_several_runs():
    predictions = {"ctr": TRUTH["ctr"], "ctcvr": TRUTH["ctcvr"], "interest": TRUTH["interest"]}
    found = measure(predictions, TRUTH, GROUP)
    table = report.truth_table({"run": found}).splitlines()
    assert [line.split("  ")[0] for line in table[2:]] == [
        "ctr",
        "ctcvr",
        "interest",
        "best possible",
    ]
    assert table[2].split()[-1] == "1.000"
    assert table[4].split()[1] == f"{found['best']['interest_auc']:.4f}"
    assert table[4].split()[5] == "45.000"
    table = report.truth_table({"run" * 30: found, "b": found}).splitlines()
    assert [line.split()[0] for line in table[2:]] == [*predictions, *predictions, "best"]
    assert "ctr of b" in table[5]
    assert max(map(len, table)) <= report.TABLE_WIDTH


def test_the_data_need_a_group(dataset, tmp_path):
    schema = dataclasses.replace(Schema.load(dataset), group=None)
    with pytest.raises(DataError, match="--truth needs data with a group"):
        Truth.read(tmp_path / "truth.csv", schema)


def truth_of(dataset, path, split="test"):
    """Writes the truth of a data set that conftest made: the probabilities are of no meaning."""
    schema = Schema.load(dataset)
    rows = schema.split(split).rows
    ((features, grade),) = data.batches(dataset, schema, split, rows)
    random = np.random.default_rng(2)
    table = pd.DataFrame({
        "session": features["group"].numpy(),
        **{name: random.random(rows) / 2 for name in planted.TARGETS},
        schema.click: grade.numpy() >= 1,
    })  # fmt: skip
    table.to_csv(path, index=False)
    return table


def test_evaluate_measures_against_the_truth(command, trained, dataset, tmp_path):
    path, out = tmp_path / "truth.csv", tmp_path / "out"
    truth = truth_of(dataset, path)
    runs = f"--workdir={trained}"
    done = command("evaluate", runs, f"--output_dir={out}", f"--truth={path}")
    assert done.returncode == 0, done.stderr
    assert "Against the planted truth" in done.stdout
    written = json.loads((out / "metrics.json").read_text())["test"]
    assert list(written["truth"]) == ["ctr", "ctcvr", "best"]
    pcoc = written["truth"]["ctr"]["pcoc"]
    predicted = written["ctr"]["pcoc"] * written["ctr"]["positives"]
    assert pcoc == pytest.approx(predicted / truth.ctr.sum(), rel=1e-5)
    assert f"{pcoc:.3f}" in done.stdout
    # The other metrics are what they are without it.
    own = json.loads((trained / "metrics.json").read_text())["test"]
    assert {name: written[name] for name in own} == own
    truth_of(dataset, path, "validation")
    done = command("evaluate", runs, f"--output_dir={tmp_path / 'no'}", f"--truth={path}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "no").exists()
