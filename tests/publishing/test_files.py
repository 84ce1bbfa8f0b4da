"""Output is complete or absent, whatever fails and whenever; nothing else in the folder is touched.

python -m pytest tests/publishing/test_files.py
"""

import builtins
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faulty import Failing, full
from tests.refusals import refused
from tests.tiny_pairs import contents, fill
from utils.errors import UserError
from utils.publishing import disk
from utils.publishing.files import half_published, publish_files, repair_folder
from utils.publishing.target import locked_folder, refuse_existing

NEW = {"a.csv": b"new a", "b.csv": b"new b" * 1000, "manifest.json": b"{}"}
OLD = {"a.csv": b"old a", "manifest.json": b"{1}"}
OTHERS = {"recipe.yml": b"somebody's", "sub/deep.txt": b"somebody's too"}


def test_files_appear_beside_others(tmp_path):
    fill(tmp_path, OTHERS)
    publish_files(tmp_path, NEW, overwrite=False)
    assert contents(tmp_path) == {**NEW, **OTHERS, "sub": None}


def test_the_last_file_is_renamed_last(tmp_path, monkeypatch):
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, final: (order.append(Path(final).name), replace(source, final)))
    publish_files(tmp_path, NEW, overwrite=False)
    assert order == list(NEW)


def test_everything_is_on_disk_before_the_first_rename(tmp_path, monkeypatch):
    synced, renamed = [], []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(len(renamed)), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda source, final: (renamed.append(final), replace(source, final)))
    publish_files(tmp_path, NEW, overwrite=False)
    assert synced == [0] * (len(NEW) + 2) + [len(NEW)]  # the files, the journal, the stage, then the folder


def test_an_existing_file_needs_overwrite(tmp_path):
    before = contents(fill(tmp_path, {**OLD, **OTHERS}))
    with refused("out-exists"):
        publish_files(tmp_path, NEW, overwrite=False)
    assert contents(tmp_path) == before
    publish_files(tmp_path, NEW, overwrite=True)
    assert contents(tmp_path) == {**NEW, **OTHERS, "sub": None}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_that_name_is_never_replaced(tmp_path, overwrite):
    before = contents(fill(tmp_path, {"a.csv/inside": b"x"}))
    with refused("out-in-the-way"):
        publish_files(tmp_path, NEW, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_broken_link_of_that_name_is_in_the_way(tmp_path):
    (tmp_path / "a.csv").symlink_to("nowhere")
    with refused("out-in-the-way"):
        refuse_existing(tmp_path, ["a.csv"])


def test_a_folder_that_vanished_is_made_again(tmp_path):
    publish_files(tmp_path / "gone" / "out", NEW, overwrite=False)
    assert contents(tmp_path / "gone" / "out") == NEW


def test_the_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        publish_files(tmp_path, NEW, overwrite=False)
    finally:
        os.umask(before)
    assert {oct((tmp_path / name).stat().st_mode & 0o777) for name in NEW} == {"0o640"}


class FailingFile:
    """A file whose writes count towards one `Failing`."""

    def __init__(self, file, write: Failing) -> None:
        self.file, self.failing = file, write

    def write(self, content):
        self.failing.function = self.file.write
        return self.failing(content)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *details):
        self.file.close()


def inject(monkeypatch, where: str, failing: Failing) -> None:
    if where == "write":
        real = builtins.open
        monkeypatch.setattr(disk, "open", lambda *args: FailingFile(real(*args), failing), raising=False)
    elif where == "open":
        failing.function = builtins.open
        monkeypatch.setattr(disk, "open", failing, raising=False)
    else:
        failing.function = getattr(os, where)
        monkeypatch.setattr(os, where, failing)


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EXDEV, errno.EMFILE])
@pytest.mark.parametrize("old", [{}, OLD], ids=["fresh", "overwrite"])
@pytest.mark.parametrize(
    ("where", "at"), [(where, at) for where in ("open", "write", "fsync", "replace") for at in range(1, 7)]
)
def test_a_disk_that_fails_leaves_the_old_or_the_new(tmp_path, monkeypatch, where, at, old, code, forever):
    before = contents(fill(tmp_path, {**old, **OTHERS}))
    failing = Failing(None, at, full(code), forever=forever and where != "replace")
    with monkeypatch.context() as patch:
        inject(patch, where, failing)
        try:
            publish_files(tmp_path, NEW, overwrite=True)
            failed = unsure = False
        except OSError as error:
            failed, unsure = error.errno == code, False
        except UserError as error:
            failed = unsure = error.code == "out-not-synced"
    complete = {**NEW, **OTHERS, "sub": None}
    assert failed == (failing.calls >= at)
    # Once every rename is done the result stays, also where flushing the folder itself fails: which is then said.
    assert unsure == (failed and where == "fsync" and at == len(NEW) + 3)
    assert contents(tmp_path) == (complete if unsure or not failed else before)


def test_a_file_system_without_hard_links_still_restores(tmp_path, monkeypatch):
    before = contents(fill(tmp_path, {**OLD, **OTHERS}))
    monkeypatch.setattr(os, "link", Failing(None, 1, full(errno.EPERM), forever=True))
    monkeypatch.setattr(os, "replace", Failing(os.replace, 3, full()))
    with pytest.raises(OSError, match="No space left"):
        publish_files(tmp_path, NEW, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("where", ["write", "fsync"])
def test_an_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch, where, at):
    before = contents(fill(tmp_path, OTHERS))
    with monkeypatch.context() as patch:
        inject(patch, where, Failing(None, at, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            publish_files(tmp_path, NEW, overwrite=False)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_signal_between_renames_waits_for_the_last_one(tmp_path, monkeypatch, signum, at):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signum, interrupt)
    replace, calls = os.replace, []

    def replace_and_signal(source, final):
        replace(source, final)
        calls.append(final)
        if len(calls) == at:
            os.kill(os.getpid(), signum)
            os.kill(os.getpid(), signum)  # an impatient user

    monkeypatch.setattr(os, "replace", replace_and_signal)
    try:
        with pytest.raises(KeyboardInterrupt):
            publish_files(tmp_path, NEW, overwrite=False)
        assert signal.getsignal(signum) is interrupt
    finally:
        signal.signal(signum, before)
    assert contents(tmp_path) == NEW


KILLED = """
import os, signal, sys
from pathlib import Path
from utils.publishing.files import publish_files
at, calls, replace = int(sys.argv[2]), [], os.replace

def replace_then_die(source, final):
    replace(source, final)
    calls.append(final)
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace_then_die
publish_files(Path(sys.argv[1]), {"a.csv": b"new a", "manifest.json": b"{}"}, overwrite=True)
"""


@pytest.mark.parametrize("old", [{}, OLD], ids=["fresh", "overwrite"])
def test_what_a_kill_between_renames_left_is_completed(tmp_path, old):
    fill(tmp_path, {**OTHERS, **old})
    ended = subprocess.run([sys.executable, "-c", KILLED, tmp_path, "1"], cwd=ROOT, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert half_published(tmp_path)
    assert "manifest.json went to its place" in repair_folder(tmp_path)
    assert contents(tmp_path) == {**OTHERS, "sub": None, "a.csv": b"new a", "manifest.json": b"{}"}
    assert not half_published(tmp_path) and repair_folder(tmp_path) == ""


def test_what_was_changed_since_a_kill_stays(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path, "1"], cwd=ROOT, timeout=60)
    (tmp_path / "manifest.json").write_bytes(b"mine")
    assert repair_folder(tmp_path).startswith("removed what a killed run has left")
    assert contents(tmp_path) == {"a.csv": b"new a", "manifest.json": b"mine"}


def test_what_a_kill_before_the_renames_left_is_removed(tmp_path):
    fill(tmp_path, {".publish.abc.part/a.csv": b"half", **OTHERS})
    assert not half_published(tmp_path)
    assert repair_folder(tmp_path).startswith("removed what a killed run has left")
    assert contents(tmp_path) == {**OTHERS, "sub": None}


def test_a_journal_that_came_with_the_folder_moves_no_file_of_others(tmp_path):
    """A stage that is a link, files in one that are links, names that lead out of it, or are folders by now."""
    journal = json.dumps(dict.fromkeys(("a.csv", "../private/b.csv", "x" * 300, "sub"))).encode()
    fill(tmp_path, {"private/a.csv": b"mine", "private/b.csv": b"mine", "private/.journal.json": journal})
    fill(tmp_path / "out", {"sub/kept.txt": b"mine"})
    (tmp_path / "out" / ".publish.abc.part").symlink_to(tmp_path / "private")
    before = contents(tmp_path)
    assert not half_published(tmp_path / "out") and repair_folder(tmp_path / "out") == ""
    assert contents(tmp_path) == before
    (tmp_path / "out" / ".publish.abc.part").unlink()
    before = contents(tmp_path)
    stat = (tmp_path / "out" / "sub").stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    stage = {".journal.json": json.dumps({**json.loads(journal), "sub": stamp}).encode(), "sub": b"a file"}
    fill(tmp_path / "out" / ".publish.abd.part", stage)
    (tmp_path / "out" / ".publish.abd.part" / "a.csv").symlink_to(tmp_path / "private" / "a.csv")
    assert repair_folder(tmp_path / "out").startswith("removed what a killed run has left")
    assert contents(tmp_path) == before


def test_nothing_is_repaired_while_a_run_is_at_work(tmp_path):
    fill(tmp_path, {".publish.abc.part/a.csv": b"half"})
    with locked_folder(tmp_path):
        assert repair_folder(tmp_path) == ""
    assert repair_folder(tmp_path) and repair_folder(tmp_path / "none") == ""


def test_a_disk_that_is_really_full(tmp_path):
    """A small file system of its own, where the system lets us mount one."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        fill(tmp_path, OLD)
        before = contents(tmp_path)
        with pytest.raises(OSError, match="No space left"):
            publish_files(
                tmp_path, {"a.csv": b"x" * 40_000, "b.csv": b"x" * 40_000, "manifest.json": b"{}"}, overwrite=True
            )
        assert contents(tmp_path) == before
    finally:
        subprocess.run(["umount", tmp_path], check=True)
        shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize("links", [True, False])
def test_a_large_file_is_not_copied_and_a_failure_leaves_it(tmp_path, monkeypatch, links):
    work, folder = tmp_path / "work", tmp_path / "folder"
    work.mkdir()
    (work / "large").write_bytes(b"grams")
    inode = (work / "large").stat().st_ino
    if not links:
        monkeypatch.setattr(os, "link", Failing(os.link, 1, full(errno.EPERM), forever=True))
    for call, at in (("fsync", 1), ("fsync", 3), ("replace", 1 if links else 2)):
        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
            patched.setattr(os, call, Failing(getattr(os, call), at, full()))
            publish_files(folder, {"a.safetensors": work / "large", "manifest.json": b"{}"}, overwrite=False)
        assert (work / "large").stat().st_ino == inode and not list(folder.iterdir())
    publish_files(folder, {"a.safetensors": work / "large", "manifest.json": b"{}"}, overwrite=False)
    assert (folder / "a.safetensors").read_bytes() == b"grams" and (folder / "a.safetensors").stat().st_ino == inode
    assert (work / "large").exists() == links and sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "manifest.json"]  # fmt: skip


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_is_no_failure(tmp_path, monkeypatch, code):
    fsync = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    publish_files(tmp_path, {"a.csv": b"1"}, overwrite=False)
    assert (tmp_path / "a.csv").read_bytes() == b"1"
