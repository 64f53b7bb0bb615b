"""Machine code comes from no folder or file that another user can write to; it is compiled then, with one warning."""

import os
import socket
import stat
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest

from answering import TARGET, Builder, answer
from fusedrnn import RNNOp, RNNSpec, env
from fusedrnn.engines.cpu import jobs
from fusedrnn.jit import cache_folder, loader
from fusedrnn.jit.object_cache import ObjectCache

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="there are no owners and modes here to be checked")
as_root = pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() != 0, reason="only root can give files away")

OTHER_USER = 54321
ME, ROOT = 1000, 0
PLANTED, OWN = 666, 42


@pytest.fixture(autouse=True)
def no_warnings_yet(monkeypatch):
    monkeypatch.setattr(env, "_warned", set())
    for name in ("FUSEDRNN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A folder that holds code for ``answer`` which a load must not run if it is not to be trusted."""
    path = tmp_path / "parent" / "planted"
    path.parent.mkdir(mode=0o700)
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(path))
    loader.load("answer", TARGET, Builder(PLANTED))
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    return path


def only_file(path):
    """The one file of a folder."""
    (file,) = path.iterdir()
    return file


def test_a_read_takes_the_memory_of_the_file_alone(planted):
    """Not as much as the largest file may have."""
    file = only_file(planted)
    with cache_folder.Folder(planted, os.geteuid()) as folder:
        tracemalloc.start()
        try:
            content = folder.read(file.name, 1 << 26)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert content == file.read_bytes() and peak < 2 * len(content) + 100_000


def load():
    return answer(loader.load("answer", TARGET, Builder(OWN)))


def assert_untrusted(path, *reasons):
    """It is compiled, with one warning that names the path and the reasons; and nothing is written."""
    with pytest.warns(RuntimeWarning, match="FUSEDRNN_CACHE_DIR") as caught:
        assert load() == OWN
    (warning,) = caught
    for words in (str(path), *reasons):
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
def test_owners_and_modes_that_are_trusted(kind, mode, owner, trusted, passed):
    """For what is read, and for what only leads to it."""
    for is_parent, good in ((False, trusted), (True, passed)):
        reason = cache_folder.objection(Path("/some/where"), status(kind, mode, owner), ME, is_parent)
        assert (not reason) == good
        assert good or "/some/where" in reason


def test_private_folder_is_used(planted):
    """What the other tests would see if nothing was refused."""
    assert load() == PLANTED


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_folder_that_others_can_write_to(planted, mode):
    planted.chmod(mode)
    assert_untrusted(planted, f"chmod go-w {planted}", "every user" if mode & 2 else "its group")
    planted.chmod(0o755)
    assert load() == PLANTED


def test_folder_that_others_can_replace(planted):
    """They need not be able to write to the folder itself, if they can put another in its place."""
    planted.parent.chmod(0o777)
    assert_untrusted(planted.parent, f"chmod go-w {planted.parent}")
    planted.parent.chmod(0o1777)
    assert load() == PLANTED


def test_no_folder_is_made_where_others_can_write(tmp_path, monkeypatch):
    """The user's cache folder as XDG_CACHE_HOME gives it, not there yet."""
    tmp_path.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert_untrusted(tmp_path, "every user")
    assert not list(tmp_path.iterdir())


def test_relative_xdg_cache_home_is_ignored(planted, tmp_path, monkeypatch):
    """As the XDG Base Directory Specification says: else code came from wherever a program is started."""
    planted.rename(planted.parent / "fusedrnn")
    monkeypatch.delenv("FUSEDRNN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "parent")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert load() == OWN
    assert only_file(tmp_path / "home/.cache/fusedrnn")


def test_relative_cache_dir_is_used(planted, monkeypatch):
    """It is used, and what leads to it is looked at as for any other."""
    monkeypatch.chdir(planted.parent)
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", "planted")
    assert load() == PLANTED
    planted.parent.chmod(0o770)
    assert_untrusted(planted.parent)


def test_links_are_followed_and_their_targets_checked(planted, tmp_path, monkeypatch):
    """Links are as good as the folders in which they lie and to which they lead."""
    link = tmp_path / "link"
    link.symlink_to(Path("parent", "..", "parent", "planted"))
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(link))
    assert load() == PLANTED
    planted.chmod(0o777)
    assert_untrusted(planted)

    planted.chmod(0o700)
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    (open_folder / "link").symlink_to(planted)
    for route in (open_folder / "link", open_folder / ".." / "parent" / "planted"):
        monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(route))
        assert_untrusted(open_folder)


def test_circular_links(tmp_path, monkeypatch):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(tmp_path / "a"))
    with pytest.warns(RuntimeWarning, match="cannot be written: Too many levels of symbolic links"):
        assert load() == OWN


def test_folder_that_becomes_writable_while_it_is_opened(planted, monkeypatch):
    """What was opened is looked at, not only what lay at its path before."""
    plain = cache_folder._resolved

    def changed_afterwards(*arguments):
        path = plain(*arguments)
        planted.chmod(0o777)
        return path

    monkeypatch.setattr(cache_folder, "_resolved", changed_afterwards)
    with pytest.raises(cache_folder.UntrustedError, match="every user"):
        cache_folder.Folder(planted, os.geteuid())


def test_one_warning_for_all_kernels_of_a_call(planted):
    """A call needs half a dozen, and gives right results without any of them on disk."""
    planted.chmod(0o777)
    spec = RNNSpec("rnn_relu", 2, 3)
    x, params = np.ones((1, 1, 2), np.float32), np.ones(spec.layout.size, np.float32)
    with pytest.MonkeyPatch.context() as patch, pytest.warns(RuntimeWarning, match=str(planted)) as caught:
        patch.setattr(jobs, "load_job", jobs.load_job.__wrapped__)
        patch.setattr(jobs, "load_pack", jobs.load_pack.__wrapped__)
        y, _, _ = RNNOp(spec).forward(x, params)
    assert len(caught) == 1
    assert y.tolist() == [[[4.0, 4.0, 4.0]]]


def test_system_without_owners(planted):
    """As Windows: nothing is checked there, and files are named by their paths."""
    cache = ObjectCache(planted, user=None)
    name = only_file(planted).name
    image = cache.read(name)
    assert answer(loader.LoadedObject("answer", TARGET, image)) == PLANTED
    (planted / name).write_bytes(b"damaged")
    assert cache.read(name) is None
    cache.write(name, image)
    assert cache.read(name) == image
    other = f"other{name}"
    ObjectCache(planted, user=None, max_files=1).write(other, image)
    assert only_file(planted).name == other
    deep = ObjectCache(planted / "new" / "deep", user=None)
    deep.write(name, image)
    assert deep.read(name) == image


@pytest.mark.parametrize("mode", [0o660, 0o606])
def test_file_that_others_can_write_to(planted, mode):
    """It is compiled again, and takes the file's place."""
    file = only_file(planted)
    file.chmod(mode)
    with pytest.warns(RuntimeWarning, match=f"compiles a kernel again.*{file.name} can be written by") as caught:
        assert load() == OWN
    assert len(caught) == 1
    assert stat.S_IMODE(only_file(planted).stat().st_mode) == 0o600
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
def test_irregular_files_are_replaced(planted, make):
    """It is not waited for, not followed and not read; the file takes its place."""
    file = only_file(planted)
    if make is not link_to_the_file:
        file.unlink()
    if make is make_socket and not Path("/proc/self/fd").exists():
        pytest.skip("no way here to a socket with a long path")
    make(file)
    assert load() == OWN
    assert stat.S_ISREG(file.lstat().st_mode)
    assert answer(loader.load("answer", TARGET, Builder(1))) == OWN


def test_file_that_is_too_large(planted):
    file = only_file(planted)
    os.truncate(file, 1 << 40)  # takes no room on the disk
    assert load() == OWN
    assert file.stat().st_size < 1 << 20


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_modes_do_not_depend_on_the_umask(tmp_path, monkeypatch, mask):
    path = tmp_path / "deep" / "cache"
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(path))
    before = os.umask(mask)
    try:
        load()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(entry.stat().st_mode) for entry in (path.parent, path, only_file(path))]
    assert modes == [0o700, 0o700, 0o600]


def test_effective_user_is_checked(planted, monkeypatch):
    """Of a process with another user's rights; its own files are foreign to it then."""
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert_untrusted("", f"and this process runs as user {other}")


@pytest.mark.parametrize(
    "value", ["~no-such-user-at-all/x", "~no-such-user-at-all"], ids=["a folder", "the home itself"]
)
def test_home_of_an_unknown_user(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", value)
    assert_untrusted(value)
    assert not list(tmp_path.iterdir())


@as_root
@pytest.mark.parametrize("owned_by_other", ["folder", "parent", "file", "link"])
def test_files_and_folders_of_another_user(planted, tmp_path, monkeypatch, owned_by_other):
    """Though nobody else may write to it."""
    paths = {"folder": planted, "parent": planted.parent, "file": only_file(planted), "link": tmp_path / "link"}
    path = paths[owned_by_other]
    if owned_by_other == "link":
        path.symlink_to(planted)
        monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(path))
    os.chown(path, OTHER_USER, OTHER_USER, follow_symlinks=False)
    if owned_by_other == "file":
        with pytest.warns(RuntimeWarning, match=f"owned by user {OTHER_USER}, and this process runs as user 0"):
            assert load() == OWN
        assert only_file(planted).stat().st_uid == 0
    else:
        assert_untrusted(path, f"owned by user {OTHER_USER}, and this process runs as user 0")


@as_root
def test_home_of_another_user(planted, tmp_path, monkeypatch):
    """Root's, of a program that was started by a command which keeps the variables of the user before."""
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    planted.rename(home / ".cache" / "fusedrnn")
    for path in (home, *home.rglob("*")):
        os.chown(path, OTHER_USER, OTHER_USER)
    monkeypatch.delenv("FUSEDRNN_CACHE_DIR")
    monkeypatch.setenv("HOME", str(home))
    assert_untrusted(home, f"owned by user {OTHER_USER}")


VICTIM = """
import os, sys
from answering import TARGET, Builder, answer
from fusedrnn.jit import loader
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
os.environ["FUSEDRNN_CACHE_DIR"] = sys.argv[2]
print(answer(loader.load("answer", TARGET, Builder(42))))
"""


@as_root
def test_processes_of_other_users(planted, tmp_path):
    """A user's own folder is used, though below folders of root's; another user's and root's are not."""
    for path in (tmp_path, *tmp_path.parents):
        if not path.stat().st_mode & stat.S_IXOTH:
            path.chmod(path.stat().st_mode | stat.S_IXOTH)
    for path in (planted.parent, planted, only_file(planted)):
        os.chown(path, OTHER_USER, OTHER_USER)
    tests, sources = str(Path(__file__).parents[1] / "support"), str(Path(env.__file__).parents[1])
    paths = os.pathsep.join((tests, sources, os.environ.get("PYTHONPATH", "")))
    for user, expected, warned in ((OTHER_USER, PLANTED, False), (OTHER_USER + 1, OWN, True)):
        planted.parent.chmod(0o755)
        planted.chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-c", VICTIM, str(user), str(planted)],
            env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.stdout.split() == [str(expected)], done.stderr
        assert ("RuntimeWarning" in done.stderr) == warned
