"""Reading strictly and writing atomically. A leaf: it imports nothing of ours but errors.

Every write goes to a temporary file in the same folder, is flushed to the disk (fsync) and renamed over the old one, so
that a crash leaves the old file or the new one and never a half.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lowrank.errors import FileFormatError


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write the whole file or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def staged(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write a new file or folder under; it becomes `path` when the block ends well.

    FileExistsError where `path` is there already: nothing is ever written over.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already: choose another place, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")]:
            if file.is_file():
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())
        os.rename(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut. Windows cannot and need not."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def write_jsonl(path: str | Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: str | Path) -> Any:
    """The file's JSON value. FileFormatError where it is not JSON, FileNotFoundError where it is not there."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FileFormatError(f"{path} is not valid JSON: {error}") from error


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) for each non-blank line. FileFormatError names file and line."""
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FileFormatError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(value, dict):
            raise FileFormatError(f"{path}, line {number}: wanted a JSON object, got {type(value).__name__}")
        yield number, value


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file with the tensors in sorted order: equal values give equal bytes."""
    if metadata and len(metadata) > 1:
        raise ValueError(
            f"safetensors writes several metadata entries in random order; give one, got {sorted(metadata)}"
        )
    ready = {name: tensors[name].detach().to("cpu").contiguous() for name in sorted(tensors)}
    write_bytes(path, save(ready, metadata))


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. FileFormatError where it is damaged."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except SafetensorError as error:
        raise FileFormatError(f"{path} is damaged or not a safetensors file: {error}") from error


def cache_folder() -> Path:
    """Where fetched models and what was measured on this machine lie: LOWRANK_CACHE, else the user's cache folder."""
    named = os.environ.get("LOWRANK_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lowrank"
