import csv
import hashlib

import numpy as np
import pandas as pd
import pytest

from pwiser_tf import metrics
from pwiser_tf.convert import aliccp, aliexpress
from pwiser_tf.synthetic.command import make_sample
from pwiser_tf.synthetic.layouts import LAYOUTS
from pwiser_tf.synthetic.truth import Truth

NAMES = ["search_id", *aliexpress.CATEGORICAL, *aliexpress.NUMERICAL, "click", "conversion"]
SHAPE = LAYOUTS["processed"].shape


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A sample, its counts, and its two files as tables."""
    folder = tmp_path_factory.mktemp("sample")
    made = make_sample(folder, rows=60_000, accidental_clicks=0.4, ctr=0.1, cvr=0.2)
    tables = [pd.read_csv(folder / "AliExpress_XX" / f"{name}.csv") for name in ("train", "test")]
    return folder, made, *tables


def within(count, total, rate):
    """Whether a count of `total` draws is within four standard deviations, and a little for the
    intercepts, which are themselves set on a sample."""
    return abs(count / total - rate) < 4 * np.sqrt(rate * (1 - rate) / total) + 0.03 * rate


def test_layout(sample):
    _, _, train, test = sample
    for table in (train, test):
        assert list(table) == NAMES
        numbers = table[list(aliexpress.NUMERICAL)].to_numpy()
        assert numbers.min() == 0
        assert numbers.max() <= 1
        # Columns have different shares of zeros, from few to many.
        zeros = (numbers == 0).mean(axis=0)
        assert zeros.min() < 0.15
        assert zeros.max() > 0.75
        categories = table[list(aliexpress.CATEGORICAL)]
        assert (categories.dtypes == "int64").all()
        assert categories.min().min() == 0
    assert (len(train), len(test)) == (48_000, 12_000)


def test_rates(sample):
    _, made, train, test = sample
    both = pd.concat([train, test])
    clicks, conversions = both.click.sum(), both.conversion.sum()
    assert made["rows"] == len(both) == 60_000
    assert (made["clicks"], made["conversions"]) == (clicks, conversions)
    assert within(clicks, 60_000, 0.1)
    assert within(conversions, clicks, 0.2)
    assert within(made["accidental"], clicks, 0.4)
    assert not ((both.conversion == 1) & (both.click == 0)).any()


def test_searches(sample):
    _, _, train, test = sample
    # Train comes before test, and no search is in both.
    assert train.search_id.is_monotonic_increasing
    assert test.search_id.is_monotonic_increasing
    assert train.search_id.max() < test.search_id.min()
    assert 8 < len(train) / train.search_id.nunique() < 12
    # The user's features, 9 categories and 23 numbers, are the search's; the item's are not.
    user = [*aliexpress.CATEGORICAL[:9], *aliexpress.NUMERICAL[:23]]
    values = train.groupby("search_id")[list(aliexpress.CATEGORICAL + aliexpress.NUMERICAL)]
    varied = values.nunique().max()
    assert (varied[user] == 1).all()
    assert (varied.drop(user) > 1).all()


def test_categories_are_skewed_and_of_varied_sizes(sample):
    _, _, train, _ = sample
    sizes = train[list(aliexpress.CATEGORICAL)].nunique()
    assert sizes.min() < 10
    assert sizes.max() > 5000
    for name in aliexpress.CATEGORICAL:
        counts = train[name].value_counts()
        assert counts[0] > 1.8 * counts.mean()


def test_accidental_clicks_are_independent_of_utility_and_never_convert():
    truth = Truth.draw(seed=1, ctr=0.2, cvr=0.1, accidental_clicks=0.5, shape=SHAPE)
    rows = truth.sample(np.random.default_rng(0), np.arange(20_000))
    accidental, genuine = rows.accidental, rows.click & ~rows.accidental
    assert not (rows.conversion & accidental).any()
    # Among rows without a genuine click, an accidental click does not depend on the utility.
    others = ~genuine
    assert abs(metrics.auc(accidental[others], rows.click_utility[others]) - 0.5) < 0.02
    assert metrics.auc(genuine, rows.click_utility) > 0.65


def test_planted_probabilities_are_calibrated_and_the_best_there_is():
    truth = Truth.draw(seed=2, ctr=0.1, cvr=0.2, accidental_clicks=0.3, shape=SHAPE)
    rows = truth.sample(np.random.default_rng(0), np.arange(20_000))
    click, both = truth.probabilities(rows)
    assert (both < click).all()
    for labels, probabilities in ((rows.click, click), (rows.conversion, both)):
        # In tenths of the rows by probability, the rate is the mean probability.
        for part in np.array_split(np.argsort(probabilities), 10):
            expected = probabilities[part].mean()
            deviation = np.sqrt(expected * (1 - expected) / len(part))
            assert abs(labels[part].mean() - expected) < 4.5 * deviation


def test_more_accidental_clicks_make_clicks_harder_to_predict(tmp_path):
    ceilings = []
    for share in (0.0, 0.4, 0.8):
        folder = tmp_path / str(share)
        folder.mkdir()
        made = make_sample(
            folder, rows=20_000, accidental_clicks=share, ctr=0.1, cvr=0.1, test_fraction=0.9
        )
        assert (made["accidental"] > 0) == (share > 0)
        ceilings.append(made["ctr_auc"])
    assert ceilings[0] > ceilings[1] + 0.03 > ceilings[2] + 0.06


@pytest.mark.slow
def test_a_linear_model_learns_only_a_part_of_the_truth(sample):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import OneHotEncoder

    _, made, train, test = sample
    names = [n for n in aliexpress.CATEGORICAL if train[n].nunique() <= 100]
    encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(train[names])

    def inputs(table):
        return np.hstack([encoder.transform(table[names]), table[list(aliexpress.NUMERICAL)]])

    for label, floor in (("click", 0.6), ("conversion", 0.68)):
        model = LogisticRegression(C=0.1, max_iter=100).fit(inputs(train), train[label])
        found = metrics.auc(test[label].to_numpy(), model.predict_proba(inputs(test))[:, 1])
        ceiling = made["ctr_auc" if label == "click" else "ctcvr_auc"]
        assert floor < found < ceiling - 0.02


def digest(folder):
    return {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.csv"))}


def test_a_seed_fixes_every_byte(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name).mkdir()
        make_sample(tmp_path / name, rows=500, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert not set(digest(tmp_path / "a").values()) & set(digest(tmp_path / "c").values())


def test_rows_are_counted_exactly_across_chunks(tmp_path):
    # A chunk holds about 50,000 rows.
    make_sample(tmp_path, rows=120_001, test_fraction=0.25)
    lengths = {p.stem: p.read_bytes().count(b"\n") - 1 for p in tmp_path.rglob("*.csv")}
    assert lengths == {"train": 90_001, "test": 30_000}


def test_raw_layout(tmp_path):
    make_sample(tmp_path, rows=300, layout="raw")
    for split, count in (("train", 240), ("test", 60)):
        with open(tmp_path / "XX" / f"xx_item_{split}.csv") as file:
            items = list(csv.reader(file))
        with open(tmp_path / "XX" / f"xx_user_{split}.csv") as file:
            users = list(csv.reader(file))
        assert len(items) == count
        assert {len(row) for row in items} == {49}
        assert {len(row) for row in users} == {33}
        assert {row[0] for row in items} == {row[0] for row in users}
        assert len({row[0] for row in users}) == len(users)
        assert {row[48] for row in items} <= {"0", "1", "2"}


def feature_list(cell):
    """The features of a raw list, as (field, id, value)."""
    return [tuple(part.replace("\x03", "\x02").split("\x02")) for part in cell.split("\x01")]


def test_aliccp_raw_layout(tmp_path):
    counts = make_sample(tmp_path, rows=3000, ctr=0.3, cvr=0.3, layout="aliccp_raw")
    fields = set(aliccp.CATEGORIES)
    odd = clicks = conversions = 0
    for split, size in (("train", 2400), ("test", 600)):
        with open(tmp_path / f"sample_skeleton_{split}.csv") as file:
            skeleton = list(csv.reader(file))
        with open(tmp_path / f"common_features_{split}.csv") as file:
            common = list(csv.reader(file))
        assert (len(skeleton), {len(row) for row in skeleton}) == (size, {6})
        assert {len(row) for row in common} == {3}
        assert {row[3] for row in skeleton} == {row[0] for row in common}
        assert len({row[0] for row in common}) == len(common)
        for row in (*skeleton, *common):
            assert len(feature_list(row[-1])) == int(row[-2])
        own = [[feature[0] for feature in feature_list(row[-1])] for row in skeleton]
        shared = [[feature[0] for feature in feature_list(row[-1])] for row in common]
        # As in the real files: repeated, missing and overridden fields, histories at any position.
        assert {names.count("210") for names in own} == {1, 2, 3}
        assert {names.count("508") for names in own} == {0, 1}
        assert any("121" in names for names in own)
        assert {"124" in names for names in shared} == {True, False}
        assert {names[0] in aliccp.HISTORIES for names in shared} == {True, False}
        assert max(names.count("150_14") for names in shared) > 3
        assert {name for names in (*own, *shared) for name in names} == fields | {*aliccp.HISTORIES}
        click, conversion = np.array([row[1:3] for row in skeleton], int).T
        odd += int((conversion > click).sum())
        clicks, conversions = clicks + click.sum(), conversions + conversion.sum()
    # A conversion without a click: every 500th row, where it has no click.
    assert 0 < odd <= 7
    assert (counts["clicks"], counts["conversions"]) == (clicks, conversions - odd)


def test_aliccp_processed_layout(tmp_path):
    make_sample(tmp_path, rows=3000, layout="aliccp_processed")
    train = pd.read_csv(tmp_path / "ali_ccp_train.csv")
    assert list(train) == [
        *("click", "purchase", *aliccp.CATEGORIES[:9], *aliccp.ITEM_FIELDS, *aliccp.CROSS_FIELDS),
        *("301", *aliccp.HISTORIES, *(f"D{name}" for name in aliccp.HISTORIES), *aliccp.VALUES),
    ]
    # Where the cross field is absent so is its value.
    for name, field in aliccp.VALUES.items():
        assert ((train[name] == 0) == (train[field] == 0)).all()
        assert 0 < (train[name] == 0).mean() < 1


@pytest.mark.slow
def test_aliccp_can_be_learnt(tmp_path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import OneHotEncoder

    make_sample(
        tmp_path, rows=60_000, ctr=0.1, cvr=0.2, accidental_clicks=0.4, layout="aliccp_processed"
    )
    train, test = (pd.read_csv(tmp_path / f"ali_ccp_{split}.csv") for split in ("train", "test"))
    names = list(aliccp.CATEGORIES)
    encoder = OneHotEncoder(handle_unknown="ignore", min_frequency=10).fit(train[names])
    for label, floor in (("click", 0.55), ("purchase", 0.61)):
        model = LogisticRegression(C=0.1, max_iter=100)
        model.fit(encoder.transform(train[names]), train[label])
        found = model.predict_proba(encoder.transform(test[names]))[:, 1]
        assert metrics.auc(test[label].to_numpy(), found) > floor


def test_command(command, tmp_path):
    done = command(
        "sample", f"--output_dir={tmp_path / 'out'}", "--rows=2000", "--ctr=.2", "--cvr=.3"
    )
    assert done.returncode == 0, done.stderr
    assert "2,000 rows" in done.stdout
    assert "ctr AUC of the planted probabilities on test" in done.stdout
    assert (tmp_path / "out" / "AliExpress_XX" / "train.csv").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--ctr=0", "--ctr: found 0.0, expected between 0 and 1"),
        ("--accidental_clicks=1", "--accidental_clicks: found 1.0"),
        ("--cvr=.8", "--cvr must be below 1 - --accidental_clicks"),
        ("--rows=0", "--rows"),
    ],
)
def test_command_refuses_impossible_values(command, tmp_path, flag, message):
    done = command("sample", f"--output_dir={tmp_path / 'out'}", flag)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
