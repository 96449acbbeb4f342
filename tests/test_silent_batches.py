import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from pwiser_tf import data, metrics
from pwiser_tf.models import MODELS
from pwiser_tf.schema import Schema
from pwiser_tf.study import silent_batches as study
from pwiser_tf.study.silent_batches import Memory, Rows, Trainer, Variant
from pwiser_tf.tasks import TASKS, LossConfig
from tests import oracles
from tests.conftest import write_dataset

COUNTS = np.array([9000, 960, 40])  # CTR .1, CVR .04
NO_ROWS = tf.zeros([0], tf.int64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "data"
    write_dataset(folder, {"train": 3000, "validation": 200, "test": 300})
    return folder


@pytest.fixture(scope="module")
def schema(folder):
    return Schema.load(folder)


@pytest.fixture(scope="module")
def train(folder):
    return study.load(str(folder), "train", 500)


def _quiet(rows: Rows) -> np.ndarray:
    """Numbers of 20 rows without a conversion among them."""
    return np.flatnonzero(rows.grade < 2)[:20]


def test_a_strength_becomes_a_weight_for_each_task():
    # strength = 2 weight (.05 + .1) / CVR on the CTR task; CVR is 1 on the CTCVR task.
    even = Variant(strength=0.6).weights(COUNTS)
    assert even == pytest.approx({"ctr": 0.6 * 0.04 / 0.3, "ctcvr": 0.6 / 0.3})
    one_weight = Variant(strength=0.6, even=False).weights(COUNTS)
    assert one_weight == pytest.approx({"ctr": 0.08, "ctcvr": 0.08})
    assert Variant().weights(COUNTS) == {"ctr": 0, "ctcvr": 0}


def test_compensation_divides_by_the_share_of_batches_that_speak():
    # Of two rows with a conversion in 250 each, 1 - .996^2 = .007984 of the batches speak.
    plain = Variant(2, strength=0.6).weights(COUNTS)
    compensated = Variant(2, strength=0.6, compensated=True).weights(COUNTS)
    assert compensated == pytest.approx({k: v / 0.007984 for k, v in plain.items()})


def test_every_variant_has_a_baseline_of_its_batches():
    for name, variant in study.VARIANTS.items():
        baseline = study.VARIANTS[study.baseline_of(name)]
        assert (baseline.batch_size, baseline.learning_rate, baseline.strength) == (
            variant.batch_size,
            variant.learning_rate,
            0,
        )


def test_memory_is_a_queue():
    memory = Memory(3)
    assert memory.scores("ctr").shape == [0]
    memory.push("ctr", tf.constant([0.1]))
    memory.push("ctr", tf.constant([]))
    memory.push("ctr", tf.constant([0.2, 0.3]))
    np.testing.assert_allclose(memory.scores("ctr"), [0.2, 0.3, 0.1])
    memory.push("ctr", tf.constant([0.4]))
    np.testing.assert_allclose(memory.scores("ctr"), [0.4, 0.2, 0.3])
    memory.push("ctr", tf.constant([0.5, 0.6, 0.7, 0.8]))
    np.testing.assert_allclose(memory.scores("ctr"), [0.5, 0.6, 0.7])
    assert memory.scores("ctcvr").shape == [0]


def test_rows_are_the_first_ones_of_the_files(folder, schema, train):
    features, grade = next(iter(data.batches(folder, schema, "train", 500)))
    assert len(train.grade) == 500
    np.testing.assert_array_equal(train.grade, grade)
    for name in ("categorical", "numerical"):
        np.testing.assert_array_equal(train.features[name], features[name])
    assert len(study.load(str(folder), "test").grade) == 300
    assert len(study.load(str(folder), "test", 10**9).grade) == 300


def test_without_remedies_the_loss_is_the_trainers(schema, train):
    variant = Variant(strength=0.6)
    trainer = Trainer(schema, train, variant, seed=3)
    weights = variant.weights(np.bincount(train.grade))
    configs = {
        task: LossConfig(loss="pwiser", pwiser_weight=weights[task], margin_click=0.05)
        for task in TASKS
    }
    keras.utils.set_random_seed(3)
    model = MODELS[study.MODEL](schema, study.CONFIG, configs)
    rows = tf.range(200, dtype=tf.int64)
    features = {name: values[:200] for name, values in train.features.items()}
    model({name: values[:1] for name, values in features.items()})
    expected = model.compute_loss((features, tf.constant(train.grade[:200])), training=True)
    assert float(trainer.loss(rows, NO_ROWS)) == pytest.approx(float(expected), rel=1e-6)


def _scores(model, rows: Rows, chosen, training: bool) -> dict[str, np.ndarray]:
    """What PWiseR ranks, by task: the towers' sigmoids."""
    logits = model.tower_logits(
        {name: tf.gather(values, chosen) for name, values in rows.features.items()}, training
    )
    towers = {"ctr": "click", "ctcvr": "conversion"}
    return {task: tf.sigmoid(logits[tower][:, 0]).numpy() for task, tower in towers.items()}


def _bce(grade, scores) -> float:
    """Half of the tasks' sum, as the model weighs them."""
    return 0.5 * sum(
        metrics.log_loss(grade >= lowest, scores[task])
        for task, lowest in (("ctr", 1), ("ctcvr", 2))
    )


def test_replayed_rows_are_conversions_of_the_pairwise_term_alone(schema, train):
    """The oracle loops over pairs; BCE leaves the replayed rows out."""
    rows, replayed = _quiet(train), np.flatnonzero(train.grade == 2)[:3]
    both = np.concatenate([rows, replayed])
    variant = Variant(strength=0.6, replay=3)
    trainer = Trainer(schema, train, variant, seed=0)
    found = float(trainer.loss(tf.constant(rows), tf.constant(replayed)))

    scores = _scores(Trainer(schema, train, Variant(), seed=0).model, train, both, True)
    bce = _bce(train.grade[rows], {task: values[:20] for task, values in scores.items()})
    weights = variant.weights(np.bincount(train.grade))
    terms = [
        0.5 * weights[task] * oracles.pwiser(scores[task], train.grade[both], 0.05, 0.1)[0]
        for task in TASKS
    ]
    assert sum(terms) > 0.01 * bce
    assert found == pytest.approx(bce + sum(terms), rel=1e-5)


def test_a_silent_batch_is_plain_bce(schema, train):
    rows = tf.constant(_quiet(train))
    plain, silent = (
        Trainer(schema, train, variant, seed=0).loss(rows, NO_ROWS)
        for variant in (Variant(), Variant(strength=0.6))
    )
    assert float(plain) == float(silent)


def test_remembered_scores_are_conversions_of_later_batches(schema, train):
    loud = np.concatenate([np.flatnonzero(train.grade == 2)[:2], _quiet(train)])
    trainer = Trainer(schema, train, Variant(strength=0.6, memory=5), seed=0)
    model = Trainer(schema, train, Variant(), seed=0).model
    trainer.loss(tf.constant(loud), NO_ROWS)
    remembered = {task: scores[:2] for task, scores in _scores(model, train, loud, True).items()}
    for task in TASKS:
        np.testing.assert_allclose(trainer._memory.scores(task), remembered[task], rtol=1e-6)

    rows = _quiet(train)
    found = trainer.loss(tf.constant(rows), NO_ROWS)
    weights = Variant(strength=0.6).weights(np.bincount(train.grade))
    grade = np.concatenate([train.grade[rows], [2, 2]])
    scores = _scores(model, train, rows, True)
    expected = _bce(train.grade[rows], scores)
    for task in TASKS:
        ranked = np.concatenate([scores[task], remembered[task]])
        expected += 0.5 * weights[task] * oracles.pwiser(ranked, grade, 0.05, 0.1)[0]
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_silent_batches_are_counted(schema, train):
    rows = Rows(train.features, np.where(np.arange(500) == 7, 2, train.grade.clip(max=1)))
    counts = {}
    for name, remedy in {"none": {}, "replay": {"replay": 1}, "memory": {"memory": 2}}.items():
        trainer = Trainer(schema, rows, Variant(100, strength=0.1, **remedy), seed=1)
        trainer._step = trainer.step  # not worth a graph
        trainer.epoch(0)
        counts[name] = trainer.steps, trainer.silent
    first = int(np.flatnonzero(np.random.default_rng((1, 0)).permutation(500) == 7)[0])
    # One conversion in five batches; it is remembered from the batch after its own on.
    assert counts == {"none": (5, 4), "replay": (5, 0), "memory": (5, first // 100)}


def _command(folder, output, *more):
    command = [sys.executable, "-m", "pwiser_tf.study.silent_batches", f"--data={folder}"]
    command += [f"--output_dir={output}", "--epochs=1", "--seeds=2", *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The results of two seeds of two variants."""
    output = tmp_path_factory.mktemp("results")
    one_epoch = study.Study(str(folder), train_rows=0, epochs=1, patience=2)
    study.run_all(one_epoch, output, ["bce", "strong"], seeds=2)
    return one_epoch, output


def _results(output) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}


def test_results_and_report(folder, finished):
    _, output = finished
    runs = {f"{name}-{seed}" for name in ("bce", "strong") for seed in (0, 1)}
    expected = {"table.md", "table.png", *(run + end for run in runs for end in (".json", ".npz"))}
    assert {path.name for path in output.iterdir()} == expected
    grade = study.load(str(folder), "test").grade
    found = _results(output)
    for run, content in found.items():
        scores = np.load(output / f"{run}.npz")
        assert content["test"]["ctcvr"]["auc"] == metrics.auc(grade == 2, scores["ctcvr"])
        assert content["silent"] == 0  # a fifth of the rows are conversions
    assert len({content["test"]["ctr"]["auc"] for content in found.values()}) == 4
    areas = {run: content["test"]["ctr"]["auc"] for run, content in found.items()}
    mean = np.mean([areas[f"strong-{seed}"] - areas[f"bce-{seed}"] for seed in (0, 1)])
    lines = (output / "table.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| strong |"))
    assert row.split("|")[3].split("[")[0].strip() == f"{mean * 1e4:+.0f}"


def test_only_what_is_missing_is_run_and_gives_the_same(finished, capsys):
    one_epoch, output = finished
    before = _results(output)
    (output / "strong-1.json").unlink()
    capsys.readouterr()
    study.run_all(one_epoch, output, ["bce", "strong"], seeds=2)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["seed 1 strong"]
    after = _results(output)
    assert after["strong-1"]["test"] == before["strong-1"]["test"]


def test_command_prints_the_table(folder, finished):
    _, output = finished
    result = _command(folder, output, "--variants=strong")
    assert result.returncode == 0, result.stderr
    assert result.stdout == (output / "table.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--variants=even,loud"], "'loud'"),
        (["--train_rows=100"], "found 100, expected at least 2048 rows"),
        (["--patience=3"], "'patience': 3"),
    ],
)
def test_bad_input_is_one_line(folder, finished, more, message):
    result = _command(folder, finished[1], "--variants=strong", *more)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
