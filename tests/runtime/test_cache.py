from __future__ import annotations

import errno
import hashlib
import inspect
import json
import logging
import os
import shutil
import stat
import string
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from caches import refuse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuser.ir.errors import CacheError
from fuser.runtime import cache as cache_module
from fuser.runtime import entries
from fuser.runtime.cache import KernelCache, default_cache
from fuser.runtime.entries import KernelKey, kernel_key

INGREDIENTS: dict[str, Any] = {
    "symbol": "kernel",
    "text": "int x;",
    "headers": {"a.h": b"a", "b.h": b"b"},
    "target": "target",
    "compiler": "g++ 12",
    "flags": ("-O3", "-fopenmp"),
}
TEXTS = st.text(max_size=20)
KEYS = st.fixed_dictionaries(
    {
        "symbol": TEXTS,
        "text": TEXTS,
        "headers": st.dictionaries(TEXTS, st.binary(max_size=10), max_size=3),
        "target": TEXTS,
        "compiler": TEXTS,
        "flags": st.lists(TEXTS, max_size=3).map(tuple),
    }
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def make_key(**changes: Any) -> KernelKey:
    return kernel_key(**{**INGREDIENTS, **changes})


def publish(cache: KernelCache, content: bytes, folder: Path, **changes: Any) -> KernelKey:
    """Put ``content`` into the cache as if it were a library."""
    key = make_key(**changes)
    library = folder / "built.so"
    library.write_bytes(content)
    values = {**INGREDIENTS, **changes}
    cache.publish(
        key,
        symbol=values["symbol"],
        library=library,
        text=values["text"],
        compiler=values["compiler"],
        target=values["target"],
    )
    return key


def entry_folder(cache: KernelCache, key: KernelKey) -> Path:
    path = cache.get(key.digest)
    assert path is not None
    return path.parent


def reopen(cache: KernelCache) -> KernelCache:
    """The cache as another process would see it."""
    return KernelCache(cache.root, cache.max_bytes)


# Keys


@pytest.mark.parametrize(
    "changes",
    [
        {"symbol": "kernel2"},
        {"text": "int y;"},
        {"target": "other"},
        {"compiler": "g++ 13"},
        {"flags": ("-O3",)},
        {"flags": ("-fopenmp", "-O3")},
        {"flags": ("-O3-fopenmp",)},
        {"headers": {"a.h": b"a"}},
        {"headers": {"a.h": b"a", "b.h": b"c"}},
        {"headers": {"a.h": b"a", "c.h": b"b"}},
        {"headers": {"a.h": b"b", "b.h": b"a"}},
        {"headers": {"a.hb.h": b"ab"}},
    ],
)
def test_every_ingredient_changes_the_key(changes: dict[str, Any]) -> None:
    assert make_key(**changes).digest != make_key().digest


def test_every_ingredient_was_tried() -> None:
    assert set(inspect.signature(kernel_key).parameters) == set(INGREDIENTS)


def test_the_format_is_an_ingredient(monkeypatch: pytest.MonkeyPatch) -> None:
    before = make_key()
    monkeypatch.setattr(entries, "FORMAT", entries.FORMAT + 1)
    assert make_key().digest != before.digest


def test_only_compiler_and_flags_are_unknown_without_a_compiler() -> None:
    tools: list[dict[str, Any]] = [{"compiler": "g++ 13"}, {"flags": ("-O2",)}]
    for changes in tools:
        assert make_key(**changes).source == make_key().source
    identity: list[dict[str, Any]] = [{"text": "int y;"}, {"target": "other"}, {"symbol": "k"}, {"headers": {}}]
    for changes in identity:
        assert make_key(**changes).source != make_key().source


@given(first=KEYS, second=KEYS)
def test_keys_are_equal_exactly_for_equal_ingredients(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert kernel_key(**first).digest == kernel_key(**first).digest
    assert (kernel_key(**first).digest == kernel_key(**second).digest) == (first == second)


# Entries


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(content=st.binary(max_size=2000), text=st.text(), symbol=TEXTS)
def test_what_is_published_is_found(content: bytes, text: str, symbol: str, cache: KernelCache, tmp_path: Path) -> None:
    key = publish(cache, content, tmp_path, text=text, symbol=symbol)
    for view in (cache, reopen(cache)):
        path = view.get(key.digest)
        # The cache keeps the first of two libraries that are filed under one key.
        assert path is not None
        assert (path.parent / "source.cpp").read_bytes() == text.encode()
    assert view.verify().damaged == ()
    cache.clear()
    assert cache.get(key.digest) is None


def test_a_missing_key_is_a_miss(cache: KernelCache) -> None:
    assert cache.get(make_key().digest) is None
    assert cache.find(make_key().source) is None


def test_what_is_no_key_is_refused(cache: KernelCache) -> None:
    with pytest.raises(ValueError, match="not the key"):
        cache.get("../../etc/passwd")


def test_the_manifest_tells_what_the_entry_is(cache: KernelCache, tmp_path: Path) -> None:
    key = publish(cache, b"library", tmp_path)
    (entry,) = cache.entries()
    assert (entry.key, entry.symbol, entry.size, entry.compiler, entry.target) == (
        *(key.digest, "kernel", 7, "g++ 12", "target"),
    )
    assert abs(entry.created - time.time()) < 60
    assert entry.fields == dict(key.fields)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "kernel.so").write_bytes(b"xibrary"),
        lambda folder: (folder / "kernel.so").write_bytes(b""),
        lambda folder: (folder / "kernel.so").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text(""),
        lambda folder: (folder / "manifest.json").write_text("[1, 2]"),
        lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"),
        lambda folder: os.truncate(folder / "manifest.json", (folder / "manifest.json").stat().st_size // 2),
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"kernel"', "5")
        ),
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"format": 1', '"format": 99')
        ),
    ],
)
def test_a_damaged_entry_is_a_miss_and_is_replaced(
    cache: KernelCache, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    key = publish(cache, b"library", tmp_path)
    damage(entry_folder(cache, key))
    other = reopen(cache)
    with caplog.at_level(logging.WARNING, "fuser"):
        assert other.get(key.digest) is None
    assert "damaged" in caplog.text
    assert [name for name, _ in other.verify().damaged] == [key.digest]
    publish(other, b"library", tmp_path)
    assert (entry_folder(other, key) / "kernel.so").read_bytes() == b"library"
    assert other.verify().damaged == ()


def replaced(path: Path, by: str) -> None:
    """Put something else in the place of a file or folder: a folder, a file, or a link to nowhere."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if by == "folder":
        path.mkdir()
    elif by == "file":
        path.write_text("something else")
    else:
        path.symlink_to("/nonexistent/place")


@pytest.mark.parametrize("by", ["folder", "file", "link"])
@pytest.mark.parametrize("name", ["manifest.json", "kernel.so", ""])
def test_what_stands_in_the_place_of_an_entry_is_replaced(
    cache: KernelCache, tmp_path: Path, name: str, by: str
) -> None:
    key = publish(cache, b"library", tmp_path)
    replaced(entry_folder(cache, key) / name, by)
    other = reopen(cache)
    assert other.get(key.digest) is None
    publish(other, b"library", tmp_path)
    again = reopen(cache)
    assert again.root == cache.root
    assert (entry_folder(again, key) / "kernel.so").read_bytes() == b"library"
    assert again.verify().damaged == ()


def test_an_entry_that_cannot_be_replaced_is_kept_elsewhere(
    cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = publish(cache, b"library", tmp_path)
    (entry_folder(cache, key) / "kernel.so").write_bytes(b"damaged")
    first, other = cache.root, reopen(cache)
    rename = Path.rename

    def stuck(self: Path, target: Path) -> Path:
        if self.is_relative_to(first / "kernels"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stuck)
    publish(other, b"library", tmp_path)
    assert other.root != first and (entry_folder(other, key) / "kernel.so").read_bytes() == b"library"


def test_a_manifest_whose_values_have_odd_types_is_damaged(cache: KernelCache, tmp_path: Path) -> None:
    key = publish(cache, b"library", tmp_path)
    manifest = entry_folder(cache, key) / "manifest.json"
    intact = json.loads(manifest.read_text())
    for change in ({"fields": {"a": 1}}, {"created": 10**400}, {"created": "now"}):
        manifest.write_text(json.dumps({**intact, **change}))
        assert reopen(cache).get(key.digest) is None
    manifest.write_text("[" * 100_000)
    assert reopen(cache).get(key.digest) is None


def test_an_entry_that_is_damaged_while_in_use_is_noticed(cache: KernelCache, tmp_path: Path) -> None:
    key = publish(cache, b"library", tmp_path)
    folder = entry_folder(cache, key)
    (folder / "kernel.so").write_bytes(b"something else")
    assert cache.get(key.digest) is None


def test_an_entry_moved_to_another_key_is_a_miss(cache: KernelCache, tmp_path: Path) -> None:
    key, other = publish(cache, b"library", tmp_path), make_key(text="int y;")
    destination = cache.root / "kernels" / other.digest[:2] / other.digest
    destination.parent.mkdir(exist_ok=True)
    entry_folder(cache, key).rename(destination)
    assert reopen(cache).get(other.digest) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data())
def test_no_damage_changes_what_is_loaded(data: st.DataObject, cache: KernelCache, tmp_path: Path) -> None:
    cache.clear()
    key = publish(cache, b"library", tmp_path)
    name = data.draw(st.sampled_from(["kernel.so", "manifest.json"]))
    file = entry_folder(cache, key) / name
    content = bytearray(file.read_bytes())
    position = int(len(content) * data.draw(st.floats(0, 1, exclude_max=True)))
    if data.draw(st.booleans()):
        content[position] ^= data.draw(st.integers(1, 255))
    else:
        del content[position:]
    file.write_bytes(content)
    path = reopen(cache).get(key.digest)
    assert path is None or path.read_bytes() == b"library"


def test_the_first_intact_library_stays(cache: KernelCache, tmp_path: Path) -> None:
    key = publish(cache, b"first", tmp_path)
    publish(cache, b"second", tmp_path)
    assert (entry_folder(cache, key) / "kernel.so").read_bytes() == b"first"


def test_find_takes_any_compiler(cache: KernelCache, tmp_path: Path) -> None:
    key = publish(cache, b"library", tmp_path, compiler="g++ 9")
    assert key.digest != make_key().digest
    assert cache.find(make_key().source) == entry_folder(cache, key) / "kernel.so"


def test_explain_names_what_differs(cache: KernelCache, tmp_path: Path) -> None:
    assert "no entry has this symbol" in cache.explain(make_key())
    publish(cache, b"library", tmp_path)
    assert "hit" in cache.explain(make_key())
    text = cache.explain(make_key(flags=("-O2",), headers={"a.h": b"a"}))
    assert {line.split(":")[0].strip() for line in text.splitlines() if "differs" in line} == {"flags", "header b.h"}


# Size


def age(cache: KernelCache, key: KernelKey, seconds: float) -> None:
    folder = cache.root / "kernels" / key.digest[:2] / key.digest
    moment = time.time() - seconds
    os.utime(folder / "manifest.json", (moment, moment))
    os.utime(folder, (moment, moment))


def test_the_least_recently_used_entries_go_first(cache: KernelCache, tmp_path: Path) -> None:
    keys = [publish(cache, bytes(1000), tmp_path, text=f"int x{i};") for i in range(4)]
    for i, key in enumerate(keys):
        age(cache, key, 1000.0 - i)
    other = reopen(cache)
    assert other.get(keys[0].digest) is not None, "the oldest is used again"
    one = other.size() / 4
    assert other.prune(int(2.5 * one)) == [keys[1].digest, keys[2].digest]
    assert [entry.key for entry in other.entries()] == [keys[0].digest, keys[3].digest]
    assert other.size() <= 2.5 * one


def test_entries_in_use_stay(cache: KernelCache, tmp_path: Path) -> None:
    key = publish(cache, bytes(1000), tmp_path)
    assert cache.prune(0) == []
    assert cache.get(key.digest) is not None
    assert reopen(cache).prune(0) == [key.digest]
    assert cache.get(key.digest) is None


def test_prune_removes_damaged_entries_too(cache: KernelCache, tmp_path: Path) -> None:
    key = publish(cache, bytes(1000), tmp_path)
    (entry_folder(cache, key) / "manifest.json").unlink()
    assert reopen(cache).prune(0) == [key.digest]
    assert cache.size() == 0


def test_entries_that_vanish_while_pruning(cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = publish(cache, b"library", tmp_path)
    gone = cache.root / "kernels" / "00" / f"{'0' * 32}-{'0' * 16}"
    folders = [entry_folder(cache, key), gone]
    other = reopen(cache)
    monkeypatch.setattr(other, "_folders", lambda roots: folders)
    assert key.digest in other.prune(0)


def test_a_cache_that_is_cleared_or_removed_in_the_middle_of_a_write(cache: KernelCache) -> None:
    root, attempts = cache.root, []

    def write(folder: Path) -> Path:
        attempts.append(folder)
        if len(attempts) == 1:
            reopen(cache).clear()
        elif len(attempts) == 2:
            shutil.rmtree(root)
        (folder / "records" / "x").write_text("x")
        return folder

    assert cache.writing(write) == root == cache.root
    assert (root / "records" / "x").exists() and len(attempts) == 3


def test_what_is_made_again_is_private(cache: KernelCache, tmp_path: Path) -> None:
    """Also where the user's files can be written by a group, as with Debian's private groups."""
    before = os.umask(0o002)
    try:
        shutil.rmtree(cache.root)
        publish(cache, b"library", tmp_path)
        cache.clear()
        publish(cache, b"library", tmp_path)
        cache.write_record("tuning", "a", {})
        cache.write_plan("mask", "a mask", b"plan")
    finally:
        os.umask(before)
    folders = [cache.root, *(path for path in cache.root.rglob("*") if path.is_dir())]
    assert {path.name for path in folders} >= {"kernels", "plans", "records", "tuning"}
    assert [path for path in folders if stat.S_IMODE(path.stat().st_mode) & 0o022] == []
    assert KernelCache(cache.root).root == cache.root


def test_what_killed_processes_left_is_swept(cache: KernelCache) -> None:
    old, new = (Path(tempfile.mkdtemp(dir=cache.root / "tmp")) for _ in range(2))
    (old / "k0.o").write_bytes(b"half")
    moment = time.time() - 2 * 86_400
    os.utime(old, (moment, moment))
    reopen(cache)
    assert not old.exists() and new.exists()


def test_only_so_many_failures_are_kept(cache: KernelCache) -> None:
    for i in range(cache_module._FAILURES_KEPT + 5):
        path = cache.keep_failure(f"key{i:03}", "int x;", {"a/b.h": b"int y;"}, "error")
        os.utime(path.parent, (i, i))
    kept = sorted(folder.name for folder in (cache.root / "failed").iterdir())
    assert len(kept) == cache_module._FAILURES_KEPT
    assert kept[-1] == path.parent.name
    assert (path.parent / "a" / "b.h").read_bytes() == b"int y;" and (path.parent / "output.txt").read_text() == "error"


# The directory


def test_the_directory_is_private(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "new" / "cache")
    assert stat.S_IMODE(cache.root.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    root.chmod(mode)
    with pytest.raises(CacheError, match="chmod -R go-w"):
        KernelCache(root)


def test_a_foreign_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "cache"
    root.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(root, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(CacheError, match="belongs to another user"):
        KernelCache(root)


def test_a_read_only_cache_is_read_and_new_kernels_go_elsewhere(
    cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = publish(cache, b"old", tmp_path)
    cache.write_record("tuning", "a", {"x": 1})
    refuse(monkeypatch, cache.root, errno.EROFS)
    with caplog.at_level(logging.WARNING, "fuser"):
        other = reopen(cache)
        new = publish(other, b"new", tmp_path, text="int y;")
        other.write_record("tuning", "b", {"x": 2})
    assert caplog.text.count("FUSER_CACHE_DIR") == 1, "one warning, not one for each write"
    assert other.root != cache.root
    assert (entry_folder(other, old) / "kernel.so").read_bytes() == b"old"
    assert (entry_folder(other, new) / "kernel.so").read_bytes() == b"new"
    assert other.read_record("tuning", "a") == {"x": 1} and other.read_record("tuning", "b") == {"x": 2}
    assert {entry.key for entry in other.entries()} == {old.digest, new.digest}
    assert stat.S_IMODE(other.root.stat().st_mode) == 0o700


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EBUSY])
def test_folders_of_other_file_systems_in_the_cache(
    cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    rename, first = Path.rename, cache.root

    def refuse(self: Path, target: Path) -> Path:
        if Path(target).is_relative_to(first / "kernels"):
            raise OSError(code, os.strerror(code), str(self), None, str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    key = publish(cache, b"library", tmp_path)
    assert cache.root != first and cache.get(key.digest) is not None and "FUSER_CACHE_DIR" in caplog.text


def test_a_folder_in_the_place_of_a_record_or_a_plan(cache: KernelCache) -> None:
    cache.write_record("tuning", "a", {"x": 1})
    cache.write_plan("mask", "a mask", b"plan")
    for path in [*cache.root.glob("records/tuning/*"), *cache.root.glob("plans/*")]:
        replaced(path, "folder")
    other = reopen(cache)
    assert other.read_record("tuning", "a") is None and other.read_plan("mask") is None
    other.write_record("tuning", "a", {"x": 2})
    other.write_plan("mask", "a mask", b"plan")
    assert other.read_record("tuning", "a") == {"x": 2} and other.read_plan("mask") == b"plan"


@pytest.mark.parametrize("place", ["file", "file/below", "link"])
def test_a_place_that_is_no_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    cache = KernelCache(tmp_path / place)
    key = publish(cache, b"library", tmp_path)
    assert reopen(cache).get(key.digest) is not None
    assert "FUSER_CACHE_DIR" in caplog.text


def test_a_disk_that_fills_up_while_publishing(
    cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = cache.root
    real = cache_module.write_own

    def full(path: Path, data: bytes) -> None:
        if path.is_relative_to(first):
            real(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, data)

    monkeypatch.setattr(cache_module, "write_own", full)
    key = publish(cache, b"library", tmp_path)
    assert (entry_folder(cache, key) / "kernel.so").read_bytes() == b"library"
    assert cache.root != first and "No space left" in caplog.text
    # Nothing half-written is left where the disk was full.
    monkeypatch.undo()
    assert KernelCache(first).verify().kernels == 0 and list((first / "tmp").iterdir()) == []


def test_when_every_disk_is_full_there_is_one_clear_error(
    cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, stage: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "rename", full)
    monkeypatch.setattr(Path, "replace", full)
    for _ in range(2):
        with pytest.raises(CacheError, match="free some space"):
            publish(cache, b"library", tmp_path)
    with pytest.raises(CacheError, match="free some space"):
        cache.write_record("tuning", "a", {})
    monkeypatch.undo()
    assert cache.verify().kernels == 0 and list((cache.root / "tmp").iterdir()) == []


def test_the_environment_names_the_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSER_CACHE_DIR", str(tmp_path / "here"))
    assert default_cache().root == tmp_path / "here" and default_cache() is default_cache()
    monkeypatch.setenv("FUSER_CACHE_DIR", str(tmp_path / "there"))
    assert default_cache().root == tmp_path / "there"
    monkeypatch.delenv("FUSER_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache().root == tmp_path / "xdg" / "fuser"


def test_without_a_home_there_is_a_temporary_cache() -> None:
    code = (
        "import os; os.path.expanduser = lambda path: path\n"  # what Python does for a user without an entry
        "from fuser.runtime.cache import default_cache; root = default_cache().root; print(root); print(root.is_dir())"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "FUSER_CACHE_DIR")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    root, usable = result.stdout.split()
    assert Path(root).is_relative_to(tempfile.gettempdir()) and usable == "True"
    assert not Path(root).exists(), "it is gone with its process"


# Records


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(key=st.text(), value=st.dictionaries(st.text(), JSON, max_size=4))
def test_records_come_back(key: str, value: dict[str, Any], cache: KernelCache) -> None:
    cache.write_record("tuning", key, value)
    assert cache.read_record("tuning", key) == value
    assert reopen(cache).read_record("tuning", key) == value
    assert cache.read_record("calibration", key) is None
    assert cache.verify().damaged == ()


@given(key=st.text(), title=st.text(), content=st.binary(max_size=300))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_plans_come_back(key: str, title: str, content: bytes, cache: KernelCache) -> None:
    cache.write_plan(key, title, content)
    assert cache.read_plan(key) == content
    assert cache.read_plan(key + "x") is None
    assert title in {entry.title for entry in cache.plans()}
    assert not cache.verify().damaged


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_changes_a_plan(data: st.DataObject, cache: KernelCache) -> None:
    cache.write_plan("key", "title", b"content of the plan")
    (path,) = cache.root.glob("plans/*.plan")
    intact = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(intact) - 1))
    intact[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(intact)
    read = cache.read_plan("key")
    assert read is None or read == b"content of the plan"
    assert bool(cache.verify().damaged) == (read is None)


def test_a_plan_of_another_key_is_a_miss(cache: KernelCache) -> None:
    cache.write_plan("a", "a", b"plan of a")
    cache.write_plan("b", "b", b"plan of b")
    first, second = cache.root.glob("plans/*.plan")
    first.write_bytes(second.read_bytes())
    assert sorted([cache.read_plan("a") or b"", cache.read_plan("b") or b""])[0] == b""


def test_plans_are_pruned_with_the_kernels(cache: KernelCache, tmp_path: Path) -> None:
    old, new = (cache.root / "plans" / hashlib.sha256(key).hexdigest() for key in (b"old", b"new"))
    for key in ("old", "new"):
        cache.write_plan(key, key, bytes(1000))
    for path, used in ((old, 1.0), (new, 3.0)):
        os.utime(f"{path}.plan", (used, used))
    assert cache.size() > 2000
    assert cache.prune(1500) == [f"{old.name}.plan"]
    assert [entry.title for entry in cache.plans()] == ["new"]
    cache.clear()
    assert cache.size() == 0


def test_a_plan_that_would_fill_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "small", max_bytes=800)
    cache.write_plan("small", "small", bytes(100))
    cache.write_plan("large", "large", bytes(101))
    assert [entry.title for entry in cache.plans()] == ["small"]


def test_a_record_can_be_replaced(cache: KernelCache) -> None:
    cache.write_record("tuning", "a", {"x": 1})
    cache.write_record("tuning", "a", {"x": 2})
    assert cache.read_record("tuning", "a") == {"x": 2}


def test_what_is_not_json_is_refused(cache: KernelCache) -> None:
    with pytest.raises(TypeError):
        cache.write_record("tuning", "a", {"x": object()})
    with pytest.raises(ValueError, match="word"):
        cache.write_record("../up", "a", {})
    assert cache.read_record("tuning", "a") is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data())
def test_no_damage_changes_what_a_record_says(data: st.DataObject, cache: KernelCache) -> None:
    cache.write_record("tuning", "a", {"seconds": 0.125, "tiles": [64, 32]})
    (file,) = (cache.root / "records" / "tuning").iterdir()
    content = bytearray(file.read_bytes())
    position = int(len(content) * data.draw(st.floats(0, 1, exclude_max=True)))
    if data.draw(st.booleans()):
        content[position] ^= data.draw(st.integers(1, 255))
    else:
        del content[position:]
    file.write_bytes(content)
    assert cache.read_record("tuning", "a") in (None, {"seconds": 0.125, "tiles": [64, 32]})
    cache.write_record("tuning", "a", {"x": 1})
    assert cache.read_record("tuning", "a") == {"x": 1}


def test_damaged_records_are_reported(cache: KernelCache) -> None:
    cache.write_record("tuning", "a", {"x": 1})
    (file,) = (cache.root / "records" / "tuning").iterdir()
    file.write_text(json.dumps({"body": 5, "sha256": ""}))
    assert cache.read_record("tuning", "a") is None
    assert [name for name, _ in cache.verify().damaged] == [f"tuning/{file.name}"]


def test_many_keep_failures_at_once(cache: KernelCache) -> None:
    def fail(thread: int) -> None:
        for i in range(80):
            cache.keep_failure(make_key(text=f"{thread} {i}").digest, "text", {"a.h": b"a"}, "output")

    with ThreadPoolExecutor(4) as pool:
        failing = [pool.submit(fail, thread) for thread in range(4)]
    assert [error for future in failing if (error := future.exception())] == []


# Archives


@pytest.fixture
def archive(cache: KernelCache, tmp_path: Path) -> Path:
    for text in ("int x;", "int y;"):
        publish(cache, b"library " + text.encode(), tmp_path, text=text)
    cache.write_record("tuning", "a", {"x": 1})
    cache.write_plan("mask", "a mask", b"content of the plan")
    path = tmp_path / "kernels.zip"
    assert cache.export(path) == 2
    return path


def test_export_and_import(cache: KernelCache, archive: Path, tmp_path: Path) -> None:
    other = KernelCache(tmp_path / "other")
    report = other.import_(archive)
    assert set(report.kernels) == {entry.key for entry in cache.entries()}
    assert (report.records, report.plans, report.present, report.targets) == (1, 1, 0, frozenset({"target"}))
    for entry in cache.entries():
        assert entry in other.entries()
        path = other.get(entry.key)
        assert path is not None and path.read_bytes().startswith(b"library int")
    assert other.read_record("tuning", "a") == {"x": 1}
    assert other.read_plan("mask") == b"content of the plan"
    assert other.verify().damaged == () and other.verify().plans == 1
    again = other.import_(archive)
    assert (again.kernels, again.records, again.plans, again.present) == ((), 0, 0, 4)
    assert archive.read_bytes() == (other.export(tmp_path / "again.zip") and (tmp_path / "again.zip").read_bytes())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15)
@given(
    kernels=st.dictionaries(st.text(string.printable, max_size=9), st.binary(max_size=300), max_size=3),
    records=st.dictionaries(st.text(max_size=9), st.dictionaries(st.text(), JSON, max_size=2), max_size=3),
)
def test_archives_lose_nothing(
    kernels: dict[str, bytes], records: dict[str, dict[str, Any]], cache: KernelCache, tmp_path: Path
) -> None:
    cache.clear()
    keys = {publish(cache, content, tmp_path, text=text): content for text, content in kernels.items()}
    for key, value in records.items():
        cache.write_record("tuning", key, value)
    cache.export(tmp_path / "all.zip")
    with tempfile.TemporaryDirectory() as folder:
        other = KernelCache(Path(folder) / "cache")
        other.import_(tmp_path / "all.zip")
        assert {key: entry_folder(other, key).joinpath("kernel.so").read_bytes() for key in keys} == keys
        assert {key: other.read_record("tuning", key) for key in records} == records


def test_local_records_win(archive: Path, tmp_path: Path) -> None:
    other = KernelCache(tmp_path / "other")
    other.write_record("tuning", "a", {"x": "measured here"})
    assert other.import_(archive).records == 0
    assert other.read_record("tuning", "a") == {"x": "measured here"}


def test_chosen_kernels_only(cache: KernelCache, archive: Path, tmp_path: Path) -> None:
    key = make_key().digest
    assert cache.export(tmp_path / "one.zip", [key, key]) == 1
    report = KernelCache(tmp_path / "other").import_(tmp_path / "one.zip")
    assert (report.kernels, report.records, report.plans) == ((key,), 0, 0)
    with pytest.raises(CacheError, match="nothing was exported"):
        cache.export(tmp_path / "two.zip", [make_key(text="int z;").digest])
    assert not (tmp_path / "two.zip").exists()


def rewrite(archive: Path, change: Callable[[dict[str, bytes]], None], *, fix_index: bool = True) -> None:
    """Change the members of an archive; with ``fix_index`` the checksums are those of the changed members."""
    with zipfile.ZipFile(archive) as file:
        members = {name: file.read(name) for name in file.namelist()}
    index = json.loads(members.pop("index.json"))
    change(members)
    if fix_index:
        index["members"] = {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in {"index.json": json.dumps(index).encode(), **members}.items():
            file.writestr(name, content)


def first(members: dict[str, bytes], end: str) -> str:
    return next(name for name in members if name.endswith(end))


@pytest.mark.parametrize(
    "name",
    [
        "../evil.so",
        "/tmp/evil.so",
        "kernels/../../evil.so",
        "records/tuning/../../evil.json",
        f"kernels/{'0' * 32}-{'0' * 16}/../evil.so",
        f"kernels/{'0' * 32}-{'0' * 16}/extra.so",
    ],
)
def test_names_outside_the_format_are_refused(archive: Path, tmp_path: Path, name: str) -> None:
    rewrite(archive, lambda members: members.update({name: b"evil"}))
    other = KernelCache(tmp_path / "deep" / "er" / "other")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(CacheError, match="not an archive"):
        other.import_(archive)
    assert set(tmp_path.rglob("*")) == before and other.entries() == []


@pytest.mark.parametrize(
    ("change", "fix_index"),
    [
        (lambda members: members.pop(first(members, "kernel.so")), True),
        (lambda members: members.pop(first(members, "manifest.json")), True),
        (lambda members: members.update({first(members, "kernel.so"): b"evil"}), True),
        (lambda members: members.update({first(members, "source.cpp"): b"evil"}), True),
        (lambda members: members.update({first(members, "manifest.json"): b"{}"}), True),
        (lambda members: members.update({f"records/tuning/{'0' * 64}.json": members[first(members, ".json")]}), True),
        (
            lambda members: members.update(
                {f"records/tuning/{'0' * 64}.json": members[next(n for n in members if n.startswith("records"))]}
            ),
            True,
        ),
        (lambda members: members.update({first(members, ".plan"): members[first(members, ".plan")] + b"x"}), True),
        (lambda members: members.update({f"plans/{'0' * 64}.plan": members[first(members, ".plan")]}), True),
        (lambda members: members.update({first(members, "kernel.so"): b"evil"}), False),
        (lambda members: members.pop(first(members, "source.cpp")), False),
    ],
)
def test_archives_that_contradict_themselves_are_refused(
    archive: Path, tmp_path: Path, change: Callable[[dict[str, bytes]], None], fix_index: bool
) -> None:
    rewrite(archive, change, fix_index=fix_index)
    other = KernelCache(tmp_path / "other")
    with pytest.raises(CacheError, match="damaged"):
        other.import_(archive)
    assert other.entries() == [] and other.read_record("tuning", "a") is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
@given(data=st.data())
def test_no_damage_to_an_archive_goes_in(data: st.DataObject, archive: Path, tmp_path: Path) -> None:
    content = bytearray(archive.read_bytes())
    position = int(len(content) * data.draw(st.floats(0, 1, exclude_max=True)))
    if data.draw(st.booleans()):
        content[position] ^= data.draw(st.integers(1, 255))
    else:
        del content[position:]
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(content)
    with tempfile.TemporaryDirectory() as folder:
        other = KernelCache(Path(folder) / "cache")
        try:
            other.import_(damaged)
        except CacheError:
            assert other.entries() == [] and other.verify().records == 0
        else:
            assert len(other.entries()) == 2 and other.read_record("tuning", "a") == {"x": 1}


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_kernel_without_its_source_does_not_spoil_an_archive(
    cache: KernelCache, archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    source = entry_folder(cache, make_key()) / "source.cpp"
    source.unlink() if damage == "gone" else source.write_text("something else")
    assert cache.export(tmp_path / "rest.zip") == 1
    assert "cannot be exported" in caplog.text
    report = KernelCache(tmp_path / "other").import_(tmp_path / "rest.zip")
    assert (len(report.kernels), report.records, report.plans) == (1, 1, 1)
    with pytest.raises(CacheError, match="nothing was exported"):
        cache.export(tmp_path / "one.zip", [make_key().digest])


def test_archives_in_other_compressions_are_refused(archive: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_LZMA) as file:
        for name, content in members.items():
            file.writestr(name, content)
    content = bytearray(archive.read_bytes())
    for i in range(80, len(content) // 2, 7):
        content[i] ^= 0x55
    archive.write_bytes(content)
    with pytest.raises(CacheError, match="not an archive"):
        KernelCache(tmp_path / "other").import_(archive)


def test_archives_that_cannot_be_read_or_written(cache: KernelCache, archive: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="cannot read"):
        cache.import_(tmp_path / "missing.zip")
    with pytest.raises(CacheError, match="cannot write"):
        cache.export(tmp_path / "missing" / "x.zip")
    rewrite(archive, lambda members: None)
    with zipfile.ZipFile(archive) as file:
        index = json.loads(file.read("index.json"))
    text = archive.read_bytes().replace(b'"format": 1', b'"format": 7')
    archive.write_bytes(text)
    assert index["format"] == 1
    with pytest.raises(CacheError):
        KernelCache(tmp_path / "other").import_(archive)


def test_an_archive_that_unpacks_to_more_than_its_size_allows_is_refused(
    cache: KernelCache, archive: Path, tmp_path: Path
) -> None:
    bomb = tmp_path / "bomb.zip"
    member = "plans/" + "0" * 64 + ".plan"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("index.json", json.dumps({"format": 1, "members": {member: ""}}))
        file.writestr(member, bytes(80 << 20))
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(CacheError, match=r"unpacks to far more than its size.*--max-size"):
        KernelCache(tmp_path / "other").import_(bomb)
    with pytest.raises(CacheError, match="unpacks to far more"):
        KernelCache(tmp_path / "other").import_(archive, max_bytes=100)
    assert not list((tmp_path / "other").rglob("*.so"))
