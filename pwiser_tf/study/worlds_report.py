"""The tables and the plot of `study.worlds`: paired differences from cross-entropy."""

import pathlib

import numpy as np
from matplotlib.figure import Figure

from pwiser_tf import plots, runs
from pwiser_tf.files import write_text
from pwiser_tf.study import paired
from pwiser_tf.study.worlds import BASELINE, PWISER, RERUNS

PLANTED = "planted"
# Differences of AUC are shown in units of 1e-4, those of top-1 in percent of cross-entropy's.
AUCS = {"ctr_auc": "observed clicks", "interest_auc": "interest", "ctcvr_auc": "CTCVR"}
TOP = {"top1_interest": "top-1 interest", "top1_purchase": "top-1 purchase"}
_PCOC = ("ctr_pcoc", "ctcvr_pcoc")
_LEVEL = 0.05


def compare(jobs: list[dict], row: str, metric: str) -> dict:
    """A row less cross-entropy over seeds.

    Args:
      jobs: {row: {metric: value}} of each seed.

    Returns:
      "mean", "low", "high" (95 percent, paired t) and "p", in the metric's shown unit.
    """
    values, base = (np.array([job[name][metric] for job in jobs]) for name in (row, BASELINE))
    differences = 100 * (values / base - 1) if metric in TOP else 1e4 * (values - base)
    found = paired.over_seeds(differences)
    return {"mean": found.mean, "low": found.low, "high": found.high, "p": found.p_value}


def comparisons(worlds: dict[str, list[dict]], metrics: tuple[str, ...]) -> list[dict]:
    """`compare` of all worlds, rows and metrics: one family, with Holm's p-value as "holm"."""
    found = [
        {"world": world, "row": row, "metric": metric, **compare(jobs, row, metric)}
        for world, jobs in worlds.items()
        for row in jobs[0]
        if row not in (BASELINE, PLANTED)
        for metric in metrics
        # A blend ranks clicks only: its ctcvr is that of cross-entropy.
        if not (row.startswith("blend") and metric == "ctcvr_auc")
    ]
    adjusted = paired.holm([entry["p"] for entry in found])
    return [{**entry, "holm": p} for entry, p in zip(found, adjusted, strict=True)]


def shown(entry: dict | None, digits: int = 0) -> str:
    """A comparison as "mean±half width", with * if it survives Holm's correction."""
    if entry is None:
        return "0"
    if not entry["mean"] and not entry["high"]:
        return "0"
    half = (entry["high"] - entry["low"]) / 2
    star = "*" if entry["holm"] is not None and entry["holm"] <= _LEVEL else ""
    return f"{entry['mean']:+.{digits}f}±{half:.{digits}f}{star}"


def _mean(jobs: list[dict], row: str, metric: str) -> float:
    return float(np.mean([job[row][metric] for job in jobs]))


def table(world: str, jobs: list[dict], found: list[dict]) -> str:
    """All rows of a world in Markdown."""
    lookup = {(e["row"], e["metric"]): e for e in found if e["world"] == world}
    names = [*AUCS.values(), *TOP.values(), "PCOC ctr, Platt", "PCOC ctcvr, Platt"]
    lines = [f"| {world} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in jobs[0]:
        if row in (BASELINE, PLANTED):
            cells = [f"{_mean(jobs, row, m):.4f}" for m in (*AUCS, *TOP)]
        else:
            cells = [shown(lookup.get((row, m))) for m in AUCS]
            cells += [shown(lookup.get((row, m)), 1) + " %" for m in TOP]
        for metric in _PCOC:
            has = metric in jobs[0][row]
            cells.append(
                f"{_mean(jobs, row, metric):.2f}, {_mean(jobs, row, metric + '_platt'):.2f}"
                if has
                else ""
            )
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(worlds: dict[str, list[dict]], found: list[dict], metric: str) -> str:
    """One metric of all worlds in Markdown: a column a world."""
    lookup = {(e["world"], e["row"]): e for e in found if e["metric"] == metric}
    title = (AUCS | TOP)[metric]
    lines = [f"| {title} | {' | '.join(worlds)} |", "|---" * (len(worlds) + 1) + "|"]
    for row in next(iter(worlds.values()))[0]:
        if row in (BASELINE, PLANTED):
            cells = [f"{_mean(jobs, row, metric):.4f}" for jobs in worlds.values()]
        else:
            cells = [shown(lookup.get((world, row)), int(metric in TOP)) for world in worlds]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def paper(worlds: dict[str, list[dict]]) -> dict:
    """The best of PWiseR's settings, and of cross-entropy's reruns, against one run of it.

    Test AUC on drawn labels, as the paper reports. "cells": (world, seed, task); "pwiser" and
    "reruns": in how many of them that best is above the one run.
    """
    counts = {"cells": 0, "pwiser": 0, "reruns": 0}
    gains: dict[str, list[float]] = {"pwiser": [], "reruns": []}
    reruns = [f"{BASELINE}, rerun {k}" for k in range(1, RERUNS + 1)]
    for jobs in worlds.values():
        for job in jobs:
            for metric in ("ctr_drawn", "ctcvr_drawn"):
                one = job[BASELINE][metric]
                counts["cells"] += 1
                for name, rows in (("pwiser", PWISER), ("reruns", reruns)):
                    best = max(job[row][metric] for row in rows)
                    counts[name] += best > one
                    gains[name].append(1e4 * (best - one))
    means = {f"{name}_gain": float(np.mean(values)) for name, values in gains.items()}
    return {**counts, **means}


def _paper_text(worlds: dict[str, list[dict]]) -> str:
    found = paper(worlds)
    lines = [
        f"Best of {len(PWISER)} PWiseR settings above one run of bce: {found['pwiser']} of "
        f"{found['cells']} cells (world, seed, task), by {found['pwiser_gain']:+.0f} on average.",
        f"Best of {RERUNS} reruns of bce above it: {found['reruns']} of {found['cells']}, by "
        f"{found['reruns_gain']:+.0f}.",
    ]
    return "\n".join(lines)


def draw(path: pathlib.Path, worlds: dict[str, list[dict]], found: list[dict]) -> None:
    """Draws the differences in AUC, a panel a world."""
    rows = [row for row in next(iter(worlds.values()))[0] if row not in (BASELINE, PLANTED)]
    figure = Figure(figsize=(3 + 2.4 * len(worlds), 1.5 + 0.45 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(worlds), sharex=True, sharey=True, squeeze=False)[0]
    styles = {
        "ctr_auc": ("#0072B2", "o"),
        "interest_auc": ("#D55E00", "s"),
        "ctcvr_auc": ("#009E73", "^"),
    }
    for axes, world in zip(panels, worlds, strict=True):
        for entry in (e for e in found if e["world"] == world and e["metric"] in AUCS):
            color, marker = styles[entry["metric"]]
            y = rows.index(entry["row"]) + 0.2 * (list(AUCS).index(entry["metric"]) - 1)
            half = (entry["high"] - entry["low"]) / 2
            axes.errorbar(entry["mean"], y, xerr=half, fmt=marker, color=color, markersize=4)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(world)
        plots.tidy(axes)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].invert_yaxis()
    for name, (color, marker) in styles.items():
        panels[0].plot([], [], marker, color=color, label=AUCS[name])
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel("AUC less that of bce, x 1e-4, 95 percent over seeds", fontsize="medium")
    plots.save(figure, path)


def write(found: dict, output: pathlib.Path) -> None:
    """Writes results.json, table.md and differences.png of `study.worlds.study` and its command."""
    worlds, is_paper = found["worlds"], found["settings"]["protocol"] == "paper"
    compared = comparisons(worlds, tuple(AUCS) if is_paper else (*AUCS, *TOP))
    results = {**found, "comparisons": compared}
    if is_paper:
        results["paper"] = paper(worlds)
    runs.write_json(output / "results.json", results)
    seeds = len(next(iter(worlds.values())))
    rates = sorted({f"{rate:g}" for rate in found["rates"].values()})
    parts = [
        f"# Losses on generated worlds: {found['settings']['protocol']}",
        f"    {found['command']}",
        f"{seeds} seeds, {found['settings']['rows']:,} training rows. Differences from bce, 95 "
        "percent paired t over seeds: AUC x 1e-4 on the planted probabilities, top-1 in percent. "
        f"* survives Holm's correction over {len(compared)} comparisons. PCOC: predicted / "
        "planted, before and after Platt on validation."
    ]  # fmt: skip
    if len(rates) > 1:
        parts.append(
            "Learning rates: "
            + ", ".join(f"{name} {rate:g}" for name, rate in found["rates"].items())
        )
    else:
        parts.append(f"Learning rate: {rates[0]}")
    if is_paper:
        parts.append(_paper_text(worlds))
    metrics = AUCS if is_paper else AUCS | TOP
    parts += [summary(worlds, compared, metric) for metric in metrics]
    if not is_paper:
        parts += [table(world, jobs, compared) for world, jobs in worlds.items()]
    write_text(output / "table.md", "\n\n".join(parts) + "\n")
    draw(output / "differences.png", worlds, compared)
