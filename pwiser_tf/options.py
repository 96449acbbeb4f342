"""`option` defines a field of a config and its command-line flag in one place."""

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
    """A field of a frozen dataclass that is also a flag of the commands.

    Args:
      default: the value if none is given; None if the value follows from other options.
      help_text: the help of the flag.
      flag: the name of the flag, if it differs from the name of the field.
      low, high: the smallest and the largest allowed value.
      choices: the allowed values. A registry may get more entries after the field is defined.
      search: the range that `pwiser tune` searches: (smallest, largest, on a logarithmic scale).
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
    """Raises DataError for a value that is not allowed, such as one from a JSON file."""
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
