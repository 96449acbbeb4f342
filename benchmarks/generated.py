"""The model that several benchmarks measure: 16 categories and 63 numbers, as AliExpress has."""

import pathlib
from collections.abc import Sequence

import numpy as np

from pwiser_tf.schema import Categorical, Numerical, Schema, Shard, Split

# TensorFlow is imported in functions: PyTorch may fail in a process that has it.

NUMBERS = 63
# Of each category, id 0 included.
IDS = tuple(50 * (position + 1) for position in range(16))
_SIZES = {
    "sample": ("shared_bottom", {"bottom_units": (128, 64), "tower_units": (32,)}),
    "mmoe": ("mmoe", {}),
}


def schema(ids: Sequence[int] = IDS, rows: int = 1000, shards: tuple[Shard, ...] = ()) -> Schema:
    """A schema of categories with so many ids each, and of the numbers."""
    return Schema(
        dataset="generated",
        categorical=tuple(
            Categorical(f"c{k}", "int64", range(count - 1)) for k, count in enumerate(ids)
        ),
        numerical=tuple(Numerical(f"n{k}", "identity", 0.5, 0.3, 0.5) for k in range(NUMBERS)),
        click="click",
        conversion="conversion",
        group="search",
        splits={"train": Split(rows, rows // 20, rows // 200, 0, shards)},
    )


def trainable(of: Schema, **config):
    """MTReclib's MMoE, a Keras model compiled with Adam."""
    import pwiser_tf.quiet  # noqa: F401

    # isort: split

    import tf_keras as keras

    from pwiser_tf.models import MODELS, ModelConfig
    from pwiser_tf.tasks import LossConfig

    model = MODELS["mmoe"](of, ModelConfig(name="mmoe", **config), LossConfig())
    model.compile(optimizer=keras.optimizers.legacy.Adam(1e-3))
    return model


def export(folder: pathlib.Path, size: str = "sample") -> None:
    """Saves an untrained model: "sample" as in configs/sample.flags, or "mmoe" as in MTReclib."""
    import pwiser_tf.quiet  # noqa: F401

    # isort: split

    import tensorflow as tf

    from pwiser_tf.export import ServedModel
    from pwiser_tf.models import MODELS, ModelConfig

    architecture, sizes = _SIZES[size]
    config = ModelConfig(name=architecture, embedding_dim=16, **sizes)
    model = MODELS[architecture](schema(), config)
    features = {
        "categorical": np.zeros((1, len(IDS)), np.int64),
        "numerical": np.zeros((1, NUMBERS), np.float32),
    }
    model(features, training=False)
    served = ServedModel(model, schema())
    tf.saved_model.save(served, str(folder), signatures=served.functions)
