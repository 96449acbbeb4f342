"""SavedModelScorer: a SavedModel on disk, called as a Scorer is, without a server."""

import numbers
import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence

import grpc

from pwiser_serving.base_scorer import (
    BaseScorer,
    Call,
    Model,
    Scores,
    by_name,
    joined,
    names_of_lists,
    require_types,
)
from pwiser_serving.errors import ModelNotFound
from pwiser_serving.server.status import Status


class SavedModelScorer(BaseScorer):
    """Scores candidates with a SavedModel on disk, in this process: in a notebook or a test.

    It takes the features that a Scorer takes, makes the same checks and gives the same scores as
    the local server. It needs TensorFlow, which is imported with the first one. Thread-safe.

    Args:
      path: the folder of a version (exported/demo/3), or of a model (exported/demo) for its
        newest version.
      signature: the signature to call. None chooses by the features' names, as a Scorer does.
      rows_per_request: larger calls are run in parts of so many rows, which bounds the memory.
      newest_last: as for a Scorer.

    Attributes:
      address: the version's folder; model: the model's name; version: a number, or None if the
      folder's name is not one.

    Raises:
      ImportError: TensorFlow is not installed.
      TypeError: an argument of another type.
      ValueError: rows_per_request is not above 0.
      ModelNotFound: there is no SavedModel.
      ScoringError: it does not load.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        signature: str | None = None,
        rows_per_request: int = 4096,
        newest_last: Collection[str] = (),
    ):
        require_types(
            ("signature", signature, str | None, "a str or None"),
            ("rows_per_request", rows_per_request, numbers.Integral, "an int"),
        )
        if not rows_per_request > 0:
            raise ValueError(f"rows_per_request must be above 0, found {rows_per_request}")
        folder = _version_folder(pathlib.Path(path).absolute())
        number = _number(folder)
        self.address, self.version = str(folder), number
        self.model = folder.name if number is None else folder.parent.name
        self.signature, self.rows_per_request = signature, rows_per_request
        self.newest_last = names_of_lists(newest_last)
        if not _is_saved_model(folder):
            expected = "a version's folder, or a model's folder with versions 1, 2, ... in it"
            details = f"found no saved_model.pb, expected {expected}"
            code = grpc.StatusCode.NOT_FOUND
            raise ModelNotFound(self.address, self.model, self.version, code, details)
        try:
            # Imported here: the client has no TensorFlow, whose import takes seconds.
            from pwiser_serving.server.saved_model import SavedModel
        except ModuleNotFoundError as error:
            raise ImportError(f"{error}: pip install 'pwiser-serving[server]'") from None
        try:
            self._saved_model = SavedModel(folder)
        except Status as status:
            raise self._fault(status.code, status.message) from None
        self._model = Model(self.version, self._saved_model.signatures)

    def score(self, features: Mapping[str, Sequence]) -> Scores:
        """Scores the candidates, in their order.

        Args:
          features: columns of raw features by name, or ids, or serialized Examples, as
            `Scorer.score` takes them.

        Returns:
          "ctr", "cvr", "ctcvr", or only "ctr": float32 [n], probabilities; and the `version`.

        Raises:
          TypeError: the features are not columns by name.
          FeatureError: the model does not take these features.
          ScoringError: the model has no such signature, or fails.
          UsageError: this is closed.
        """
        self._require_open()
        call = self._prepared(self._model, by_name(features))
        starts = range(0, call.rows, self.rows_per_request)
        parts = [self._scores(call, start) for start in starts]
        return joined(parts or [call.no_scores()])

    def close(self) -> None:
        """Frees the model; running calls end with an error. May be called again."""
        if not self._closed:
            self._closed = True
            self._saved_model.close()

    def _scores(self, call: Call, start: int) -> Scores:
        end = min(start + self.rows_per_request, call.rows)
        try:
            outputs = self._saved_model.predict(call.signature, call.part(start, end), call.outputs)
        except Status as status:
            # It may have been closed meanwhile.
            self._require_open()
            raise self._fault(status.code, status.message) from None
        versions = [] if self.version is None else [self.version]
        return self._checked(outputs.__getitem__, call.outputs, end - start, versions)


def _version_folder(path: pathlib.Path) -> pathlib.Path:
    """The folder of the newest version in a model's folder; any other path as it is."""
    if _is_saved_model(path) or not path.is_dir():
        return path
    versions = [child for child in path.iterdir() if _number(child) is not None and child.is_dir()]
    return max(versions, key=_number, default=path)


def _number(folder: pathlib.Path) -> int | None:
    """The version by the folder's name, or None."""
    return int(folder.name) if re.fullmatch(r"[0-9]{1,19}", folder.name) else None


def _is_saved_model(folder: pathlib.Path) -> bool:
    # As bytes or as text.
    return any((folder / name).is_file() for name in ("saved_model.pb", "saved_model.pbtxt"))
