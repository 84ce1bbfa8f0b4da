"""A folder takes its place in one step, and what killed runs have left is taken up, put back or swept.

python -m pytest tests/publishing/test_staging.py
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faulty import Failing, full
from tests.refusals import refused
from tests.tiny_pairs import contents, fill
from utils.errors import UserError
from utils.publishing import staging
from utils.publishing.exchange import exchange
from utils.publishing.kept import kept_work
from utils.publishing.siblings import PROGRESS, put_back, refuse_parallel_run, stage_of, sweep
from utils.publishing.staging import foreign_entries, staged_folder, stamp

NEW = {"a.csv": b"new a", "b.csv": b"new b" * 1000, "manifest.json": b"{}"}


def stamps(folder: Path, names) -> dict:
    return {name: stamp(folder / name) for name in names}


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def either_way(request, monkeypatch):
    """With the system's exchange of two folders, and where there is none."""
    if not request.param:
        monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    return request.param


def stage(target: Path, files: dict[str, bytes], replaceable=()) -> None:
    with staged_folder(target, replaceable=stamps(target, replaceable)) as folder:
        assert folder.parent == Path(os.path.realpath(target)).parent  # a rename must not cross file systems
        fill(folder, files)


def test_a_folder_appears_whole(tmp_path):
    with staged_folder(tmp_path / "new" / "model") as folder:
        fill(folder, NEW)
        assert not (tmp_path / "new" / "model").exists()
    assert contents(tmp_path) == {"new": None, "new/model": None, **{f"new/model/{k}": v for k, v in NEW.items()}}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_block_that_fails_leaves_the_old_folder(tmp_path, error):
    before = contents(fill(tmp_path, {"model/x": b"old"}))
    known = stamps(tmp_path / "model", ["x"])
    with pytest.raises(error), staged_folder(tmp_path / "model", replaceable=known) as folder:
        fill(folder, NEW)
        raise error
    assert contents(tmp_path) == before


def test_only_listed_files_are_replaced(tmp_path, either_way):
    before = contents(fill(tmp_path, {"model/x": b"old", "model/sub/y": b"old"}))
    with refused("out-foreign-files"):
        stage(tmp_path / "model", NEW, ["x"])
    assert contents(tmp_path) == before
    stage(tmp_path / "model", NEW, ["x", "sub/y"])
    assert contents(tmp_path / "model") == NEW
    assert foreign_entries(tmp_path / "model", stamps(tmp_path / "model", NEW)) == []
    assert foreign_entries(tmp_path / "none", {}) == []


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "model").mkdir()
    stage(tmp_path / "model", NEW)
    assert contents(tmp_path) == {"model": None, **{f"model/{k}": v for k, v in NEW.items()}}


def test_a_file_of_that_name_is_kept(tmp_path):
    before = contents(fill(tmp_path, {"model": b"a file"}))
    with refused("out-is-file"):
        stage(tmp_path / "model", NEW)
    assert contents(tmp_path) == before


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    fill(tmp_path, {"real/x": b"old"})
    (tmp_path / "model").symlink_to("real")
    stage(tmp_path / "model", NEW, ["x"])
    assert contents(tmp_path / "real") == NEW
    assert (tmp_path / "model").is_symlink()


def test_a_failure_removes_the_folders_it_made(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "a" / "b" / "model") as folder:
        fill(folder, NEW)
        raise KeyboardInterrupt
    assert contents(tmp_path) == {}
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="no"), staged_folder(tmp_path / "a" / "b" / "model"):
        raise ValueError("no")
    assert contents(tmp_path) == {"a": None}


def test_two_runs_cannot_make_the_same_folder(tmp_path):
    with staged_folder(tmp_path / "model"), staged_folder(tmp_path / "model.2"):
        assert sweep(tmp_path / "model") == ""
        with refused("out-in-use"), staged_folder(tmp_path / "model"):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.2"]


def test_a_file_that_was_edited_or_an_empty_folder_is_not_replaced(tmp_path, either_way):
    fill(tmp_path, {"model/x": b"old"})
    known = stamps(tmp_path / "model", ["x"])
    (tmp_path / "model" / "x").write_bytes(b"edited")
    with refused("out-foreign-files"), staged_folder(tmp_path / "model", replaceable=known):
        pass
    (tmp_path / "model" / "mine").mkdir()
    known = stamps(tmp_path / "model", ["x"])
    with refused("out-foreign-files") as caught, staged_folder(tmp_path / "model", replaceable=known):
        pass
    assert "mine" in str(caught.value)
    assert contents(tmp_path) == {"model": None, "model/x": b"edited", "model/mine": None}


def test_what_appears_in_the_last_moment_is_kept(tmp_path, monkeypatch):
    fill(tmp_path, {"model/x": b"old"})
    known = stamps(tmp_path / "model", ["x"])

    def late(first, second):
        if not (second / "late").exists() and not (first / "late").exists():
            (second / "late").write_bytes(b"mine")
        return exchange(first, second)

    monkeypatch.setattr(staging, "exchange", late)
    with refused("out-foreign-files"), staged_folder(tmp_path / "model", replaceable=known) as folder:
        fill(folder, NEW)
    (tmp_path / "model" / "late").unlink()
    with (
        refused("out-foreign-files") as caught,
        staged_folder(tmp_path / "model", key=KEY, replaceable=known) as folder,
    ):
        fill(folder, {PROGRESS: b"1", **NEW})
    kept = kept_work(caught.value).folder
    assert contents(kept) == {PROGRESS: b"1", **NEW}
    shutil.rmtree(kept)
    assert contents(tmp_path) == {"model": None, "model/x": b"old", "model/late": b"mine"}


# --- what killed runs have left ---------------------------------------------------------------------------------------

KEY = "0123456789ab"
PART = stage_of(Path("model"), KEY).name
OLD = PART.replace(".part", ".old")


def test_dead_stages_are_swept_in_one_line_and_others_stay(tmp_path):
    dead = stage_of(tmp_path / "model", "f" * 12)
    others = [stage_of(tmp_path / "model2", KEY).name, ".model.x.y.part", PART]
    for name in (dead.name, *others):
        fill(tmp_path, {f"{name}/x": b"x"})
    assert sweep(tmp_path / "model", KEY) == f"removed what a killed run has left: {dead}"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    assert KEY in sweep(tmp_path / "model") and sweep(tmp_path / "model") == ""


@pytest.mark.parametrize("end", ["part", "old"])
@pytest.mark.parametrize("name", ["20261126", "202611261230", "backup_of_1", KEY, "0" * 20])
@pytest.mark.parametrize("there", [True, False])
def test_what_others_have_called_alike_stays(tmp_path, name, end, there):
    fill(tmp_path, {f".model.{name}.{end}/thesis.txt": b"mine", **({"model/x": b"old"} if there else {})})
    before = contents(tmp_path)
    assert put_back(tmp_path / "model") == sweep(tmp_path / "model") == ""
    refuse_parallel_run(tmp_path / "model")
    assert contents(tmp_path) == before


def test_what_an_earlier_version_had_finished_is_swept(tmp_path):
    left = fill(tmp_path / f".model.{KEY}.part", {PROGRESS: b"1"})
    assert str(left) in sweep(tmp_path / "model") and not left.exists()


@pytest.mark.parametrize("begin", ["x" * 64, "x" * 130, "模型" * 30])
def test_long_names_that_begin_alike_have_folders_of_their_own(tmp_path, begin):
    one, two = tmp_path / f"{begin}-one", tmp_path / f"{begin}-two"
    left = fill(stage_of(two, KEY), {PROGRESS: b"1"})
    assert sweep(one) == "" and left.exists()
    with staged_folder(two, key=KEY), staged_folder(one, key=KEY):
        refuse_parallel_run(one, KEY)
    assert {path.name for path in tmp_path.iterdir()} == {one.name, two.name}
    fill(left.with_suffix(".old"), {"x": b"old"})
    two.rename(tmp_path / "away"), one.rename(tmp_path / "too")
    assert put_back(one) == "" and put_back(two)


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_link_in_the_place_of_the_work_is_refused(tmp_path, kind):
    fill(tmp_path, {"scratch/x": b"mine"})
    (tmp_path / PART).symlink_to("scratch") if kind == "link" else (tmp_path / PART).write_bytes(b"mine")
    before = contents(tmp_path)
    with refused("out-in-the-way"), staged_folder(tmp_path / "model", key=KEY):
        pass
    assert contents(tmp_path) == before and sweep(tmp_path / "model") == ""


def test_a_target_that_was_moved_away_is_put_back(tmp_path):
    fill(tmp_path, {f"{OLD}/x": b"old", f"{PART}/x": b"new"})
    assert sweep(tmp_path / "model") == ""  # nothing goes while the target is missing
    assert "what was there is back" in put_back(tmp_path / "model")
    assert (tmp_path / "model" / "x").read_bytes() == b"old"
    assert sweep(tmp_path / "model") and sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert put_back(tmp_path / "model") == ""


def test_a_dead_run_of_the_same_key_is_gone_on_with(tmp_path):
    fill(tmp_path, {f"{PART}/{PROGRESS}": b"1", f"{PART}/a": b"half"})
    with staged_folder(tmp_path / "model", key=KEY) as folder:
        assert (folder / "a").read_bytes() == b"half"
    assert contents(tmp_path / "model") == {"a": b"half"}


def test_without_a_list_of_what_is_finished_nothing_of_it_is_used(tmp_path):
    fill(tmp_path, {f"{PART}/a": b"half", f"{PART}/sub/b": b"half"})
    with staged_folder(tmp_path / "model", key=KEY) as folder:
        assert contents(folder) == {}


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError, OSError])
@pytest.mark.parametrize(
    ("left", "of_use"), [({PROGRESS: b"1", "a": b"1"}, True), ({PROGRESS: b"1"}, False), ({"a": b"1"}, True)]
)
def test_whatever_stops_it_leaves_what_is_finished_and_of_use(tmp_path, kind, left, of_use):
    stays, where = PROGRESS in left and of_use, {"key": KEY, "is_of_use": lambda error: of_use and type(error) is kind}
    with (
        pytest.raises(kind) as caught,
        staged_folder(tmp_path / "out" / "model", **where) as folder,
    ):
        fill(folder, left)
        raise kind
    assert (tmp_path / "out" / PART).exists() == stays == (tmp_path / "out").exists()
    assert (kept_work(caught.value) is not None) == stays
    assert not stays or str(tmp_path / "out" / PART) in str(kept_work(caught.value))


def test_a_swap_that_is_refused_keeps_what_is_finished(tmp_path, either_way):
    fill(tmp_path, {"model/x": b"old"})
    known = stamps(tmp_path / "model", ["x"])
    with (
        refused("out-foreign-files") as caught,
        staged_folder(tmp_path / "model", key=KEY, replaceable=known) as folder,
    ):
        fill(folder, {PROGRESS: b"1", "a": b"new", "model/late": b""})
        (tmp_path / "model" / "late").write_bytes(b"mine")
    assert kept_work(caught.value).folder == folder and (folder / PROGRESS).read_bytes() == b"1"
    (tmp_path / "model" / "late").unlink()
    with staged_folder(tmp_path / "model", key=KEY, replaceable=known) as folder:
        assert (folder / "a").read_bytes() == b"new"
    assert not (tmp_path / "model" / PROGRESS).exists() and not list(tmp_path.glob(".*"))


def test_runs_of_one_key_wait_and_find_the_result(tmp_path):
    said, made, found = [], [], []

    def run():
        with staged_folder(
            tmp_path / "model", key=KEY, is_there=(tmp_path / "model").exists, say=said.append
        ) as folder:
            if folder is None:
                found.append(True)
                return
            made.append(True)
            time.sleep(0.3)
            fill(folder, NEW)

    threads = [threading.Thread(target=run) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert (len(made), len(found)) == (1, 4) and said
    assert contents(tmp_path) == {"model": None, **{f"model/{name}": content for name, content in NEW.items()}}


def test_a_run_of_another_key_is_refused(tmp_path):
    with staged_folder(tmp_path / "model", key=KEY):
        refuse_parallel_run(tmp_path / "model", KEY)
        with refused("out-in-use"), staged_folder(tmp_path / "model", key="f" * 12):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


READER = """
import os, sys
target, absent, reads = sys.argv[1], 0, 0
print("ready", flush=True)
while not os.path.exists(sys.argv[2]):
    for _ in range(100):
        reads += 1
        try:
            open(os.path.join(target, "x")).close()
        except FileNotFoundError:
            absent += 1
print(reads, absent)
"""


def test_a_reader_never_sees_an_absent_folder(tmp_path):
    model, stop = tmp_path / "model", tmp_path / "stop"
    fill(tmp_path, {"model/x": b"0", "other": b""})
    (tmp_path / "p").mkdir(), (tmp_path / "q").mkdir()
    if not exchange(tmp_path / "p", tmp_path / "q"):
        pytest.skip("this file system cannot exchange two folders")
    reader = subprocess.Popen([sys.executable, "-c", READER, model, stop], stdout=subprocess.PIPE, text=True)
    assert reader.stdout.readline() == "ready\n"
    for number in range(40):
        stage(model, {"x": str(number).encode()}, ["x"])
    stop.touch()
    reads, absent = map(int, reader.communicate(timeout=30)[0].split())
    assert reads > 100 and absent == 0


def test_files_get_the_permissions_of_new_files(tmp_path):
    previous = os.umask(0o027)
    try:
        with staged_folder(tmp_path / "model") as folder:
            (folder / "x").write_text("x")
            (folder / "x").chmod(0o600)
    finally:
        os.umask(previous)
    assert (tmp_path / "model" / "x").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750


LAST_SYNC = len(NEW) + 2  # every file, the folder, and then, with the new folder in its place, the one it lies in


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, LAST_SYNC])
@pytest.mark.parametrize("where", ["rename", "fsync", "chmod"])
def test_a_failing_swap_loses_neither_folder(tmp_path, monkeypatch, where, at, forever, either_way):
    before = contents(fill(tmp_path, {"model/x": b"old"}))
    failing = Failing(getattr(os, where), at, full(errno.EIO), forever)
    with monkeypatch.context() as patch:
        patch.setattr(os, where, failing)
        try:
            stage(tmp_path / "model", NEW, ["x"])
            failed = unsure = False
        except OSError:
            failed, unsure = True, False
        except UserError as error:
            failed = unsure = error.code == "out-not-synced"
    assert unsure == (failed and where == "fsync" and at == LAST_SYNC)
    if not (tmp_path / "model").exists():  # moved away, and neither can be moved in: the next run puts it back
        assert forever and where == "rename" and not either_way
        put_back(tmp_path / "model")
    sweep(tmp_path / "model")
    new = {"model": None, **{f"model/{k}": v for k, v in NEW.items()}}
    done = (
        unsure or not failed or (where == "rename" and either_way and at == 1)
    )  # what is left over after the exchange
    assert contents(tmp_path) == (new if done else before)


def test_a_signal_during_the_swap_waits(tmp_path, monkeypatch, either_way):
    fill(tmp_path, {"model/x": b"old"})
    rename = os.rename

    def rename_and_signal(source, final):
        rename(source, final)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "rename", rename_and_signal)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "model", NEW, ["x"])
    assert contents(tmp_path / "model") == NEW


KILLED = """
import os, signal, sys
from pathlib import Path
from utils.publishing import staging
where, at = sys.argv[2], int(sys.argv[3])
if where == "renames":
    staging.exchange = lambda first, second: False
calls = []

def die(function):
    def call(*args):
        found = function(*args)
        calls.append(args)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    return call

staging.exchange, os.rename = die(staging.exchange), die(os.rename)
target = Path(sys.argv[1])
with staging.staged_folder(target, replaceable={"x": staging.stamp(target / "x")}) as folder:
    (folder / "x").write_bytes(b"new")
"""


@pytest.mark.parametrize("where", ["exchange", "renames"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_after_a_kill_the_next_run_finds_the_old_or_the_new(tmp_path, where, at):
    fill(tmp_path, {"model/x": b"old"})
    ended = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "model", where, str(at)], cwd=ROOT, timeout=60)
    assert ended.returncode == -signal.SIGKILL or (where, at) == ("exchange", 3)
    if where == "exchange":
        assert (tmp_path / "model").is_dir()
    put_back(tmp_path / "model")
    sweep(tmp_path / "model")
    found = contents(tmp_path)
    assert found in [{"model": None, "model/x": content} for content in (b"old", b"new")]
