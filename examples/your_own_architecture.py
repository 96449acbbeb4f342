"""A new architecture: a cross network (DCN v2) that feeds both towers.

    python examples/your_own_architecture.py own/data cross     # data set, folder for the run

An architecture computes the inputs of the two towers. The base class has the towers, heads and
losses; training, evaluation and export work as for all models. To add it to the package, put the
class into a file in pwiser_tf/models/ and its name into MODELS (docs/guides/extend.md).
"""

import pwiser_tf.quiet

# isort: split

import pathlib
import sys

import tensorflow_recommenders as tfrs

import pwiser_tf
from pwiser_tf.export import export
from pwiser_tf.models import MODELS, ClickConversionModel
from pwiser_tf.models.base import TOWERS


class CrossNetwork(ClickConversionModel):
    """Deep & Cross Network v2 (Wang et al., WWW 2021), one cross layer, then a shared bottom."""

    def __init__(self, schema, config, loss=None):
        super().__init__(schema, config, loss)
        self._shared_encoder = self._encoder()
        self._cross = tfrs.layers.dcn.Cross()
        self._bottom = self._mlp(config.bottom_units)

    def tower_inputs(self, features, training):
        encoded = self._shared_encoder(features)  # [batch, width]
        shared = self._bottom(self._cross(encoded), training)  # [batch, units]
        return dict.fromkeys(TOWERS, shared)


MODELS["cross"] = CrossNetwork


def main() -> None:
    data, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    options = {"embedding_dim": 8, "bottom_units": (32,), "tower_units": (16,)}
    options |= {"batch_size": 512, "epochs": 2}
    config = pwiser_tf.Config.of(data_dir=data, model="cross", **options)
    pwiser_tf.train(config, folder / "run")
    print("exported", export(folder / "run", folder / "models", "cross"))


if __name__ == "__main__":
    main()
