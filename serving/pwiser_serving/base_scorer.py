"""What Scorer and SavedModelScorer share: the call that features make, the scores of outputs."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Self

import grpc
import numpy as np

from pwiser_serving import features as feature_columns
from pwiser_serving import services
from pwiser_serving.errors import FeatureError, ScoringError, UsageError
from pwiser_serving.protos import tensor_pb2

# A model has these, or of a log without conversions the first one alone.
PROBABILITIES = ("ctr", "cvr", "ctcvr")
# It may also have these: corrected for accidental clicks; what `pwiser export --score` asked for.
OUTPUTS = (*PROBABILITIES, "interest", "score")
RAW_SIGNATURE = "predict_raw"
ID_SIGNATURE = "predict"

# A call takes the one with its features' names: raw features, ids, serialized Examples.
_SIGNATURES = (RAW_SIGNATURE, ID_SIGNATURE, services.DEFAULT_SIGNATURE)


class Scores(dict[str, np.ndarray]):
    """The scores of one call: "ctr", "cvr" and "ctcvr", or only "ctr", float32 [n]; "interest"
    and "score", where the model has them.

    Attributes:
      versions: the versions of the model that answered, in order; several only if the server
        changed versions during the call. Empty if there were no rows, or the server names none.
    """

    def __init__(self, values: Mapping[str, np.ndarray], versions: Iterable[int] = ()):
        super().__init__(values)
        self.versions = tuple(sorted(set(versions)))

    @property
    def version(self) -> int | None:
        """The version that answered; None if it was not exactly one."""
        return self.versions[0] if len(self.versions) == 1 else None


@dataclasses.dataclass(frozen=True)
class Model:
    """What a server said about a model."""

    version: int | None
    signatures: Mapping[str, tensor_pb2.Signature]

    def inputs(self, signature: str) -> Mapping[str, tensor_pb2.TensorInfo]:
        found = self.signatures.get(signature)
        return found.inputs if found else {}

    def outputs(self, signature: str) -> tuple[str, ...]:
        """The scores that a signature gives."""
        found = self.signatures.get(signature)
        names = tuple(name for name in OUTPUTS if found and name in found.outputs)
        return names if set(names) & set(PROBABILITIES) else ()


@dataclasses.dataclass(frozen=True)
class Call:
    """What to ask a model: a signature, its outputs, the arrays of its inputs, their rows."""

    signature: str
    outputs: tuple[str, ...]
    arrays: Mapping[str, np.ndarray]
    rows: int

    def part(self, start: int, end: int) -> dict[str, np.ndarray]:
        """The arrays of the rows from start to end."""
        return {name: array[start:end] for name, array in self.arrays.items()}

    def no_scores(self) -> Scores:
        """The scores of no rows."""
        return Scores(dict.fromkeys(self.outputs, np.zeros(0, np.float32)))


class BaseScorer:
    """The checks that a Scorer and a SavedModelScorer share, and their errors."""

    address: str
    model: str
    version: int | str | None
    signature: str | None
    rows_per_request: int
    newest_last: frozenset[str]
    _closed = False

    def close(self) -> None:
        """Frees what the scorer holds."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _prepared(self, model: Model, features) -> Call:
        """The call of the signature that takes the features."""
        signature = self.signature
        if signature is None:
            names = set(features.keys())
            there = [name for name in _SIGNATURES if model.inputs(name)] or [RAW_SIGNATURE]
            fitting = [name for name in there if model.inputs(name).keys() == names]
            signature = (fitting or there)[0]
        inputs = model.inputs(signature)
        if not inputs:
            have = ", ".join(sorted(model.signatures))
            details = f"the model has no signature {signature}, only {have}"
            raise self._fault(grpc.StatusCode.FAILED_PRECONDITION, details)
        raw = signature == RAW_SIGNATURE
        arrays, rows = feature_columns.to_arrays(
            features, inputs, newest_last=self.newest_last, raw=raw
        )
        outputs = model.outputs(signature)
        if not outputs:
            have = ", ".join(sorted(model.signatures[signature].outputs))
            details = f"the signature {signature} has no output {OUTPUTS[0]}, only {have}"
            raise self._fault(grpc.StatusCode.FAILED_PRECONDITION, details)
        return Call(signature, outputs, arrays, rows)

    def _checked(
        self,
        output: Callable[[str], np.ndarray],
        names: Sequence[str],
        rows: int,
        versions: Iterable[int],
    ) -> Scores:
        """A model's outputs of those names as scores; ScoringError if they are not scores."""
        scores = {}
        for name in names:
            try:
                scores[name] = output(name).astype(np.float32)
            except ValueError as error:
                details = f"the answer's {name} cannot be read: {error}"
                raise self._fault(grpc.StatusCode.INTERNAL, details) from None
            if scores[name].shape != (rows,):
                shape = list(scores[name].shape)
                details = f"the answer's {name} has the shape {shape}, expected [{rows}]"
                raise self._fault(grpc.StatusCode.INTERNAL, details)
        return Scores(scores, versions)

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError("this Scorer is closed: open another one")

    def _fault(self, code: grpc.StatusCode, details: str) -> ScoringError:
        return ScoringError(self.address, self.model, self.version, code, details)


def require_types(*arguments: tuple[str, object, type, str]) -> None:
    """TypeError for the first argument (name, value, type, expected) of another type."""
    for name, value, kind, expected in arguments:
        # True is an int, but hardly meant as one.
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name}: found {value!r}, expected {expected}")


def names_of_lists(names: Collection[str]) -> frozenset[str]:
    """The argument `newest_last`. TypeError: it is no collection of names."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"newest_last: found {names!r}, expected a list of names")
    return frozenset(names)


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of the requests of one call as one."""
    if len(parts) == 1:
        return parts[0]
    return Scores(
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
        itertools.chain.from_iterable(part.versions for part in parts),
    )


def by_name(features) -> dict[str, Sequence]:
    """A caller's features as a dict, with the checks that need no model.

    Raises:
      TypeError: they are not columns by name.
      FeatureError: two columns of one name, or a value that is not a column.
    """
    if not callable(getattr(features, "keys", None)):
        found = type_name(features)
        if isinstance(features, Sequence) and features and isinstance(features[0], Mapping):
            found = (
                "a list of rows: give pandas.DataFrame(rows), or "
                "{name: [row[name] for row in rows] for name in rows[0]}"
            )
        elif getattr(getattr(features, "dtype", None), "names", None):
            found = (
                "a structured NumPy array: give {name: array[name] for name in array.dtype.names}"
            )
        raise TypeError(
            f"features: expected columns by name, as a dict or pandas.DataFrame, found {found}"
        )
    names = list(features.keys())
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        count = names.count(twice)
        raise FeatureError(twice, f"found {count} columns of this name, expected one")
    columns = {name: features[name] for name in names}
    for name, values in columns.items():
        # Any type with a length, and values by position.
        if isinstance(values, str | bytes | Mapping) or not (
            hasattr(values, "__len__") and hasattr(values, "__getitem__")
        ):
            expected = "a column: a list, NumPy array or pandas.Series with a value for each row"
            raise FeatureError(name, expected, found=values)
    return columns


def type_name(value: object) -> str:
    return "None" if value is None else f"the type {type(value).__name__}"
