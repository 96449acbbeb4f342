"""What batches without a conversion do to PWiseR, and what helps.

Where conversions are rare, many batches hold none, and PWiseR, which compares conversions with
other rows, is 0 there. This trains variants that make it speak more often, and judges each by its
paired differences to plain BCE at the same batch size and learning rate:

- larger batches (and smaller ones);
- a larger weight: divided by the share of batches that hold a conversion ("compensated");
- replay: conversions drawn at random from the training split, which join each batch's own as
  upper rows of the pairwise term, and nothing else;
- memory: the scores of the last conversions, held constant, as further upper rows.

The data of the study in docs/explain/when-pwiser-helps.md are generated, with 2 percent clicks of
which 3 percent convert, and with 0 or 60 percent of the clicks accidental:

    pwiser sample --output_dir=csv --rows=2400000 --seed=2 --ctr=0.02 --cvr=0.03 \\
        --accidental_clicks=0.6
    pwiser convert --format=aliexpress --input=csv --output_dir=data --shards=16
    python -m pwiser_tf.study.silent_batches --data=data --output_dir=results --seeds=3

Runs with one seed share their initialisation, the order of the rows and, at one batch size, the
dropout masks. The epoch is chosen on validation (by the mean of CTR and CTCVR AUC, as pwiser_tf.
train does), then the test split is read once. A run leaves a JSON file of its metrics and an .npz
of its test scores in --output_dir; those that are there are not run again. After each seed
table.md and table.png are written there anew.

Replayed rows pass through the model together with the batch, in training mode, and only BCE leaves
them out. So batch normalisation sees them: 16 rows among 2064 move a mean by less than one percent
of the distance between conversions and other rows. A pass of their own is worse either way. In
training mode it would normalise conversions by conversions, which takes away what tells them from
other rows, and would drag the moving statistics, which serve, towards conversions. In inference
mode, by the moving statistics, their gradient raises the inputs of a normalisation for all rows
alike; the batch's own normalisation takes that away again, so nothing answers it, and the moving
statistics lag behind weights that drift on. (So it was tried first. After an epoch the model gave
a CTCVR of .0034 in inference and of .0010 in training mode, on the same rows.)
"""

import dataclasses
import functools
import gc
import itertools
import math
import pathlib
import time

import pwiser_tf.quiet  # noqa: F401

# isort: split

import numpy as np
import tensorflow as tf
import tf_keras as keras
from absl import flags
from matplotlib.figure import Figure

from pwiser_tf import command_line, data, losses, metrics
from pwiser_tf.errors import DataError
from pwiser_tf.models import MODELS, ClickConversionModel, ModelConfig
from pwiser_tf.models.base import TOWER_OF_TASK
from pwiser_tf.runs import read_json, write_json
from pwiser_tf.schema import Schema
from pwiser_tf.study import paired
from pwiser_tf.tasks import CONVERSION, POSITIVE_GRADE, TASKS, LossConfig
from pwiser_tf.training import share_cores

MODEL = "shared_bottom"
CONFIG = ModelConfig(
    embedding_dim=16, bottom_units=(128, 64), tower_units=(32,), dropout=0.2, weight_decay=1e-4
)
MARGIN_CLICK, MARGIN_NONCLICK = 0.05, 0.1
_PREDICTED_ROWS = 32768


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
      batch_size, learning_rate: as in pwiser_tf.train.
      strength: PWiseR's (see losses.strength) on the CTR task; 0 is plain BCE.
      even: the CTCVR task has the same strength; else the same weight, which is a strength CVR
        times as small.
      compensated: the weights are divided by the expected share of batches with a conversion.
      replay: how many conversions are drawn for each batch.
      memory: of how many past conversions the scores are kept.
    """

    batch_size: int = 2048
    learning_rate: float = 1e-3
    strength: float = 0.0
    even: bool = True
    compensated: bool = False
    replay: int = 0
    memory: int = 0

    def baseline(self) -> "Variant":
        """Plain BCE in the same batches."""
        return Variant(self.batch_size, self.learning_rate)

    def weights(self, counts: np.ndarray) -> dict[str, float]:
        """PWiseR's weight for each task, from the training split's counts of the three grades."""
        rows, clicks, conversions = counts.sum(), counts[1:].sum(), counts[CONVERSION]
        cvr = float(conversions / clicks)
        # The strength is proportional to the weight.
        weight = self.strength / losses.strength(1.0, MARGIN_CLICK, MARGIN_NONCLICK, cvr)
        if self.compensated:
            weight /= 1 - (1 - conversions / rows) ** self.batch_size
        return {"ctr": float(weight), "ctcvr": float(weight / cvr if self.even else weight)}


_STRENGTHS = {
    "mild": Variant(strength=0.5, even=False),
    "strong": Variant(strength=1.5, even=False),
    "gentle": Variant(strength=0.1),
    "even": Variant(strength=0.5),
}
_BATCHES = {
    "": {},
    "_8192": {"batch_size": 8192, "learning_rate": 2e-3},
    # Adam's rate goes with the root of the batch size; this is the control.
    "_8192_slow": {"batch_size": 8192},
    "_512": {"batch_size": 512},
}
_REMEDIES = {
    "_compensated": {"compensated": True},
    "_replay_4": {"replay": 4},
    "_replay_16": {"replay": 16},
    "_memory_16": {"memory": 16},
    "_memory_64": {"memory": 64},
}
# "bce", "bce_8192", "strong", "strong_replay_16" and so on.
VARIANTS = {"bce" + name: Variant(**batches) for name, batches in _BATCHES.items()} | {
    strength + name: dataclasses.replace(variant, **remedy)
    for strength, variant in _STRENGTHS.items()
    for name, remedy in (_BATCHES | _REMEDIES).items()
}


def define_flags() -> None:
    """Defines the flags of this command line."""
    flags.DEFINE_string("data", None, "Folder of the data set.", required=True)
    flags.DEFINE_string("output_dir", None, "Where results lie.", required=True)
    flags.DEFINE_list(
        "variants",
        list(VARIANTS),
        f"What to run, in this order, besides BCE in the same batches: of {', '.join(VARIANTS)}.",
    )
    flags.DEFINE_integer("seeds", 3, "Runs of each variant.", lower_bound=1)
    flags.DEFINE_integer("train_rows", 0, "Use the first ones only; 0: all.", lower_bound=0)
    flags.DEFINE_integer("epochs", 6, "At most so many.", lower_bound=1)
    flags.DEFINE_integer("patience", 2, "As in pwiser_tf.train.", lower_bound=0)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows in memory: features {name: [rows, columns]} and grade int64 [rows]."""

    features: dict[str, tf.Tensor]
    grade: np.ndarray


@functools.cache
def load(folder: str, split: str, rows: int = 0) -> Rows:
    """A split of a data set, or its first rows. DataError where there is none."""
    schema = Schema.load(folder)
    total = data.check(folder, schema, split).rows
    rows = min(rows or total, total)
    with tf.device("CPU"):
        [(features, grade)] = data.batches(folder, schema, split, rows).take(1)
    features.pop("group", None)
    return Rows(features, grade.numpy())


class Memory:
    """The scores that each task last gave conversions, held constant: a queue."""

    def __init__(self, size: int):
        self._scores = {task: tf.Variable(tf.zeros([size])) for task in TASKS}
        self._filled = {task: tf.Variable(0) for task in TASKS}

    def scores(self, task: str) -> tf.Tensor:
        """Float32 [at most size], the latest first."""
        return self._scores[task][: self._filled[task]]

    def push(self, task: str, scores: tf.Tensor) -> None:
        """Puts scores [any number] in front; the oldest drop out."""
        kept = self._scores[task]
        self._filled[task].assign(tf.minimum(self._filled[task] + tf.size(scores), tf.size(kept)))
        kept.assign(tf.concat([tf.stop_gradient(scores), kept], 0)[: tf.size(kept)])


class Trainer:
    """A model in training by one variant.

    Args:
      schema: the data set's; train: its training rows, with a conversion among them.
      variant: how; seed: of the initialisation, of the order and of what is replayed.
    """

    def __init__(self, schema: Schema, train: Rows, variant: Variant, seed: int):
        keras.utils.set_random_seed(seed)
        self.model: ClickConversionModel = MODELS[MODEL](schema, CONFIG)
        self.model({name: values[:1] for name, values in train.features.items()})  # makes variables
        # Batches seen, and those among them in which the pairwise term has no upper row.
        self.steps = self.silent = 0
        self._train, self._variant, self._seed = train, variant, seed
        self._optimizer = keras.optimizers.legacy.Adam(variant.learning_rate)
        self._weights = variant.weights(np.bincount(train.grade, minlength=3))
        self._memory = Memory(variant.memory) if variant.memory else None
        self._grade = tf.constant(train.grade)
        self._step = tf.function(self.step)

    def epoch(self, number: int) -> None:
        """One pass over the training rows, but for an incomplete last batch."""
        size = self._variant.batch_size
        order = np.random.default_rng((self._seed, number)).permutation(len(self._train.grade))
        replay = np.random.default_rng((self._seed, number, 1))
        conversions = np.flatnonzero(self._train.grade == CONVERSION)
        for start in range(0, len(order) - size + 1, size):
            replayed = replay.choice(conversions, self._variant.replay)
            upper = self._step(
                tf.constant(order[start : start + size]), tf.constant(replayed, tf.int64)
            )
            self.steps += 1
            self.silent += int(upper) == 0

    def step(self, rows: tf.Tensor, replayed: tf.Tensor) -> tf.Tensor:
        """Trains on row numbers [batch]; gives the count of upper rows in the pairwise term.

        Args:
          replayed: row numbers of conversions, [any number], for the pairwise term alone.
        """
        grade = tf.gather(self._grade, rows)
        upper = tf.math.count_nonzero(grade == CONVERSION) + tf.size(replayed, tf.int64)
        if self._memory:
            upper += tf.size(self._memory.scores("ctr"), tf.int64)
        with tf.GradientTape() as tape:
            loss = self.loss(rows, replayed) + tf.add_n(self.model.losses)
        variables = self.model.trainable_variables
        self._optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return upper

    def loss(self, rows: tf.Tensor, replayed: tf.Tensor) -> tf.Tensor:
        """The loss of a batch, without weight decay: the model's compute_loss, and the remedies."""
        grade = tf.gather(self._grade, rows)
        count = tf.size(rows)
        logits = self.model.tower_logits(self._features(tf.concat([rows, replayed], 0)), True)
        total = 0.0
        for task, tower in TOWER_OF_TASK.items():
            of_batch, of_replayed = logits[tower][:count, 0], logits[tower][count:, 0]
            positive = tf.cast(grade >= POSITIVE_GRADE[task], tf.float32)
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(positive, of_batch))
            if self._weights[task]:
                own = tf.sigmoid(of_batch)
                scores = [own, tf.sigmoid(of_replayed)]
                if self._memory:
                    scores.append(self._memory.scores(task))
                    self._memory.push(task, tf.boolean_mask(own, grade == CONVERSION))
                scores = tf.concat(scores, 0)
                added = tf.fill([tf.size(scores) - count], tf.constant(CONVERSION, tf.int64))
                grades = tf.concat([grade, added], 0)
                loss += self._weights[task] * losses.pwiser(
                    scores, grades, MARGIN_CLICK, MARGIN_NONCLICK
                )
            total += LossConfig().weight * loss
        return total

    def _features(self, rows: tf.Tensor) -> dict[str, tf.Tensor]:
        return {name: tf.gather(values, rows) for name, values in self._train.features.items()}


def predict(model: ClickConversionModel, rows: Rows) -> dict[str, np.ndarray]:
    """Probabilities {"ctr", "cvr", "ctcvr"}, float32 [rows] each."""
    call = tf.function(lambda features: model(features, training=False), reduce_retracing=True)
    parts = [
        call(
            {
                name: values[start : start + _PREDICTED_ROWS]
                for name, values in rows.features.items()
            }
        )
        for start in range(0, len(rows.grade), _PREDICTED_ROWS)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def monitored(grade: np.ndarray, predictions: dict[str, np.ndarray]) -> float:
    """What chooses the epoch: the mean of the tasks' AUC."""
    areas = [metrics.auc(grade >= POSITIVE_GRADE[task], predictions[task]) for task in TASKS]
    return float(np.mean(areas))


@dataclasses.dataclass(frozen=True)
class Study:
    """What the runs of a study share: the folder of the data set and flags of that name."""

    data: str
    train_rows: int
    epochs: int
    patience: int

    def settings(self, variant: Variant) -> dict:
        """What a variant's results depend on, besides the seed; the data are known by counts."""
        train = Schema.load(self.data).split("train")
        return {
            **dataclasses.asdict(variant),
            "train_rows": self.train_rows,
            "epochs": self.epochs,
            "patience": self.patience,
            "data": [train.rows, train.clicks, train.conversions],
        }


def run(study: Study, variant: Variant, seed: int) -> tuple[dict, dict[str, np.ndarray]]:
    """Trains one variant. Returns what its JSON file holds, and the test predictions."""
    started = time.monotonic()
    validation = load(study.data, "validation")
    train = load(study.data, "train", study.train_rows)
    if not np.any(train.grade == CONVERSION):
        raise DataError("a conversion among the rows to train on, found none", file=study.data)
    trainer = Trainer(Schema.load(study.data), train, variant, seed)
    history, best, weights = [], 0, None
    while len(history) < study.epochs and len(history) - best <= study.patience:
        trainer.epoch(len(history))
        history.append(monitored(validation.grade, predict(trainer.model, validation)))
        if history[-1] > max(history[:-1], default=-math.inf):
            best, weights = len(history) - 1, trainer.model.get_weights()
    trainer.model.set_weights(weights)
    test = load(study.data, "test")
    predictions = predict(trainer.model, test)
    result = {
        "settings": study.settings(variant),
        "seed": seed,
        "epoch": best + 1,
        "validation": history,
        "silent": trainer.silent / trainer.steps,
        "test": metrics.summary(test.grade, predictions),
        "seconds": time.monotonic() - started,
    }
    return result, predictions


def run_all(study: Study, folder: pathlib.Path, names: list[str], seeds: int) -> None:
    """Runs what is not there yet, seed by seed, and writes the report after each seed."""
    for seed in range(seeds):
        for name in names:
            path = _result_path(folder, name, seed)
            if path.exists():
                found, settings = read_json(path)["settings"], study.settings(VARIANTS[name])
                if found != settings:
                    raise DataError(f"settings {settings}", file=path, found=found)
                continue
            result, predictions = run(study, VARIANTS[name], seed)
            np.savez(path.with_suffix(".npz"), **predictions)
            write_json(path, result)  # last: it says that the run is over
            test = result["test"]
            print(
                f"seed {seed} {name}: epoch {result['epoch']} of {len(result['validation'])}, "
                f"AUC ctr {test['ctr']['auc']:.4f} ctcvr {test['ctcvr']['auc']:.4f}, "
                f"PCOC {test['ctr']['pcoc']:.2f} {test['ctcvr']['pcoc']:.2f}, "
                f"{result['seconds']:.0f} s",
                flush=True,
            )
            # Models hold reference cycles, and Keras holds on to graphs.
            keras.backend.clear_session()
            gc.collect()
        comparisons = compare(folder, names, seed + 1, load(study.data, "test").grade)
        (folder / "table.md").write_text(table(comparisons), encoding="utf-8")
        plot(comparisons, folder / "table.png")


def _result_path(folder: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    return folder / f"{name}-{seed}.json"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One variant, and its differences to its baseline where it is not that itself.

    Attributes:
      means: over seeds, by name: "silent", "epoch", and "auc", "log_loss" and "pcoc" of each task,
        as "ctr auc".
      differences: "ctr auc" and the like to (mean and interval over seeds, p-value). That of AUC
        is the larger of those over seeds and over test rows; that of log loss is over seeds alone.
    """

    name: str
    means: dict[str, float]
    differences: dict[str, tuple[paired.Estimate, float | None]]


def compare(
    folder: pathlib.Path, names: list[str], seeds: int, grade: np.ndarray
) -> list[Comparison]:
    """The finished runs of a folder; grade: [rows] of the test split."""

    @functools.cache
    def results(name):
        return [read_json(_result_path(folder, name, seed)) for seed in range(seeds)]

    def values(name, task, metric):
        return np.array([result["test"][task][metric] for result in results(name)])

    @functools.cache
    def placements(name, task):
        files = [_result_path(folder, name, seed).with_suffix(".npz") for seed in range(seeds)]
        positive = grade >= POSITIVE_GRADE[task]
        return [paired.placements(positive, np.load(file)[task]) for file in files]

    comparisons = []
    for name in names:
        means = {key: np.mean([r[key] for r in results(name)]) for key in ("silent", "epoch")}
        differences = {}
        baseline = baseline_of(name)
        for task in TASKS:
            for metric in ("auc", "log_loss", "pcoc"):
                means[f"{task} {metric}"] = values(name, task, metric).mean()
            if name == baseline:
                continue
            for metric in ("auc", "log_loss"):
                estimate = paired.over_seeds(
                    values(name, task, metric) - values(baseline, task, metric)
                )
                p_value = estimate.p_value
                if metric == "auc":
                    rows = paired.over_rows(placements(name, task), placements(baseline, task))
                    p_value = paired.both(p_value, rows.p_value)
                differences[f"{task} {metric}"] = estimate, p_value
        comparisons.append(Comparison(name, means, differences))
    return comparisons


def baseline_of(name: str) -> str:
    """The name of the variant that a variant is compared with; a baseline's is its own."""
    baseline = VARIANTS[name].baseline()
    return next(other for other, variant in VARIANTS.items() if variant == baseline)


def table(comparisons: list[Comparison]) -> str:
    """A Markdown table; differences in units of 1e-4, log loss in percent of the baseline's."""
    header = ["variant", "silent", "CTR AUC", "p", "CTCVR AUC", "p"]
    header += ["CTR log loss", "p", "CTCVR log loss", "p", "CTR PCOC", "CTCVR PCOC", "epoch"]
    lines = [header, ["---"] * len(header)]
    means = {one.name: one.means for one in comparisons}
    for one in comparisons:
        cells = [one.name, f"{one.means['silent']:.1%}"]
        for metric, digits in (("auc", 4), ("log_loss", 6)):
            for task in TASKS:
                key = f"{task} {metric}"
                if key not in one.differences:
                    cells += [f"{one.means[key]:.{digits}f}", ""]
                    continue
                estimate, p_value = one.differences[key]
                scale, unit = 1e4, ""
                if metric == "log_loss":
                    scale, unit = 100 / means[baseline_of(one.name)][key], "%"
                cells += [_interval(estimate, scale, unit), _p(p_value)]
        cells += [f"{one.means[f'{task} pcoc']:.2f}" for task in TASKS]
        cells.append(f"{one.means['epoch']:.1f}")
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _interval(estimate: paired.Estimate, scale: float, unit: str) -> str:
    digits = 2 if unit else 0
    text = f"{estimate.mean * scale:+.{digits}f}{unit}"
    if estimate.low is None:
        return text
    return f"{text} [{estimate.low * scale:+.{digits}f}, {estimate.high * scale:+.{digits}f}]"


def _p(p_value: float | None) -> str:
    return "-" if p_value is None else f"{p_value:.3f}"


def plot(comparisons: list[Comparison], path: pathlib.Path) -> None:
    """Differences in AUC with their intervals over seeds, and the calibration of CTCVR."""
    rows = [one for one in comparisons if one.differences]
    figure = Figure(figsize=(12, 1.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    position = np.arange(len(rows))
    for axis, task in zip(axes, TASKS, strict=False):
        estimates = [one.differences[f"{task} auc"][0] for one in rows]
        for y, estimate in zip(position, estimates, strict=True):
            if estimate.low is not None:
                axis.plot(np.array([estimate.low, estimate.high]) * 1e4, [y, y], color="#0072B2")
        axis.plot([estimate.mean * 1e4 for estimate in estimates], position, "o", color="#0072B2")
        axis.axvline(0, color="#7F7F7F", linewidth=1)
        axis.set_title(f"{task.upper()} AUC less that of BCE, x 1e-4")
    axes[2].plot([one.means["ctcvr pcoc"] for one in rows], position, "s", color="#D55E00")
    axes[2].axvline(1, color="#7F7F7F", linewidth=1)
    axes[2].set_title("CTCVR PCOC (1: calibrated)")
    axes[0].set_yticks(position, [one.name for one in rows])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs, and prints the table."""
    share_cores()
    values = flags.FLAGS
    unknown = [name for name in values.variants if name not in VARIANTS]
    if unknown:
        raise DataError(f"--variants among {', '.join(VARIANTS)}", found=unknown[0])
    pairs = [(baseline_of(name), name) for name in values.variants]
    names = list(dict.fromkeys(itertools.chain.from_iterable(pairs)))
    study = Study(values.data, values.train_rows, values.epochs, values.patience)
    train = Schema.load(study.data).split("train")
    largest = max(VARIANTS[name].batch_size for name in names)
    if (study.train_rows or train.rows) < largest:
        raise DataError(
            f"at least {largest} rows to train on", found=study.train_rows or train.rows
        )
    folder = pathlib.Path(values.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    run_all(study, folder, names, values.seeds)
    print((folder / "table.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
