"""The planted truth of generated exposure logs: users, items, clicks and conversions.

Every search has a user vector and every shown item has an item vector. Categories and numbers are
noisy views of these vectors. The click utility and the conversion utility are linear functions of
the two vectors and of their products, so a model with interactions beats one without. A click is

    genuine     with probability sigmoid(click utility); it converts with probability
                sigmoid(conversion utility)
    accidental  at random, independent of the utility; it never converts
"""

import dataclasses

import numpy as np

# The length of a user's and an item's vector.
FACTORS = 4
# Standard deviations of the utilities, in logits.
CLICK_SPREAD, CONVERSION_SPREAD = 1.6, 1.0
SEARCH_ROWS = 10
# The number of searches that are drawn to set the intercepts of the utilities.
_CALIBRATION_SEARCHES = 10_000


@dataclasses.dataclass(frozen=True)
class Shape:
    """The features: the number of values of each category, and the number of numbers."""

    user_categories: tuple[int, ...]
    item_categories: tuple[int, ...]
    user_numbers: int
    item_numbers: int


@dataclasses.dataclass(frozen=True)
class Side:
    """How the features of users (or items) depend on their vectors.

    Attributes:
      values: a vector for each value of each category, float [cardinality, FACTORS].
      loadings: float [FACTORS, numbers].
      zeros: the share of zeros of each number, [numbers].
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
        numbers = np.round(sigmoid(noisy), 6)
        numbers[rng.random(numbers.shape) < self.zeros] = 0
        return vectors, categories, numbers


@dataclasses.dataclass(frozen=True)
class Truth:
    """The planted truth: the two sides, and the weights of the utilities.

    Attributes:
      click, conversion: weights of the user's vector, the item's, and their products, [3, FACTORS].
      click_intercept, conversion_intercept: set so that the rates are as requested.
      accidental: the probability of an accidental click if there is no genuine one.
    """

    user: Side
    item: Side
    click: np.ndarray
    conversion: np.ndarray
    click_intercept: float
    conversion_intercept: float
    accidental: float

    @classmethod
    def draw(
        cls, seed: int, ctr: float, cvr: float, accidental_clicks: float, shape: Shape
    ) -> "Truth":
        """Draws a truth with these rates and features.

        Args:
          ctr: clicks per exposure, genuine and accidental.
          cvr: conversions per click.
          accidental_clicks: the share of clicks that are accidental.
        """
        rng = np.random.default_rng([seed, 0])
        user = Side.draw(rng, shape.user_categories, shape.user_numbers)
        item = Side.draw(rng, shape.item_categories, shape.item_numbers)
        click = rng.normal(size=(3, FACTORS))
        # Clicks and conversions partly have the same causes.
        conversion = 0.3 * click + rng.normal(size=(3, FACTORS))
        genuine = ctr * (1 - accidental_clicks)
        truth = cls(user, item, click, conversion, 0, 0, (ctr - genuine) / (1 - genuine))
        population = truth.sample(rng, np.arange(_CALIBRATION_SEARCHES))
        utilities = [population.click_utility, population.conversion_utility]
        scales = [
            spread / values.std()
            for spread, values in zip((CLICK_SPREAD, CONVERSION_SPREAD), utilities, strict=True)
        ]
        click_intercept = intercept(utilities[0] * scales[0], genuine)
        # Only genuine clicks convert, so the rows are weighted with their probability.
        weights = sigmoid(utilities[0] * scales[0] + click_intercept)
        conversion_intercept = intercept(
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
        utilities = [
            utility(users[0][search], items[0], weights) + level
            for weights, level in (
                (self.click, self.click_intercept),
                (self.conversion, self.conversion_intercept),
            )
        ]
        genuine = rng.random(len(search)) < sigmoid(utilities[0])
        accident = rng.random(len(search)) < self.accidental
        bought = rng.random(len(search)) < sigmoid(utilities[1])
        return Rows(
            searches, search, users[1], users[2], items[1], items[2], *utilities,
            click=genuine | accident, accidental=accident & ~genuine, conversion=genuine & bought,
        )  # fmt: skip

    def probabilities(self, rows: "Rows") -> tuple[np.ndarray, np.ndarray]:
        """P(click) and P(click and conversion) of each row, [n] each."""
        genuine = sigmoid(rows.click_utility)
        click = genuine + (1 - genuine) * self.accidental
        return click, genuine * sigmoid(rows.conversion_utility)


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
        """The first rows of a chunk."""
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


def utility(user: np.ndarray, item: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The utility [n] of vectors [n, FACTORS]; weights [3, FACTORS] of both and their products."""
    views = (user, item, user * item)
    return sum(view @ weights[i] for i, view in enumerate(views))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The probabilities of logits."""
    return 1 / (1 + np.exp(-x))


def intercept(logits: np.ndarray, rate: float, weights: np.ndarray | None = None) -> float:
    """The number to add to logits so that their (weighted) mean probability is the rate."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = np.average(sigmoid(logits + middle), weights=weights)
        low, high = (middle, high) if mean < rate else (low, middle)
    return middle
