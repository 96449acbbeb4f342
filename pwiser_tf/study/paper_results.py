"""The results of finished runs as one dictionary: metrics, differences, intervals, tests."""

import collections
import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence

from pwiser_tf import metrics
from pwiser_tf.schema import Schema
from pwiser_tf.study import paired
from pwiser_tf.study.paper_runs import Run, read_predictions

# MTReclib's README: test AUC of CTR and of CTCVR (which it calls CVR), the mean of 5 runs, each
# stopped early on the test split itself.
_PUBLISHED = """
                NL              ES              FR              US
single_task     0.7222 0.8590   0.7266 0.8855   0.7259 0.8737   0.7061 0.8637
shared_bottom   0.7228 0.8511   0.7287 0.8866   0.7245 0.8700   0.7029 0.8698
omoe            0.7254 0.8611   0.7253 0.8859   0.7257 0.8781   0.7049 0.8701
mmoe            0.7234 0.8606   0.7285 0.8898   0.7216 0.8811   0.7043 0.8758
ple             0.7292 0.8591   0.7273 0.8913   0.7276 0.8805   0.7138 0.8675
aitm            0.7240 0.8577   0.7290 0.8885   0.7236 0.8763   0.7048 0.8730
metaheac        0.7263 0.8615   0.7299 0.8883   0.7249 0.8813   0.7089 0.8743
"""
_COUNTRIES, *_ROWS = (line.split() for line in _PUBLISHED.strip().split("\n"))
PUBLISHED = {
    country: {row[0]: tuple(map(float, row[1 + 2 * k : 3 + 2 * k])) for row in _ROWS}
    for k, country in enumerate(_COUNTRIES)
}


@dataclasses.dataclass(frozen=True)
class Measure:
    """A column of the table: one metric of one task.

    Attributes:
      kind: the metric's key in `metrics.summary`; task: the task's.
      scale: what a difference is multiplied by to be shown; digits: and its decimals.
      sign: 1 where more is better, -1 where less is.
    """

    kind: str
    task: str
    scale: float = 1e4
    digits: int = 0
    sign: int = 1

    @property
    def title(self) -> str:
        names = {"auc": "AUC", "gauc": "GAUC", "log_loss": "log loss", "pcoc": "PCOC"}
        return f"{names[self.kind]} {self.task.upper()}"

    @property
    def difference_title(self) -> str:
        name = f"abs(ln PCOC) {self.task.upper()}" if self.kind == "pcoc" else self.title
        return name if self.scale == 1 else f"{name}, in 1e-{round(math.log10(self.scale))}"

    def value(self, summary: dict) -> float | None:
        """The metric itself; None where undefined."""
        return summary[self.task][self.kind]

    def compared(self, summary: dict) -> float | None:
        """What differences are taken of: the metric, but of PCOC its distance from 1, |ln PCOC|,
        which finds predictions that are twice and half the truth equally wrong."""
        value = self.value(summary)
        if self.kind != "pcoc" or value is None:
            return value
        return abs(math.log(value)) if value > 0 else None


MEASURES = {
    (measure.kind, measure.task): measure
    for measure in (
        *(Measure("auc", task) for task in metrics.TASKS),
        *(Measure("gauc", task) for task in ("ctr", "ctcvr")),
        *(Measure("log_loss", task, 1e5, 1, -1) for task in ("ctr", "ctcvr")),
        *(Measure("pcoc", task, 1, 3, -1) for task in ("ctr", "ctcvr")),
    )
}


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run and its result (see paper_runs)."""

    run: Run
    result: dict


def results(
    finished: Sequence[Finished],
    schemas: dict[str, Schema],
    command: str,
    published: str | None,
) -> dict:
    """The content of the table, as values that JSON can hold.

    Args:
      finished: all runs of all data sets, models, losses and seeds; the first loss is the baseline.
      schemas: of the data sets, by name. command: what made the table.
      published: the country of MTReclib's numbers; None takes it from each schema's notes.

    Returns:
      "command", "baseline", "seeds"; "data": a data set's name to its counts; "runs": each run's
      metrics; "absolute": means over seeds; "comparisons": differences to the baseline with their
      tests; "fixed_epochs": AUC differences by epoch; "counts": wins, ties and losses by loss.
    """
    table: dict[tuple, list[Finished]] = {}
    for entry in finished:
        table.setdefault(tuple(_names(entry.run).values()), []).append(entry)
    baseline = finished[0].run.loss
    pairs = [
        (entries, table[data, model, baseline])
        for (data, model, loss), entries in table.items()
        if loss != baseline
    ]
    comparisons = []
    for entries, others in pairs:
        comparisons += _comparisons(entries, others, schemas[entries[0].run.data])
    _correct(comparisons)
    return {
        "command": command,
        "baseline": baseline,
        "seeds": len(table[next(iter(table))]),
        "data": {name: _description(schema, published) for name, schema in schemas.items()},
        "absolute": [_absolute(entries) for entries in table.values()],
        "comparisons": comparisons,
        "counts": _counts(comparisons),
        "fixed_epochs": [row for pair in pairs for row in _fixed_epochs(*pair)],
        "runs": [
            {**_names(entry.run), "seed": entry.run.settings.training.seed, **entry.result}
            for entry in finished
        ],
    }


def select(rows: Sequence[dict], **wanted) -> list[dict]:
    """The rows that have the wanted values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _names(run: Run) -> dict:
    return {"data": run.data, "model": run.model, "loss": run.loss}


def _description(schema: Schema, published: str | None) -> dict:
    country = published or (schema.notes.get("country") if schema.dataset == "aliexpress" else None)
    return {
        "dataset": schema.dataset,
        "groups": bool(schema.group),
        "splits": {
            name: {"rows": split.rows, "clicks": split.clicks, "conversions": split.conversions}
            for name, split in schema.splits.items()
        },
        "published": PUBLISHED.get(country),
    }


def _absolute(entries: list[Finished]) -> dict:
    """The mean over seeds of each measure, and the standard deviation, where they are defined."""
    measures = {}
    for measure in MEASURES.values():
        values = [measure.value(entry.result["test"]) for entry in entries]
        defined = None not in values
        measures[measure.title] = {
            "mean": statistics.fmean(values) if defined else None,
            "deviation": statistics.stdev(values) if defined and len(values) > 1 else None,
        }
    return {
        **_names(entries[0].run),
        "measures": measures,
        "best_epoch": statistics.fmean(entry.result["best_epoch"] for entry in entries),
        "last_epoch_best": sum(
            entry.result["best_epoch"] == entry.run.settings.training.epochs for entry in entries
        ),
    }


def _comparisons(entries: list[Finished], baseline: list[Finished], schema: Schema) -> list[dict]:
    """A loss against the baseline: a row a measure."""
    rows = []
    for (kind, task), measure in MEASURES.items():
        if kind == "gauc" and not schema.group:
            continue
        pairs = [
            (measure.compared(a.result["test"]), measure.compared(b.result["test"]))
            for a, b in zip(entries, baseline, strict=True)
        ]
        row = {**_names(entries[0].run), "kind": kind, "task": task, **_over_seeds(pairs)}
        if kind == "auc":
            row |= _over_rows(_placements(entries, task), _placements(baseline, task))
            row["p_value"] = paired.both(row["p_seeds"], row["p_rows"])
        rows.append(row)
    return rows


def _over_seeds(pairs: list[tuple[float | None, float | None]]) -> dict:
    """The differences and their tests over seeds. A measure that one seed lacks has none."""
    if any(None in pair for pair in pairs):
        names = ("mean", "low", "high", "p_seeds", "p_wilcoxon", "p_value")
        return {"differences": None, **dict.fromkeys(names)}
    differences = [a - b for a, b in pairs]
    estimate = paired.over_seeds(differences)
    return {
        "differences": differences,
        "mean": estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
        "p_seeds": estimate.p_value,
        "p_wilcoxon": paired.wilcoxon(differences),
        "p_value": estimate.p_value,
    }


def _placements(entries: list[Finished], task: str) -> list[tuple | None]:
    found = []
    for entry in entries:
        predictions = read_predictions(entry.run)
        measured, labels = metrics.task_labels(predictions["grade"], task)
        found.append(metrics.placements(labels[measured], predictions[task][measured]))
    return found


def _over_rows(a: list, b: list) -> dict:
    """DeLong's test of the mean difference, and of each seed's own."""
    if None in a or None in b:
        return dict.fromkeys(("rows_low", "rows_high", "p_rows", "seeds_for", "seeds_against"))
    mean = paired.over_rows(a, b)
    single = [paired.over_rows([x], [y]) for x, y in zip(a, b, strict=True)]
    clear = [one for one in single if one.p_value is not None and one.p_value <= 1 - paired.LEVEL]
    return {
        "rows_low": mean.low,
        "rows_high": mean.high,
        "p_rows": mean.p_value,
        "seeds_for": sum(one.mean > 0 for one in clear),
        "seeds_against": sum(one.mean < 0 for one in clear),
    }


def _correct(comparisons: list[dict]) -> None:
    """Adds Holm's p-values and the verdicts; each kind of measure is a family of its own."""
    for kind in dict.fromkeys(kind for kind, _ in MEASURES):
        family = select(comparisons, kind=kind)
        adjusted = paired.holm([row["p_value"] for row in family])
        for row, p_value in zip(family, adjusted, strict=True):
            gain = MEASURES[kind, row["task"]].sign * (row["mean"] or 0.0)
            row["p_holm"] = p_value
            row["verdict"] = paired.verdict(gain, p_value)
            row["uncorrected"] = paired.verdict(gain, row["p_value"])


def _counts(comparisons: list[dict]) -> list[dict]:
    """Verdicts on AUC by loss and task, over all data sets and models."""
    losses = dict.fromkeys(row["loss"] for row in comparisons)
    counts = []
    for loss, task, key in itertools.product(losses, metrics.TASKS, ("verdict", "uncorrected")):
        found = collections.Counter(
            row[key] for row in select(comparisons, loss=loss, kind="auc", task=task)
        )
        names = {"wins": "win", "ties": "tie", "losses": "loss", "undefined": None}
        numbers = {name: found[value] for name, value in names.items()}
        counts.append({"loss": loss, "task": task, "corrected": key == "verdict", **numbers})
    return counts


def _fixed_epochs(entries: list[Finished], baseline: list[Finished]) -> list[dict]:
    """AUC differences at each epoch that every seed of both losses reached.

    Runs end at different epochs; later ones would compare only the seeds that went on.
    """
    shared = min(len(entry.result["epochs"]) for entry in (*entries, *baseline))
    found = []
    for task, epoch in itertools.product(metrics.TASKS, range(shared)):
        pairs = [
            tuple(x.result["epochs"][epoch]["test"][task]["auc"] for x in pair)
            for pair in zip(entries, baseline, strict=True)
        ]
        estimate = _over_seeds(pairs)
        row = {**_names(entries[0].run), "task": task, "epoch": epoch + 1}
        found.append(row | {name: estimate[name] for name in ("mean", "low", "high")})
    return found
