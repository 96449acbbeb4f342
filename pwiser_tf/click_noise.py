"""Click noise: accidental clicks, whose share depends on named fields such as slot and device.

An accidental click never converts, and it adds a click. So a cell (a value of such a field) with
many accidental clicks has more clicks than its items deserve, and fewer conversions per click.
`estimate` compares counts of the training split, cell by cell:

    E = the conversions that a cell's clicks would have, were the cell like all others
    r = its conversions / E, drawn towards 1 where there are few (gamma-Poisson)
    q = r / (r of the best cells), at most 1: the share of its clicks that are genuine

and there are two checks. Evidence: if conversions differ between the cells no more than chance
allows, q is 1 everywhere. Guard: accidents add clicks, so that few conversions per click must come
with many clicks; q is raised to a power between 0 and 1, which is 0 where they do not, beyond
chance. So that the guard has cells to judge by, fields with few values are crossed into one
(`crossed`). Over several such, q is the product. The probability of an accident at an exposure is

    a = C (1 - q) / (1 - C q),    C = the cell's CTR

and the model learns g = sigmoid(z), P(genuine click), through P(click) = g + (1 - g) a
(`observed_logits`). g is the output `interest`, P(click) the output `ctr`.

E does not assume that all cells show the same items: it is the sum over the cell's clicks of the
conversions expected from the other fields, by a small multiplicative model of them. Where items do
not depend on cells, this is clicks times the mean CVR; `simple_quality` is the estimate from that.

Only name fields that say how an exposure was shown (slot, device, creative format), never item or
user: a field whose values click more and truly convert less looks the same in the counts.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from scipy import stats

# Chance exceeds the bound of the evidence test with a probability of about 0.001.
_STRICTNESS = 3.1
# The best cells are those that hold this share of the clicks.
_BEST_SHARE = 0.2
# The guard's CVR is drawn towards the mean by as much as this many conversions.
_GUARD_CONVERSIONS = 3.0
# The guard's slope must be below 0: so rarely would chance make it, if it were 0.
_GUARD_LEVEL = 0.01
# Fields are crossed into one as long as it has at most so many cells.
_CROSSED_CELLS = 64
# Rounds in which the multiplicative model fits each column in turn.
_ROUNDS = 5
# Cells show different items if so large a share of the clicks would not be expected by chance.
_DIFFERENT_ITEMS = 0.03
_SHOWN_CELLS = 20
# Of a number, where it stands among the other features.
_BINS = 8


@dataclasses.dataclass(frozen=True)
class NoisyField:
    """The estimate for one field; arrays have an entry for each cell, float64 [cells].

    Attributes:
      features: the categorical features of the field; a cell is a combination of their ids.
      sizes: the ids of each feature.
      exposures, clicks, conversions: of the training split.
      expected: conversions of its clicks, were the cell like the others; they sum to conversions.
      expected_clicks: likewise the clicks of its exposures.
      statistic, bound: of the evidence test: the cells differ if the first exceeds the second.
      guard: the power, in [0, 1], to which q was raised.
      quality: q, the share of clicks that are genuine, in (0, 1].
      simple_quality: q with `expected` = clicks * mean CVR.
      click_ratio: the cell's CTR / the mean CTR, drawn towards 1 where there are few exposures.
    """

    features: tuple[str, ...]
    sizes: tuple[int, ...]
    exposures: np.ndarray
    clicks: np.ndarray
    conversions: np.ndarray
    expected: np.ndarray
    expected_clicks: np.ndarray
    statistic: float
    bound: float
    guard: float
    quality: np.ndarray
    simple_quality: np.ndarray
    click_ratio: np.ndarray

    @property
    def name(self) -> str:
        """Its features, for messages."""
        return " x ".join(self.features)

    def texts(self, values: dict[str, Sequence[str]]) -> list[str]:
        """The text of each cell, from those of each feature's ids."""
        return [" x ".join(cell) for cell in itertools.product(*(values[f] for f in self.features))]

    @property
    def has_evidence(self) -> bool:
        """Whether the cells' conversions per click differ by more than chance."""
        return self.statistic > self.bound


@dataclasses.dataclass(frozen=True)
class ClickNoise:
    """The estimate for all fields. ctr: clicks per exposure in the training split."""

    ctr: float
    fields: tuple[NoisyField, ...]
    largest_accident: ClassVar[float] = 0.5

    def accidental(self, cells: Sequence[np.ndarray]) -> np.ndarray:
        """P(accidental click), float64 [n], of exposures with these cells in each field, [n]."""
        logs = [
            np.log([field.quality[cell], field.click_ratio[cell]])
            for field, cell in zip(self.fields, cells, strict=True)
        ]
        quality, ratio = np.exp(np.sum(logs, axis=0))
        rate = np.minimum(self.ctr * ratio, 1.0)
        with np.errstate(invalid="ignore"):
            accident = rate * (1 - quality) / (1 - rate * quality)
        return np.where(quality < 1, np.clip(accident, 0.0, self.largest_accident), 0.0)

    def to_json(self) -> dict:
        """The content of click_noise.json."""
        fields = []
        for field in self.fields:
            content = dataclasses.asdict(field)
            fields.append({k: v.tolist() if isinstance(v, np.ndarray) else v
                           for k, v in content.items()})  # fmt: skip
        return {"ctr": self.ctr, "fields": fields}

    @classmethod
    def from_json(cls, content: dict) -> "ClickNoise":
        """Reads `to_json`."""
        fields = []
        for entry in content["fields"]:
            values = {k: np.array(v) if isinstance(v, list) else v for k, v in entry.items()}
            for name in ("features", "sizes"):
                values[name] = tuple(entry[name])
            fields.append(NoisyField(**values))
        return cls(content["ctr"], tuple(fields))

    def table(self, values: dict[str, Sequence[str]]) -> str:
        """The estimate as plain text, a block for each field.

        Args:
          values: the texts of each feature's ids.
        """
        lines = []
        for field in self.fields:
            texts = field.texts(values)
            lines.append(f"click noise by {field.name}: {self._verdict(field)}")
            width = max(len(text) for text in ("cell", *texts))
            lines.append(
                f"{'cell':<{width}}  exposures    clicks  conversions   CTR %   CVR %"
                "  genuine q  accidental a"
            )
            order = np.argsort(-field.clicks, kind="stable")
            order = order[field.exposures[order] > 0]
            alone = ClickNoise(self.ctr, (field,))
            for cell in order[:_SHOWN_CELLS].tolist():
                exposures, clicks = field.exposures[cell], field.clicks[cell]
                cvr = 100 * field.conversions[cell] / clicks if clicks else math.nan
                lines.append(
                    f"{texts[cell]:<{width}} {exposures:>10,.0f} {clicks:>9,.0f} "
                    f"{field.conversions[cell]:>12,.0f} {100 * clicks / exposures:>7.3f} "
                    f"{cvr:>7.3f} {field.quality[cell]:>10.3f} "
                    f"{alone.accidental([np.array([cell])])[0]:>13.4f}"
                )
            if len(order) > _SHOWN_CELLS:
                lines.append(f"and {len(order) - _SHOWN_CELLS:,} cells with fewer clicks")
        return "\n".join(lines)

    @staticmethod
    def _verdict(field: NoisyField) -> str:
        test = f"statistic {field.statistic:.1f}, chance up to {field.bound:.1f}"
        if not field.has_evidence:
            return f"no evidence that conversions per click differ ({test}); nothing is corrected"
        if not field.guard:
            return (
                f"conversions per click differ ({test}), but not as accidental clicks would make "
                "them (guard b = 0); nothing is corrected"
            )
        return f"corrected, guard b = {field.guard:.2f} ({test})"

    @property
    def items_differ(self) -> bool:
        """Whether the cells of a field show items that are clicked more or less than others."""
        far = [
            np.sum(np.abs(field.expected_clicks - self.ctr * field.exposures))
            / max(field.clicks.sum(), 1)
            for field in self.fields
        ]
        return max(far, default=0.0) > _DIFFERENT_ITEMS

    def warnings(self) -> list[str]:
        """Where an estimate that ignores the items of a cell would be far from this one."""
        found = []
        for field in self.fields:
            weights = field.clicks / max(field.clicks.sum(), 1)
            far = float(np.sum(weights * np.abs(field.quality - field.simple_quality)))
            if far > 0.1:
                found.append(
                    f"{field.name}: cells show different items: an estimate from counts alone is "
                    f"biased by {far:.2f} on average; q compares with the conversions expected "
                    "of the items"
                )
        return found


def crossed(sizes: Sequence[int]) -> list[list[int]]:
    """Which features are one field: the smaller ones together, up to 64 cells; positions."""
    order = sorted(range(len(sizes)), key=lambda k: sizes[k])
    fields: list[list[int]] = []
    for k in order:
        if fields and math.prod(sizes[i] for i in (*fields[0], k)) <= _CROSSED_CELLS:
            fields[0].append(k)
        else:
            fields.append([k])
    return sorted(sorted(field) for field in fields)


def other_columns(ids: np.ndarray, numbers: np.ndarray, fields: Sequence[int]) -> np.ndarray:
    """What `estimate` takes as `others`, int64 [n, columns]: the columns of `ids` [n, C] that are
    no `fields`, and `numbers` [n, N] in bins with about equally many rows."""
    columns = [ids[:, k] for k in range(ids.shape[1]) if k not in fields]
    for values in numbers.T:
        bounds = np.quantile(values, np.arange(1, _BINS) / _BINS)
        columns.append(np.searchsorted(bounds, values, side="right"))
    return np.stack(columns, axis=1) if columns else np.empty((len(ids), 0), np.int64)


def estimate(
    features: Sequence[str],
    ids: np.ndarray,
    sizes: Sequence[int],
    others: np.ndarray,
    grade: np.ndarray,
    weights: np.ndarray | None = None,
    guarded: bool = True,
) -> ClickNoise:
    """The click noise of training rows.

    Args:
      features: the categorical features that say how an exposure was shown.
      ids: int64 [n, features], their ids. sizes: the ids of each feature.
      others: int64 [n, columns], values of other features from 0, to expect clicks and conversions
        by. No columns: all cells are taken to show the same items.
      grade: int [n]: 0 exposure, 1 click, 2 conversion.
      weights: of rows, [n], where exposures without click are sampled; None: 1 each.
      guarded: False leaves q as it is, whatever the guard says: to show what the guard is for.
    """
    weights = np.ones(len(grade)) if weights is None else weights
    groups = crossed(sizes)
    shapes = [tuple(sizes[k] for k in group) for group in groups]
    cells = np.stack(
        [
            np.ravel_multi_index([ids[:, k] for k in group], shape)
            for group, shape in zip(groups, shapes, strict=True)
        ],
        axis=1,
    )
    click, conversion = weights * (grade >= 1), weights * (grade == 2)
    clicked = np.flatnonzero(grade >= 1)
    ctr = float(click.sum() / weights.sum()) if len(click) else 0.0
    counts = [math.prod(shape) for shape in shapes]
    conversions_per_click = _expected(
        cells[clicked], others[clicked], conversion[clicked], weights[clicked], counts
    )
    clicks_per_exposure = _expected(cells, others, click, weights, counts)
    fields = []
    for k, (group, shape) in enumerate(zip(groups, shapes, strict=True)):
        n, clicks, conversions = (
            np.bincount(cells[:, k], each, counts[k]) for each in (weights, click, conversion)
        )
        simple = clicks * (conversions.sum() / max(clicks.sum(), 1))
        by_chance = n * ctr
        expected, expected_clicks = conversions_per_click[k], clicks_per_exposure[k]
        quality, guard, statistic, bound = _quality(
            conversions, expected, clicks, expected_clicks, guarded
        )
        plain, *_ = _quality(conversions, simple, clicks, by_chance, guarded)
        ratio = _drawn(clicks, by_chance, _spread(clicks, by_chance))
        fields.append(
            NoisyField(
                tuple(features[i] for i in group), shape, n, clicks,
                conversions, expected, expected_clicks, statistic, bound, guard, quality, plain,
                np.maximum(ratio, 1e-6),
            )
        )  # fmt: skip
    return ClickNoise(ctr, tuple(fields))


def _quality(conversions, expected, clicks, expected_clicks, guarded: bool):
    """(q [cells], guard, statistic, bound) from counts and expectations [cells]."""
    quality, guard = np.ones(len(clicks)), 0.0
    held = expected > 0
    m, e = conversions[held], expected[held]
    statistic = float(np.sum((m - e) ** 2 / e))
    # The variance of a term is 2 + 1 / e for a Poisson count: rare cells vary more.
    bound = len(m) - 1 + _STRICTNESS * math.sqrt(float(np.sum(2 + 1 / e))) if len(m) else 0.0
    spread = _spread(m, e)
    if statistic <= bound or spread <= 0:
        return quality, guard, statistic, bound
    ratio = _drawn(m, e, spread)
    weights = clicks[held]
    order = np.argsort(-ratio, kind="stable")
    share = np.cumsum(weights[order]) / weights.sum()
    best = order[: np.searchsorted(share, _BEST_SHARE) + 1]
    reference = np.average(ratio[best], weights=np.maximum(weights[best], 1e-9))
    q = np.minimum(1.0, ratio / reference)
    # Fewer conversions per click must come with more clicks.
    clicked = (weights > 0) & (expected_clicks[held] > 0)
    w = weights[clicked]
    slope, chance = _slope(
        np.log((m + _GUARD_CONVERSIONS)[clicked] / (e + _GUARD_CONVERSIONS)[clicked]),
        np.log(w / expected_clicks[held][clicked]),
        w,
    )
    if not guarded:
        guard = 1.0
    elif chance < _GUARD_LEVEL:
        guard = float(np.clip(-slope, 0.0, 1.0))
    quality[held] = q**guard
    return quality, guard, statistic, bound


def _slope(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The slope of the weighted regression of y on x, and the probability of one as far below 0 by
    chance (t-test); 1 for fewer than three points."""
    x, y = (values - np.average(values, weights=weights) for values in (x, y))
    squares = np.sum(weights * x * x)
    if len(x) < 3 or squares <= 0:
        return 0.0, 1.0
    slope = np.sum(weights * x * y) / squares
    freedom = len(x) - 2
    error = math.sqrt(np.sum(weights * (y - slope * x) ** 2) / squares / freedom)
    return float(slope), float(stats.t.cdf(slope / max(error, 1e-12), freedom))


def _spread(counts: np.ndarray, expected: np.ndarray) -> float:
    """The variance of the ratio count / expected beyond that of a Poisson count, by moments."""
    squares = float(np.sum(expected**2))
    return float(np.sum((counts - expected) ** 2 - expected)) / squares if squares else 0.0


def _drawn(counts: np.ndarray, expected: np.ndarray, spread: float) -> np.ndarray:
    """counts / expected, drawn towards 1 as a gamma prior with variance `spread` does."""
    if spread <= 0:
        return np.ones(len(counts))
    return (counts + 1 / spread) / (expected + 1 / spread)


def _expected(cells, others, outcome, weights, sizes) -> list[np.ndarray]:
    """For each field, the outcome expected in its cells from everything else, float64 [cells].

    The rate of a row is a product of effects, one for each column: those of `others` are drawn
    towards 1, those of the fields are not, so that what a field does is not taken for what its
    items do. The effects are fitted in turn (backfitting), and the sum of the expectation is that
    of the outcome.
    """
    # The fields come last: what remains is theirs.
    columns = [*others.T, *cells.T]
    sizes = [*(int(c.max(initial=0)) + 1 for c in others.T), *sizes]
    is_field = [False] * others.shape[1] + [True] * cells.shape[1]
    rate = weights * (outcome.sum() / max(weights.sum(), 1e-9))
    effects = [np.ones(size) for size in sizes]
    counts = [np.bincount(c, outcome, size) for c, size in zip(columns, sizes, strict=True)]
    expected = counts
    for _ in range(_ROUNDS if others.shape[1] else 1):
        expected = []
        for k, (column, size) in enumerate(zip(columns, sizes, strict=True)):
            without = rate / effects[k][column]
            e = np.bincount(column, without, size)
            spread = _spread(counts[k], e)
            # So that a cell without an outcome keeps an effect above 0.
            effects[k] = (
                (counts[k] + 0.5) / (e + 0.5) if is_field[k] else _drawn(counts[k], e, spread)
            )
            rate = without * effects[k][column]
            expected.append(e)
    total = outcome.sum()
    return [e * (total / e.sum()) if e.sum() else e for e in expected[others.shape[1] :]]
