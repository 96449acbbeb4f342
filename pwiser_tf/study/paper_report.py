"""The report of paper_results' dictionary, as Markdown and as plots."""

import pathlib
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pwiser_tf import metrics, plots, runs
from pwiser_tf.files import write_text
from pwiser_tf.report import number, plural
from pwiser_tf.study.paper_results import MEASURES, Measure, select

_EXPLANATION = """\
Every loss was trained with the same seeds as {baseline}: one seed is one initialisation and one \
order of batches, for all losses. The best epoch is chosen on the validation split alone. The test \
split chose nothing: the test metrics of every epoch were written down as training passed it \
(epochs.png), and the tables show those of the best epoch.

- **difference**: loss less {baseline}, the mean over seeds of the difference within each seed, \
with its 95 percent interval over seeds (t).
- **p seeds**: the paired t-test over seeds; it sees the noise of training. (Wilcoxon's test is in \
results.json.)
- **p rows**: DeLong's paired test of the same mean difference; it sees that the test rows are a \
sample. **seeds +/-**: in how many seeds DeLong's test alone, at 0.05, favours the \
loss or {baseline}.
- **p Holm**: the larger of the two, since a difference has to outlive both, corrected by Holm \
over all {comparisons} AUC comparisons of this report.
- **verdict**: win or loss where p Holm is at most 0.05, tie elsewhere: a tie is what was not \
shown, not what was shown to be equal.
- CTCVR is P(click and conversion given exposure), which the paper and MTReclib call CVR; CVR is \
P(conversion given click), on clicked rows. PCOC is predictions over labels: 1 is calibrated.\
"""


def write(found: dict, folder: pathlib.Path) -> None:
    """Writes what `paper_results.results` gave: results.json, table.md, plots of differences."""
    runs.write_json(folder / "results.json", found)
    if found["comparisons"]:
        plot_differences(found, ("auc",), folder / "differences.png")
        plot_differences(found, ("log_loss", "pcoc"), folder / "calibration.png")
        plot_epochs(found, folder / "epochs.png")
    write_text(folder / "table.md", markdown(found))


# --- Markdown ----------------------------------------------------------------------------------


def markdown(found: dict) -> str:
    """The report as Markdown, from `paper_results.results`."""
    parts = ["# Losses compared", textwrap.indent(found["command"], "    ")]
    compared = select(found["comparisons"], kind="auc")
    parts.append(
        f"{plural(found['seeds'], 'seed')}. "
        + _EXPLANATION.format(baseline=found["baseline"], comparisons=len(compared))
    )
    if compared:
        parts += ["## Wins, ties and losses", _counts_table(found)]
        parts.append(
            f"Test AUC against {found['baseline']}, over all data sets and models. In brackets: "
            "before Holm's correction, where some are chance."
        )
    for name, data in found["data"].items():
        parts += [f"## {name}", _splits_table(data), "### Test metrics at the best epoch"]
        parts.append(_absolute_table(select(found["absolute"], data=name), data, found))
        rows = select(found["comparisons"], data=name)
        if rows:
            parts += [
                f"### AUC minus that of {found['baseline']}, in 1e-4",
                _comparison_table(rows, of_auc=True),
                f"### Other metrics less those of {found['baseline']}",
                _comparison_table(rows, of_auc=False),
                "Over seeds alone: no test over rows. p Holm is over all comparisons of a metric. "
                "Log loss and abs(ln PCOC), PCOC's distance from 1: less is better, and a win.",
            ]
    if compared:
        parts += [
            "![Differences in AUC](differences.png)",
            "![Differences in calibration](calibration.png)",
            "![Differences by epoch](epochs.png)",
        ]
    return "\n\n".join(parts) + "\n"


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _counts_table(found: dict) -> str:
    names = ("wins", "ties", "losses")
    lines = []
    for loss in dict.fromkeys(row["loss"] for row in found["counts"]):
        cells = []
        for tasks in (*((task,) for task in metrics.TASKS), metrics.TASKS):
            shown = []
            for corrected in (True, False):
                rows = select(found["counts"], loss=loss, corrected=corrected)
                sums = (sum(r[name] for r in rows if r["task"] in tasks) for name in names)
                shown.append("/".join(map(str, sums)))
            cells.append("{} ({})".format(*shown))
        lines.append([loss, *cells])
    return _markdown_table(["loss", *(task.upper() for task in metrics.TASKS), "all"], lines)


def _splits_table(data: dict) -> str:
    lines = []
    for name, split in data["splits"].items():
        counts = rows, clicks, conversions = split["rows"], split["clicks"], split["conversions"]
        shares = (clicks, rows), (conversions, clicks), (conversions, rows)
        percents = [f"{100 * part / whole:.3g}%" if whole else "-" for part, whole in shares]
        lines.append([name, *(f"{count:,}" for count in counts), *percents])
    return _markdown_table(
        ["split", "exposures", "clicks", "conversions", "CTR", "CVR", "CTCVR"], lines
    )


def _absolute_table(rows: list[dict], data: dict, found: dict) -> str:
    measures = [m for m in MEASURES.values() if m.kind != "gauc" or data["groups"]]
    header = ["model", "loss", *(measure.title for measure in measures), "best epoch"]
    published = data["published"]
    if published:
        header.append("MTReclib, AUC CTR / CTCVR")
    lines = []
    for row in rows:
        cells = [row["model"], row["loss"]]
        for measure in measures:
            value = row["measures"][measure.title]
            digits = {"log_loss": 6, "pcoc": 3}.get(measure.kind, 4)
            text = number(value["mean"], f".{digits}f")
            if value["deviation"] is not None:
                text += f" ± {value['deviation']:.{digits}f}"
            cells.append(text)
        at_limit = f" ({row['last_epoch_best']} at the limit)" if row["last_epoch_best"] else ""
        cells.append(f"{row['best_epoch']:.1f}{at_limit}")
        if published:
            areas = published.get(row["model"].split(":")[0])
            shown = areas and row["loss"] == found["baseline"]
            cells.append(f"{areas[0]:.4f} / {areas[1]:.4f}" if shown else "")
        lines.append(cells)
    text = _markdown_table(header, lines)
    notes = ["Mean ± standard deviation over seeds."] if found["seeds"] > 1 else []
    if any(row["last_epoch_best"] for row in rows):
        notes.append(
            "At the limit: seeds whose best epoch was the last allowed, and which more epochs "
            "might have improved."
        )
    if published:
        notes.append(
            "MTReclib's numbers are its README's, means of 5 runs with BCE, each stopped early on "
            "the test split."
        )
    return "\n\n".join([text, " ".join(notes)]) if notes else text


def _comparison_table(rows: list[dict], of_auc: bool) -> str:
    """The differences of AUC, with their test over rows, or those of the other measures."""
    rows = [row for row in rows if (row["kind"] == "auc") == of_auc]
    if not of_auc:
        keys = list(MEASURES)
        rows.sort(key=lambda row: keys.index((row["kind"], row["task"])))
    lines = []
    for row in rows:
        measure = MEASURES[row["kind"], row["task"]]
        name = row["task"].upper() if of_auc else measure.difference_title
        cells = [row["model"], row["loss"], name, _difference(row, measure), _p(row["p_seeds"])]
        if of_auc:
            defined = row["seeds_for"] is not None
            seeds = f"+{row['seeds_for']} -{row['seeds_against']}" if defined else "-"
            cells += [_p(row["p_rows"]), seeds]
        lines.append([*cells, _p(row["p_holm"]), row["verdict"] or "-"])
    header = ["model", "loss", "task" if of_auc else "metric", "difference", "p seeds"]
    header += ["p rows", "seeds +/-"] if of_auc else []
    return _markdown_table([*header, "p Holm", "verdict"], lines)


def _difference(row: dict, measure: Measure) -> str:
    if row["mean"] is None:
        return "-"
    mean, low, high = (
        number(row[name] and row[name] * measure.scale, f"+.{measure.digits}f")
        for name in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "<.0001" if value < 0.0001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


# --- plots -------------------------------------------------------------------------------------

# The colors of Okabe and Ito, which color-blind readers can distinguish; markers differ too.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^DvPX"
_ZERO = {"color": "#888888", "linewidth": 1, "zorder": 1.5}


def _style(found: dict, loss: str) -> dict:
    position = list(dict.fromkeys(row["loss"] for row in found["comparisons"])).index(loss)
    color, marker = (values[position % len(values)] for values in (_COLORS, _MARKERS))
    return {"color": color, "marker": marker}


def plot_differences(found: dict, kinds: Sequence[str], path: pathlib.Path) -> None:
    """Draws the differences to the baseline: a row of panels a data set, a column a measure.

    A marker is the mean over seeds, a bar its 95 percent interval, a dot below it each seed.
    Markers are filled where the verdict is a win or loss, hollow where it is a tie.

    Args:
      found: `paper_results.results`. kinds: of the measures to draw. path: of the PNG.
    """
    measures = [measure for measure in MEASURES.values() if measure.kind in kinds]
    entries = list(dict.fromkeys((row["model"], row["loss"]) for row in found["comparisons"]))
    height = 1.2 + (1.3 + 0.28 * len(entries)) * len(found["data"])
    figure = Figure(figsize=(3 + 4 * len(measures), height), dpi=100, layout="constrained")
    figure.suptitle(
        f"Test split, best epoch by validation: loss less {found['baseline']}, "
        f"mean and 95% interval over {plural(found['seeds'], 'seed')}; "
        "filled: significant after Holm's correction",
        fontsize=11,
    )
    panels = figure.subplots(len(found["data"]), len(measures), squeeze=False, sharey=True)
    for line, data in zip(panels, found["data"], strict=True):
        for axes, measure in zip(line, measures, strict=True):
            kind, task = measure.kind, measure.task
            for row in select(found["comparisons"], data=data, kind=kind, task=task):
                position = entries.index((row["model"], row["loss"]))
                _draw_difference(axes, position, row, measure, _style(found, row["loss"]))
            axes.axvline(0, **_ZERO)
            better = "more is better" if measure.sign > 0 else "less is better"
            axes.set_title(f"{data}: {measure.difference_title} ({better})", fontsize=9)
            axes.set_yticks(range(len(entries)), [f"{model}  {loss}" for model, loss in entries])
            axes.set_ylim(len(entries) - 0.5, -0.5)
            axes.tick_params(labelsize=8)
            plots.tidy(axes)
    plots.save(figure, path)


def _draw_difference(axes: Axes, position: int, row: dict, measure: Measure, style: dict) -> None:
    if row["mean"] is None:
        axes.text(0.5, position, "undefined", ha="center", va="center", fontsize=8,
                  transform=axes.get_yaxis_transform())  # fmt: skip
        return
    dots = np.array(row["differences"]) * measure.scale
    # Below the bar, which would hide them.
    below = np.full(len(dots), position + 0.25)
    axes.plot(dots, below, ".", color=style["color"], alpha=0.5, markersize=5)
    if row["low"] is not None:
        low, high = row["low"] * measure.scale, row["high"] * measure.scale
        axes.hlines(position, low, high, color=style["color"], linewidth=2)
    fill = style["color"] if row["verdict"] in ("win", "loss") else "white"
    axes.plot(row["mean"] * measure.scale, position, markersize=7, markerfacecolor=fill, **style)


def plot_epochs(found: dict, path: pathlib.Path) -> None:
    """Draws AUC differences to the baseline by epoch: a row of panels a data set and model, a
    column a task, a line a loss with its 95 percent interval over seeds."""
    lines = list(dict.fromkeys((row["data"], row["model"]) for row in found["fixed_epochs"]))
    size, dpi = (14, 1.6 + 2.6 * len(lines)), 100 if len(lines) < 12 else 70
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    figure.suptitle(
        f"Test AUC minus that of {found['baseline']} at each fixed epoch, in 1e-4, with 95% "
        "interval over seeds; no choice was made by these",
        fontsize=11,
    )
    panels = figure.subplots(len(lines), len(metrics.TASKS), squeeze=False)
    for (data, model), row_of_panels in zip(lines, panels, strict=True):
        for axes, task in zip(row_of_panels, metrics.TASKS, strict=True):
            _draw_epochs(axes, found, data, model, task)
            axes.set_title(f"{data}, {model}: {task.upper()}", fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    plots.save(figure, path)


def _draw_epochs(axes: Axes, found: dict, data: str, model: str, task: str) -> None:
    rows = select(found["fixed_epochs"], data=data, model=model, task=task)
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    for position, loss in enumerate(losses):
        # Beside each other, or the bars of one epoch would hide each other.
        shift = 0.5 * ((position + 0.5) / len(losses) - 0.5)
        points = select(rows, loss=loss)
        epoch = [point["epoch"] + shift for point in points]
        mean, low, high = (
            1e4 * np.array([point[name] for point in points], np.float64)
            for name in ("mean", "low", "high")
        )
        style = _style(found, loss)
        axes.plot(epoch, mean, label=loss, markersize=4, linewidth=1, **style)
        axes.vlines(epoch, low, high, color=style["color"], linewidth=1, alpha=0.6)
    axes.axhline(0, **_ZERO)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch", fontsize=8)
    axes.tick_params(labelsize=8)
    plots.tidy(axes)
