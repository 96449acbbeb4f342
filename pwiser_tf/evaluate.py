"""Evaluates trained runs: prints exact metrics, writes them to metrics.json, and draws plots.

pwiser evaluate --workdir=runs/us
"""

import pwiser_tf.quiet  # noqa: F401

# isort: split

import pathlib

import numpy as np
from absl import flags

from pwiser_tf import report, runs
from pwiser_tf.command_line import run
from pwiser_tf.errors import DataError
from pwiser_tf.evaluation import Evaluation, evaluate, plots_module
from pwiser_tf.schema import SPLITS, Schema
from pwiser_tf.score import SEARCH, Score


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_list("workdir", None, "One or several folders of runs.", required=True)
    flags.DEFINE_enum("split", "test", SPLITS, "The split to evaluate.")
    flags.DEFINE_string(
        "data_dir", None, "A converted data set with the same schema. Default: the run's data set."
    )
    flags.DEFINE_string(
        "output_dir",
        None,
        "The folder for metrics and plots. Default: the workdir. Required for several runs: each "
        "gets a subfolder with its name, and comparison.png compares them.",
    )
    flags.DEFINE_string(
        "truth",
        None,
        "A file with the planted probabilities of a generated log, such as truth-test.parquet of "
        "pwiser sample --world; predictions are then measured against them too.",
    )
    flags.DEFINE_string(
        "score",
        None,
        "A score to rank by, measured for clicks and conversions: a product of powers of ctr, cvr, "
        "ctcvr and, if the model has it, interest, such as ctr^0.75*ctcvr^0.25. search: the "
        "ctr^(1-w)*ctcvr^w with the best conversion AUC on validation.",
    )
    flags.DEFINE_list(
        "segments",
        [],
        "Segment columns or categorical features, such as country,slot: metrics for each value.",
    )


def main() -> None:
    """Evaluates the runs that the flags name."""
    args = flags.FLAGS
    if len(args.workdir) > 1 and not args.output_dir:
        raise DataError("several runs need an --output_dir")
    score = args.score or None
    if score and score != SEARCH:
        score = Score.parse(score)
    with runs.file_errors():
        evaluations = {}
        for folder in map(pathlib.Path, args.workdir):
            name = folder.resolve().name
            if name in evaluations:
                raise DataError(f"two runs are named {name}; their folders need different names")
            evaluations[name] = _evaluate_run(folder, name, score)
        first, *others = evaluations.values()
        # Checked before anything is written.
        if any(not np.array_equal(first.grade, other.grade) for other in others):
            raise DataError("the runs have different data and cannot be compared; nothing written")
        for (name, evaluation), folder in zip(evaluations.items(), args.workdir, strict=True):
            output = pathlib.Path(args.output_dir or folder)
            evaluation.write(output / name if len(evaluations) > 1 else output)
        summaries = {name: evaluation.summary for name, evaluation in evaluations.items()}
        print(report.table(summaries))
        if any(evaluation.score for evaluation in evaluations.values()):
            print()
            print(report.score_table({name: e.score for name, e in evaluations.items() if e.score}))
        for name, evaluation in evaluations.items():
            for column, found in (evaluation.segments or {}).items():
                print()
                print(report.segment_table(column, found, name if others else ""))
        if others:
            predictions = {name: evaluation.predictions for name, evaluation in evaluations.items()}
            print()
            print(report.difference_table(first.grade, predictions))
        if args.truth:
            print()
            print(report.truth_table({name: e.truth for name, e in evaluations.items()}))
        if others and (plots := plots_module()):
            plots.plot_comparison(pathlib.Path(args.output_dir) / "comparison.png", summaries)


def _evaluate_run(folder: pathlib.Path, name: str, score: Score | str | None) -> Evaluation:
    """Evaluates the best epoch of a run on its data set, or on another with the same schema."""
    args = flags.FLAGS
    model, config, schema = runs.load_run(folder)
    data_dir = args.data_dir or config.data_dir
    found = Schema.load(data_dir)
    if found.fingerprint != schema.fingerprint:
        raise DataError(
            f"differs from {folder / 'schema.json'}, with which the model was trained",
            file=pathlib.Path(data_dir) / "schema.json",
        )
    return evaluate(model, data_dir, found, args.split, name, args.truth, score, args.segments)


if __name__ == "__main__":
    define_flags()
    run(main)
