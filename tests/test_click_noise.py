"""Click noise: the estimate from counts, the corrected loss, and the outputs that follow."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf

from pwiser_tf import runs
from pwiser_tf.click_noise import ClickNoise, crossed, estimate
from pwiser_tf.config import Config
from pwiser_tf.errors import DataError
from pwiser_tf.evaluation import evaluate
from pwiser_tf.export import export
from pwiser_tf.layers import AccidentalClicks, observed_logits
from pwiser_tf.report import score_table
from pwiser_tf.synthetic.worlds import World, make_world
from pwiser_tf.training import estimate_click_noise, train
from tests.conftest import SCHEMA
from tests.test_convert import convert
from tests.test_models import CASES, FEATURES, GRADE, _shaken_model


def _rows(counts):
    """Rows of cells with (exposures without click, clicks without conversion, conversions)."""
    cells = np.repeat(np.arange(len(counts)), [sum(row) for row in counts])
    return cells[:, None], np.concatenate([np.repeat([0, 1, 2], row) for row in counts])


def _estimate(counts, others=None):
    cells, grade = _rows(counts)
    others = np.empty((len(grade), 0), int) if others is None else others
    return estimate(["slot"], cells, [len(counts)], others, grade)


# 1,000 genuine clicks per 10,000 exposures and 200 conversions; and 0, 250, 1,000, 2,000 accidents.
SLOTS = [(9_000 - k, 800 + k, 200) for k in (0, 250, 1_000, 2_000)]


def test_the_share_of_genuine_clicks_by_hand():
    noise = _estimate(SLOTS)
    (field,) = noise.fields
    clicks = np.array([1_000, 1_250, 2_000, 3_000])
    assert field.exposures.tolist() == [10_000] * 4
    assert field.clicks.tolist() == clicks.tolist()
    assert field.conversions.tolist() == [200] * 4
    expected = clicks * 800 / 7_250
    np.testing.assert_allclose(field.expected, expected)
    assert field.statistic == pytest.approx(np.sum((200 - expected) ** 2 / expected))
    assert field.bound == pytest.approx(3 + 3.1 * np.sqrt(np.sum(2 + 1 / expected)))
    spread = np.sum((200 - expected) ** 2 - expected) / np.sum(expected**2)
    ratio = (200 + 1 / spread) / (expected + 1 / spread)
    # The best cells with 20 % of the clicks are the first two.
    best = (1_000 * ratio[0] + 1_250 * ratio[1]) / 2_250
    # Conversions per exposure are equal, so that clicks explain all: the guard lets all through.
    assert field.guard == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(field.quality, np.minimum(1, ratio / best) ** field.guard)
    # What was planted, less the accidents of the second cell, which is one of the best.
    np.testing.assert_allclose(field.quality, [1, 0.8, 0.5, 1 / 3], atol=0.11)
    rate, q = clicks / 10_000, field.quality
    found = noise.accidental([np.arange(4)])
    np.testing.assert_allclose(found, rate * (1 - q) / (1 - rate * q), rtol=0.01)
    assert found[0] == 0


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        # Equal conversions per click.
        ([(9_000, 900, 100), (8_000, 1_800, 200), (7_000, 2_700, 300)], "no evidence"),
        # The cells with many clicks convert more: real interest.
        ([(9_000, 900, 50), (8_000, 1_700, 300), (7_000, 2_500, 500)], "guard b = 0"),
        # Real conversions differ, clicks do not follow them.
        (
            [(9_000, 900, 100), (8_000, 1_700, 300), (8_000, 1_950, 50), (9_000, 750, 250)],
            "guard b = 0",
        ),
        # Two cells say nothing about what goes with what.
        ([(9_000, 800, 200), (7_000, 2_800, 200)], "guard b = 0"),
        # Nothing at all.
        ([(10, 0, 0), (5, 0, 0)], "no evidence"),
        ([(0, 0, 0)], "no evidence"),
    ],
)
def test_nothing_is_corrected_without_reason(counts, verdict):
    noise = _estimate(counts)
    assert (noise.fields[0].quality == 1).all()
    assert (noise.accidental([np.arange(len(counts))]) == 0).all()
    shown = noise.table({"slot": [str(k) for k in range(len(counts))]})
    assert verdict in shown
    assert "nothing is corrected" in shown


def test_thousands_of_rare_cells_are_no_evidence():
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cells = rng.integers(5_000, size=(20_000, 1))
        grade = (rng.random(20_000) < 0.2) * (1 + (rng.random(20_000) < 0.02))
        noise = estimate(["page"], cells, [5_000], np.empty((20_000, 0), int), grade)
        found.append(noise.fields[0].has_evidence)
    assert sum(found) <= 1


def _chosen(seed):
    """Rows in which an item that converts little and is clicked much is mostly in slots 2 and 3;
    the slots do nothing. Slots, items, grades."""
    rng = np.random.default_rng(seed)
    n = 200_000
    item = rng.integers(2, size=n)
    slot = np.where(rng.random(n) < 0.8, 2 * item, 2 * (1 - item)) + rng.integers(2, size=n)
    click = rng.random(n) < np.where(item, 0.2, 0.05)
    converted = rng.random(n) < np.where(item, 0.02, 0.2)
    return slot[:, None], item[:, None], click + (click & converted).astype(int)


def test_items_that_choose_their_slots_do_not_fool_the_estimate():
    slot, item, grade = _chosen(0)
    (field,) = estimate(["slot"], slot, [4], item, grade).fields
    # From counts alone, slots 2 and 3 would hold mostly accidents.
    assert field.simple_quality[2:].max() < 0.5
    assert (field.quality == 1).all()
    (warning,) = estimate(["slot"], slot, [4], item, grade).warnings()
    assert "cells show different items" in warning
    rng = np.random.default_rng(1)
    assert not estimate(["slot"], rng.permutation(slot), [4], item, grade).warnings()


def test_accidents_are_found_among_items_that_choose_their_slots():
    slot, item, grade = _chosen(0)
    rng = np.random.default_rng(1)
    # Slots of the same kind: eight cells, every second with accidents.
    slot = slot + 4 * rng.integers(2, size=slot.shape)
    accident = rng.random(len(grade)) < 0.1 * (slot[:, 0] % 2)
    noise = estimate(["slot"], slot, [8], item, np.maximum(grade, accident))
    found = noise.accidental([np.arange(8)])
    assert found[1::2].min() > 0.05
    assert found[::2].max() < 0.02


def test_weights_stand_for_sampled_rows():
    cells, grade = _rows([(900, 80, 20), (700, 280, 20), (500, 480, 20)])
    kept = np.flatnonzero((grade >= 1) | (np.arange(len(grade)) % 2 == 0))
    others = cells % 2
    whole = estimate(["slot"], cells, [3], others, grade)
    sampled = estimate(
        ["slot"], cells[kept], [3], others[kept], grade[kept], np.where(grade[kept] >= 1, 1, 2)
    )
    np.testing.assert_allclose(sampled.fields[0].quality, whole.fields[0].quality)
    np.testing.assert_allclose(sampled.fields[0].exposures, whole.fields[0].exposures)


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        ([7], [[0]]),
        ([7, 3], [[0, 1]]),
        ([11, 7, 3], [[0], [1, 2]]),
        ([1000, 2, 2000], [[0], [1], [2]]),
        ([4, 4, 4], [[0, 1, 2]]),
    ],
)
def test_small_fields_are_crossed(sizes, fields):
    assert crossed(sizes) == fields


@pytest.mark.parametrize("world", ["slot", "hetero", "clean"])
def test_planted_accidents_are_found_and_nothing_else(world):
    found, corrected = [], 0
    for seed in range(4):
        drawn = World.draw(world, seed).sample(np.random.default_rng(seed), np.arange(20_000))
        log, truth = drawn.log, drawn.truth
        ids = np.stack([log["slot"], log["device"]], axis=1)
        others = np.stack([log["item"], log["category"]], axis=1)
        noise = estimate(["slot", "device"], ids, [6, 2], others, log["click"] + log["conversion"])
        accident = noise.accidental([2 * log["slot"] + log["device"]])
        planted = (truth["ctr"] - truth["interest"]) / (1 - truth["interest"])
        corrected += accident.any()
        if planted.any() and accident.any():
            found.append(np.corrcoef(accident, planted)[0, 1])
            assert 0.01 < accident.mean() < planted.mean()
    if world == "slot":
        assert corrected >= 3
        assert min(found) > 0.9
    else:
        assert corrected == 0


# ---- the model

SLOT_NOISE = dataclasses.replace(
    _estimate(SLOTS).fields[0],
    features=("page",),
    sizes=(7,),
    quality=np.array([1, 0.9, 0.5, 0.3, 1, 1, 0.2]),
    click_ratio=np.array([1, 1.1, 2, 4, 0.5, 1, 3]),
)
SHOP_NOISE = dataclasses.replace(
    SLOT_NOISE,
    features=("shop", "user city"),
    sizes=(4, 4),
    quality=np.linspace(0.2, 1, 16),
    click_ratio=np.linspace(2, 0.5, 16),
)
NOISE = ClickNoise(0.1, (SLOT_NOISE, SHOP_NOISE))


def _accidents():
    ids = FEATURES["categorical"].numpy()
    return NOISE.accidental([ids[:, 0], 4 * ids[:, 2] + ids[:, 1]])


def test_the_estimate_survives_json():
    again = ClickNoise.from_json(json.loads(json.dumps(NOISE.to_json())))
    np.testing.assert_array_equal(
        again.accidental([[0, 3], [5, 0]]), NOISE.accidental([[0, 3], [5, 0]])
    )
    assert again.fields[1].features == ("shop", "user city")
    assert again.fields[1].sizes == (4, 4)


def test_the_graph_computes_what_numpy_does():
    layer = AccidentalClicks(NOISE, SCHEMA)
    np.testing.assert_allclose(layer(FEATURES), _accidents(), rtol=1e-5)
    assert _accidents().max() > 0.1
    # Ids that no cell has count as unknown.
    odd = {"categorical": tf.constant([[99, -1, 4], [0, 0, 0]], tf.int64)}
    np.testing.assert_allclose(layer(odd), [NOISE.accidental([[0], [0]])[0]] * 2, rtol=1e-5)


def test_observed_logits_and_their_gradient():
    z = np.array([-3.0, 0.0, 2.0, -3.0, 1.0])
    a = np.array([0.2, 0.5, 0.01, 0.0, 0.0])
    genuine = 1 / (1 + np.exp(-z))
    click = genuine + (1 - genuine) * a
    x = tf.constant(z)
    with tf.GradientTape() as tape:
        tape.watch(x)
        observed = observed_logits(x, tf.constant(a))
    np.testing.assert_allclose(observed, np.log(click / (1 - click)))
    np.testing.assert_array_equal(observed[3:], z[3:])
    step = 1e-6
    moved = [observed_logits(tf.constant(z + d), tf.constant(a)).numpy() for d in (step, -step)]
    np.testing.assert_allclose(tape.gradient(observed, x), (moved[0] - moved[1]) / (2 * step), 1e-6)


@pytest.mark.parametrize("z", [-1e4, -100.0, 100.0, 1e4])
def test_observed_logits_far_out(z):
    x = tf.constant([z, z], tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        observed = observed_logits(x, tf.constant([0.0, 0.1]))
    gradient = tape.gradient(observed, x).numpy()
    assert np.isfinite(observed).all()
    assert gradient[0] == 1
    # Far below, all clicks are accidents.
    assert observed[1].numpy() == pytest.approx(
        np.log(0.1 / 0.9) if z < 0 else z - np.log(0.9), rel=1e-4
    )
    assert gradient[1] == pytest.approx(0 if z < 0 else 1, abs=1e-6)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_outputs_of_every_architecture(name, head):
    model = _shaken_model(name, head)
    interest = model(FEATURES)["ctr"].numpy()
    plain = {key: value.numpy() for key, value in model(FEATURES).items()}
    model.correct_clicks(NOISE)
    found = {key: value.numpy() for key, value in model(FEATURES).items()}
    accident = _accidents()
    np.testing.assert_allclose(found["interest"], interest, rtol=1e-6)
    np.testing.assert_allclose(found["ctr"], interest + (1 - interest) * accident, rtol=1e-5)
    np.testing.assert_allclose(found["ctcvr"], found["ctr"] * found["cvr"], rtol=1e-6)
    assert (found["ctcvr"] <= found["ctr"]).all()
    if head == "product":
        # Accidental clicks never convert.
        np.testing.assert_allclose(found["ctcvr"], plain["ctcvr"], rtol=1e-5)
    loss = model.compute_loss(({**FEATURES, "grade": GRADE}, GRADE), training=False)
    assert np.isfinite(loss)


@pytest.mark.parametrize("head", ["direct", "product"])
def test_the_losses_are_those_of_the_observed_probabilities(head):
    model = _shaken_model("shared_bottom", head, loss=Config.of(data_dir="d", loss="bce").loss)
    model.correct_clicks(NOISE)
    found = {key: value.numpy().astype(float) for key, value in model(FEATURES).items()}
    conversion = found["ctcvr"]
    if head == "direct":
        logits = model.tower_logits(FEATURES, False)["conversion"][:, 0].numpy()
        conversion = 1 / (1 + np.exp(-logits))
    expected = 0.0
    for label, p in ((GRADE.numpy() >= 1, found["ctr"]), (GRADE.numpy() == 2, conversion)):
        expected += 0.5 * np.mean(-np.log(np.where(label, p, 1 - p)))
    assert model.compute_loss((FEATURES, GRADE)).numpy() == pytest.approx(expected, rel=1e-5)


# ---- a run


def test_a_run_keeps_its_estimate(dataset, tmp_path, capsys):
    options = {"click_noise_fields": ("page", "shop"), "model": "shared_bottom", "epochs": 1}
    sizes = {"embedding_dim": 4, "bottom_units": (8,), "tower_units": (4,), "batch_size": 64}
    config = Config.of(data_dir=str(dataset), **options, **sizes)
    content = train(config, tmp_path / "run")
    assert "click noise by page x shop" in capsys.readouterr().out
    assert content["test"]["ctr"]["auc"] is not None
    model, again, schema = runs.load_run(tmp_path / "run")
    assert again == config
    noise = estimate_click_noise(dataset, schema, ("page", "shop"))
    assert noise.to_json() == runs.click_noise(tmp_path / "run", config).to_json()
    features = {"categorical": FEATURES["categorical"], "numerical": FEATURES["numerical"]}
    expected = model(features)
    assert set(expected) == {"ctr", "cvr", "ctcvr", "interest"}
    folder = export(tmp_path / "run", tmp_path / "models", "m")
    served = tf.saved_model.load(str(folder)).signatures["predict"](**features)
    for name in expected:
        np.testing.assert_allclose(served[name], expected[name], rtol=1e-5)
    (tmp_path / "run" / "click_noise.json").write_text("{}")
    with pytest.raises(DataError, match=r"click_noise\.json: not written by"):
        runs.load_run(tmp_path / "run")


def _world_run(folder, **kwargs) -> Config:
    """A converted world and the config of a small run on it."""
    make_world(folder, rows=30_000, ctr=0.2, cvr=0.2, **{"seed": 3, **kwargs})
    convert(
        folder / "data",
        "--format=columns",
        f"--features={folder / 'log.toml'}",
        f"--train={folder / 'train.csv'}",
        f"--test={folder / 'test.csv'}",
    )
    options = {"model": "shared_bottom", "loss": "bce", "learning_rate": 0.02, "epochs": 2}
    sizes = {"embedding_dim": 4, "bottom_units": (16,), "tower_units": (8,), "batch_size": 512}
    return Config.of(data_dir=str(folder / "data"), **options, **sizes)


def test_a_model_expects_what_items_in_chosen_slots_do(tmp_path, capsys):
    plain = _world_run(tmp_path, name="clean", slots="chosen", seed=1)
    config = plain.replace(click_noise_fields=("slot",), epochs=1)
    train(config, tmp_path / "run")
    assert "cells show different items; a first model" in capsys.readouterr().out
    noise = runs.click_noise(tmp_path / "run", config)
    assert noise.items_differ
    schema = runs.Schema.load(tmp_path / "data")
    counted = estimate_click_noise(tmp_path / "data", schema, ("slot",))
    # What the items of each slot deserve is planted: their interest without the slot's effect.
    world = World.draw("clean", 1, ctr=0.2, cvr=0.2, slots="chosen")
    drawn = world.sample(np.random.default_rng(0), np.arange(20_000))
    slot, device = drawn.log["slot"], drawn.log["device"]
    logit = drawn.logits[0] - world.places[0][slot, device]
    planted = np.bincount(slot, 1 / (1 + np.exp(-logit))) / np.bincount(slot)
    feature = next(feature for feature in schema.categorical if feature.name == "slot")
    ids = feature.ids(np.arange(6))
    errors = []
    for (field,) in (noise.fields, counted.fields):
        expected = field.expected_clicks[ids] / field.exposures[ids] / planted
        errors.append(np.std(np.log(expected)))
    assert errors[0] < 0.9 * errors[1]
    (tmp_path / "random").mkdir()
    random = _world_run(tmp_path / "random", name="slot")
    schema = runs.Schema.load(random.data_dir)
    assert not estimate_click_noise(random.data_dir, schema, ("slot", "device")).items_differ


def test_interest_is_closer_to_genuine_clicks(tmp_path):
    """From a log with planted accidents to the tables of evaluate."""
    plain = _world_run(tmp_path, name="slot")
    found = {}
    for name, fields in (("plain", ()), ("corrected", ("slot", "device"))):
        config = plain.replace(click_noise_fields=fields)
        train(config, tmp_path / name)
        model, _, schema = runs.load_run(tmp_path / name)
        truth = tmp_path / "truth-test.parquet"
        found[name] = evaluate(model, config.data_dir, schema, "test", name, truth)
    gain = found["corrected"].truth["interest"]["interest_auc"]
    gain -= found["plain"].truth["ctr"]["interest_auc"]
    assert gain > 0.03
    assert found["corrected"].truth["ctr"]["pcoc"] == pytest.approx(1, abs=0.15)
    assert found["plain"].score is None
    assert "interest" in score_table({"corrected": found["corrected"].score})


def test_fields_that_cannot_be_used_are_refused(dataset, tmp_path):
    config = Config.of(data_dir=str(dataset), click_noise_fields=("price (€)",))
    with pytest.raises(DataError, match=r"price \(€\) is no categorical feature; these are: page"):
        train(config, tmp_path / "run")
    # Otherwise the right fields would be refused there, as another run.
    assert not (tmp_path / "run").exists()
    schema = dataclasses.replace(runs.Schema.load(dataset), conversion=None)
    with pytest.raises(DataError, match="needs conversions"):
        estimate_click_noise(dataset, schema, ("page",))
