"""Generated exposure logs in the AliExpress layout, with a planted truth.

    python -m tools.make_sample --output_dir=sample --rows=200000 --accidental_clicks=0.3

Every search has a user vector and every shown item an item vector. Categories and numbers are
noisy views of them; the click utility and the conversion utility are functions of them, linear
and of their products, so that a model with interactions beats one without. A click is

    genuine     with probability sigmoid(click utility); it converts with probability
                sigmoid(conversion utility)
    accidental  at random, whatever the utility; it never converts

The AUC of the planted probabilities, printed at the end, is what no model can exceed but by luck.
"""

import dataclasses
import pathlib

import numpy as np
import pyarrow
import pyarrow.csv
from absl import flags

from pwiser_tf import command_line, metrics
from pwiser_tf.errors import DataError
from tools import aliexpress, output

# How many values each category has: those of the user, then those of the item.
USER_CARDINALITIES = (10, 5, 7, 4, 60, 8, 50, 1000, 200)
ITEM_CARDINALITIES = (100, 3, 2000, 20000, 12, 300, 5)
USER_NUMBERS, ITEM_NUMBERS = len(aliexpress.USER_NUMERICAL), len(aliexpress.ITEM_NUMERICAL)
# The length of a user's and an item's vector.
FACTORS = 4
# Standard deviations of the utilities, in logits.
CLICK_SPREAD, CONVERSION_SPREAD = 1.6, 1.0
SEARCH_ROWS = 10
CHUNK_SEARCHES = 5000
# The utilities' intercepts are set on this many searches, drawn for that purpose.
_CALIBRATION_SEARCHES = 10_000
_COUNTRY = "XX"


@dataclasses.dataclass(frozen=True)
class Side:
    """How the features of users (or of items) come from their vectors.

    Attributes:
      values: a vector for each value of each category, float [cardinality, FACTORS].
      loadings: float [FACTORS, numbers]. zeros: the share of zeros of each number, [numbers].
    """

    values: tuple[np.ndarray, ...]
    loadings: np.ndarray
    zeros: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, cardinalities: tuple[int, ...], numbers: int) -> "Side":
        scale = 0.8 / np.sqrt(len(cardinalities))
        values = tuple(rng.normal(0, scale, (size, FACTORS)) for size in cardinalities)
        return cls(values, rng.normal(0, 1, (FACTORS, numbers)), rng.uniform(0, 0.9, numbers))

    def sample(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, ...]:
        """Draws vectors [size, FACTORS], categories int [size, C], numbers in [0, 1] [size, N]."""
        # A power of a uniform number: low ids are common, high ones rare.
        categories = np.stack(
            [(len(v) * rng.random(size) ** 2.5).astype(np.int64) for v in self.values], axis=1
        )
        vectors = 0.6 * rng.normal(size=(size, FACTORS))
        for position, values in enumerate(self.values):
            vectors += values[categories[:, position]]
        noisy = vectors @ self.loadings + 0.7 * rng.normal(size=(size, self.loadings.shape[1]))
        numbers = np.round(_sigmoid(noisy), 6)
        numbers[rng.random(numbers.shape) < self.zeros] = 0
        return vectors, categories, numbers


@dataclasses.dataclass(frozen=True)
class Truth:
    """The planted truth: the two sides, and the weights of the utilities.

    Attributes:
      click, conversion: weights of the user's vector, the item's, and their products, [3, FACTORS].
      click_intercept, conversion_intercept: set so that the rates come out as asked.
      accidental: the probability of an accidental click where there is no genuine one.
    """

    user: Side
    item: Side
    click: np.ndarray
    conversion: np.ndarray
    click_intercept: float
    conversion_intercept: float
    accidental: float

    @classmethod
    def draw(cls, seed: int, ctr: float, cvr: float, accidental_clicks: float) -> "Truth":
        """Draws a truth with those rates.

        Args:
          ctr: clicks, genuine and accidental, per exposure. cvr: conversions per click.
          accidental_clicks: the share of clicks that are accidental.
        """
        rng = np.random.default_rng([seed, 0])
        user = Side.draw(rng, USER_CARDINALITIES, USER_NUMBERS)
        item = Side.draw(rng, ITEM_CARDINALITIES, ITEM_NUMBERS)
        click = rng.normal(size=(3, FACTORS))
        # What makes people buy is partly what makes them look.
        conversion = 0.3 * click + rng.normal(size=(3, FACTORS))
        genuine = ctr * (1 - accidental_clicks)
        truth = cls(user, item, click, conversion, 0, 0, (ctr - genuine) / (1 - genuine))
        population = truth.sample(rng, np.arange(_CALIBRATION_SEARCHES))
        utilities = [population.click_utility, population.conversion_utility]
        scales = [
            spread / utility.std()
            for spread, utility in zip((CLICK_SPREAD, CONVERSION_SPREAD), utilities, strict=True)
        ]
        click_intercept = _intercept(utilities[0] * scales[0], genuine)
        # Conversions come from genuine clicks alone, so they weigh the rows.
        weights = _sigmoid(utilities[0] * scales[0] + click_intercept)
        conversion_intercept = _intercept(
            utilities[1] * scales[1], cvr / (1 - accidental_clicks), weights
        )
        return dataclasses.replace(
            truth,
            click=click * scales[0],
            conversion=conversion * scales[1],
            click_intercept=click_intercept,
            conversion_intercept=conversion_intercept,
        )

    def sample(self, rng: np.random.Generator, searches: np.ndarray) -> "Rows":
        """Draws the exposures of some searches, given by their ids [n]."""
        sizes = 1 + rng.poisson(SEARCH_ROWS - 1, len(searches))
        search = np.repeat(np.arange(len(searches)), sizes)
        users = self.user.sample(rng, len(searches))
        items = self.item.sample(rng, len(search))
        user_vector, item_vector = users[0][search], items[0]
        views = (user_vector, item_vector, user_vector * item_vector)
        utilities = [
            sum(view @ weights[i] for i, view in enumerate(views)) + intercept
            for weights, intercept in (
                (self.click, self.click_intercept),
                (self.conversion, self.conversion_intercept),
            )
        ]
        genuine = rng.random(len(search)) < _sigmoid(utilities[0])
        accident = rng.random(len(search)) < self.accidental
        bought = rng.random(len(search)) < _sigmoid(utilities[1])
        return Rows(
            searches, search, users[1], users[2], items[1], items[2], *utilities,
            click=genuine | accident, accidental=accident & ~genuine, conversion=genuine & bought,
        )  # fmt: skip

    def probabilities(self, rows: "Rows") -> tuple[np.ndarray, np.ndarray]:
        """P(click) and P(click and conversion) of each row, [n] each."""
        genuine = _sigmoid(rows.click_utility)
        click = genuine + (1 - genuine) * self.accidental
        return click, genuine * _sigmoid(rows.conversion_utility)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Exposures of S searches, n rows. `search` [n] is a position in `search_id` [S].

    User features are [S, ...], item features, utilities and labels [n, ...].
    """

    search_id: np.ndarray
    search: np.ndarray
    user_categories: np.ndarray
    user_numbers: np.ndarray
    item_categories: np.ndarray
    item_numbers: np.ndarray
    click_utility: np.ndarray
    conversion_utility: np.ndarray
    click: np.ndarray
    accidental: np.ndarray
    conversion: np.ndarray

    def head(self, rows: int) -> "Rows":
        """The first rows, fewer than one chunk has."""
        cut = {
            name: getattr(self, name)[:rows]
            for name in (
                "search", "item_categories", "item_numbers", "click_utility",
                "conversion_utility", "click", "accidental", "conversion",
            )
        }  # fmt: skip
        searches = int(cut["search"][-1]) + 1 if rows else 0
        for name in ("search_id", "user_categories", "user_numbers"):
            cut[name] = getattr(self, name)[:searches]
        return Rows(**cut)

    def processed(self) -> pyarrow.Table:
        """The processed layout."""
        columns = {aliexpress.GROUP: self.search_id[self.search]}
        categories = [self.user_categories[self.search], self.item_categories]
        numbers = [self.user_numbers[self.search], self.item_numbers]
        columns |= zip(aliexpress.CATEGORICAL, np.concatenate(categories, axis=1).T, strict=True)
        columns |= zip(aliexpress.NUMERICAL, np.concatenate(numbers, axis=1).T, strict=True)
        columns |= {"click": self.click.astype(int), "conversion": self.conversion.astype(int)}
        return pyarrow.table(columns)

    def raw(self) -> dict[str, pyarrow.Table]:
        """The raw layout: the tables of the item and the user file, columns named by number."""
        user = {1: self.search_id}
        user |= zip(aliexpress.USER_CATEGORICAL, self.user_categories.T, strict=True)
        user |= zip(aliexpress.USER_NUMERICAL, self.user_numbers.T, strict=True)
        item = {1: self.search_id[self.search]}
        item |= zip(aliexpress.ITEM_CATEGORICAL, self.item_categories.T, strict=True)
        item |= zip(aliexpress.ITEM_NUMERICAL, self.item_numbers.T, strict=True)
        item[aliexpress.RAW_LABEL] = self.click.astype(int) + self.conversion
        return {
            name: pyarrow.table({str(number): table[number] for number in sorted(table)})
            for name, table in (("item", item), ("user", user))
        }


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
    """Writes a sample into a folder; train holds the first searches, test the last.

    Args:
      rows: of train and test together.
      ctr, cvr, accidental_clicks: as `Truth.draw`.
      layout: "processed" (AliExpress_XX/train.csv, test.csv) or "raw" (XX/xx_item_train.csv, ...).

    Returns:
      The counts "rows", "clicks", "accidental" (clicks) and "conversions", and the AUC of the
      planted probabilities on the test rows: "ctr_auc", "ctcvr_auc", "cvr_auc" (over clicks).
    """
    truth = Truth.draw(seed, ctr, cvr, accidental_clicks)
    counts = {"rows": 0, "clicks": 0, "accidental": 0, "conversions": 0}
    held_back: list[tuple[np.ndarray, ...]] = []
    left = {"train": rows - round(test_fraction * rows), "test": round(test_fraction * rows)}
    number = 0
    for split, wanted in left.items():
        with _Writer(folder, split, layout) as writer:
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


class _Writer:
    """The CSV files of one split in one layout."""

    def __init__(self, folder: pathlib.Path, split: str, layout: str):
        self._layout = layout
        if layout == "processed":
            self._paths = {"all": folder / f"AliExpress_{_COUNTRY}" / f"{split}.csv"}
        else:
            self._paths = {
                side: folder / _COUNTRY / f"{_COUNTRY.lower()}_{side}_{split}.csv"
                for side in ("item", "user")
            }
        self._files: dict = {}

    def __enter__(self) -> "_Writer":
        for name, path in self._paths.items():
            path.parent.mkdir(exist_ok=True)
            self._files[name] = open(path, "wb")
        return self

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            file.close()

    def write(self, rows: Rows) -> None:
        tables = {"all": rows.processed()} if self._layout == "processed" else rows.raw()
        for name, table in tables.items():
            file = self._files[name]
            if self._layout == "processed" and not file.tell():
                file.write((",".join(table.column_names) + "\n").encode())
            options = pyarrow.csv.WriteOptions(include_header=False)
            pyarrow.csv.write_csv(table, file, options)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _intercept(utility: np.ndarray, rate: float, weights: np.ndarray | None = None) -> float:
    """The number to add to the utilities so that the mean probability is the rate. Bisection."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = np.average(_sigmoid(utility + middle), weights=weights)
        low, high = (middle, high) if mean < rate else (low, middle)
    return middle


def define_flags() -> None:
    """Defines the flags of this command line."""
    flags.DEFINE_string("output_dir", None, "The folder to make.")
    flags.DEFINE_integer("rows", 200_000, "Exposures, of train and test together.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the truth and of the rows.", lower_bound=0)
    flags.DEFINE_float("accidental_clicks", 0.3, "The share of clicks that are accidental.")
    flags.DEFINE_float("ctr", 0.04, "Clicks per exposure.")
    flags.DEFINE_float("cvr", 0.07, "Conversions per click.")
    flags.DEFINE_float("test_fraction", 0.2, "The share of rows in test.csv, the last searches.")
    flags.DEFINE_enum("layout", "processed", ["processed", "raw"], "Which AliExpress layout.")


def main() -> None:
    """Generates as the flags say and prints the rates and the ceiling of the AUC."""
    values = flags.FLAGS
    if not values.output_dir:
        raise DataError("--output_dir is needed; --help shows all flags")
    for name in ("accidental_clicks", "test_fraction"):
        if not 0 <= values[name].value < 1:
            raise DataError(f"--{name}: found {values[name].value}, expected at least 0, below 1")
    for name in ("ctr", "cvr"):
        if not 0 < values[name].value < 1:
            raise DataError(f"--{name}: found {values[name].value}, expected between 0 and 1")
    if values.cvr >= 1 - values.accidental_clicks:
        raise DataError("--cvr must be below 1 - --accidental_clicks: accidents never convert")
    with output.whole_folder(values.output_dir, overwrite=False) as folder:
        made = make_sample(
            folder,
            rows=values.rows,
            seed=values.seed,
            accidental_clicks=values.accidental_clicks,
            ctr=values.ctr,
            cvr=values.cvr,
            test_fraction=values.test_fraction,
            layout=values.layout,
        )
    rows, clicks, conversions = made["rows"], made["clicks"], made["conversions"]
    print(
        f"{rows:,} rows, {clicks:,} clicks ({made['accidental']:,} of them accidental), "
        f"{conversions:,} conversions"
    )
    print(f"CTR {100 * clicks / rows:.3f} %, CVR {100 * conversions / max(clicks, 1):.3f} %")
    for name in ("ctr", "ctcvr", "cvr"):
        if (auc := made.get(f"{name}_auc")) is not None:
            print(f"{name} AUC of the planted probabilities on test: {auc:.4f}")
    print("wrote", values.output_dir)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
