"""Scores a CSV of candidates with a served model.

    python -m pwiser_serving.client --server localhost:8500 --model demo \\
        --input candidates.csv --output scores.csv --keep candidate_id

The input has a header and a column for each raw feature of the model, in any order; an empty cell
is a missing value, other columns are ignored. The output has a row for each row of the input, in
its order: the columns of --keep, then ctr, cvr and ctcvr. It appears whole or not at all. Without
--output a table is printed.
"""

import argparse
import collections
import contextlib
import csv
import os
import pathlib
import signal
import sys
from collections.abc import Iterator, Sequence

from pwiser_serving import command_line
from pwiser_serving.candidates import CandidateError, CandidateFile
from pwiser_serving.errors import FeatureError, ScoringError
from pwiser_serving.scorer import OUTPUTS, RAW_SIGNATURE, Scorer

Rows = Iterator[Sequence[str]]


def score_file(scorer: Scorer, candidates: CandidateFile, keep: Sequence[str]) -> Iterator[Rows]:
    """The output's rows, batch by batch: the columns of keep, then the scores as text.

    Raises:
      CandidateError: the file does not hold what the model takes.
      ScoringError: the server did not answer, or refused.
    """
    candidates.require(keep, "--keep names")
    inputs = scorer.inputs(RAW_SIGNATURE)
    candidates.require(sorted(inputs), f"model {scorer.model} needs")
    kept = collections.deque()

    def features():
        for batch in candidates.batches(scorer.rows_per_request):
            kept.append([batch.columns[name] for name in keep])
            yield {name: batch.values(name, info.dtype) for name, info in inputs.items()}

    for scores in scorer.score_batches(features()):
        texts = [scores[name].astype(str).tolist() for name in OUTPUTS]
        yield zip(*kept.popleft(), *texts, strict=True)


def _write(batches: Iterator[Rows], header: Sequence[str], output: pathlib.Path) -> int:
    """Writes the CSV aside and moves it into place. Returns the number of rows."""
    aside = output.with_name(f".{output.name}.{os.getpid()}.partial")
    rows = 0
    _end_on_signals(aside)
    try:
        with open(aside, "x", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            for batch in batches:
                for row in batch:
                    writer.writerow(row)
                    rows += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, output)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from None
    finally:
        aside.unlink(missing_ok=True)
    return rows


def _end_on_signals(aside: pathlib.Path | None = None) -> None:
    """SIGINT and SIGTERM end the process at once, after removing the file written aside.

    They raise nothing: an exception in the midst of a gRPC call leaves its channel so that
    closing it, which the way out does, waits for ever.
    """

    def end(number, _):
        if aside:
            aside.unlink(missing_ok=True)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def _print(batches: Iterator[Rows], header: Sequence[str]) -> int:
    """Prints a table whose widths are those of the first batch. Returns the number of rows."""
    rows, widths = 0, None
    for batch in batches:
        batch = [(*row[: -len(OUTPUTS)], *(f"{float(v):.6f}" for v in row[-3:])) for row in batch]
        if widths is None:
            widths = [max(map(len, column)) for column in zip(header, *batch, strict=True)]
            _print_row(header, widths)
        for row in batch:
            _print_row(row, widths)
        rows += len(batch)
    if widths is None:
        _print_row(header, [len(name) for name in header])
    return rows


def _print_row(row: Sequence[str], widths: Sequence[int]) -> None:
    print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


def _flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(
        prog="python -m pwiser_serving.client",
        description="Scores a CSV of raw features with a model behind TF Serving's gRPC API.",
    )
    parser.add_argument("--server", default="localhost:8500", help="host:port of the server")
    parser.add_argument("--model", required=True, help="the model's name on the server")
    parser.add_argument("--version", type=int, help="the model's version; the newest by default")
    parser.add_argument("--input", required=True, type=pathlib.Path, help="CSV with a header")
    parser.add_argument("--delimiter", default=",", help=r"between cells; \t is a tab")
    parser.add_argument("--output", type=pathlib.Path, help="CSV to write; a table by default")
    parser.add_argument("--keep", default="", help="columns of the input to repeat, a,b,c")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for one request")
    parser.add_argument("--batch_size", type=int, default=4096, help="rows in one request")
    flags = parser.parse_args(arguments)
    if not flags.timeout > 0:
        parser.error(f"--timeout: found {flags.timeout:g}, expected more than 0 seconds")
    if flags.batch_size < 1:
        parser.error(f"--batch_size: found {flags.batch_size}, expected 1 or more")
    if flags.output and not flags.output.absolute().parent.is_dir():
        parser.error(f"--output: {flags.output.parent} is not a folder")
    if flags.output and flags.output.is_dir():
        parser.error(f"--output: {flags.output} is a folder, expected a file's name")
    flags.delimiter = flags.delimiter.replace(r"\t", "\t")
    if len(flags.delimiter) != 1 or flags.delimiter in '"\r\n':
        parser.error(f"--delimiter: found {flags.delimiter!r}, expected one character")
    flags.keep = [name for name in flags.keep.split(",") if name]
    return flags


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    flags = _flags(arguments)
    _end_on_signals()
    header = [*flags.keep, *OUTPUTS]
    try:
        with contextlib.ExitStack() as stack:
            candidates = stack.enter_context(CandidateFile(flags.input, flags.delimiter))
            scorer = stack.enter_context(
                Scorer(
                    flags.server,
                    flags.model,
                    version=flags.version,
                    timeout=flags.timeout,
                    rows_per_request=flags.batch_size,
                )
            )
            batches = score_file(scorer, candidates, flags.keep)
            if flags.output:
                rows = _write(batches, header, flags.output)
                print(f"{flags.output}: {rows} rows scored by {flags.model}", file=sys.stderr)
            else:
                _print(batches, header)
                sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the table has seen enough; Python would complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (CandidateError, FeatureError, ScoringError, OSError) as error:
        command_line.fail(error)


if __name__ == "__main__":
    main()
