"""pwiser-tf: from exposure logs to served CTR, CVR and CTCVR, trained with the PWiseR loss.

    pwiser_tf.PWiseRLoss()                    the loss, in any Keras 2 model; pwiser() for tensors
    pwiser_tf.Schema.load("data/us")          the schema of a converted data set
    pwiser_tf.train(config, folder)           trains a model; load_run(folder) loads its best epoch
    pwiser_tf.evaluate(...), auc, gauc, ...   exact metrics

Importing this package is fast: it does not import TensorFlow. The names below are imported when
they are first used. The import only makes sure that `tf.keras` will be the Keras 2 line, which
TensorFlow Recommenders needs.
"""

import importlib
import os
import sys

__version__ = "0.1.0"

# Public names and their modules.
_PUBLIC = {
    "DataError": "errors",
    "MODELS": "models",
    "PWiseRLoss": "losses",
    "Schema": "schema",
    "Config": "config",
    "auc": "metrics",
    "evaluate": "evaluation",
    "gauc": "metrics",
    "load_run": "runs",
    "pwiser": "losses",
    "summary": "metrics",
    "train": "training",
}
__all__ = sorted(_PUBLIC)


def _use_keras_2() -> None:
    """Makes `tf.keras` be tf_keras. Raises ImportError when that is no longer possible.

    TensorFlow reads TF_USE_LEGACY_KERAS when `tf.keras` is first used. Setting it later has no
    effect, and mixing Keras 2 and Keras 3 loses variables silently.
    """
    wanted = os.environ.setdefault("TF_USE_LEGACY_KERAS", "1").lower() in ("1", "true")
    tensorflow = sys.modules.get("tensorflow")
    bound = getattr(tensorflow, "__dict__", {}).get("keras") if tensorflow else None
    version = str(getattr(bound, "__version__", "") or "")
    if not wanted or version.startswith("3."):
        raise ImportError(
            "pwiser_tf needs tf.keras to be the Keras 2 line (tf_keras). Import pwiser_tf before "
            "tf.keras is first used, or set TF_USE_LEGACY_KERAS=1 in the environment."
        )


_use_keras_2()


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"pwiser_tf.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
