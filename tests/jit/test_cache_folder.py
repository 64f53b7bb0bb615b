"""Machine code comes from no folder or file that another user can write to; it is compiled then, with one warning."""

import os
import socket
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from answering import TARGET, Builder, answer
from fusedrnn import RNNOp, RNNSpec, env
from fusedrnn.engines.cpu import executor
from fusedrnn.jit import cache_folder, loader, object_cache

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="there are no owners and modes here to be checked")
as_root = pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() != 0, reason="only root can give files away")

OTHER_USER = 54321
ME, ROOT = 1000, 0
PLANTED, OWN = 666, 42


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(env, "_warned", set())
    for name in ("FUSEDRNN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder that holds code for ``answer`` which a load must not run if it is not to be trusted."""
    path = tmp_path / "way" / "kept"
    path.parent.mkdir(mode=0o700)
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(path))
    loader.load("answer", TARGET, Builder(PLANTED))
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    return path


def the_file(path):
    (file,) = path.iterdir()
    return file


def load():
    return answer(loader.load("answer", TARGET, Builder(OWN)))


def assert_refused(culprit, *reasons):
    """It is compiled, with one warning that names the culprit and the reasons; and nothing is written."""
    with pytest.warns(RuntimeWarning, match="FUSEDRNN_CACHE_DIR") as said:
        assert load() == OWN
    (warning,) = said
    for words in (str(culprit), *reasons):
        assert words in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load() == OWN


def status(kind, mode, owner):
    return os.stat_result((kind | mode, 0, 0, 1, owner, owner, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("kind", "mode", "owner", "trusted", "passed"),
    [
        (stat.S_IFDIR, 0o700, ME, True, True),
        (stat.S_IFDIR, 0o755, ME, True, True),
        (stat.S_IFDIR, 0o775, ME, False, False),
        (stat.S_IFDIR, 0o757, ME, False, False),
        (stat.S_IFDIR, 0o1777, ME, False, True),
        (stat.S_IFDIR, 0o1777, ROOT, False, True),
        (stat.S_IFDIR, 0o1770, ROOT, False, True),
        (stat.S_IFDIR, 0o755, ROOT, False, True),
        (stat.S_IFDIR, 0o775, ROOT, False, False),
        (stat.S_IFDIR, 0o700, OTHER_USER, False, False),
        (stat.S_IFDIR, 0o1777, OTHER_USER, False, False),
        (stat.S_IFLNK, 0o777, ME, True, True),
        (stat.S_IFLNK, 0o777, ROOT, False, True),
        (stat.S_IFLNK, 0o777, OTHER_USER, False, False),
        (stat.S_IFREG, 0o600, ME, True, True),
        (stat.S_IFREG, 0o644, ME, True, True),
        (stat.S_IFREG, 0o620, ME, False, False),
        (stat.S_IFREG, 0o602, ME, False, False),
        (stat.S_IFREG, 0o600, OTHER_USER, False, False),
    ],
)
def test_who_is_trusted(kind, mode, owner, trusted, passed):
    """For what is read, and for what only leads to it."""
    for is_parent, good in ((False, trusted), (True, passed)):
        reason = cache_folder.objection(Path("/some/where"), status(kind, mode, owner), ME, is_parent)
        assert (not reason) == good
        assert good or "/some/where" in reason


def test_a_private_folder_is_used(kept):
    """What the other tests would see if nothing was refused."""
    assert load() == PLANTED


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_can_write_to(kept, mode):
    kept.chmod(mode)
    assert_refused(kept, f"chmod go-w {kept}", "every user" if mode & 2 else "its group")
    kept.chmod(0o755)
    assert load() == PLANTED


def test_a_folder_that_others_can_replace(kept):
    """They need not be able to write to the folder itself, if they can put another in its place."""
    kept.parent.chmod(0o777)
    assert_refused(kept.parent, f"chmod go-w {kept.parent}")
    kept.parent.chmod(0o1777)
    assert load() == PLANTED


def test_nothing_is_made_where_others_can_write(tmp_path, monkeypatch):
    """The user's cache folder as XDG_CACHE_HOME gives it, not there yet."""
    tmp_path.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert_refused(tmp_path, "every user")
    assert not list(tmp_path.iterdir())


def test_a_relative_cache_home_is_ignored(kept, tmp_path, monkeypatch):
    """As the XDG Base Directory Specification says: else code came from wherever a program is started."""
    kept.rename(kept.parent / "fusedrnn")
    monkeypatch.delenv("FUSEDRNN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "way")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert load() == OWN
    assert the_file(tmp_path / "home/.cache/fusedrnn")


def test_a_relative_folder_that_is_asked_for(kept, monkeypatch):
    """It is used, and what leads to it is looked at as for any other."""
    monkeypatch.chdir(kept.parent)
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", "kept")
    assert load() == PLANTED
    kept.parent.chmod(0o770)
    assert_refused(kept.parent)


def test_links_are_followed_to_what_they_lead_to(kept, tmp_path, monkeypatch):
    """Links are as good as the folders in which they lie and to which they lead."""
    link = tmp_path / "link"
    link.symlink_to(Path("way", "..", "way", "kept"))
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(link))
    assert load() == PLANTED
    kept.chmod(0o777)
    assert_refused(kept)

    kept.chmod(0o700)
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    (open_folder / "link").symlink_to(kept)
    for way in (open_folder / "link", open_folder / ".." / "way" / "kept"):
        monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(way))
        assert_refused(open_folder)


def test_links_in_a_circle(tmp_path, monkeypatch):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(tmp_path / "a"))
    assert load() == OWN


def test_a_folder_that_becomes_unsafe_while_it_is_opened(kept, monkeypatch):
    """What was opened is looked at, not only what lay at its path before."""
    plain = cache_folder._resolved

    def changed_afterwards(*arguments):
        path = plain(*arguments)
        kept.chmod(0o777)
        return path

    monkeypatch.setattr(cache_folder, "_resolved", changed_afterwards)
    with pytest.raises(cache_folder.UntrustedError, match="every user"):
        cache_folder.Folder(kept)


def test_one_warning_for_all_kernels(kept):
    """A call needs half a dozen, and gives right results without any of them on disk."""
    kept.chmod(0o777)
    spec = RNNSpec("rnn_relu", 2, 3)
    x, params = np.ones((1, 1, 2), np.float32), np.ones(spec.layout.size, np.float32)
    with pytest.MonkeyPatch.context() as patch, pytest.warns(RuntimeWarning, match=str(kept)) as said:
        patch.setattr(executor, "load_job", executor.load_job.__wrapped__)
        patch.setattr(executor, "load_pack", executor.load_pack.__wrapped__)
        y, _, _ = RNNOp(spec).forward(x, params)
    assert len(said) == 1
    assert y.tolist() == [[[4.0, 4.0, 4.0]]]


def test_a_system_without_owners(kept, monkeypatch):
    """As Windows: nothing is checked there, and files are named by their paths."""
    monkeypatch.setattr(cache_folder, "_POSIX", False)
    assert load() == PLANTED
    file = the_file(kept)
    file.write_bytes(b"damaged")
    build = Builder(OWN)
    assert [answer(loader.load("answer", TARGET, build)) for _ in range(2)] == [OWN, OWN]
    assert build.calls == 1
    monkeypatch.setattr(object_cache, "_MAX_FILES", 1)
    loader.load("other", TARGET, Builder())
    assert the_file(kept).name.startswith("other-")
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(kept / "new" / "deep"))
    assert load() == OWN
    assert the_file(kept / "new" / "deep")


@pytest.mark.parametrize("mode", [0o660, 0o606])
def test_a_file_that_others_can_write_to(kept, mode):
    """It is compiled again, and takes the file's place."""
    file = the_file(kept)
    file.chmod(mode)
    with pytest.warns(RuntimeWarning, match=f"compiles a kernel again.*{file.name} can be written by") as said:
        assert load() == OWN
    assert len(said) == 1
    assert stat.S_IMODE(the_file(kept).stat().st_mode) == 0o600
    assert answer(loader.load("answer", TARGET, Builder(1))) == OWN


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listening:
        folder_handle = os.open(path.parent, os.O_RDONLY)
        try:
            listening.bind(f"/proc/self/fd/{folder_handle}/{path.name}")  # the path itself is too long
        finally:
            os.close(folder_handle)


def link_to_zeros(path):
    path.symlink_to("/dev/zero")


def link_to_the_file(path):
    path.symlink_to(path.rename(path.parent.parent / "elsewhere"))


@pytest.mark.parametrize("make", [make_fifo, link_to_zeros, link_to_the_file, make_socket])
def test_what_is_no_regular_file(kept, make):
    """It is not waited for, not followed and not read; the file takes its place."""
    file = the_file(kept)
    if make is not link_to_the_file:
        file.unlink()
    if make is make_socket and not Path("/proc/self/fd").exists():
        pytest.skip("no way here to a socket with a long path")
    make(file)
    assert load() == OWN
    assert stat.S_ISREG(file.lstat().st_mode)
    assert answer(loader.load("answer", TARGET, Builder(1))) == OWN


def test_a_file_too_large_to_be_a_kernel(kept):
    file = the_file(kept)
    os.truncate(file, 1 << 40)  # takes no room on the disk
    assert load() == OWN
    assert file.stat().st_size < 1 << 20


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_the_umask_does_not_matter(tmp_path, monkeypatch, mask):
    path = tmp_path / "deep" / "cache"
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(path))
    before = os.umask(mask)
    try:
        load()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(one.stat().st_mode) for one in (path.parent, path, the_file(path))]
    assert modes == [0o700, 0o700, 0o600]


def test_the_effective_user_counts(kept, monkeypatch):
    """Of a process with another user's rights; its own files are foreign to it then."""
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert_refused("", f"and this process runs as user {other}")


@pytest.mark.parametrize(
    "value", ["~no-such-user-at-all/x", "~no-such-user-at-all"], ids=["a folder", "the home itself"]
)
def test_a_home_that_does_not_exist(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", value)
    assert_refused(value)
    assert not list(tmp_path.iterdir())


@as_root
@pytest.mark.parametrize("given_away", ["folder", "parent", "file", "link"])
def test_what_belongs_to_another_user(kept, tmp_path, monkeypatch, given_away):
    """Though nobody else may write to it."""
    path = {"folder": kept, "parent": kept.parent, "file": the_file(kept), "link": tmp_path / "link"}[given_away]
    if given_away == "link":
        path.symlink_to(kept)
        monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(path))
    os.chown(path, OTHER_USER, OTHER_USER, follow_symlinks=False)
    if given_away == "file":
        with pytest.warns(RuntimeWarning, match=f"owned by user {OTHER_USER}, and this process runs as user 0"):
            assert load() == OWN
        assert the_file(kept).stat().st_uid == 0
    else:
        assert_refused(path, f"owned by user {OTHER_USER}, and this process runs as user 0")


@as_root
def test_the_home_of_another_user(kept, tmp_path, monkeypatch):
    """Root's, of a program that was started by a command which keeps the variables of the user before."""
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    kept.rename(home / ".cache" / "fusedrnn")
    for path in (home, *home.rglob("*")):
        os.chown(path, OTHER_USER, OTHER_USER)
    monkeypatch.delenv("FUSEDRNN_CACHE_DIR")
    monkeypatch.setenv("HOME", str(home))
    assert_refused(home, f"owned by user {OTHER_USER}")


VICTIM = """
import os, sys
from answering import TARGET, Builder, answer
from fusedrnn.jit import loader, object_cache
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
os.environ["FUSEDRNN_CACHE_DIR"] = sys.argv[2]
print(answer(loader.load("answer", TARGET, Builder(42))))
"""


@as_root
def test_other_users_processes(kept, tmp_path):
    """A user's own folder is used, though below folders of root's; another user's and root's are not."""
    for path in (tmp_path, *tmp_path.parents):
        if not path.stat().st_mode & stat.S_IXOTH:
            path.chmod(path.stat().st_mode | stat.S_IXOTH)
    for path in (kept.parent, kept, the_file(kept)):
        os.chown(path, OTHER_USER, OTHER_USER)
    tests, sources = str(Path(__file__).parents[1] / "support"), str(Path(env.__file__).parents[1])
    paths = os.pathsep.join((tests, sources, os.environ.get("PYTHONPATH", "")))
    for user, expected, warned in ((OTHER_USER, PLANTED, False), (OTHER_USER + 1, OWN, True)):
        kept.parent.chmod(0o755)
        kept.chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-c", VICTIM, str(user), str(kept)],
            env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.stdout.split() == [str(expected)], done.stderr
        assert ("RuntimeWarning" in done.stderr) == warned
