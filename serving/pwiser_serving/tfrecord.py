"""Candidates in a TFRecord file: serialized tf.train.Examples of raw features, sent as they are."""

import itertools
import pathlib
import struct
from collections.abc import Iterator, Mapping, Sequence

import crc32c
import numpy as np

from pwiser_serving import services
from pwiser_serving.candidates import BaseFile, CandidateError, open_file
from pwiser_serving.protos import tensor_pb2

# A record's frame: its length, the length's masked CRC32C, the data, the data's masked CRC32C.
_LENGTH = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")


class Batch:
    """Some records of the file."""

    def __init__(self, first: int, records: list[bytes]):
        self._first, self._records = first, records

    @property
    def rows(self) -> Sequence[int]:
        """The number of each row."""
        return range(self._first, self._first + len(self._records))

    def features(self, inputs: Mapping[str, tensor_pb2.TensorInfo]) -> dict[str, np.ndarray]:
        """The records as the signature's input."""
        records = np.empty(len(self._records), object)
        records[:] = self._records
        return dict.fromkeys(inputs, records)


class CandidateFile(BaseFile):
    """A TFRecord file. CandidateError: it cannot be opened."""

    signature = services.DEFAULT_SIGNATURE

    def __init__(self, path: pathlib.Path):
        self.path = path
        # The model's raw features: a record must hold at least one of them.
        self.names: Sequence[str] = ()
        self._file = open_file(path)

    def require(self, names: Sequence[str], reason: str) -> None:
        """CandidateError if there is a name: the records have no columns."""
        for name in names:
            raise CandidateError(
                f"a TFRecord file has no columns to take, which {reason}",
                file=self.path,
                column=name,
            )

    def no_rows(self) -> Batch:
        """A batch without rows."""
        return Batch(1, [])

    def batches(self, rows: int, *, skip: int = 0) -> Iterator[Batch]:
        """The records after the first `skip`, in batches of at most `rows`.

        Raises:
          CandidateError: a record that is cut off or has a wrong checksum; or one that holds none
            of the model's features: the model would take it, with all features missing.
        """
        records = itertools.islice(self._records(), skip, None)
        while found := list(itertools.islice(self._checked(records, skip), rows)):
            yield Batch(skip + 1, found)
            skip += len(found)

    def _checked(self, records: Iterator[bytes], skip: int) -> Iterator[bytes]:
        names = [name.encode() for name in self.names]
        for number, record in enumerate(records, skip + 1):
            if names and not any(name in record for name in names):
                have = ", ".join(self.names)
                raise CandidateError(
                    f"the record holds none of the model's features: {have}",
                    file=self.path,
                    row=number,
                )
            yield record

    def _records(self) -> Iterator[bytes]:
        for number in itertools.count(1):
            header = self._read(_LENGTH.size, number)
            if not header:
                return
            length, checksum = _LENGTH.unpack(header)
            # Checked first: a wrong length may ask for all the memory.
            if _masked(header[:8]) != checksum:
                raise CandidateError(
                    "the record's length does not match its checksum: a corrupt file, or not a "
                    "TFRecord file",
                    file=self.path,
                    row=number,
                )
            data = self._read(length + _CHECKSUM.size, number)
            record = data[:length]
            if not data or _masked(record) != _CHECKSUM.unpack(data[length:])[0]:
                expected = "the record does not match its checksum" if data else "cut off"
                raise CandidateError(expected, file=self.path, row=number)
            yield record

    def _read(self, size: int, number: int) -> bytes:
        """The next `size` bytes, or none at the end of the file."""
        try:
            data = self._file.read(size)
        except (OSError, OverflowError, MemoryError) as error:
            raise CandidateError(str(error), file=self.path, row=number) from None
        if data and len(data) < size:
            raise CandidateError("the record is cut off", file=self.path, row=number)
        return data


def _masked(data: bytes) -> int:
    """TFRecord's masked checksum."""
    checksum = crc32c.crc32c(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
