"""What each loss is worth on worlds with a planted truth: losses x worlds x seeds, in memory.

    python -m pwiser_tf.study.worlds --protocol=one_pass --output_dir=worlds/one_pass
    python -m pwiser_tf.study.worlds --protocol=early_stopping --worlds=clean,mixed \\
        --output_dir=worlds/early_stopping
    python -m pwiser_tf.study.worlds --protocol=paper --worlds=clean,mixed \\
        --output_dir=worlds/paper

The worlds are those of `pwiser sample` (synthetic/worlds.py). A seed draws world, data and first
weights, and all losses share them. Protocols:

    one_pass        each training row is seen once, in the order of the log, and the model predicts
                    the rows that follow; weights are averaged exponentially over the steps
    early_stopping  half the rows, several epochs, the best one by validation
    paper           MTReclib's: heads start at 1/2 instead of the base rate, and the best epoch is
                    chosen by the test split; it compares the best of several PWiseR settings with
                    the best of as many reruns of cross-entropy

In the first two, each loss has its own learning rate, the best of --learning_rates by validation
(mean of the AUC of ctr and ctcvr on drawn labels) on tuning seeds, which are not reported. AUCs in
the tables are expected AUCs on the planted probabilities, so there is no label noise.

A (world, seed) is one job of one core. Its measurements are kept in OUTPUT/jobs, so the same
command, or one with more seeds or worlds, continues. It writes results.json, table.md and
differences.png.
"""

import pwiser_tf.quiet  # noqa: F401

# isort: split

import dataclasses
import json
import logging
import math
import multiprocessing
import os
import pathlib
import shlex
import sys
import time

import numpy as np
import tensorflow as tf
import tf_keras as keras
from absl import flags

from pwiser_tf import calibration, click_noise, metrics, runs
from pwiser_tf.click_noise import ClickNoise
from pwiser_tf.command_line import run
from pwiser_tf.errors import DataError
from pwiser_tf.layers.blocks import Block
from pwiser_tf.models import ModelConfig
from pwiser_tf.models.shared_bottom import SharedBottom
from pwiser_tf.records import empty_features
from pwiser_tf.schema import Categorical, Numerical, Schema, Split
from pwiser_tf.score import Score
from pwiser_tf.synthetic.truth import SEARCH_ROWS
from pwiser_tf.synthetic.worlds import CATEGORIES, DEVICES, SLOTS, STYLES, WORLDS, World
from pwiser_tf.tasks import POSITIVE_GRADE, TASKS, LossConfig

PROTOCOLS = ("one_pass", "early_stopping", "paper")
BASELINE = "bce"
# Genuine clicks are learnt by these losses: with and without the guard of click_noise.
FORWARD, UNGUARDED = "forward correction", "forward correction, no guard"
STRONG = {"margin_click": 0.1, "margin_nonclick": 0.5}
LOSSES = {
    BASELINE: LossConfig(name="bce"),
    "pwiser": LossConfig(),
    "pwiser, margins .1/.5": LossConfig(**STRONG),
    "pwiser, logits": LossConfig(
        score_space="logit", pwiser_weight=1e-3, margin_click=1.0, margin_nonclick=2.0
    ),
    "pwiser, CTR head, weight 1": LossConfig(pwiser_weight=1.0, loss_tasks=("ctr",), **STRONG),
    "conversions x 4": LossConfig(name="bce", conversion_weight=4.0),
    FORWARD: LossConfig(name="bce"),
    UNGUARDED: LossConfig(name="bce"),
}
# Cross-entropy's own heads, ranked by (1 - a) log pCTR + a log pCTCVR.
BLENDS = {f"blend {share:g} of bce": share for share in (0.1, 0.25, 0.5)}
PWISER = tuple(name for name in LOSSES if name.startswith("pwiser"))
RERUNS = len(PWISER)
NOISE_FIELDS = ("slot", "device", "style")
TUNING_WORLDS = ("uniform", "mixed")
# Seeds for the search of the learning rate; reported ones are 1, 2, ...
_FIRST_TUNING_SEED = 9001

_ROWS = {"one_pass": 245_760, "early_stopping": 122_880, "paper": 122_880}
_RATES = {"one_pass": (0.006, 0.012, 0.024), "early_stopping": (0.003, 0.006, 0.012)}
_PAPER_RATE = 2e-3
_BATCH = 2048
_EMA = 0.97
# Layer sizes; no dropout, no weight decay.
_MODEL = ModelConfig(
    name="shared_bottom",
    embedding_dim=8,
    bottom_units=(40,),
    tower_units=(20,),
    dropout=0.0,
    weight_decay=0.0,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all jobs of a study share.

    Attributes:
      protocol: one of PROTOCOLS. rows: training rows; a quarter as many to validate on, half as
        many to test. epochs, patience: at most so many; 1 and 0 in one pass.
    """

    protocol: str
    rows: int
    epochs: int
    patience: int

    @property
    def one_pass(self) -> bool:
        """Whether rows are seen once."""
        return self.protocol == "one_pass"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a split: features as a model takes them, grade int64 [n], truth of each [n]."""

    features: dict[str, np.ndarray]
    grade: np.ndarray
    truth: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.grade)

    def with_accidents(self, accidental: np.ndarray) -> "Rows":
        """With P(accidental click) [n] as a feature."""
        features = {**self.features, "accidental": accidental.astype(np.float32)}
        return dataclasses.replace(self, features=features)


@dataclasses.dataclass(frozen=True)
class Data:
    """A drawn world: the schema of its log, and the rows of its splits in the log's order."""

    schema: Schema
    train: Rows
    validation: Rows
    test: Rows

    @property
    def splits(self) -> tuple[Rows, Rows, Rows]:
        """All of them."""
        return self.train, self.validation, self.test

    def noise(self, guarded: bool) -> ClickNoise:
        """The estimate that training makes (`training.estimate_click_noise`), from arrays."""
        ids, numbers = (self.train.features[name] for name in ("categorical", "numerical"))
        names = [feature.name for feature in self.schema.categorical]
        chosen = [names.index(name) for name in NOISE_FIELDS]
        return click_noise.estimate(
            NOISE_FIELDS,
            ids[:, chosen],
            [self.schema.categorical[k].size for k in chosen],
            click_noise.other_columns(ids, numbers, chosen),
            self.train.grade,
            guarded=guarded,
        )

    def accidental(self, noise: ClickNoise, rows: Rows) -> np.ndarray:
        """P(accidental click) by the estimate, float64 [n]."""
        names = [feature.name for feature in self.schema.categorical]
        cells = []
        for field in noise.fields:
            ids = [rows.features["categorical"][:, names.index(name)] for name in field.features]
            cells.append(np.ravel_multi_index(ids, field.sizes))
        return noise.accidental(cells)


def draw(world: str, seed: int, rows: int) -> Data:
    """Draws a world and its log: rows to train on, a quarter as many to validate, half to test."""
    drawn = World.draw(world, seed)
    counts = [rows, rows // 4, rows // 2]
    searches = -(-sum(counts) // SEARCH_ROWS)
    sample = drawn.sample(np.random.default_rng([seed, 1]), np.arange(1, searches + 1))
    sizes = {"user_segment": len(drawn.users[0]), "user_city": len(drawn.users[1])}
    sizes |= {"item": len(drawn.items), "category": CATEGORIES, "style": STYLES}
    sizes |= {"slot": SLOTS, "device": DEVICES}
    categorical = tuple(Categorical(name, "int64", range(size)) for name, size in sizes.items())
    # Numbers are in [0, 1].
    numerical = tuple(
        Numerical(name, "standardize", 0.5, 0.25, 0.5) for name in sample.log if "number" in name
    )
    ids = np.stack([feature.ids(sample.log[feature.name]) for feature in categorical], axis=1)
    numbers = np.stack([feature.apply(sample.log[feature.name]) for feature in numerical], axis=1)
    grade = sample.truth["click"] + sample.truth["conversion"]
    parts, start = [], 0
    for count in counts:
        part = slice(start, start + count)
        features = {"categorical": ids[part], "numerical": numbers[part]}
        features["accidental"] = np.zeros(count, np.float32)
        truth = {name: values[part] for name, values in sample.truth.items()}
        parts.append(Rows(features, grade[part], truth))
        start += count
    of_train = parts[0].grade
    split = Split(rows, int((of_train >= 1).sum()), int((of_train == 2).sum()), 0, ())
    schema = Schema(
        world, categorical, numerical, "click", "conversion", None, splits={"train": split}
    )
    return Data(schema, *parts)


class _Model(SharedBottom):
    """The model, with P(accidental click) as a feature, so that one graph serves all estimates."""

    def __init__(self, schema, config, loss=None, corrects: bool = False):
        super().__init__(schema, config, loss)
        if corrects:
            self._accidental_clicks = lambda features: features["accidental"]


class Program:
    """A loss: its traced training and prediction, used again for each seed."""

    def __init__(self, schema: Schema, loss: LossConfig, corrects: bool):
        self._model = _Model(schema, _MODEL, loss, corrects)
        self._model(_first_row(schema))
        self._weights = self._model.trainable_weights
        self._optimizer = keras.optimizers.legacy.Adam(1e-3)
        self._optimizer._create_all_weights(self._weights)
        self._averaged = _state(self._model)
        self._averages = [tf.Variable(v, trainable=False) for v in self._averaged]
        self._step = tf.Variable(0.0)

    def start(self, weights: list[np.ndarray], learning_rate: float) -> None:
        """Sets the weights, and forgets what was trained before."""
        for variable, value in zip(self._averaged, weights, strict=True):
            variable.assign(value)
        self._optimizer.learning_rate = learning_rate
        for variable in self._optimizer.variables():
            variable.assign(tf.zeros_like(variable))
        for variable, average in zip(self._averaged, self._averages, strict=True):
            average.assign(variable)
        self._step.assign(0.0)

    def train(self, rows: Rows, order: np.ndarray) -> None:
        """One epoch in this order [n]; rows beyond the last whole batch are left out."""
        batch = min(_BATCH, len(order))
        features = {name: tf.constant(values[order]) for name, values in rows.features.items()}
        steps = len(order) // batch
        self._epoch(features, tf.constant(rows.grade[order]), tf.constant(steps), batch)

    def use_averages(self) -> None:
        """Replaces the weights by their averages over the steps."""
        for variable, average in zip(self._averaged, self._averages, strict=True):
            variable.assign(average)

    def predict(self, rows: Rows) -> dict[str, np.ndarray]:
        """The model's outputs, float32 [n]."""
        features = {name: tf.constant(values) for name, values in rows.features.items()}
        return {name: values.numpy() for name, values in self._predict(features).items()}

    @tf.function(reduce_retracing=True)
    def _predict(self, features):
        return self._model(features, training=False)

    @tf.function(reduce_retracing=True)
    def _epoch(self, features, grade, steps, batch: int):
        for step in tf.range(steps):
            part = {name: values[step * batch :][:batch] for name, values in features.items()}
            with tf.GradientTape() as tape:
                loss = self._model.compute_loss(
                    (part, grade[step * batch :][:batch]), training=True
                )
            gradients = tape.gradient(loss, self._weights)
            self._optimizer.apply_gradients(zip(gradients, self._weights, strict=True))
            self._step.assign_add(1.0)
            # Fewer steps count equally, so that the first weights are forgotten.
            kept = tf.minimum(_EMA, 1.0 - 1.0 / self._step)
            for variable, average in zip(self._averaged, self._averages, strict=True):
                average.assign(kept * average + (1.0 - kept) * variable)


def _state(model: keras.Model) -> list[tf.Variable]:
    """What a model predicts with: its weights, and batch normalization's statistics."""
    blocks = [block for block in model.submodules if isinstance(block, Block)]
    statistics = [variable for block in blocks for variable in (block.mean, block.variance)]
    return [*model.trainable_weights, *statistics]


def _first_row(schema: Schema) -> dict[str, np.ndarray]:
    return {**empty_features(schema), "accidental": np.zeros(1, np.float32)}


def first_weights(schema: Schema, seed: int) -> list[np.ndarray]:
    """The weights that all losses start from."""
    keras.utils.set_random_seed(seed)
    model = _Model(schema, _MODEL)
    model(_first_row(schema))
    return [variable.numpy() for variable in _state(model)]


# One worker's programs, by the name of the loss.
_programs: dict[tuple, Program] = {}


def _program(name: str, schema: Schema) -> Program:
    sizes = tuple(feature.size for feature in schema.categorical)
    key = (name.replace(UNGUARDED, FORWARD), sizes)
    if key not in _programs:
        _programs[key] = Program(schema, LOSSES[name], name in (FORWARD, UNGUARDED))
    return _programs[key]


def _monitored(rows: Rows, outputs: dict[str, np.ndarray]) -> float:
    """The mean AUC of ctr and ctcvr on drawn labels, as training monitors it."""
    aucs = [
        metrics.auc((rows.grade >= grade).astype(np.int64), outputs[task])
        for task, grade in POSITIVE_GRADE.items()
    ]
    return float(np.nanmean(aucs))


@dataclasses.dataclass(frozen=True)
class Trained:
    """The outputs of the best epoch on validation and test, and the value it was chosen by."""

    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    monitored: float
    epoch: int


def train(
    name: str, data: Data, settings: Settings, weights: list, learning_rate: float, seed: int
) -> Trained:
    """Trains one loss by the protocol. seed: of the order of the rows, where they are shuffled."""
    program = _program(name, data.schema)
    program.start(weights, learning_rate)
    rng = np.random.default_rng([seed, 2])
    best, waited = None, 0
    for epoch in range(settings.epochs):
        rows = len(data.train)
        program.train(data.train, np.arange(rows) if settings.one_pass else rng.permutation(rows))
        if settings.one_pass:
            program.use_averages()
        test = program.predict(data.test)
        validation = program.predict(data.validation)
        monitored = (
            _monitored(data.test, test)
            if settings.protocol == "paper"
            else _monitored(data.validation, validation)
        )
        if best is None or monitored > best.monitored:
            best, waited = Trained(validation, test, monitored, epoch + 1), 0
        else:
            waited += 1
        if waited > settings.patience:
            break
    return best


def corrected(data: Data, guarded: bool) -> tuple[Data, ClickNoise]:
    """The data with the estimated probabilities of accidental clicks, and the estimate."""
    noise = data.noise(guarded)
    parts = [rows.with_accidents(data.accidental(noise, rows)) for rows in data.splits]
    return Data(data.schema, *parts), noise


def blend(outputs: dict[str, np.ndarray], share: float) -> np.ndarray:
    """(1 - share) log pCTR + share log pCTCVR, float64 [n]."""
    return Score.blend(share).logarithm(outputs)


def measure(
    rows: Rows, outputs: dict[str, np.ndarray], score: np.ndarray | None = None
) -> dict[str, float]:
    """A model's outputs against the planted truth.

    Args:
      score: what ranks clicks and interest, [n]; None: the output ctr for clicks, and interest,
        where the model has it, otherwise ctr, for interest.
    """
    truth = rows.truth
    click = outputs["ctr"] if score is None else score
    interest = outputs.get("interest", outputs["ctr"]) if score is None else score
    return {
        "ctr_auc": metrics.expected_auc(truth["ctr"], click),
        "interest_auc": metrics.expected_auc(truth["interest"], interest),
        "ctcvr_auc": metrics.expected_auc(truth["ctcvr"], outputs["ctcvr"]),
        "top1_interest": metrics.top_mean(truth["interest"], interest, truth["search"]),
        "top1_purchase": metrics.top_mean(truth["ctcvr"], interest, truth["search"]),
    }


def calibrated(data: Data, trained: Trained) -> dict[str, float]:
    """PCOC on test, predicted / planted, before and after Platt on validation."""
    outputs = {task: trained.test[task] for task in TASKS}
    fitted, _ = calibration.fit_heads(
        data.validation.grade, {task: trained.validation[task] for task in TASKS}
    )
    after = fitted.apply({task: tf.constant(values) for task, values in outputs.items()})
    found = {}
    for task in TASKS:
        planted = data.test.truth[task].sum()
        found[f"{task}_pcoc"] = float(outputs[task].sum(dtype=np.float64) / planted)
        scaled = after[task].numpy().sum(dtype=np.float64)
        found[f"{task}_pcoc_platt"] = float(scaled / planted)
    return found


def job(world: str, seed: int, settings: Settings, rates: dict[str, float]) -> dict[str, dict]:
    """All losses on one drawn world: {row: {metric: value}}."""
    data = draw(world, seed, settings.rows)
    if settings.protocol == "paper":
        return _paper_job(data, seed, settings, rates)
    weights = first_weights(data.schema, seed)
    found, trained = {}, {}
    for name in LOSSES:
        used, noise = data, None
        if name in (FORWARD, UNGUARDED):
            used, noise = corrected(data, guarded=name == FORWARD)
        if noise and not used.train.features["accidental"].any():
            trained[name] = trained[BASELINE]
        else:
            trained[name] = train(name, used, settings, weights, rates[name], seed)
        found[name] = measure(data.test, trained[name].test)
        found[name] |= calibrated(data, trained[name]) | {"epoch": trained[name].epoch}
        if noise:
            found[name]["guards"] = [field.guard for field in noise.fields]
    for name, share in BLENDS.items():
        outputs = trained[BASELINE].test
        found[name] = measure(data.test, outputs, blend(outputs, share))
    truth = data.test.truth
    perfect = {name: truth[name] for name in ("ctr", "ctcvr", "interest")}
    found["planted"] = measure(data.test, perfect)
    return found


def _paper_job(data: Data, seed: int, settings: Settings, rates) -> dict[str, dict]:
    """Test AUC on drawn labels of each PWiseR setting, and of cross-entropy and its reruns."""
    # Without counts the heads start at 1/2.
    blank = dataclasses.replace(data.schema, splits={})
    found = {}
    plan = [(BASELINE, 0), *((name, 0) for name in PWISER)]
    plan += [(BASELINE, rerun) for rerun in range(1, RERUNS + 1)]
    for name, rerun in plan:
        weights = first_weights(blank, 1000 * rerun + seed)
        trained = train(name, data, settings, weights, rates[name], 1000 * rerun + seed)
        row = f"{name}, rerun {rerun}" if rerun else name
        found[row] = measure(data.test, trained.test) | {"epoch": trained.epoch}
        for task, grade in POSITIVE_GRADE.items():
            label = (data.test.grade >= grade).astype(np.int64)
            found[row][f"{task}_drawn"] = metrics.auc(label, trained.test[task])
    return found


def tuning_job(
    world: str, seed: int, settings: Settings, grid: tuple[float, ...]
) -> dict[str, list[float]]:
    """The monitored value of each loss (without the unguarded one) at each learning rate."""
    data = draw(world, seed, settings.rows)
    weights = first_weights(data.schema, seed)
    found = {}
    for name in (name for name in LOSSES if name != UNGUARDED):
        used = corrected(data, guarded=True)[0] if name == FORWARD else data
        if name == FORWARD and not used.train.features["accidental"].any():
            found[name] = found[BASELINE]
            continue
        found[name] = [train(name, used, settings, weights, rate, seed).monitored for rate in grid]
    return found


def best_rates(tuned: list[dict], grid: tuple[float, ...]) -> dict[str, float]:
    """The learning rate of each loss: the best of the grid by the mean over `tuning_job`s."""
    chosen = {
        name: grid[int(np.argmax(np.mean([values[name] for values in tuned], axis=0)))]
        for name in tuned[0]
    }
    return {**chosen, UNGUARDED: chosen[FORWARD]}


def _cached(path: pathlib.Path, function, *arguments) -> dict:
    """function(*arguments), or what an earlier run kept of it."""
    if not path.exists():
        started = time.time()
        content = function(*arguments)
        runs.write_json(path, content)
        print(f"{path.stem}: {time.time() - started:.0f} s", flush=True)
    return runs.read_json(path)


def _start_worker() -> None:
    # It warns of several programs of one class.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def _all(calls: list[tuple], parallel: int) -> list[dict]:
    """`_cached` of each, in this process or in several."""
    if parallel == 1:
        return [_cached(*call) for call in calls]
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(parallel, len(calls)), _start_worker) as pool:
        return pool.starmap(_cached, calls, chunksize=1)


def study(
    settings: Settings,
    worlds: list[str],
    seeds: int,
    grid: tuple[float, ...],
    tuning_seeds: int,
    output: pathlib.Path,
    parallel: int = 1,
) -> dict:
    """Runs all jobs that are not finished.

    Returns:
      "settings", "rates" {loss: learning rate} and "worlds" {world: [{row: {metric: value}} of
      each seed]}.
    """
    jobs = output / "jobs"
    jobs.mkdir(parents=True, exist_ok=True)
    given = {**dataclasses.asdict(settings), "grid": list(grid), "tuning_seeds": tuning_seeds}
    path = output / "settings.json"
    if path.exists() and runs.read_json(path) != given:
        raise DataError(
            f"found a study with other settings, expected {json.dumps(given)}: give another "
            "--output_dir",
            file=path,
        )
    runs.write_json(path, given)
    if settings.protocol == "paper" or len(grid) == 1:
        rates = dict.fromkeys(LOSSES, grid[0])
        tuned = []
    else:
        tuning = range(_FIRST_TUNING_SEED, _FIRST_TUNING_SEED + tuning_seeds)
        calls = [
            (jobs / f"tuning-{world}-{seed}.json", tuning_job, world, seed, settings, grid)
            for seed in tuning
            for world in TUNING_WORLDS
        ]
        tuned = _all(calls, parallel)
        rates = best_rates(tuned, grid)
        print("learning rates:", rates, flush=True)
    # Seed by seed, so that an interrupted study has all worlds.
    calls = [
        (jobs / f"{world}-{seed}.json", job, world, seed, settings, rates)
        for seed in range(1, seeds + 1)
        for world in worlds
    ]
    found = _all(calls, parallel)
    return {
        "settings": given,
        "rates": rates,
        "tuning": tuned,
        "worlds": {world: found[k :: len(worlds)] for k, world in enumerate(worlds)},
    }


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_list(
        "worlds", ["clean", "uniform", "slot", "bait", "mixed", "hetero"], "Worlds; see sample."
    )
    flags.DEFINE_enum("protocol", "one_pass", PROTOCOLS, "How models are trained; see above.")
    flags.DEFINE_integer("seeds", 10, "Seeds 1, 2, ...: so many of each world.", lower_bound=2)
    flags.DEFINE_integer("rows", None, f"Training rows. Default: {_ROWS}.", lower_bound=1000)
    flags.DEFINE_integer("epochs", 5, "At most so many epochs; one_pass has one.", lower_bound=1)
    flags.DEFINE_integer(
        "patience", 1, "Epochs without a better one until training stops.", lower_bound=0
    )
    flags.DEFINE_list(
        "learning_rates",
        None,
        f"The grid. Default: {_RATES}; paper: {_PAPER_RATE}, its one rate for all losses.",
    )
    flags.DEFINE_integer("tuning_seeds", 2, "Seeds for the learning rates.", lower_bound=1)
    flags.DEFINE_string("output_dir", None, "Where results go.", required=True)
    flags.DEFINE_integer("parallel", None, "Processes. Default: one a core.", lower_bound=1)


def main() -> None:
    """Runs the study and writes its table."""
    from pwiser_tf.study import worlds_report

    args = flags.FLAGS
    unknown = [world for world in args.worlds if world not in WORLDS]
    if unknown or not args.worlds or len(set(args.worlds)) < len(args.worlds):
        raise DataError(
            f"--worlds: expected different names out of {', '.join(WORLDS)}, found "
            f"{','.join(args.worlds)}"
        )
    protocol = args.protocol
    try:
        grid = tuple(map(float, args.learning_rates or _RATES.get(protocol, (_PAPER_RATE,))))
    except ValueError as error:
        raise DataError(f"--learning_rates: {error}") from None
    if not all(rate > 0 and math.isfinite(rate) for rate in grid):
        raise DataError(f"--learning_rates: expected numbers above 0, found {grid}")
    one_pass = protocol == "one_pass"
    settings = Settings(
        protocol,
        args.rows or _ROWS[protocol],
        1 if one_pass else args.epochs,
        0 if one_pass else args.patience,
    )
    output = pathlib.Path(args.output_dir).resolve()
    output.mkdir(parents=True, exist_ok=True)
    parallel = args.parallel or len(os.sched_getaffinity(0))
    with runs.locked(output):
        found = study(settings, args.worlds, args.seeds, grid, args.tuning_seeds, output, parallel)
        found["command"] = "python -m pwiser_tf.study.worlds " + shlex.join(sys.argv[1:])
        worlds_report.write(found, output)
    print((output / "table.md").read_text(encoding="utf-8"))
    print(f"written to {output}")


if __name__ == "__main__":
    define_flags()
    run(main)
