"""The result of a search: a CSV of its trials, and a plot.

The plot has the course of the search of each loss, the importance of each option (PED-ANOVA, as
Optuna computes it: how much an option's distribution among the best trials differs from that among
all), and a panel an option: its values against the values of the trials.
"""

import math
import os

import optuna
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from pwiser_tf import plots
from pwiser_tf.files import whole_file
from pwiser_tf.tasks import TASKS

_STYLES = ({"color": "#7F7F7F", "marker": "s"}, {"color": "#0072B2", "marker": "o"})
_VALUE = "validation: mean of the AUCs"
_COLUMNS = 3
# With fewer complete trials importances are chance.
_FEWEST_FOR_IMPORTANCE = 10
# The panels end this many times the distance from best to median below the best: otherwise one
# useless trial hides the differences among the good ones.
_DEPTH = 4


def outcome(trial: FrozenTrial) -> str:
    """How a finished trial ended: "complete", "pruned" or "diverged"."""
    if trial.user_attrs.get("diverged"):
        return "diverged"
    return "complete" if trial.state == TrialState.COMPLETE else "pruned"


def best_value(trial: FrozenTrial) -> float | None:
    """The monitored value of a trial's best epoch; None where it finished none."""
    return max(trial.intermediate_values.values(), default=None)


def write_csv(path: str | os.PathLike, studies: dict[str, optuna.Study]) -> None:
    """Writes a row for each finished trial of each loss's study."""
    rows = [
        {
            "loss": loss,
            "trial": trial.number + 1,
            "outcome": outcome(trial),
            "monitored": best_value(trial),
            **{f"{task}_auc": trial.user_attrs.get(f"{task}_auc") for task in TASKS},
            "best_epoch": trial.user_attrs.get("best_epoch"),
            "epochs": len(trial.intermediate_values),
            **trial.params,
        }
        for loss, study in studies.items()
        for trial in _finished(study)
    ]
    with whole_file(path) as aside:
        # Object columns: otherwise an epoch becomes 3.0 where another row has none.
        pd.DataFrame(rows, dtype=object).to_csv(aside, index=False)


def plot_studies(path: str | os.PathLike, studies: dict[str, optuna.Study]) -> None:
    """Draws the course of the search, the importances, and a panel an option, as a PNG.

    Args:
      studies: loss to its study, of two losses at most; each has a finished trial.
    """
    options = list(dict.fromkeys(name for s in studies.values() for name in _distributions(s)))
    rows = math.ceil((2 + len(options)) / _COLUMNS)
    figure = Figure(figsize=(5 * _COLUMNS, 4.2 * rows), dpi=110, layout="constrained")
    counts = ", ".join(f"{loss} {len(_finished(study))}" for loss, study in studies.items())
    figure.suptitle(
        f"Search on the validation split; trials: {counts}\n"
        "The best of many is better here than it will be elsewhere.",
        fontsize=14,
    )
    course, importance, *panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    lowest = _lowest(studies)
    _draw_course(course, studies, lowest)
    _draw_importance(importance, studies)
    for axes, name in zip(panels, options, strict=False):
        _draw_option(axes, name, studies, lowest)
        axes.set_ylim(course.get_ylim())
    for axes in panels[len(options) :]:
        axes.set_axis_off()
    for axes in (course, *panels[1 : len(options) : _COLUMNS]):
        axes.set_ylabel(_VALUE)
    plots.save(figure, path)


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(states=(TrialState.COMPLETE,))


def _distributions(study: optuna.Study) -> dict[str, optuna.distributions.BaseDistribution]:
    return {key: value for t in _finished(study) for key, value in t.distributions.items()}


def _lowest(studies: dict[str, optuna.Study]) -> float | None:
    """The lower limit of the panels; None where they need none."""
    values = sorted(trial.value for study in studies.values() for trial in _complete(study))
    if not values or values[-1] == values[len(values) // 2]:
        return None
    return values[-1] - _DEPTH * (values[-1] - values[len(values) // 2])


def _draw_course(axes: Axes, studies: dict[str, optuna.Study], lowest: float | None) -> None:
    for (loss, study), style in zip(studies.items(), _STYLES, strict=False):
        trials = [trial for trial in _finished(study) if best_value(trial) is not None]
        numbers = [trial.number + 1 for trial in trials]
        _draw_points(axes, numbers, trials, lowest, style)
        best, steps = math.nan, []
        for trial in trials:
            if trial.state == TrialState.COMPLETE and not trial.value <= best:
                best = trial.value
            steps.append(best if lowest is None or not best < lowest else lowest)
        axes.step(numbers, steps, where="post", color=style["color"], linewidth=1)
        axes.plot([], [], label=f"{loss}, and its best so far", **style)
    axes.plot([], [], "x", color="#555555", label="pruned")
    if lowest is not None:
        hollow = {"marker": "o", "markerfacecolor": "white", "linestyle": ""}
        axes.plot([], [], color="#555555", label="hollow: lies below the panel", **hollow)
    axes.set(title="The course of the search", xlabel="trial")
    # Above the best there is nothing to cover.
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.35 * (high - low))
    axes.legend(loc="upper left", fontsize=9, framealpha=0.9)
    plots.tidy(axes)


def _draw_importance(axes: Axes, studies: dict[str, optuna.Study]) -> None:
    axes.set_title("Importance, by PED-ANOVA; without pruned trials")
    bars = []
    for (loss, study), style in zip(studies.items(), _STYLES, strict=False):
        if len(_complete(study)) >= _FEWEST_FOR_IMPORTANCE and len(_distributions(study)) > 1:
            found = optuna.importance.get_param_importances(study)
            bars += [(f"{name} ({loss})", share, style["color"]) for name, share in found.items()]
    if not bars:
        text = f"needs two options and {_FEWEST_FOR_IMPORTANCE}\ncomplete trials"
        axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    names, shares, colors = zip(*bars, strict=True)
    axes.barh(range(len(names)), shares, color=colors)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("share of the importance")
    plots.tidy(axes)
    axes.grid(axis="y", visible=False)


def _draw_option(
    axes: Axes, name: str, studies: dict[str, optuna.Study], lowest: float | None
) -> None:
    for study, style in zip(studies.values(), _STYLES, strict=False):
        distribution = _distributions(study).get(name)
        if distribution is None:
            continue
        trials = [t for t in _finished(study) if name in t.params and best_value(t) is not None]
        places = [trial.params[name] for trial in trials]
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            places = [distribution.choices.index(place) for place in places]
            axes.set_xticks(range(len(distribution.choices)), distribution.choices)
            axes.set_xlim(-0.5, len(distribution.choices) - 0.5)
        elif distribution.log:
            axes.set(xscale="log", xlim=(distribution.low / 1.2, distribution.high * 1.2))
            plots.plain_ticks(axes.xaxis, math.log10(distribution.high / distribution.low))
        else:
            margin = 0.05 * (distribution.high - distribution.low)
            axes.set_xlim(distribution.low - margin, distribution.high + margin)
        _draw_points(axes, places, trials, lowest, style)
    axes.set(title=name, xlabel=f"{name}, over the searched range")
    plots.tidy(axes)


def _draw_points(axes: Axes, places: list, trials: list, lowest: float | None, style: dict) -> None:
    """Complete trials as marks, pruned ones as crosses; those below `lowest` at its height."""
    for place, trial in zip(places, trials, strict=True):
        value = best_value(trial)
        complete = trial.state == TrialState.COMPLETE
        axes.plot(
            place,
            value if lowest is None else max(value, lowest),
            color=style["color"],
            marker=style["marker"] if complete else "x",
            markerfacecolor="white" if lowest is not None and value < lowest else style["color"],
        )
