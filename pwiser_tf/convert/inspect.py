"""Looks at a log and writes a first feature file, with its reasons as comments.

    pwiser inspect log.csv --output=log.toml

It reads the first rows (--rows) of a CSV or Parquet file. What it writes is a proposal: read it,
and correct it, before `pwiser convert --features=log.toml`.
"""

import dataclasses
import json
import pathlib
import re
import shlex
import sys
import tempfile

import duckdb
import pyarrow
from absl import flags

from pwiser_tf.command_line import run
from pwiser_tf.convert import columns, learn, source
from pwiser_tf.convert.csv_reader import TEXT, CsvFile, literal, literals
from pwiser_tf.convert.features import MISSING_MARKS
from pwiser_tf.convert.parquet_reader import ParquetFile, is_parquet
from pwiser_tf.errors import DataError
from pwiser_tf.files import write_text

# What columns of each role are often called, the likeliest first.
_NAMES = {
    "click": r"click(ed|s)?|is_?click|clk|label|y",
    "conversion": r"conver(sion|ted)|is_?conver.*|bought|buy|purchased?|order(ed)?|cvr?_?label|pay",
    "group": r"(search|session|query|request|impression|auction)(_?id)?",
    "time": r"(time(_?stamp)?|ts|date(_?time)?|day|hour|dt)",
}
_SEPARATORS = ("|", ";", ",", " ", "\x02", "^")
_DELIMITERS = (",", "\t", ";", "|", "\x01")
_LABELS = {"0", "1", "0.0", "1.0", "true", "false", "t", "f", "yes", "no"}
# Up to this many different integers a column is more likely a category than a quantity.
_FEW_INTEGERS = 100
_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Column:
    """What was found in a column.

    Attributes:
      name: the column's. rows: looked at. missing: of them, with a missing mark.
      marks: the missing marks found. distinct: different values. integers, numbers: values that
        are such. separator: between the values of a text that looks like a list. longest: values
        in a cell. examples: some values. is_list: a Parquet column of lists. is_vector: all cells
        have as many numbers. weighted: most texts end in ":" and a number.
    """

    name: str
    rows: int
    missing: int
    marks: tuple[str, ...]
    distinct: int
    integers: int
    numbers: int
    separator: str | None
    longest: int
    examples: tuple[str, ...]
    is_list: bool = False
    is_vector: bool = False
    weighted: bool = False

    @property
    def present(self) -> int:
        """The rows with a value."""
        return self.rows - self.missing


def inspect(
    path: str,
    rows: int,
    delimiter: str | None = None,
    header: list[str] | None = None,
    quote: str = '"',
) -> str:
    """The text of a feature file for the log in `path`.

    Args:
      path: a CSV or Parquet file, or a folder of them, of which the first is read.
      rows: how many rows are looked at. delimiter, header: of a CSV; None: found out. quote: of
        a CSV; "": there is none.

    Raises:
      DataError: no file, or one that cannot be read.
    """
    first = source.paths([path])[0]
    lists, floats, nested = set(), set(), {}
    if is_parquet(first):
        whole = ParquetFile(first, {})
        nested = {name: kind for name in whole.names if (kind := whole.nested(name))}
        names = [name for name in whole.names if name not in nested]
        file = ParquetFile(first, dict.fromkeys(names, TEXT))
        lists = {name for name in names if file.is_list(name)}
        floats = {name for name in lists if pyarrow.types.is_floating(file.element(name))}
    else:
        delimiter = delimiter or _delimiter(first, quote)
        names = CsvFile(first, {}, delimiter=delimiter, names=header, quote=quote).names
        for name in names:
            if names.count(name) > 1:
                raise DataError(
                    f"found two columns named {name!r} in the header; a file without one needs "
                    "--header",
                    file=first,
                    row=1,
                )
        kinds = dict.fromkeys(names, TEXT)
        file = CsvFile(first, kinds, delimiter=delimiter, names=header, quote=quote)
    with tempfile.TemporaryDirectory() as scratch:
        connection = duckdb.connect(str(pathlib.Path(scratch) / "inspect.duckdb"))
        connection.execute("SET GLOBAL TimeZone = 'UTC'")
        selected = ", ".join(
            f"CAST({file.column(name)} AS VARCHAR) AS c{k}"
            + (f", len({file.column(name)}) AS length{k}" if name in lists else "")
            for k, name in enumerate(names)
        )
        try:
            connection.execute(
                f"CREATE TABLE log AS SELECT {selected} FROM {file.table()} LIMIT {rows}"
            )
        except duckdb.Error as error:
            raise file.find_fault(connection) or DataError(str(error), file=first) from None
        found = [
            _column(connection, k, name, name in lists, name in floats)
            for k, name in enumerate(names)
        ]
        connection.close()
    if not found or not found[0].rows:
        raise DataError("found no rows", file=first)
    options = f" --delimiter='{_shown(delimiter)}'" if delimiter not in (None, ",") else ""
    if header:
        options += f" --header={','.join(header)}"
    if quote != '"':
        options += f" --quote={quote and shlex.quote(_shown(quote))}"
    return _text(path, found, options, columns.partitions(first), nested)


def _delimiter(path: str, quote: str) -> str:
    """The delimiter that gives the header most columns."""
    with CsvFile(path, {}, names=None, quote=quote)._open() as file:
        line = file.readline().decode("utf-8", "replace")
    return max(_DELIMITERS, key=line.count)


def _column(connection, k: int, name: str, is_list: bool, of_floats: bool) -> Column:
    value = f"c{k}"
    marks = f"{literals(MISSING_MARKS)}"
    present = f"({value} IS NOT NULL AND NOT list_contains({marks}, {value}))"
    rows, missing, distinct, integers, numbers = connection.execute(
        f"SELECT count(*), count(*) FILTER (WHERE NOT {present}), "
        f"count(DISTINCT {value}) FILTER (WHERE {present}), "
        f"count(*) FILTER (WHERE {present} AND ({learn.integer(value)}) IS NOT NULL), "
        f"count(*) FILTER (WHERE {present} AND TRY_CAST({value} AS DOUBLE) IS NOT NULL) FROM log"
    ).fetchone()
    found_marks = connection.execute(
        f"SELECT DISTINCT {value} FROM log WHERE NOT {present} AND {value} IS NOT NULL ORDER BY 1"
    ).fetchall()
    examples = connection.execute(
        f"SELECT {value} FROM log WHERE {present} GROUP BY {value} "
        f"ORDER BY count(*) DESC, {value} LIMIT {_EXAMPLES}"
    ).fetchall()
    separator, longest, is_vector, weighted = None, 1, False, False
    if is_list:
        # An empty list is a missing value, of a vector too.
        least, most = connection.execute(
            f"SELECT min(length{k}), max(length{k}) FROM log WHERE length{k} > 0"
        ).fetchone()
        longest, is_vector = most or 0, of_floats and least == most and most > 1
    elif numbers < rows - missing:
        for candidate in _SEPARATORS:
            parts = f"string_split({value}, {literal(candidate)})"
            share, most, least, of_numbers, with_colon = connection.execute(
                f"SELECT avg(CASE WHEN contains({value}, {literal(candidate)}) THEN 1 ELSE 0 END), "
                f"max(len({parts})), min(len({parts})), "
                f"bool_and(list_bool_and(list_transform({parts}, lambda x: "
                f"TRY_CAST(x AS DOUBLE) IS NOT NULL))), avg(CASE WHEN regexp_full_match({value}, "
                f"'.+:[0-9.]+') THEN 1 ELSE 0 END) FROM log WHERE {present}"
            ).fetchone()
            # Words have blanks too: a list has them in most cells, and not always as many.
            if share and share > 0.5 and (most > least or of_numbers):
                separator, longest = candidate, most
                is_vector = most == least and of_numbers
                weighted = with_colon > 0.9 and candidate != ":"
                break
    texts = tuple(text for (text,) in examples)
    marks = tuple(text for (text,) in found_marks)
    return Column(
        *(name, rows, missing, marks, distinct, integers, numbers, separator, longest, texts),
        *(is_list, is_vector, weighted),
    )


def _shown(character: str) -> str:
    """A delimiter as --delimiter takes it."""
    return character if character.isprintable() else f"\\x{ord(character):02x}"


def _text(
    path: str,
    found: list[Column],
    options: str,
    partitions: dict[str, str],
    nested: dict[str, str],
) -> str:
    roles: dict[str, Column] = {}
    for role, pattern in _NAMES.items():
        for column in found:
            fits = role in ("group", "time") or _is_label(column)
            if fits and column not in roles.values() and re.fullmatch(pattern, column.name.lower()):
                roles.setdefault(role, column)
    marks = sorted({mark for column in found for mark in column.marks})
    lines = [
        f"# Proposed by `pwiser inspect {path}` from its first {found[0].rows:,} rows. Read it",
        "# and correct it, then: pwiser convert --format=columns --features=THIS_FILE "
        + f"--train={path}{options}",
        "",
        "[labels]",
    ]
    for role in ("click", "conversion"):
        if role in roles:
            lines.append(f"{role} = {_quoted(roles[role].name)}  # {_found(roles[role])}")
    if "click" not in roles:
        labels = [column.name for column in found if _is_label(column)]
        lines.append(
            'click = ""  # no column is called so; with values of a label: '
            + (", ".join(labels) or "none")
        )
    if "conversion" not in roles:
        lines.append("# no conversion was found: the model will have CTR only")
    lines += ["", "[columns]"]
    for role in ("group", "time"):
        if role in roles:
            lines.append(f"{role} = {_quoted(roles[role].name)}  # {_found(roles[role])}")
    for name, value in partitions.items():
        is_time = "time" not in roles and re.fullmatch(_NAMES["time"], name.lower())
        line = f"time = {_quoted(name)}  # " if is_time else f"# {name}: "
        lines.append(line + f"of the folders' names, for example {_quoted(value)}")
    lines.append(
        "# missing marks found: "
        + (", ".join(map(_quoted, marks)) or "none")
        + "; all of the usual ones count"
    )
    for column in found:
        if column not in roles.values():
            lines += ["", *_feature(column)]
    for name, kind in nested.items():
        lines += ["", f"# {name} is left out: the type {kind} is not read."]
    return "\n".join(lines) + "\n"


def _is_label(column: Column) -> bool:
    return column.distinct <= 2 and {text.lower() for text in column.examples} <= _LABELS


def _found(column: Column) -> str:
    """What was found in a column, in words."""
    shown = ", ".join(map(_quoted, column.examples))
    missing = f", {column.missing / column.rows:.1%} missing" if column.missing else ""
    return f"{column.distinct:,} different values{missing}; for example {shown or '-'}"


def _feature(column: Column) -> list[str]:
    """The lines of a column's feature, commented out where it is none."""
    table = f"[features.{_key(column.name)}]"
    reason = f"# {_found(column)}"
    left_out = f"# {column.name} is left out: nearly every row has another value. {reason[2:]}"
    if column.distinct <= 1:
        return [f"# {column.name} is left out: it is constant or empty. {reason[2:]}"]
    if column.is_vector:
        return [
            table,
            reason,
            f'type = "vector"  # {column.longest} numbers in every cell',
            f"length = {column.longest}",
            *([f"separator = {_quoted(column.separator)}"] if column.separator else []),
        ]
    if column.is_list:
        return [
            table,
            reason,
            f'type = "list"  # lists of up to {column.longest} values; "sequence" where their '
            "order is time",
        ]
    if column.separator:
        weights = ['weight_separator = ":"  # a number behind it'] if column.weighted else []
        return [
            table,
            reason,
            f'type = "list"  # up to {column.longest} values; "sequence" where their order is time',
            f"separator = {_quoted(column.separator)}",
            *weights,
        ]
    if column.numbers < column.present:
        if column.integers >= 0.9 * column.present:
            lines = [table, reason, 'dtype = "int64"  # most values are integers; others: unknown']
        elif column.distinct > 0.95 * column.present > 100:
            return [left_out]
        else:
            lines = [table, reason, 'dtype = "string"']
        return lines
    is_id = re.search(
        r"(^|_)(id|user|item|movie|ad|campaign|shop|seller|brand|category|cat|city|slot|device|code)"
        r"(_|$|s$)",
        column.name.lower(),
    )
    if is_id and column.distinct > 0.95 * column.present > 100:
        return [left_out]
    if column.integers < column.present:
        return [table, reason, 'type = "numerical"  # not all values are integers']
    if is_id or column.distinct <= _FEW_INTEGERS:
        why = "its name is that of an id" if is_id else "few different integers"
        return [table, reason, f'dtype = "int64"  # {why}']
    return [table, reason, 'type = "numerical"  # many different integers; "categorical" for ids']


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("output", None, "The feature file to write.", flag_values=values)
    flags.DEFINE_integer(
        "rows", 200_000, "How many rows are looked at.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string(
        "delimiter", None, "Between cells of a CSV; default: found out.", flag_values=values
    )
    flags.DEFINE_list(
        "header", [], "The names of the columns of a CSV without a header.", flag_values=values
    )
    flags.DEFINE_string(
        "quote", '"', "Around cells of a CSV with delimiters; empty: none.", flag_values=values
    )


def main(path: str, values: flags.FlagValues = flags.FLAGS) -> None:
    """Writes the feature file, or prints it."""
    delimiter = columns.character("delimiter", values.delimiter) if values.delimiter else None
    quote = columns.character("quote", values.quote) if values.quote else ""
    text = inspect(path, values.rows, delimiter, values.header or None, quote)
    if not values.output:
        sys.stdout.write(text)
        return
    output = pathlib.Path(values.output)
    if output.exists():
        raise DataError(
            "expected a file that does not exist yet: this one is not overwritten", file=output
        )
    write_text(output, text)
    print("wrote", output)


if __name__ == "__main__":
    define_flags()
    run(main, argument="a log")
