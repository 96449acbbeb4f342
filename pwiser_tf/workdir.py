"""The folder of one training run: what is in it, and how its model is built again.

flags.json         the resolved flags that define the run
schema.json        the data set's schema (and vocabularies/), as it was when training began
checkpoints/       the newest state, from which an interrupted run goes on
best/              the weights of the best epoch by validation
logs/              TensorBoard
metrics.json       epochs, validation and test metrics
report-SPLIT.png   plots of an evaluation
"""

import contextlib
import dataclasses
import json
import os
import pathlib

import tensorflow as tf
import tf_keras as keras

from pwiser_tf.errors import DataError
from pwiser_tf.models import MODELS, ClickConversionModel, ModelConfig
from pwiser_tf.schema import Schema
from pwiser_tf.tasks import TASKS, LossConfig

FLAGS_FILE = "flags.json"
METRICS_FILE = "metrics.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags of pwiser_tf.train that define a run; `--help` there explains each."""

    data_dir: str
    model: str
    conversion_head: str
    embedding_dim: int
    bottom_units: tuple[int, ...]
    tower_units: tuple[int, ...]
    experts: int
    dropout: float
    weight_decay: float
    mixed_precision: bool
    batch_size: int
    epochs: int
    patience: int
    learning_rate: float
    ctr_weight: float
    ctcvr_weight: float
    conversion_weight: float
    pwiser_weight: float
    margin_click: float
    margin_nonclick: float
    pwiser_tasks: tuple[str, ...]
    seed: int

    def losses(self) -> dict[str, LossConfig]:
        """How each task is learnt, by its name."""
        return {
            task: LossConfig(
                weight={"ctr": self.ctr_weight, "ctcvr": self.ctcvr_weight}[task],
                conversion_weight=self.conversion_weight,
                pwiser_weight=self.pwiser_weight if task in self.pwiser_tasks else 0.0,
                margin_click=self.margin_click,
                margin_nonclick=self.margin_nonclick,
            )
            for task in TASKS
        }

    def build_model(self, schema: Schema) -> ClickConversionModel:
        """A model with all variables made, initialised from the seed."""
        config = ModelConfig(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(ModelConfig)}
        )
        keras.utils.set_random_seed(self.seed)
        model = MODELS[self.model](schema, config, self.losses())
        features = {}
        if schema.categorical:
            features["categorical"] = tf.zeros([1, len(schema.categorical)], tf.int64)
        if schema.numerical:
            features["numerical"] = tf.zeros([1, len(schema.numerical)])
        model(features)
        return model


def begin(workdir: str | os.PathLike, settings: Settings, schema: Schema) -> None:
    """Makes the folder ready for a run, or checks that the run in it is the one asked for.

    Raises:
      DataError: the folder holds a run with other flags or data.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / FLAGS_FILE
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        schema.save(workdir)
        write_json(path, dataclasses.asdict(settings))
        return
    old_settings, old_schema = load(workdir)
    old, new = dataclasses.asdict(old_settings), dataclasses.asdict(settings)
    for name in (name for name in new if name != "data_dir" and new[name] != old[name]):
        raise DataError(
            f"the run in this folder has --{name}={old[name]}, not {new[name]}: give its own flags "
            "to go on with it, or another --workdir",
            file=path,
        )
    if old_schema.fingerprint != schema.fingerprint:
        raise DataError(
            f"the run in this folder has another data set than {settings.data_dir}: give its own "
            "--data_dir to go on with it, or another --workdir",
            file=path,
        )


def load(workdir: str | os.PathLike) -> tuple[Settings, Schema]:
    """The settings and schema of a run; DataError where the folder holds none."""
    path = pathlib.Path(workdir) / FLAGS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
        return Settings(**{**content, **lists}), Schema.load(workdir)
    except FileNotFoundError:
        raise DataError(
            "no such file; --workdir must be a run of pwiser_tf.train", file=path
        ) from None
    except (ValueError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"not written by pwiser_tf.train ({error})", file=path) from None


def best_checkpoint(workdir: str | os.PathLike, model: ClickConversionModel):
    """The manager of the best epoch's weights."""
    return tf.train.CheckpointManager(
        tf.train.Checkpoint(model=model),
        str(pathlib.Path(workdir) / "best"),
        max_to_keep=1,
        checkpoint_name="epoch",
    )


def load_best(workdir: str | os.PathLike) -> tuple[ClickConversionModel, Settings, Schema]:
    """The model of a run with the weights of its best epoch."""
    settings, schema = load(workdir)
    model = settings.build_model(schema)
    manager = best_checkpoint(workdir, model)
    if not manager.latest_checkpoint:
        raise DataError("no epoch has been finished yet", file=workdir)
    manager.checkpoint.read(
        manager.latest_checkpoint
    ).expect_partial().assert_existing_objects_matched()
    return model, settings, schema


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes a JSON file whole or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def file_errors():
    """Turns what TensorFlow raises for an unwritable or full disk into an OSError, in one line."""
    try:
        yield
    except tf.errors.OpError as error:
        kinds = (tf.errors.PermissionDeniedError, tf.errors.ResourceExhaustedError)
        if isinstance(error, kinds) or "No space left" in error.message:
            raise OSError(error.message.split("\n")[0][:300]) from None
        raise
