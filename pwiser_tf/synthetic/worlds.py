"""Worlds: logs whose accidental clicks depend on slot, item or creative style, and their truth.

A world shows ten items a search. Users and items have vectors, and the fields of the log are views
of these: the utilities are those of truth.py. Besides, a slot of the page and a device change the
logits a little. A click is

    genuine     with probability `interest`; it converts with a probability of its own
    accidental  with a probability that may depend on slot and device, on the item, or on its
                creative style (`WORLDS`); it never converts

so P(click) = interest + (1 - interest) * P(accident). `make_world` writes the log and, in files
of their own, the planted probabilities.

truth.Truth stays beside this. It generates fields in whatever number a layout of real data has,
for searches of varying length, and draws a new item for each exposure. A world has few fields with
meaning and lasting items, without which no item could be bait. They share the utilities.
"""

import dataclasses
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet

from pwiser_tf import metrics
from pwiser_tf.synthetic import layouts
from pwiser_tf.synthetic.truth import (
    CLICK_SPREAD,
    CONVERSION_SPREAD,
    FACTORS,
    SEARCH_ROWS,
    intercept,
    sigmoid,
    utility,
)

SLOTS, DEVICES, STYLES, CATEGORIES, DAYS = 6, 2, 10, 20, 20
# Whether slots are drawn, or better items get better slots.
SLOT_RULES = ("random", "chosen")
_USER_FIELDS = {"user_segment": 50, "user_city": 200}
_NUMBERS = 3
TRUTH_SCHEMA = pyarrow.schema([
    ("search", pyarrow.int64()), ("click", pyarrow.int64()), ("conversion", pyarrow.int64()),
    ("genuine", pyarrow.int64()), ("interest", pyarrow.float64()), ("ctr", pyarrow.float64()),
    ("ctcvr", pyarrow.float64()),
])  # fmt: skip
_CHUNK_SEARCHES = 10_000
_CALIBRATION_SEARCHES = 20_000
# The logits of a row, in the order of `Exposures.logits`.
_CLICK, _CONVERSION, _ACCIDENT = range(3)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a world's probabilities depend on: standard deviations, in logits.

    Attributes:
      accidents: whether there are accidental clicks.
      by_slot: of accidents, over slot and device. by_item: over items, partly through their
        style. by_style: over styles.
      conversion: of the real conversions per genuine click, over slot and device.
    """

    accidents: bool = True
    by_slot: float = 0.0
    by_item: float = 0.0
    by_style: float = 0.0
    conversion: float = 0.0


WORLDS = {
    "clean": Kind(accidents=False),
    "uniform": Kind(),
    "slot": Kind(by_slot=1.2),
    "bait": Kind(by_item=1.2),
    "style": Kind(by_style=1.2),
    "mixed": Kind(by_slot=0.9, by_item=0.9),
    "hetero": Kind(accidents=False, conversion=0.5),
}


@dataclasses.dataclass(frozen=True)
class Exposures:
    """Drawn rows: log and truth by column name, [n] each, and logits [3, n]."""

    log: dict[str, np.ndarray]
    truth: dict[str, np.ndarray]
    logits: np.ndarray

    def head(self, rows: int) -> "Exposures":
        """The first rows."""
        log, truth = (
            {name: values[:rows] for name, values in columns.items()}
            for columns in (self.log, self.truth)
        )
        return Exposures(log, truth, self.logits[:, :rows])


@dataclasses.dataclass(frozen=True)
class World:
    """The planted truth of a world.

    Attributes:
      slots: one of SLOT_RULES.
      users: a vector for each value of each user field, float [values, FACTORS].
      user_loadings: of the user's numbers, [FACTORS, _NUMBERS].
      items: vectors, [items, FACTORS]. categories, styles: [items].
      item_numbers: [items, _NUMBERS]. item_accidents: logits of an accident, [items].
      click, conversion: the weights of their utilities, [3, FACTORS].
      places: what is added to the three logits, [3, SLOTS, DEVICES].
      levels: the intercepts of the three logits, [3], set so that the rates are as requested.
    """

    slots: str
    users: tuple[np.ndarray, ...]
    user_loadings: np.ndarray
    items: np.ndarray
    categories: np.ndarray
    styles: np.ndarray
    item_numbers: np.ndarray
    item_accidents: np.ndarray
    click: np.ndarray
    conversion: np.ndarray
    places: np.ndarray
    levels: np.ndarray

    @classmethod
    def draw(
        cls,
        name: str,
        seed: int,
        *,
        items: int = 2000,
        ctr: float = 0.05,
        cvr: float = 0.1,
        accidental_clicks: float = 0.6,
        slots: str = "random",
    ) -> "World":
        """Draws the world of that name.

        Args:
          name: one of WORLDS.
          items: the number of item ids.
          ctr: clicks per exposure, genuine and accidental. cvr: conversions per click.
          accidental_clicks: the share of clicks that are accidental, where the world has any.
          slots: one of SLOT_RULES.
        """
        kind = WORLDS[name]
        accidental = accidental_clicks if kind.accidents else 0.0
        rng = np.random.default_rng([seed, 0])
        categories, styles = rng.integers(CATEGORIES, size=items), rng.integers(STYLES, size=items)
        of_category = rng.normal(0, 0.57, (CATEGORIES, FACTORS))
        vectors = of_category[categories] + rng.normal(0, 0.8, (items, FACTORS))
        of_style = _standardized(rng.normal(size=STYLES))
        bait = 0.6 * of_style[styles] + 0.8 * rng.normal(size=items)
        loadings = rng.normal(size=(2, FACTORS, _NUMBERS))
        click = rng.normal(size=(3, FACTORS))
        world = cls(
            slots=slots,
            users=tuple(rng.normal(0, 0.57, (size, FACTORS)) for size in _USER_FIELDS.values()),
            user_loadings=loadings[0],
            items=vectors,
            categories=categories,
            styles=styles,
            item_numbers=_numbers(rng, vectors, loadings[1]),
            item_accidents=kind.by_item * bait + kind.by_style * of_style[styles],
            click=click,
            # Clicks and conversions partly have the same causes.
            conversion=0.3 * click + rng.normal(size=(3, FACTORS)),
            places=np.zeros((3, SLOTS, DEVICES)),
            levels=np.zeros(3),
        )
        # Slot 0 is the best one for genuine clicks; accidents do not follow that order.
        of_click = np.sort(rng.normal(0, 0.4, (SLOTS, DEVICES)), axis=0)[::-1]
        of_conversion = kind.conversion * _standardized(rng.normal(size=(SLOTS, DEVICES)))
        slope = rng.permutation(np.linspace(-1.5, 1.5, SLOTS))
        of_accident = kind.by_slot * _standardized(slope[:, None] + np.array([-0.6, 0.6]))

        searches = np.arange(_CALIBRATION_SEARCHES)
        spread = world.sample(rng, searches).logits.std(axis=1)
        world = dataclasses.replace(
            world,
            click=click * (CLICK_SPREAD / spread[_CLICK]),
            conversion=world.conversion * (CONVERSION_SPREAD / spread[_CONVERSION]),
            places=np.stack([of_click, of_conversion, of_accident]),
        )
        logits = world.sample(rng, searches).logits
        of_genuine = intercept(logits[_CLICK], ctr * (1 - accidental))
        interest = sigmoid(logits[_CLICK] + of_genuine)
        levels = [
            of_genuine,
            intercept(logits[_CONVERSION], cvr / (1 - accidental), interest),
            # An accident counts only where there is no genuine click.
            intercept(logits[_ACCIDENT], ctr * accidental / (1 - interest).mean(), 1 - interest)
            if accidental
            else -np.inf,
        ]
        return dataclasses.replace(world, levels=np.array(levels))

    def sample(self, rng: np.random.Generator, searches: np.ndarray) -> Exposures:
        """Draws the exposures of the searches with these ids [S]: SEARCH_ROWS of each."""
        size, rows = len(searches), len(searches) * SEARCH_ROWS
        search = np.repeat(np.arange(size), SEARCH_ROWS)
        fields = [(len(values) * rng.random(size) ** 2).astype(np.int64) for values in self.users]
        user = 0.6 * rng.normal(size=(size, FACTORS))
        for values, ids in zip(self.users, fields, strict=True):
            user += values[ids]
        user_numbers = _numbers(rng, user, self.user_loadings)
        # Low ids are common, high ones rare.
        item = (len(self.items) * rng.random(rows) ** 2.5).astype(np.int64)
        device = rng.integers(DEVICES, size=size)[search]
        utilities = [
            utility(user[search], self.items[item], weights)
            for weights in (self.click, self.conversion)
        ]
        slot = self._slots(rng, utilities[0])
        logits = np.stack([*utilities, self.item_accidents[item]])
        logits += self.places[:, slot, device] + self.levels[:, None]
        interest, buys, accident = sigmoid(logits)
        genuine = rng.random(rows) < interest
        click = genuine | (rng.random(rows) < accident)
        conversion = genuine & (rng.random(rows) < buys)
        labels = {"click": click.astype(np.int64), "conversion": conversion.astype(np.int64)}
        log = {"search": searches[search]}
        log |= {name: ids[search] for name, ids in zip(_USER_FIELDS, fields, strict=True)}
        log |= {"item": item, "category": self.categories[item], "style": self.styles[item]}
        log |= {"slot": slot, "device": device}
        log |= _columns("user", user_numbers[search])
        log |= _columns("item", self.item_numbers[item])
        truth = {
            "search": log["search"],
            **labels,
            "genuine": genuine.astype(np.int64),
            "interest": interest,
            "ctr": interest + (1 - interest) * accident,
            "ctcvr": interest * buys,
        }
        return Exposures(log | labels, truth, logits)

    def _slots(self, rng: np.random.Generator, click_utility: np.ndarray) -> np.ndarray:
        """The slots of rows, int64 [n]; each of SLOTS equally often, whatever the rule."""
        slot = rng.integers(SLOTS, size=(len(click_utility) // SEARCH_ROWS, SEARCH_ROWS))
        if self.slots == "chosen":
            # The ranker that chose them knows the utility with an error.
            seen = click_utility + rng.normal(0, CLICK_SPREAD, len(click_utility))
            rank = np.argsort(np.argsort(-seen.reshape(slot.shape), axis=1), axis=1)
            slot = np.take_along_axis(np.sort(slot, axis=1), rank, axis=1)
        return slot.reshape(-1)


def make_world(
    folder: pathlib.Path,
    name: str,
    *,
    rows: int,
    seed: int = 0,
    test_fraction: float = 0.2,
    **draw,
) -> dict[str, float]:
    """Writes a world's log and truth into a folder; train has the first searches, test the last.

    The log is CSV, which people can look at and the serving client can send: train.csv, test.csv
    and its feature file log.toml. The truth is Parquet, which keeps probabilities as they are:
    truth-train.parquet and truth-test.parquet, row by row those of the log.

    Args:
      name: one of WORLDS.
      rows: the number of exposures, train and test together.
      draw: as in `World.draw`.

    Returns:
      The counts "rows", "clicks", "accidental" (clicks) and "conversions", and the expected AUC of
      the planted probabilities on the test rows: "interest_auc", "ctr_auc", "ctcvr_auc".
    """
    world = World.draw(name, seed, **draw)
    test = round(test_fraction * rows)
    splits = {"train": rows - test, "test": test}
    searches = {split: -(-count // SEARCH_ROWS) for split, count in splits.items()}
    counts = {"rows": 0, "clicks": 0, "accidental": 0, "conversions": 0}
    planted: list[dict[str, np.ndarray]] = []
    first = 1
    for split, left in splits.items():
        if not left:
            continue
        with (
            layouts.Writer(folder, split, _Layout()) as log_file,
            pyarrow.parquet.ParquetWriter(
                folder / f"truth-{split}.parquet", TRUTH_SCHEMA
            ) as truth_file,
        ):
            end = first + searches[split]
            for start in range(first, end, _CHUNK_SEARCHES):
                ids = np.arange(start, min(start + _CHUNK_SEARCHES, end))
                rng = np.random.default_rng([seed, start])
                drawn = world.sample(rng, ids).head(left)
                day = (drawn.log["search"] - 1) * DAYS // sum(searches.values())
                log_file.write({"day": day, **drawn.log})
                truth_file.write_table(pyarrow.table(drawn.truth, TRUTH_SCHEMA))
                left -= len(day)
                counts["rows"] += len(day)
                counts["clicks"] += int(drawn.truth["click"].sum())
                accidental = drawn.truth["click"] - drawn.truth["genuine"]
                counts["accidental"] += int(accidental.sum())
                counts["conversions"] += int(drawn.truth["conversion"].sum())
                if split == "test":
                    planted.append(drawn.truth)
        first = end
    (folder / "log.toml").write_text(_feature_file(), encoding="utf-8")
    if not planted:
        return counts
    for target in ("interest", "ctr", "ctcvr"):
        probability = np.concatenate([truth[target] for truth in planted])
        counts[f"{target}_auc"] = metrics.expected_auc(probability, probability)
    return counts


class _Layout:
    """train.csv, test.csv; see `layouts.Layout`."""

    has_header = True

    def path(self, folder, split, name):
        return folder / f"{split}.csv"

    def tables(self, rows):
        return {"log": pyarrow.table(rows)}


def _standardized(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


def _numbers(rng: np.random.Generator, vectors: np.ndarray, loadings: np.ndarray) -> np.ndarray:
    """Noisy views of vectors [n, FACTORS], in [0, 1]: [n, _NUMBERS]."""
    noise = rng.normal(0, 0.7, (len(vectors), loadings.shape[1]))
    return np.round(sigmoid(vectors @ loadings + noise), 4)


def _columns(side: str, numbers: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{side}_number_{i}": values for i, values in enumerate(numbers.T, start=1)}


def _feature_file() -> str:
    """The feature file of a world's log."""
    ids = dict.fromkeys(_USER_FIELDS, "user")
    ids |= {"item": "candidate", "category": "candidate", "style": "candidate"}
    ids |= {"slot": "candidate", "device": "context"}
    lines = ["[labels]", 'click = "click"', 'conversion = "conversion"', ""]
    lines += ["[columns]", 'group = "search"', 'time = "day"']
    for name, side in ids.items():
        lines += ["", f"[features.{name}]", 'dtype = "int64"', f'side = "{side}"']
    for side, name in (("user", "user"), ("candidate", "item")):
        for i in range(1, _NUMBERS + 1):
            lines += ["", f"[features.{name}_number_{i}]", 'type = "numerical"', f'side = "{side}"']
    return "\n".join(lines) + "\n"
