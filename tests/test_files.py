"""A file or folder is there whole or not at all, whatever fails while it is written."""

import errno
import json
import multiprocessing
import os
import signal

import pytest
from safetensors import SafetensorError

from diffrep import files
from diffrep.errors import RunError, UserError
from diffrep.files import disk_errors, folder_aside, locked, read_json, sha256_of, short_hash, write_atomic, write_json


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_write_atomic_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_atomic(path, "ö\n")
    assert path.read_bytes() == "ö\n".encode()
    write_atomic(path, b"\x00")
    assert path.read_bytes() == b"\x00" and names(path.parent) == ["b.txt"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_write_atomic_keeps_the_old_content_when_the_disk_is_full(tmp_path, monkeypatch, broken):
    path = tmp_path / "result.json"
    write_atomic(path, "old")
    monkeypatch.setattr(files.os, broken, full)
    with pytest.raises(RunError, match=r"cannot write .*result.json: No space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["result.json"]


def test_write_atomic_keeps_the_old_content_when_it_is_interrupted(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomic(path, "old")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["result.json"]


def test_json_with_nan_is_refused_before_the_file_is_touched(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"score": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"score": float("nan")})
    assert json.loads(path.read_text()) == {"score": 1.5}


def fill(path, text, error=None):
    with folder_aside(path) as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "file").write_text(text)
        assert not path.exists() or (path / "inner" / "file").read_text() != text
        if error:
            raise error


def test_folder_aside_appears_whole_and_replaces(tmp_path):
    path = tmp_path / "deep" / "step"
    fill(path, "one")
    fill(path, "two")
    assert (path / "inner" / "file").read_text() == "two" and names(path.parent) == ["step"]


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt()])
def test_folder_aside_keeps_the_old_folder_when_filling_fails(tmp_path, error):
    path = tmp_path / "step"
    fill(path, "old")
    with pytest.raises(type(error)):
        fill(path, "new", error)
    assert (path / "inner" / "file").read_text() == "old" and names(tmp_path) == ["step"]


@pytest.mark.parametrize("failing", [1, 2])
def test_folder_aside_keeps_the_old_folder_when_a_rename_fails(tmp_path, monkeypatch, failing):
    path = tmp_path / "step"
    fill(path, "old")
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(source)
        if len(calls) == failing:
            full()
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(RunError, match="No space left"):
        fill(path, "new")
    assert (path / "inner" / "file").read_text() == "old" and names(tmp_path) == ["step"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES])
def test_disk_errors_are_one_line_and_exit_3(tmp_path, number):
    with pytest.raises(RunError, match=f"cannot write {tmp_path}: ") as error, disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert error.value.exit_code == 3 and os.strerror(number) in str(error.value)


def test_safetensors_tells_of_a_full_disk_in_words(tmp_path):
    with pytest.raises(RunError, match="No space left on device"), disk_errors(tmp_path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="header"), disk_errors(tmp_path):
        raise SafetensorError("invalid header")


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        open(tmp_path / "nothing")  # noqa: SIM115


def hold(folder, pipe):
    with locked(folder):
        pipe.send("held")
        pipe.poll(30)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path / "run", theirs))
    process.start()
    assert ours.poll(30) and ours.recv() == "held"
    yield process, ours
    process.kill()
    process.join()


def test_a_lock_is_exclusive_and_released_at_the_end(tmp_path, holder):
    process, ours = holder
    with pytest.raises(UserError, match="run is in use by another process"), locked(tmp_path / "run"):
        pass
    ours.send("go on")
    process.join()
    with locked(tmp_path / "run"):
        assert names(tmp_path / "run") == [".lock"]


def test_a_killed_holder_leaves_no_lock(tmp_path, holder):
    process, _ = holder
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked(tmp_path / "run"):
        pass


def test_a_lock_is_released_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="inside"), locked(tmp_path):
            raise ValueError("inside")


def test_a_file_where_the_folder_should_be_is_the_users(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match="a file is in its way"), locked(folder):
            pass


def test_hashes_by_hand(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")
    assert short_hash({"b": 1, "a": [1.5, None]}) == short_hash({"a": [1.5, None], "b": 1})
    assert short_hash({"a": 1}) != short_hash({"a": 2}) and len(short_hash(1, 12)) == 12


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe"])
def test_a_damaged_json_file_is_named(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(UserError, match=r"result.json is not readable JSON"):
        read_json(tmp_path / "result.json")
    with pytest.raises(UserError, match=r"nowhere.json does not exist"):
        read_json(tmp_path / "nowhere.json")
