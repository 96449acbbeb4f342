"""Plots of the results of `metrics.summary`, as PNG files. They need the extra `plots`.

Figures use `matplotlib.figure.Figure` directly, without pyplot: no global state, no window and no
backend. The colours are those of Okabe and Ito, which colour-blind readers can distinguish; line
styles and markers differ too.
"""

import os

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pwiser_tf import metrics
from pwiser_tf.files import whole_file
from pwiser_tf.report import number, plural

_TASK_STYLE = {
    "ctr": {"color": "#0072B2", "linestyle": "-"},
    "ctcvr": {"color": "#D55E00", "linestyle": "--"},
    "cvr": {"color": "#009E73", "linestyle": "-."},
}
_GRADES = ("exposure only", "click, no conversion", "conversion")
_GRADES_OF_CTR_ONLY = ("exposure only", "click")
_GRADE_STYLE = (
    {"color": "#7F7F7F", "linestyle": ":"},
    {"color": "#E69F00", "linestyle": "-"},
    {"color": "#000000", "linestyle": "--"},
)
_FAINT = "#BBBBBB"

# With fewer rows a histogram is mostly noise, so each row is drawn as a tick.
_FEWEST_FOR_HISTOGRAM = 30
# Reliability has logarithmic axes if a rate is below this.
_SMALL_RATE = 0.05
# The mean number of positives in a bin of reliability; with fewer, intervals are very wide.
_POSITIVES_PER_BIN = 5


def plot_evaluation(
    path: str | os.PathLike,
    grade: np.ndarray,
    predictions: dict[str, np.ndarray],
    summary: dict[str, dict],
    title: str,
) -> None:
    """Draws the plots of one model: ROC, scores by grade, and reliability of each task.

    Args:
      path: of the PNG, which is replaced atomically.
      grade: integers [n] in {0, 1, 2}.
      predictions: "ctr", "ctcvr" and "cvr", each float [n] in [0, 1].
      summary: the result of `metrics.summary` for these.
      title: of the figure, such as the model's name and the split.

    Raises:
      ValueError: as `metrics.summary`.
      OSError: the file cannot be written.
    """
    grade = np.asarray(grade)
    counts = [plural(summary["ctr"]["rows"], "exposure")]
    for task, noun in (("ctr", "click"), ("ctcvr", "conversion")):
        if task in summary:
            counts.append(plural(summary[task]["positives"], noun))
    rows = 1 if len(summary) == 1 else 2
    figure = Figure(figsize=(15, 5 * rows - 0.5), dpi=110, layout="constrained")
    figure.suptitle(f"{title}\n{', '.join(counts)}", fontsize=14)
    panels = iter(figure.subplots(rows, 3).ravel())
    _draw_roc(next(panels), grade, predictions, summary)
    for task in (task for task in ("ctr", "ctcvr") if task in summary):
        grades = _GRADES if "ctcvr" in summary else _GRADES_OF_CTR_ONLY
        _draw_scores(next(panels), grade, np.asarray(predictions[task]), task, grades)
    for axes, task in zip(panels, summary, strict=True):
        measured, labels = metrics.task_labels(grade, task)
        probabilities = np.asarray(predictions[task])[measured]
        bins = int(np.clip(summary[task]["positives"] // _POSITIVES_PER_BIN, 2, 20))
        curve = metrics.reliability(labels[measured], probabilities, bins)
        _draw_reliability(axes, curve, task, summary[task])
    save(figure, path)


def plot_comparison(path: str | os.PathLike, summaries: dict[str, dict]) -> None:
    """Draws the AUC of several models with 95 percent intervals, one panel per task.

    Args:
      path: of the PNG, which is replaced atomically.
      summaries: model name to its `metrics.summary`; the others are compared with the first.

    Raises:
      OSError: the file cannot be written.
    """
    names = list(summaries)
    figure = Figure(figsize=(15, 1.8 + 0.55 * len(names)), dpi=110, layout="constrained")
    figure.supxlabel(
        "Each model with its own 95% interval. On the same rows, differences between models are "
        "more certain than these intervals suggest.",
        fontsize=10,
    )
    tasks = [task for task in metrics.TASKS if all(task in s for s in summaries.values())]
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        reference = summaries[names[0]][task]["auc"] if names else None
        if reference is not None:
            axes.axvline(reference, color=_FAINT, linestyle="--", linewidth=1, zorder=0)
        for position, name in enumerate(names):
            result = summaries[name][task]
            _draw_interval(axes, position, result, _TASK_STYLE[task]["color"])
        axes.set_title(_task_title(task, summaries[names[0]][task] if names else None), fontsize=11)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel("AUC")
        axes.margins(x=0.12)
        tidy(axes)
        axes.grid(axis="y", visible=False)
    save(figure, path)


def _draw_roc(axes: Axes, grade, predictions, summary) -> None:
    axes.plot([0, 1], [0, 1], color=_FAINT, linewidth=1, zorder=0)
    for task in summary:
        measured, labels = metrics.task_labels(grade, task)
        scores = np.asarray(predictions[task])[measured]
        rates = metrics.roc_curve(labels[measured], scores)
        result = summary[task]
        label = f"{task.upper()}: AUC {number(result['auc'], '.4f', 'undefined')}"
        if result["auc_low"] is not None:
            label += f" [{result['auc_low']:.4f}, {result['auc_high']:.4f}]"
        axes.plot(*rates, label=label, linewidth=1.8, **_TASK_STYLE[task])
    axes.set(
        title="ROC, with AUC and its 95% interval",
        xlabel="false positive rate",
        ylabel="true positive rate",
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.01),
    )
    axes.set_aspect("equal", adjustable="box")
    axes.legend(loc="lower right", fontsize=9, framealpha=0.9)
    tidy(axes)


def _draw_scores(axes: Axes, grade, probabilities, task: str, grades: tuple[str, ...]) -> None:
    low, high = _score_range(grade, probabilities)
    # Clipped as logarithms: 10**low is rounded and could be outside the range of the histogram.
    logarithm = np.log10(np.maximum(probabilities, np.finfo(np.float64).tiny, dtype=np.float64))
    logarithm = np.clip(logarithm, low, high)
    by_grade = [logarithm[grade == level] for level in range(len(grades))]
    few = [level for level in range(len(grades)) if len(by_grade[level]) < _FEWEST_FOR_HISTOGRAM]
    top = 0.0
    for level, values in enumerate(by_grade):
        style, label = _GRADE_STYLE[level], f"{grades[level]} ({len(values):,})"
        if level not in few:
            # An odd number of bins: if all scores are equal, the bar is centred on them.
            bins = int(np.clip(np.sqrt(len(values)), 8, 60)) | 1
            density, edges = np.histogram(values, bins=bins, range=(low, high), density=True)
            axes.stairs(density, 10**edges, label=label, linewidth=1.8, **style)
            axes.stairs(density, 10**edges, fill=True, alpha=0.12, color=style["color"])
            top = max(top, density.max())
            continue
        # Each grade has its own height, so that ticks do not cover each other.
        lane = few.index(level) + 1
        axes.plot(
            10**values,
            np.full(len(values), lane * (0.18 if len(few) == len(grades) else 0.05)),
            "|",
            markersize=14,
            markeredgewidth=1.6,
            color=style["color"],
            label=label + (": one tick per row" if len(values) else ""),
            transform=axes.get_xaxis_transform(),
        )
    margin = 0.02 * (high - low)
    axes.set(
        title=f"Predicted {task.upper()} by what happened",
        xlabel=f"predicted {task.upper()} (logarithmic)",
        xscale="log",
        xlim=(10 ** (low - margin), 10 ** (high + margin)),
        ylim=(0, 1.3 * top or 1),
    )
    if top:
        axes.set_ylabel("density per factor of ten")
    else:
        axes.set_yticks([])
    plain_ticks(axes.xaxis, high - low)
    axes.legend(loc="upper left", fontsize=9, framealpha=0.9, markerscale=0.7)
    tidy(axes)


def _score_range(grade, probabilities) -> tuple[float, float]:
    """The range of log10 of the scores, at most 9 wide. The lowest 0.1 percent of a grade may be
    below the range and is drawn at its edge."""
    lows, highs = [], []
    for level in range(3):
        values = probabilities[(grade == level) & (probabilities > 0)]
        if len(values):
            lows.append(float(np.log10(np.quantile(values, 0.001))))
            highs.append(float(np.log10(values.max())))
    low, high = (max(min(lows), max(highs) - 9), max(highs)) if lows else (-1.0, 0.0)
    return (low, high) if high - low > 0.1 else (low - 0.3, high + 0.3)


def _draw_reliability(axes: Axes, curve: metrics.Reliability, task: str, result: dict) -> None:
    name, style = task.upper(), _TASK_STYLE[task]
    axes.set(
        title=f"Reliability of {name}: PCOC {number(result['pcoc'], '.3f', 'undefined')}",
        xlabel=f"predicted {name}, mean of a bin",
        ylabel=f"observed {name}, with 95% interval",
    )
    tidy(axes)
    if not len(curve.rows):
        axes.text(0.5, 0.5, "no rows", ha="center", transform=axes.transAxes)
        return
    low, high = _reliability_range(curve)
    if low > 0:
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            plain_ticks(axis, np.log10(high / low))
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.set_aspect("equal", adjustable="box")
    axes.plot([low, high], [low, high], color=_FAINT, linewidth=1, zorder=0, label="calibrated")
    predicted = np.maximum(curve.predicted, low)
    observed = np.maximum(curve.observed, low)
    axes.vlines(predicted, np.maximum(curve.low, low), curve.high, color=style["color"], alpha=0.6)
    none = curve.observed == 0
    fewest, most = curve.rows.min(), curve.rows.max()
    rows = plural(most, "row") if fewest == most else f"{fewest:,} to {most:,} rows"
    # Markers at the edge are drawn completely and do not affect the layout.
    whole = {"clip_on": False, "in_layout": False, "linestyle": "", "color": style["color"]}
    label = f"{plural(len(curve.rows), 'bin')} of {rows}"
    axes.plot(predicted[~none], observed[~none], marker="o", markersize=5, label=label, **whole)
    if none.any():
        hollow = {"marker": "v", "markersize": 7, "markerfacecolor": "white"}
        axes.plot(predicted[none], observed[none], label="none observed", **hollow, **whole)
    axes.legend(loc="upper left", fontsize=9, framealpha=0.9)


def _reliability_range(curve: metrics.Reliability) -> tuple[float, float]:
    """The common range of both axes: from 0 for linear axes, from above 0 for logarithmic ones."""
    rates = np.concatenate([curve.predicted, curve.observed])
    rates = rates[rates > 0]
    if not len(rates) or rates.min() >= _SMALL_RATE:
        return 0.0, min(1.0, 1.1 * max(rates.max(initial=0.0), curve.high.max()))
    return max(rates.min() / 2, 1e-9), min(1.0, 1.5 * max(rates.max(), curve.high.max()))


def _draw_interval(axes: Axes, position: int, result: dict, color: str) -> None:
    """Draws the AUC of one model in a comparison."""
    if result["auc"] is None:
        axes.text(0.5, position, "undefined", ha="center", va="center", fontsize=9, color="#555555",
                  transform=axes.get_yaxis_transform())  # fmt: skip
        return
    if result["auc_low"] is not None:
        axes.hlines(position, result["auc_low"], result["auc_high"], color=color, linewidth=2)
    axes.plot(result["auc"], position, "o", color=color, markersize=7)
    axes.annotate(
        f"{result['auc']:.4f}",
        (result["auc"], position),
        xytext=(0, 7),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )


def _task_title(task: str, result: dict | None) -> str:
    if not result:
        return task.upper()
    return f"{task.upper()}: {plural(result['positives'], 'positive')} in {result['rows']:,} rows"


def plain_ticks(axis: Axis, decades: float) -> None:
    """Labels a logarithmic axis with a few plain numbers, whatever its length."""
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def tidy(axes: Axes) -> None:
    """Applies the common style of all panels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Writes the figure as a PNG, whole or not at all."""
    with whole_file(path) as aside:
        figure.savefig(aside, format="png")
