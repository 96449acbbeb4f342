"""Zip and tar files, streamed out into a scratch folder."""

import gzip
import pathlib
import shutil
import tarfile
import zipfile
import zlib

from pwiser_tf.errors import DataError

SUFFIXES = (".zip", ".tar.gz", ".tgz", ".tar")


def unpack(path: pathlib.Path, scratch: pathlib.Path, shown) -> list[pathlib.Path]:
    """Streams an archive's files into a folder of its own in the scratch folder.

    Args:
      path: its name ends in one of SUFFIXES; one that lies in the scratch folder is removed
        afterwards.
      shown: what messages call the archive.

    Returns:
      The files, under their names alone: a path in an archive may lead anywhere.

    Raises:
      DataError: it is damaged, or none.
    """
    target = scratch / f"unpacked_{path.name}"
    target.mkdir()
    files = []

    def write(name: str, source) -> None:
        file = target / pathlib.PurePosixPath(name).name
        with open(file, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
        files.append(file)

    kind = "zip" if path.suffix.lower() == ".zip" else "tar"
    try:
        if kind == "zip":
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    if not entry.is_dir() and "__MACOSX" not in entry.filename:
                        with archive.open(entry) as source:
                            write(entry.filename, source)
        else:
            opener = open if path.suffix.lower() == ".tar" else gzip.open
            with opener(path, "rb") as stream:
                with tarfile.open(fileobj=stream, mode="r|") as archive:
                    for entry in archive:
                        if entry.isfile():
                            write(entry.name, archive.extractfile(entry))
                # To the end, where gzip has its checksum.
                while stream.read(1 << 20):
                    pass
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        gzip.BadGzipFile,
        EOFError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        raise DataError(f"expected a whole {kind} file ({error})", file=shown) from None
    if path.is_relative_to(scratch):
        path.unlink()
    return files
