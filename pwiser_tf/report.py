"""Text tables of the results of `metrics.summary`; `plots` draws them."""

import numpy as np

from pwiser_tf import metrics, planted

TABLE_WIDTH = 100

_MEANING = {
    "ctr": "P(click given exposure)",
    "ctcvr": "P(click and conversion given exposure)",
    "cvr": "P(conversion given click), on clicked rows",
}


def table(summaries: dict[str, dict]) -> str:
    """The metrics as plain text of at most 100 columns: one block per task, one row per model.

    Args:
      summaries: model name to its `metrics.summary`. Names too long for the width are shortened.
        Undefined values and intervals are shown as "-".

    Returns:
      The lines, without a newline at the end.
    """
    header = ["AUC [95% interval]", "GAUC", "log loss", "PCOC", "ECE", "rows", "positives"]
    blocks = {
        task: [[name, *_cells(summary[task])] for name, summary in summaries.items()]
        for task in metrics.TASKS
        if all(task in summary for summary in summaries.values())
    }
    # The same widths in all blocks, so that the columns of all tasks are aligned.
    aligned = iter(_aligned([["", *header], *(row for block in blocks.values() for row in block)]))
    first = next(aligned)
    lines = []
    for task, block in blocks.items():
        lines += ["", f"{task.upper()}: {_MEANING[task]}{_groups(summaries, task)}", first]
        lines += [next(aligned) for _ in block]
    return "\n".join(lines[1:])


def difference_table(grade: np.ndarray, predictions: dict[str, dict[str, np.ndarray]]) -> str:
    """The AUC of each model minus that of the first, on the same rows, as plain text.

    Args:
      grade: integers [n] in {0, 1, 2}.
      predictions: model name to its "ctr", "ctcvr" and "cvr", each float [n].

    Returns:
      One line per task and model, with the 95 percent interval and p-value of the paired DeLong
      test (`metrics.auc_difference`), which is more precise than two separate intervals.
      Undefined values are shown as "-".
    """
    reference, *others = predictions
    width = max(map(len, others))
    lines = [f"AUC minus that of {reference} [95% interval], paired DeLong test"]
    for task in (task for task in metrics.TASKS if task in predictions[reference]):
        measured, labels = metrics.task_labels(grade, task)
        for name in others:
            found = metrics.auc_difference(
                labels[measured],
                np.asarray(predictions[name][task])[measured],
                np.asarray(predictions[reference][task])[measured],
            )
            cells = "{:+.4f} [{:+.4f}, {:+.4f}]  p {:.3f}".format(*found)
            if np.isnan(found[0]):
                cells = "-"
            elif np.isnan(found[1]):
                cells = f"{found[0]:+.4f} [      -,       -]  p     -"
            lines.append(f"{task.upper():<5}  {name:<{width}}  {cells}")
    return "\n".join(lines)


_TRUTH_COLUMNS = {
    "interest AUC": "interest_auc",
    "genuine AUC": "genuine_auc",
    "CTR AUC": "ctr_auc",
    "CTCVR AUC": "ctcvr_auc",
    "interest": "top1_interest",
    "purchase": "top1_purchase",
    "PCOC": "pcoc",
}


def truth_table(results: dict[str, dict[str, dict]]) -> str:
    """The outputs of one or several models against the planted truth, as plain text.

    Args:
      results: model name to its `planted.measure`. Undefined values are shown as "-".

    Returns:
      The lines: one per output and model, and the best possible values.
    """
    rows = [["", *_TRUTH_COLUMNS]]
    for name, measured in results.items():
        for output in (output for output in measured if output != planted.BEST):
            label = output if len(results) == 1 else f"{output} of {name}"
            rows.append([label, *_truth_cells(measured[output])])
    rows.append(["best possible", *_truth_cells(measured[planted.BEST])])
    title = "Against the planted truth; interest and purchase: of the first row of each group, in %"
    return "\n".join([title, *_aligned(rows)])


def _truth_cells(measured: dict) -> list[str]:
    cells = []
    for key in _TRUTH_COLUMNS.values():
        value = measured[key]
        if key.startswith("top1") and value is not None:
            value *= 100
        cells.append(number(value, ".3f" if key == "pcoc" or key.startswith("top1") else ".4f"))
    return cells


_SCORE_COLUMNS = ("click_auc", "click_gauc", "conversion_auc", "conversion_gauc")


def score_table(scores: dict[str, dict]) -> str:
    """Outputs of each model as rankings for clicks and for conversions, and its score, if any.

    Args:
      scores: model name to the `score` of its Evaluation. After a search, the blends that it has
        tried on validation come first.
    """
    blocks = []
    for name, score in scores.items():
        of_model = "" if len(scores) == 1 else f" of {name}"
        if "search" in score:
            best = f"best for conversions: {score['formula']}"
            rows = [["w", "click AUC", "conversion AUC"]]
            for tried in score["search"]:
                found = (number(tried[f"{label}_auc"], ".4f") for label in ("click", "conversion"))
                rows.append([f"{tried['weight']:g}", *found])
            title = f"ctr^(1-w)*ctcvr^w{of_model} on the validation split; {best}"
            blocks += [title, *_aligned(rows), ""]
    rows = [["", "click AUC", "click GAUC", "conversion AUC", "conversion GAUC"]]
    for name, score in scores.items():
        of_model = "" if len(scores) == 1 else f" of {name}"
        measured = {f"{score['formula']}{of_model}": score} if "formula" in score else {}
        measured |= {f"{output}{of_model}": found for output, found in score["outputs"].items()}
        for label, ranked in measured.items():
            rows.append([label, *(number(ranked[key], ".4f") for key in _SCORE_COLUMNS)])
    return "\n".join([*blocks, "Outputs as rankings of all exposures", *_aligned(rows)])


def segment_table(column: str, measured: dict, name: str = "") -> str:
    """The metrics of each value of a segment, as plain text.

    Args:
      column: the segment. measured: its `segments.measure`. name: of the model; "" if it is alone.
    """
    of_model = f", {name}" if name else ""
    header = ["", "rows", "clicks", "CTR AUC", "CTR PCOC"]
    keys = [("clicks", ","), ("ctr_auc", ".4f"), ("ctr_pcoc", ".3f")]
    entries = list(measured["values"])
    if entries and "ctcvr_auc" in entries[0]:
        header += ["conversions", "CTCVR AUC", "CTCVR PCOC"]
        keys += [("conversions", ","), ("ctcvr_auc", ".4f"), ("ctcvr_pcoc", ".3f")]
    if measured["rest"]:
        count = measured["rest"]["value"]
        entries.append({**measured["rest"], "value": plural(count, "other value")})
    rows = [header]
    for entry in entries:
        cells = [number(entry[key], spec) for key, spec in keys]
        rows.append([_printable(entry["value"]), f"{entry['rows']:,}", *cells])
    return "\n".join([f"By {column}{of_model}", *_aligned(rows)])


def _printable(value: str) -> str:
    """A value of the log in a table: an empty one and control characters become visible."""
    return value if value and value.isprintable() else repr(value)


def _aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells, of which the first is a name, as lines; too long names are shortened."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = max(5, min(widths[0], TABLE_WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for name, *values in rows:
        name = name if len(name) <= widths[0] else name[: widths[0] - 2] + ".."
        padded = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return lines


def _cells(result: dict) -> list[str]:
    area = number(result["auc"], ".4f")
    if result["auc_low"] is not None:
        area += f" [{result['auc_low']:.4f}, {result['auc_high']:.4f}]"
    elif result["auc"] is not None:
        area += " [     -,      -]"
    return [
        area,
        number(result["gauc"], ".4f"),
        number(result["log_loss"], ".6f"),
        number(result["pcoc"], ".3f"),
        number(result["calibration_error"], ".6f"),
        f"{result['rows']:,}",
        f"{result['positives']:,}",
    ]


def _groups(summaries: dict[str, dict], task: str) -> str:
    """The number of groups in GAUC. It is the same for all models: they have the same rows."""
    for summary in summaries.values():
        used, skipped = summary[task]["gauc_groups"], summary[task]["gauc_groups_skipped"]
        if used is not None:
            return f"; GAUC: {used:,} groups, {skipped:,} skipped"
    return ""


def number(value: float | None, spec: str, undefined: str = "-") -> str:
    """A number as text, or `undefined` for None."""
    return undefined if value is None else format(value, spec)


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 row", "2 rows"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
