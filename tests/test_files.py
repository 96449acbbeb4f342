import errno
import os

import numpy as np
import pytest

from pwiser_tf.files import whole_file, write_text


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "text"
    write_text(path, "ä")
    assert path.read_bytes() == "ä".encode()
    with whole_file(path) as aside:
        aside.write_text("new")
        assert path.read_bytes() == "ä".encode()
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["text"]


def test_writers_that_look_at_the_suffix(tmp_path):
    with whole_file(tmp_path / "arrays.npz") as aside:
        np.savez(aside, a=[1, 2])
    assert np.load(tmp_path / "arrays.npz")["a"].tolist() == [1, 2]


def test_a_failed_write_leaves_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "text"
    write_text(path, "old")

    def fill_the_disk():
        with whole_file(path) as aside:
            aside.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left on device") as error:
        fill_the_disk()
    assert error.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["text"]
    with pytest.raises(FileNotFoundError) as error:
        write_text(tmp_path / "absent" / "text", "new")
    assert error.value.filename == str(tmp_path / "absent" / "text")
