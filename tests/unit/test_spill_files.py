"""Files without a name: what they hold, how they fail, and that nothing is left of them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from streamindex_service.core.pages import PageSlot
from streamindex_service.frontend.spill_files import SpillFiles

PAGE = 8192
PAGES = [(PageSlot(1, number * PAGE), bytes([number + 1]) * PAGE) for number in range(3)]


def run_now(close):
    close()


@pytest.fixture
def files(tmp_path):
    made = SpillFiles(str(tmp_path), run_now)
    made.make_extent(1, 4 * PAGE)
    yield made
    made.close()


def views(pages=PAGES):
    return [(slot, memoryview(data)) for slot, data in pages]


def spill_fds(directory):
    """Descriptors of this process that are files of a directory."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own
            continue
        if Path(target).is_relative_to(directory):
            found[int(name)] = target
    return found


def test_what_is_written_is_read(files):
    checksums = files.write(views())
    for (slot, data), checksum in zip(PAGES, checksums, strict=True):
        assert files.read(slot, PAGE, checksum) == data


def no_tmpfile(monkeypatch):
    opened = os.open

    def refuse(path, flags, *others, **more):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return opened(path, flags, *others, **more)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("tmpfile", [True, False], ids=["O_TMPFILE", "unlinked"])
def test_files_have_no_name_and_are_the_owners_alone(files, tmp_path, monkeypatch, tmpfile):
    if not tmpfile:
        no_tmpfile(monkeypatch)
    files.check()
    files.write(views())
    assert os.listdir(tmp_path) == []
    ((fd, _),) = spill_fds(tmp_path).items()
    state = os.fstat(fd)
    assert (stat.S_IMODE(state.st_mode), state.st_nlink, state.st_size) == (0o600, 0, 4 * PAGE)
    assert not os.get_inheritable(fd)
    files.drop_extent(1)
    assert spill_fds(tmp_path) == {}


def test_a_name_that_cannot_be_taken_away_again(files, tmp_path, monkeypatch):
    no_tmpfile(monkeypatch)
    unlink = os.unlink
    failures = iter([True])

    def fail_once(path, **others):
        if next(failures, False):
            raise OSError(errno.EIO, "no")
        unlink(path, **others)

    monkeypatch.setattr(os, "unlink", fail_once)
    with pytest.raises(OSError, match="no"):
        files.check()
    assert os.listdir(tmp_path) == []
    assert spill_fds(tmp_path) == {}


def test_writes_and_reads_that_are_cut_short_go_on(files, monkeypatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:777]], offset))
    checksums = files.write(views())
    assert files.read(PAGES[2][0], PAGE, checksums[2]) == PAGES[2][1]


def test_a_disk_that_takes_nothing_more(files, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    with pytest.raises(OSError, match="nothing was written"):
        files.write(views())


def test_a_full_disk_is_met_before_the_first_byte(files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def full(fd, offset, length):
            raise OSError(errno.ENOSPC, "full")

        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="full"):
            files.write(views())
        assert spill_fds(tmp_path) == {}
    checksums = files.write(views())
    assert files.read(PAGES[0][0], PAGE, checksums[0]) == PAGES[0][1]


def test_bytes_that_the_disk_has_not_confirmed_are_not_written(files, monkeypatch):
    def fail(fd):
        raise OSError(errno.EIO, "lost on the way")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="lost on the way"):
        files.write(views())


def test_other_bytes_than_were_written(files, tmp_path):
    checksums = files.write(views())
    (fd,) = spill_fds(tmp_path)
    os.pwrite(fd, b"\x00", PAGE + 17)
    assert files.read(PAGES[0][0], PAGE, checksums[0]) == PAGES[0][1]
    with pytest.raises(OSError, match="not those"):
        files.read(PAGES[1][0], PAGE, checksums[1])


def test_a_file_that_ends_too_early(files, tmp_path):
    checksums = files.write(views())
    (fd,) = spill_fds(tmp_path)
    os.ftruncate(fd, 2 * PAGE + 5)
    with pytest.raises(OSError, match="ends before"):
        files.read(PAGES[2][0], PAGE, checksums[2])


def test_closing_lets_go_of_every_file(files, tmp_path):
    files.write(views())
    files.make_extent(2, PAGE)
    files.write([(PageSlot(2, 0), memoryview(PAGES[0][1]))])
    assert len(spill_fds(tmp_path)) == 2
    files.close()
    assert spill_fds(tmp_path) == {}


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        SpillFiles(str(tmp_path / "absent"), run_now).check()
