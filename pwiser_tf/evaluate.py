"""Evaluates a trained run: exact metrics on the screen and in metrics.json, and a plot sheet.

python -m pwiser_tf.evaluate --workdir=runs/us
"""

import pwiser_tf.quiet  # noqa: F401

# isort: split

import json
import os
import pathlib

import numpy as np
import tensorflow as tf
from absl import flags
from tqdm import tqdm

from pwiser_tf import data, metrics, report, workdir
from pwiser_tf.command_line import run
from pwiser_tf.errors import DataError
from pwiser_tf.models import ClickConversionModel
from pwiser_tf.schema import SPLITS, Schema

# A choice of speed alone: predictions do not depend on the batch.
_BATCH_SIZE = 8192


def predict(
    model: ClickConversionModel, data_dir: str | os.PathLike, schema: Schema, split: str
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None]:
    """Predictions {"ctr", "cvr", "ctcvr"}, grades, and groups if there are any, all [rows]."""
    rows = data.check(data_dir, schema, split).rows
    predict_batch = tf.function(
        lambda features: model(features, training=False), reduce_retracing=True
    )
    predictions, grades, groups = [], [], []
    try:
        bar = tqdm(total=rows, unit="row", unit_scale=True, desc=split, leave=False, disable=None)
        with bar:
            for features, grade in data.batches(data_dir, schema, split, _BATCH_SIZE):
                group = features.pop("group", None)
                predictions.append({k: v.numpy() for k, v in predict_batch(features).items()})
                grades.append(grade.numpy())
                groups.append(None if group is None else group.numpy())
                bar.update(len(grade))
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
        data.explain(error, data_dir, schema, split)
    joined = {
        name: np.concatenate([batch[name] for batch in predictions]) for name in predictions[0]
    }
    group = np.concatenate(groups) if schema.group else None
    return joined, np.concatenate(grades), group


def evaluate(
    model: ClickConversionModel,
    data_dir: str | os.PathLike,
    schema: Schema,
    split: str,
    output_dir: str | os.PathLike,
    name: str,
) -> dict:
    """Evaluates one split; writes its plot and its entry in metrics.json, prints its table.

    Returns the metrics (see metrics.summary); `name` titles the table's row and the plot.
    """
    predictions, grade, group = predict(model, data_dir, schema, split)
    summary = metrics.summary(grade, predictions, group)
    output_dir = pathlib.Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    plot = output_dir / f"report-{split}.png"
    report.plot(plot, grade, predictions, summary, title=f"{name}, {split} split")
    path = output_dir / workdir.METRICS_FILE
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    workdir.write_json(path, {**content, split: summary})
    print(f"{split} split, {len(grade)} exposures; plots in {plot}")
    print(report.table({name: summary}))
    return summary


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The folder of a run of pwiser_tf.train.", required=True)
    flags.DEFINE_enum("split", "test", SPLITS, "The split to evaluate.")
    flags.DEFINE_string(
        "data_dir", None, "A converted data set with the same schema; default: the run's own."
    )
    flags.DEFINE_string(
        "output_dir", None, "Where metrics.json and the plots go; default: the workdir."
    )


def main() -> None:
    args = flags.FLAGS
    model, settings, schema = workdir.load_best(args.workdir)
    data_dir = args.data_dir or settings.data_dir
    found = Schema.load(data_dir)
    if found.fingerprint != schema.fingerprint:
        raise DataError(
            f"not the schema of {args.workdir}/schema.json, with which the model was trained",
            file=pathlib.Path(data_dir) / "schema.json",
        )
    evaluate(
        model, data_dir, found, args.split, args.output_dir or args.workdir, name=settings.model
    )


if __name__ == "__main__":
    define_flags()
    run(main)
