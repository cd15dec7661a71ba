"""Files that survive kill -9 and power loss: written beside their place, synced, renamed into it."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kd.errors import MachineError, UserError

TEMPORARY_PREFIX = ".tmp-"  # what may be found under this name after a kill is removed or overwritten, never read

_UMASK = os.umask(0)  # there is no way to read it without setting it
os.umask(_UMASK)
_OWNER_ONLY = 0o600

_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}
# For a full disk safetensors and torch raise no OSError: the first quotes the system's words, the second only names the
# source file of its writer.
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container.cc")
_NEARLY_NOTHING = 1 << 20  # bytes free below which torch's writer is taken to have met a full disk


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system while `path` is written into MachineError or UserError.

    Raises:
        MachineError: the disk or the quota is full, also where safetensors or torch report it in their own way.
        UserError: `path` may not be written (permissions, a read-only file system, a file where a folder should be).
    """
    try:
        yield
    except (UserError, MachineError):
        raise
    except Exception as error:
        if _means_full(error, path):
            raise MachineError(
                f"{path}: the disk is full; free some space there and give the same command again "
                "(whole checkpoints are kept)"
            ) from error
        if isinstance(error, OSError) and error.errno in _NOT_ALLOWED:
            where = error.filename if isinstance(error.filename, str) else path
            raise UserError(
                f"{where}: cannot be written ({error.strerror}); choose another place or change its permissions"
            ) from error
        raise


def _means_full(error: Exception, path: Path) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    text = str(error)
    if any(full in text for full in _FULL_TEXTS):
        return True
    if not any(writer in text for writer in _TORCH_WRITER):
        return False
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free < _NEARLY_NOTHING


def fsync_path(path: Path) -> None:
    """Bring one file or folder (its list of names) onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_usual_permissions(file: Path) -> None:
    """Those that the umask leaves to a new file: safetensors makes files that only their owner can read."""
    if file.stat().st_mode & 0o777 == _OWNER_ONLY:
        file.chmod(0o666 & ~_UMASK)


def fsync_tree(folder: Path) -> None:
    """Bring everything below `folder`, and `folder` itself, onto the disk, with usual permissions."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            give_usual_permissions(Path(parent, name))
            fsync_path(Path(parent, name))
        fsync_path(Path(parent))


def write_text_durably(path: Path, text: str) -> None:
    write_bytes_durably(path, text.encode())


def write_bytes_durably(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds either its old content or all of the new one, whenever it stops.

    Raises:
        MachineError: the disk is full. `path` is as before.
        UserError: the folder may not be written.
    """
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


def append_lines(path: Path, lines: str) -> None:
    """Append whole lines in one write; what a failing write left of them is taken back.

    Raises:
        MachineError: the disk is full.
        UserError: the file may not be written.
    """
    data = lines.encode()
    with disk_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                written = os.write(descriptor, data)
                if written < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


def whole_lines(path: Path) -> list[bytes]:
    """The lines before the first one that a kill or a power loss has torn: without its newline, or with a NUL byte.

    A block that a power loss kept from the disk is read as zeros. JSON has no NUL bytes.
    """
    if not path.exists():
        return []
    with disk_errors(path), path.open("rb") as file:
        return list(itertools.takewhile(lambda line: line.endswith(b"\n") and b"\0" not in line, file))


def cut_torn_line(path: Path) -> bool:
    """Cut what does not belong to `whole_lines`. True if something was cut."""
    if not path.exists():
        return False
    keep = sum(map(len, whole_lines(path)))
    if keep == path.stat().st_size:
        return False
    with disk_errors(path), path.open("r+b") as file:
        file.truncate(keep)
        os.fsync(file.fileno())
    return True


def remove(path: Path) -> None:
    """Remove a file or a folder with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """`value` in JSON's words: numbers of numpy and torch as Python's, "nan", "inf", "-inf" where it has no word."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of the toolkit's own writing.

    Raises:
        UserError: it is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or choose another output") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object; restore it, or choose another output")
    return content


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each named file below `folder`. Files are read side by side: hashing does not hold the interpreter."""
    ordered = sorted(names)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(ordered, pool.map(lambda name: file_sha256(folder / name), ordered), strict=True))


def joint_sha256(hashes: Mapping[str, str]) -> str:
    """One SHA-256 over names and hashes: what `LC_ALL=C sha256sum NAMES... | sha256sum` prints for sorted names."""
    listing = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return hashlib.sha256(listing.encode()).hexdigest()
