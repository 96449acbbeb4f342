"""The file layouts of generated exposure logs; each is a class that implements `Layout`.

The columns are those of the module of `convert` that reads the format.
"""

import pathlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.csv

from pwiser_tf.convert import aliccp, aliexpress
from pwiser_tf.synthetic.truth import Rows, Shape

_COUNTRY = "XX"
_ITEM_FIELDS = (*aliccp.ITEM_FIELDS, *aliccp.CROSS_FIELDS, *aliccp.CONTEXT_FIELDS)
# The ids of a field are its offset plus a category.
_OFFSET = {field: 1_000_000 * (i + 1) for i, field in enumerate(aliccp.CATEGORIES)}
_OFFSET |= {field: 100_000_000 * (i + 1) for i, field in enumerate(aliccp.HISTORIES)}


class Layout(Protocol):
    """Defines the files and tables of a layout."""

    shape: Shape
    has_header: bool

    def path(self, folder: pathlib.Path, split: str, name: str) -> pathlib.Path:
        """The file of the table with this name."""

    def tables(self, rows: Rows) -> dict[str, pyarrow.Table]:
        """The tables of some rows, by name."""


class _AliExpress:
    shape = Shape(
        user_categories=(10, 5, 7, 4, 60, 8, 50, 1000, 200),
        item_categories=(100, 3, 2000, 20000, 12, 300, 5),
        user_numbers=len(aliexpress.USER_NUMERICAL),
        item_numbers=len(aliexpress.ITEM_NUMERICAL),
    )


class AliExpressProcessed(_AliExpress):
    """AliExpress_XX/train.csv, test.csv."""

    has_header = True

    def path(self, folder, split, name):
        return folder / f"AliExpress_{_COUNTRY}" / f"{split}.csv"

    def tables(self, rows):
        columns = {aliexpress.GROUP: rows.search_id[rows.search]}
        categories = [rows.user_categories[rows.search], rows.item_categories]
        numbers = [rows.user_numbers[rows.search], rows.item_numbers]
        columns |= zip(aliexpress.CATEGORICAL, np.concatenate(categories, axis=1).T, strict=True)
        columns |= zip(aliexpress.NUMERICAL, np.concatenate(numbers, axis=1).T, strict=True)
        columns |= {"click": rows.click.astype(int), "conversion": rows.conversion.astype(int)}
        return {"all": pyarrow.table(columns)}


class AliExpressRaw(_AliExpress):
    """XX/xx_item_train.csv, xx_user_train.csv, and so for test; columns have numbers."""

    has_header = False

    def path(self, folder, split, name):
        return folder / _COUNTRY / f"{_COUNTRY.lower()}_{name}_{split}.csv"

    def tables(self, rows):
        user = {1: rows.search_id}
        user |= zip(aliexpress.USER_CATEGORICAL, rows.user_categories.T, strict=True)
        user |= zip(aliexpress.USER_NUMERICAL, rows.user_numbers.T, strict=True)
        item = {1: rows.search_id[rows.search]}
        item |= zip(aliexpress.ITEM_CATEGORICAL, rows.item_categories.T, strict=True)
        item |= zip(aliexpress.ITEM_NUMERICAL, rows.item_numbers.T, strict=True)
        item[aliexpress.RAW_LABEL] = rows.click.astype(int) + rows.conversion
        return {
            name: pyarrow.table({str(number): table[number] for number in sorted(table)})
            for name, table in (("item", item), ("user", user))
        }


class _AliCcp:
    """Shared by both layouts of Ali-CCP: ids, missing values and irregular rows.

    As in the real data, different fields have different ids. The first category of the user fields
    124 and 126 counts as missing, and so does a cross field with the value 0. One in 500 rows
    without a click has a conversion.
    """

    shape = Shape(
        user_categories=(8000, 98, 14, 3, 8, 4, 4, 3, 5),
        item_categories=(20000, 500, 5000, 300, 2000, 400, 2000, 1000, 500, 3),
        user_numbers=0,
        item_numbers=len(aliccp.CROSS_FIELDS),
    )

    def _user_ids(self, rows: Rows) -> dict[str, np.ndarray]:
        """Ids of the users of the searches, [S] for each field; 0 if missing."""
        ids = {}
        for field, category in zip(aliccp.USER_FIELDS, rows.user_categories.T, strict=True):
            missing = (category == 0) & (field in ("124", "126"))
            ids[field] = np.where(missing, 0, _OFFSET[field] + category)
        return ids

    def _item_ids(self, rows: Rows) -> dict[str, np.ndarray]:
        """Ids of the shown items, [n] for each field; 0 if missing."""
        categories = zip(_ITEM_FIELDS, rows.item_categories.T, strict=True)
        ids = {field: _OFFSET[field] + category for field, category in categories}
        for field, value in zip(aliccp.CROSS_FIELDS, rows.item_numbers.T, strict=True):
            ids[field] = np.where(value == 0, 0, ids[field])
        return ids

    def _labels(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        odd = ~rows.click & (np.arange(len(rows.click)) % 500 == 0)
        return rows.click.astype(int), (rows.conversion | odd).astype(int)

    def _histories(self, rows: Rows) -> Iterator[dict[str, list[tuple[int, float]]]]:
        """For each search, the (id, value) pairs of the user's histories, at least one in each."""
        for search_id in rows.search_id.tolist():
            yield {
                field: [
                    (_OFFSET[field] + search_id % 97 + k, 0.7 / (k + 1))
                    for k in range(1 + (search_id + i) % 7)
                ]
                for i, field in enumerate(aliccp.HISTORIES)
            }


class AliCcpProcessed(_AliCcp):
    """ali_ccp_train.csv, ali_ccp_test.csv, with a header of 33 columns; 0 if missing."""

    has_header = True

    def path(self, folder, split, name):
        return folder / f"ali_ccp_{split}.csv"

    def tables(self, rows):
        click, conversion = self._labels(rows)
        columns = {"click": click, "purchase": conversion}
        columns |= {field: ids[rows.search] for field, ids in self._user_ids(rows).items()}
        columns |= self._item_ids(rows)
        # These files have one id and one value of each history.
        first = [{f: h[0] for f, h in histories.items()} for histories in self._histories(rows)]
        for position, prefix in enumerate(("", "D")):
            for field in aliccp.HISTORIES:
                values = np.array([histories[field][position] for histories in first])
                columns[prefix + field] = values[rows.search]
        columns |= zip(aliccp.VALUES, rows.item_numbers.T, strict=True)
        return {"all": pyarrow.table(columns)}


class AliCcpRaw(_AliCcp):
    """sample_skeleton_train.csv, common_features_train.csv, and so for test.

    Field 210 is repeated in two of three rows, the row's own id first; one skeleton row in ten has
    a user field that the common features override.
    """

    has_header = False

    def path(self, folder, split, name):
        return folder / f"{name}_{split}.csv"

    def tables(self, rows):
        # Multiplied by an odd number, so that ids are unique and not in order.
        common_ids = np.array(
            [f"{x:016x}" for x in rows.search_id.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)]
        )
        user = self._user_ids(rows)
        histories = ["\x01".join(map(self._history, h.items())) for h in self._histories(rows)]
        # Half of them have the histories first, as fields have no fixed order in the real files.
        before = np.arange(len(rows.search_id)) % 2 == 0
        listed = [self._features(field, ids) for field, ids in user.items()]
        columns = [_where(before, histories), *listed, _where(~before, histories)]
        common, n_common = _joined(columns)
        click, conversion = self._labels(rows)
        number = np.arange(len(click))
        values = dict(zip(aliccp.CROSS_FIELDS, rows.item_numbers.T, strict=True))
        items = self._item_ids(rows)
        columns = [self._features(f, ids, values.get(f)) for f, ids in items.items()]
        for more in (1, 2):
            others = np.where(number % 3 >= more, items["210"] + more, 0)
            columns.append(self._features("210", others))
        stale = np.where(number % 10 == 0, user["121"][rows.search] + 1, 0)
        columns.append(self._features("121", stale))
        features, n_features = _joined(columns)
        return {
            "sample_skeleton": pyarrow.table({
                "sample_id": number + 1, "click": click, "conversion": conversion,
                "common_feature_id": common_ids[rows.search], "n_features": n_features,
                "feature_list": features,
            }),
            "common_features": pyarrow.table({
                "common_feature_id": common_ids, "n_features": n_common, "feature_list": common,
            }),
        }  # fmt: skip

    @staticmethod
    def _features(field: str, ids: np.ndarray, values: np.ndarray | None = None) -> pyarrow.Array:
        """The features of a field as text with their values (default 1.0); null if the id is 0."""
        join = pyarrow.compute.binary_join_element_wise
        value = "1.0" if values is None else pyarrow.array(values).cast("string")
        text = join(join(field, pyarrow.array(ids).cast("string"), "\x02"), value, "\x03")
        return pyarrow.compute.if_else(pyarrow.array(ids != 0), text, None)

    @staticmethod
    def _history(item: tuple[str, list[tuple[int, float]]]) -> str:
        field, features = item
        return "\x01".join(f"{field}\x02{key}\x03{value:.5f}" for key, value in features)


LAYOUTS: dict[str, Layout] = {
    "processed": AliExpressProcessed(),
    "raw": AliExpressRaw(),
    "aliccp_processed": AliCcpProcessed(),
    "aliccp_raw": AliCcpRaw(),
}


class Writer:
    """The CSV files of one split in one layout. A context manager."""

    def __init__(self, folder: pathlib.Path, split: str, layout: Layout):
        self._folder, self._split, self._layout = folder, split, layout
        self._files: dict = {}

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            file.close()

    def write(self, rows: Rows) -> None:
        """Appends rows."""
        for name, table in self._layout.tables(rows).items():
            if name not in self._files:
                path = self._layout.path(self._folder, self._split, name)
                path.parent.mkdir(exist_ok=True)
                self._files[name] = open(path, "wb")  # noqa: SIM115
                if self._layout.has_header:
                    self._files[name].write((",".join(table.column_names) + "\n").encode())
            options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="none")
            pyarrow.csv.write_csv(table, self._files[name], options)


def _where(chosen: np.ndarray, texts: list[str]) -> pyarrow.Array:
    """The chosen texts; null for the others."""
    return pyarrow.compute.if_else(pyarrow.array(chosen), pyarrow.array(texts), None)


def _joined(columns: list[pyarrow.Array]) -> tuple[pyarrow.Array, np.ndarray]:
    """Joins the columns to feature lists without nulls; returns them and their lengths."""
    lists = pyarrow.compute.binary_join_element_wise(*columns, "\x01", null_handling="skip")
    return lists, pyarrow.compute.count_substring(lists, "\x02").to_numpy()
