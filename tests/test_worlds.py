import functools
import json

import numpy as np
import pandas as pd
import pytest

from pwiser_tf import records
from pwiser_tf.convert.features import read
from pwiser_tf.schema import Schema
from pwiser_tf.synthetic.truth import sigmoid
from pwiser_tf.synthetic.worlds import DEVICES, SLOTS, WORLDS, World, make_world

QUIET = ("clean", "hetero")


@functools.cache
def draw(name: str, searches: int = 20_000, **options):
    """The log and the truth of so many searches of a world, as tables; and the world."""
    world = World.draw(name, 1, **options)
    drawn = world.sample(np.random.default_rng(5), np.arange(searches))
    return pd.DataFrame(drawn.log), pd.DataFrame(drawn.truth), world


def within(count, total, rate):
    """Whether a count of `total` draws is within four standard deviations, and a little for the
    intercepts, which are themselves set on a sample."""
    return abs(count / total - rate) < 4 * np.sqrt(rate * (1 - rate) / total) + 0.03 * rate


@pytest.mark.parametrize("name", WORLDS)
def test_rates_are_as_asked(name):
    _, truth, _ = draw(name, ctr=0.08, cvr=0.15, accidental_clicks=0.4)
    clicks = truth.click.sum()
    assert within(clicks, len(truth), 0.08)
    assert within(truth.conversion.sum(), clicks, 0.15)
    accidental = (truth.click - truth.genuine).sum()
    assert accidental == 0 if name in QUIET else within(accidental, clicks, 0.4)
    # Labels are nested: a conversion is a genuine click, and a genuine click is a click.
    assert (truth.conversion <= truth.genuine).all()
    assert (truth.genuine <= truth.click).all()
    assert ((truth.ctcvr <= truth.interest) & (truth.interest <= truth.ctr)).all()


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("slots", ["random", "chosen"])
def test_planted_probabilities_are_those_of_the_labels(name, slots):
    log, truth, _ = draw(name, slots=slots)
    cells = [log.slot, log["style"], pd.qcut(truth.interest, 10)]
    for probability, label in (("interest", "genuine"), ("ctr", "click"), ("ctcvr", "conversion")):
        for cell in cells:
            by_cell = truth.groupby(cell, observed=True)
            expected, found = by_cell[probability].sum(), by_cell[label].sum()
            assert (abs(found - expected) < 4.5 * np.sqrt(expected + 1)).all()


def spread_of_accidents(name: str, by) -> np.ndarray:
    """The logarithm of P(accident | no genuine click), averaged by a column of the log."""
    log, truth, _ = draw(name)
    accident = (truth.ctr - truth.interest) / (1 - truth.interest)
    return np.log(accident).groupby([log[column] for column in by]).mean().to_numpy()


def test_accidents_depend_on_what_the_world_says():
    place, item, style = ["slot", "device"], ["item"], ["style"]
    for name, varied, constant in (
        ("uniform", [], [place, item, style]),
        ("slot", [place], []),
        ("bait", [item, style], []),
        ("style", [style], []),
        ("mixed", [place, item], []),
    ):
        for by in varied:
            assert spread_of_accidents(name, by).std() > 0.3, (name, by)
        for by in constant:
            assert spread_of_accidents(name, by).std() < 1e-9, (name, by)


def test_accidental_share_by_slot_is_as_planted():
    log, truth, world = draw("slot")
    # Its standard deviation is that of the world, in logits.
    assert world.places[2].std() == pytest.approx(1.2)
    place = log.slot * DEVICES + log.device
    expected = sigmoid(world.places[2] + world.levels[2]).reshape(-1)
    no_genuine = 1 - truth.genuine
    accidents = (truth.click - truth.genuine).groupby(place).sum()
    chances = no_genuine.groupby(place).sum()
    assert len(chances) == SLOTS * DEVICES
    deviation = np.sqrt(chances * expected * (1 - expected))
    assert (abs(accidents - chances * expected) < 4.5 * deviation).all()
    # The style world's accidents do not depend on the place.
    assert not draw("style", 10)[2].places[2].any()


def test_in_hetero_only_conversions_per_click_depend_on_the_place():
    places = draw("hetero", 10)[2].places
    assert places[1].std() == pytest.approx(0.5)
    assert not places[2].any()
    assert not draw("clean", 10)[2].places[1:].any()


def test_chosen_slots_go_to_better_items():
    for slots in ("random", "chosen"):
        log, truth, world = draw("uniform", slots=slots)
        # Without what the slot itself adds.
        utility = np.log(truth.interest / (1 - truth.interest))
        utility -= world.places[0][log.slot, log.device]
        # Between rows of a search.
        by_search = utility.groupby(log.search)
        within_search = (utility - by_search.transform("mean")).groupby(log.slot).mean()
        share = np.bincount(log.slot) / len(log)
        np.testing.assert_allclose(share, 1 / SLOTS, atol=0.004)
        if slots == "random":
            assert abs(within_search).max() < 0.05
        else:
            assert (np.diff(within_search) < -0.05).all()


def test_fields(tmp_path):
    log, truth, _ = draw("bait", 3000, items=50)
    assert set(log["item"]) == set(range(50))
    of_search = ["user_segment", "user_city", "device", *(f"user_number_{i}" for i in (1, 2, 3))]
    of_item = ["category", "style", *(f"item_number_{i}" for i in (1, 2, 3))]
    assert (log.groupby("search")[of_search].nunique() == 1).all(axis=None)
    assert (log.groupby("item")[of_item].nunique() == 1).all(axis=None)
    assert (log.groupby("search").size() == 10).all()
    assert not {"genuine", "interest", "ctr", "ctcvr"} & set(log)
    assert list(truth.search) == list(log.search)


def test_files(tmp_path):
    made = make_world(tmp_path, "mixed", rows=3005, seed=3, test_fraction=0.3)
    assert made["rows"] == 3005
    tables = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in ("train", "test")}
    truths = {name: pd.read_parquet(tmp_path / f"truth-{name}.parquet") for name in tables}
    assert {name: len(table) for name, table in tables.items()} == {"train": 2103, "test": 902}
    for name, table in tables.items():
        for column in ("search", "click", "conversion"):
            np.testing.assert_array_equal(table[column], truths[name][column])
    assert made["clicks"] == sum(table.click.sum() for table in tables.values())
    assert tables["train"].search.max() < tables["test"].search.min()
    # Time goes on through train and test.
    days = pd.concat([tables["train"].day, tables["test"].day])
    assert days.is_monotonic_increasing
    assert (days.min(), days.max()) == (0, 19)
    # The feature file names every column but labels, group and time.
    named = read(tmp_path / "log.toml")
    assert (named.click, named.conversion, named.group, named.time) == (
        *("click", "conversion", "search"),
        "day",
    )
    features = {feature.name for feature in named.features}
    assert features == set(tables["train"]) - {"click", "conversion", "search", "day"}


def test_chunks_and_seeds(tmp_path, monkeypatch):
    def made(folder: str, seed: int, rows: int = 500):
        (tmp_path / folder).mkdir()
        make_world(tmp_path / folder, "slot", rows=rows, seed=seed, items=100)
        return (tmp_path / folder / "train.csv").read_text()

    assert made("a", 1) == made("b", 1) != made("c", 2)
    monkeypatch.setattr("pwiser_tf.synthetic.worlds._CHUNK_SEARCHES", 7)
    made("d", 1)
    for split, rows in (("train", 400), ("test", 100)):
        truth = pd.read_parquet(tmp_path / "d" / f"truth-{split}.parquet")
        log = pd.read_csv(tmp_path / "d" / f"{split}.csv")
        assert len(log) == len(truth) == rows
        np.testing.assert_array_equal(log.click, truth.click)
        assert (np.diff(log.search) <= 1).all()


@pytest.mark.parametrize("split", ["auto", "group"])
def test_the_command_and_convert(command, tmp_path, split):
    world, data = tmp_path / "world", tmp_path / "data"
    done = command("sample", f"--output_dir={world}", "--world=slot", "--rows=4000", "--ctr=.2")
    assert done.returncode == 0, done.stderr
    assert "4,000 rows" in done.stdout
    assert "interest AUC of the planted probabilities on test" in done.stdout
    done = command(
        "convert",
        *(f"--features={world}/log.toml", f"--train={world}/train.csv"),
        *(f"--test={world}/test.csv", f"--output_dir={data}", f"--validation_split={split}"),
    )
    assert done.returncode == 0, done.stderr
    schema = Schema.load(data)
    truth = pd.concat(pd.read_parquet(world / f"truth-{s}.parquet") for s in ("train", "test"))
    clicks = sum(split.clicks for split in schema.splits.values())
    assert sum(split.rows for split in schema.splits.values()) == len(truth)
    assert clicks == truth.click.sum()
    assert set(schema.splits) == {"train", "validation", "test"}
    assert json.loads((data / "schema.json").read_text())["group"] == "search"
    for shard in schema.split("validation").shards:
        assert sum(1 for _ in records.read(data / shard.file)) == shard.rows


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--world=slot", "--layout=raw"], "--layout says nothing with --world=slot"),
        (["--items=5"], "--items says nothing without --world"),
        (["--slots=chosen"], "--slots says nothing without --world"),
        (["--world=clean", "--accidental_clicks=.2"], "--accidental_clicks says nothing with"),
        (["--world=slot", "--cvr=.5"], "--cvr must be below 1 - --accidental_clicks"),
        (["--world=slot", "--ctr=0"], "--ctr: found 0.0, expected between 0 and 1"),
        (["--world=other"], "--world"),
    ],
)
def test_flags_that_say_nothing_are_refused(command, tmp_path, flags, message):
    done = command("sample", f"--output_dir={tmp_path / 'out'}", *flags)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
