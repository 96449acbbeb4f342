"""`option`: a field of a config that is a flag too; everything about it is said once, there."""

import dataclasses
import math
import types
import typing
from collections.abc import Collection

from pwiser_tf.errors import DataError


def option(
    default,
    help_text: str,
    *,
    flag: str | None = None,
    low: float | None = None,
    high: float | None = None,
    choices: Collection[str] | None = None,
    search: tuple[float, float, bool] | None = None,
):
    """A field of a frozen dataclass that is a flag of the commands.

    Args:
      default: its value where none is given; None where the value follows from other options.
      flag: the flag's name, where it differs from the field's.
      low, high: the least and the greatest value.
      choices: the values that exist; a registry may grow after the field was made.
      search: what `pwiser tune` searches: least, greatest, and whether as a logarithm.
    """
    meta = {"help": help_text, "flag": flag, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata={**meta, "search": search})


def flag_of(field: dataclasses.Field) -> str:
    """The name of an option's flag."""
    return field.metadata["flag"] or field.name


def kind_of(field: dataclasses.Field) -> type:
    """The type of an option's values: bool, int, float, str or tuple."""
    kind = field.type
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    return typing.get_origin(kind) or kind


def check(config) -> None:
    """DataError for a value that an option cannot have: flags are checked, JSON files are not."""
    for field in dataclasses.fields(config):
        value, kind, meta = getattr(config, field.name), kind_of(field), field.metadata
        if value is None and field.default is None:
            continue
        shown = f"--{flag_of(field)}={value}"
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise DataError(f"{shown}: expected type {kind.__name__}")
        if kind is float and not math.isfinite(value):
            raise DataError(f"{shown}: expected a finite number")
        values = value if kind is tuple else (value,)
        if meta["choices"] and not set(values) <= set(meta["choices"]):
            raise DataError(f"{shown}: expected one of {list(meta['choices'])}")
        for bound, outside in (("low", lambda v, b: v < b), ("high", lambda v, b: v > b)):
            limit = meta[bound]
            if limit is not None and any(outside(v, limit) for v in values):
                word = "at least" if bound == "low" else "at most"
                raise DataError(f"{shown}: expected {word} {limit:g}")
