"""Generates exposure logs with a planted truth: `pwiser sample`.

    pwiser sample --output_dir=sample --rows=200000 --accidental_clicks=0.3
    pwiser sample --output_dir=world --world=slot --rows=300000

The first writes a layout of real data (truth.py), the second a world (worlds.py): a log with
slots, devices and creative styles, and its planted probabilities in files of their own.

At the end it prints the AUC of the planted probabilities. A model can exceed it only by chance.
"""

import pathlib

import numpy as np
from absl import flags

from pwiser_tf import metrics
from pwiser_tf.convert import output
from pwiser_tf.errors import DataError
from pwiser_tf.synthetic.layouts import LAYOUTS, Writer
from pwiser_tf.synthetic.truth import Truth
from pwiser_tf.synthetic.worlds import SLOT_RULES, WORLDS, make_world

CHUNK_SEARCHES = 5000
# Where a flag is absent: in a layout of real data, and in a world.
_DEFAULTS = {"ctr": (0.04, 0.05), "cvr": (0.07, 0.1), "accidental_clicks": (0.3, 0.6)}


def make_sample(
    folder: pathlib.Path,
    *,
    rows: int,
    seed: int = 0,
    accidental_clicks: float = 0.3,
    ctr: float = 0.04,
    cvr: float = 0.07,
    test_fraction: float = 0.2,
    layout: str = "processed",
) -> dict[str, float]:
    """Writes a sample into a folder; train has the first searches, test the last.

    Args:
      rows: the number of exposures, train and test together.
      ctr, cvr, accidental_clicks: as in `Truth.draw`.
      layout: one of LAYOUTS.

    Returns:
      The counts "rows", "clicks", "accidental" (clicks) and "conversions", and the AUC of the
      planted probabilities on the test rows: "ctr_auc", "ctcvr_auc", "cvr_auc" (over clicks).
    """
    truth = Truth.draw(seed, ctr, cvr, accidental_clicks, LAYOUTS[layout].shape)
    counts = {"rows": 0, "clicks": 0, "accidental": 0, "conversions": 0}
    held_back: list[tuple[np.ndarray, ...]] = []
    left = {"train": rows - round(test_fraction * rows), "test": round(test_fraction * rows)}
    number = 0
    for split, wanted in left.items():
        with Writer(folder, split, LAYOUTS[layout]) as writer:
            while wanted:
                first = 1 + number * CHUNK_SEARCHES
                number += 1
                rng = np.random.default_rng([seed, number])
                chunk = truth.sample(rng, np.arange(first, first + CHUNK_SEARCHES))
                chunk = chunk.head(min(wanted, len(chunk.search)))
                writer.write(chunk)
                wanted -= len(chunk.search)
                counts["rows"] += len(chunk.search)
                counts["clicks"] += int(chunk.click.sum())
                counts["accidental"] += int(chunk.accidental.sum())
                counts["conversions"] += int(chunk.conversion.sum())
                if split == "test":
                    held_back.append((chunk.click, chunk.conversion, *truth.probabilities(chunk)))
    if not held_back:
        return counts
    click, conversion, p_click, p_both = map(np.concatenate, zip(*held_back, strict=True))
    return counts | {
        "ctr_auc": metrics.auc(click, p_click),
        "ctcvr_auc": metrics.auc(conversion, p_both),
        "cvr_auc": metrics.auc(conversion[click], (p_both / p_click)[click]),
    }


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("output_dir", None, "The folder to create.")
    flags.DEFINE_integer(
        "rows", 200_000, "The number of exposures, train and test together.", lower_bound=1
    )
    flags.DEFINE_integer("seed", 0, "The seed of the truth and of the rows.", lower_bound=0)
    for name, text in (
        ("accidental_clicks", "The share of clicks that are accidental."),
        ("ctr", "Clicks per exposure."),
        ("cvr", "Conversions per click."),
    ):
        layout, world = _DEFAULTS[name]
        flags.DEFINE_float(name, None, f"{text} Default: {layout}; with --world {world}.")
    flags.DEFINE_float("test_fraction", 0.2, "The share of rows in test (the last searches).")
    flags.DEFINE_enum(
        "layout",
        "processed",
        list(LAYOUTS),
        "The layout of the files: AliExpress (processed, raw) or Ali-CCP.",
    )
    flags.DEFINE_enum(
        "world",
        None,
        list(WORLDS),
        "Instead of a layout: a log with the feature file log.toml, and its truth. Accidental "
        "clicks depend on nothing (uniform), on slot and device (slot), on the item and partly its "
        "style (bait), on the style (style), on slot and item (mixed). There are none in clean and "
        "in hetero, where conversions per click depend on slot and device.",
    )
    flags.DEFINE_integer("items", 2000, "With --world: the number of items.", lower_bound=1)
    flags.DEFINE_enum(
        "slots",
        "random",
        list(SLOT_RULES),
        "With --world: slots are random, or chosen: better items get better slots.",
    )


def main() -> None:
    """Generates a sample and prints its rates and the AUC of the planted probabilities."""
    values = flags.FLAGS
    if not values.output_dir:
        raise DataError("--output_dir is needed; --help shows all flags")
    rates = _rates(values)
    common = {"rows": values.rows, "seed": values.seed, "test_fraction": values.test_fraction}
    with output.whole_folder(values.output_dir, overwrite=False) as folder:
        if values.world:
            more = {"items": values.items, "slots": values.slots}
            made = make_world(folder, values.world, **common, **rates, **more)
        else:
            made = make_sample(folder, layout=values.layout, **common, **rates)
    rows, clicks, conversions = made["rows"], made["clicks"], made["conversions"]
    print(
        f"{rows:,} rows, {clicks:,} clicks ({made['accidental']:,} of them accidental), "
        f"{conversions:,} conversions"
    )
    print(f"CTR {100 * clicks / rows:.3f} %, CVR {100 * conversions / max(clicks, 1):.3f} %")
    for name in ("interest", "ctr", "ctcvr", "cvr"):
        if (auc := made.get(f"{name}_auc")) is not None:
            print(f"{name} AUC of the planted probabilities on test: {auc:.4f}")
    print("wrote", values.output_dir)


def _rates(values: flags.FlagValues) -> dict[str, float]:
    """The rates by name; refuses impossible ones, and flags that are not read."""
    for name in ("layout",) if values.world else ("items", "slots"):
        if values[name].present:
            where = f"with --world={values.world}" if values.world else "without --world"
            raise DataError(f"--{name} says nothing {where}")
    quiet = values.world and not WORLDS[values.world].accidents
    if quiet and values["accidental_clicks"].present:
        raise DataError(f"--accidental_clicks says nothing with --world={values.world}")
    rates = {
        name: defaults[bool(values.world)] if values[name].value is None else values[name].value
        for name, defaults in _DEFAULTS.items()
    }
    if quiet:
        rates["accidental_clicks"] = 0.0
    for name in ("accidental_clicks", "test_fraction"):
        value = rates.get(name, values.test_fraction)
        if not 0 <= value < 1:
            raise DataError(f"--{name}: found {value}, expected at least 0, below 1")
    for name in ("ctr", "cvr"):
        if not 0 < rates[name] < 1:
            raise DataError(f"--{name}: found {rates[name]}, expected between 0 and 1")
    if rates["cvr"] >= 1 - rates["accidental_clicks"]:
        raise DataError(
            "--cvr must be below 1 - --accidental_clicks, as an accidental click never converts"
        )
    return rates
