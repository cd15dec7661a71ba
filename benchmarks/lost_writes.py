"""What a file system may hold after a power loss: a record of system calls, and a model of what was synced.

`record` runs a command under strace. `FileSystem` applies its calls one by one and builds, after any of them, a folder
as a power loss may leave it. Only this is certain:

    content of a file    what it was at its last fsync; what came later is there, missing, torn or zeros
    names in a folder    what they were at its last fsync; each later change may be there or not
    rename               both of its names change, or neither; lasting once either folder is synced

That is less than any common file system promises: ext4 and XFS keep the order of renames.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CALLS = (
    "openat,creat,write,pwrite64,writev,pwritev,pwritev2,lseek,ftruncate,truncate,fallocate,fsync,fdatasync,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,copy_file_range,"
    "sendfile,splice,mmap,io_uring_setup"
)
# Calls that the model does not know. None may touch the folder.
UNKNOWN = {
    "creat", "pwritev", "pwritev2", "truncate", "fallocate", "link", "linkat", "symlink", "symlinkat",
    "copy_file_range", "sendfile", "splice",
}  # fmt: skip
_LINE = re.compile(r"(?P<pid>\d+)\s+(?P<rest>.*)")
_CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\)\s+= (?P<result>-?\d+|0x[0-9a-f]+)(?P<more>.*)")
BLOCK = 512  # bytes that a disk writes at once
_VECTOR = re.compile(r'iov_base="((?:\\x[0-9a-f]{2})*)"')
_ARGUMENT = re.compile(r'\s*(?:"((?:\\x[0-9a-f]{2})*)"|((?:-?\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2})*)>[^,]*)|([^,]+))')


@dataclass(frozen=True)
class Call:
    """A system call that succeeded. arguments: strings as bytes, the rest as text; places: of descriptors."""

    name: str
    arguments: tuple[bytes | str, ...]
    places: Mapping[int, str]
    result: int


def record(
    command: Sequence[str], cwd: Path, environment: Mapping[str, str], log: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command under strace, with all that it writes."""
    strace = ["strace", "-f", "-y", "-xx", "-s", str(1 << 26), "--seccomp-bpf", "-o", str(log), "-e", f"trace={CALLS}"]
    return subprocess.run(
        [*strace, *command], cwd=cwd, env=dict(environment), capture_output=True, text=True, check=False
    )


def calls(log: Path) -> Iterator[Call]:
    """The successful calls of a record, in the order in which they ended."""
    begun: dict[str, str] = {}
    with log.open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            found = _LINE.match(line)
            if found is None:
                continue
            pid, rest = found["pid"], found["rest"]
            if rest.endswith("<unfinished ...>"):
                begun[pid] = rest.removesuffix("<unfinished ...>")
                continue
            if rest.startswith("<... "):
                rest = begun.pop(pid) + rest.partition("resumed>")[2]
            call = _CALL.match(rest)
            if call is None or call["result"] == "-1":
                continue
            yield parsed(call["name"], call["arguments"], int(call["result"], 0))


def parsed(name: str, text: str, result: int) -> Call:
    if name == "writev":  # its buffers are one
        text = f'{text.partition(",")[0]}, "{"".join(_VECTOR.findall(text))}"'
    arguments: list[bytes | str] = []
    places: dict[int, str] = {}
    for string, descriptor, place, other in _ARGUMENT.findall(text):
        if descriptor:
            places[len(arguments)] = unescaped(place).decode()
            arguments.append(descriptor.partition("<")[0])
        else:
            arguments.append(other.strip() if other else unescaped(string))
    return Call(name, tuple(arguments), places, result)


def unescaped(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


@dataclass(eq=False)
class File:
    data: bytearray = field(default_factory=bytearray)
    synced: bytes | None = None


@dataclass(eq=False)
class Folder:
    """names: as they are. log: every change, as (number of the call, name, entry or None); synced: how many last."""

    names: dict[str, Entry] = field(default_factory=dict)
    log: list[tuple[int, str, Entry | None]] = field(default_factory=list)
    synced: int = 0

    def change(self, number: int, name: str, entry: Entry | None) -> None:
        if entry is None:
            self.names.pop(name, None)
        else:
            self.names[name] = entry
        self.log.append((number, name, entry))


Entry = File | Folder


class FileSystem:
    """The folder `root` as the calls leave it, and what of it lasts. Descriptors are those of one process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = Folder()
        self.number = 0
        self._descriptors: dict[str, tuple[Entry, int, bool]] = {}  # file, offset, append

    def apply(self, call: Call) -> bool:
        """Apply one call; whether it changed or synced anything below the root.

        Raises ValueError where a call that the model does not know touches the root.
        """
        self.number += 1
        touched = [place for place in call.places.values() if self._parts(place) is not None]
        if call.name in UNKNOWN and touched:
            raise ValueError(f"{call.name} of {touched}: not in the model")
        if (
            call.name == "mmap"
            and touched
            and "PROT_WRITE" in str(call.arguments)
            and "MAP_SHARED" in str(call.arguments)
        ):
            raise ValueError(f"a shared writable mapping of {touched}: not in the model")
        method = getattr(self, f"_{call.name}", None)
        return bool(method(call)) if method is not None else False

    # -- places --------------------------------------------------------------------------------------------------------

    def _parts(self, place: str) -> tuple[str, ...] | None:
        path = Path(place.removesuffix(" (deleted)"))
        return path.relative_to(self.root).parts if path.is_relative_to(self.root) else None

    def _path(self, call: Call, position: int, at: int | None = None) -> tuple[Folder, str] | None:
        """Folder and name of a path argument; None outside of the root. at: the argument that it is relative to."""
        raw = call.arguments[position]
        assert isinstance(raw, bytes)
        base = call.places[at] if at is not None else str(self.root.parent)  # the command's working folder
        parts = self._parts(str(Path(base, raw.decode("utf-8", "surrogateescape"))))
        if parts is None:
            return None
        if not parts:
            return Folder(), ""  # the root itself: see _mkdir
        folder: Entry = self.top
        for part in parts[:-1]:
            assert isinstance(folder, Folder)
            folder = folder.names[part]
        assert isinstance(folder, Folder)
        return folder, parts[-1]

    def _entry(self, place: str) -> Entry | None:
        parts = self._parts(place)
        entry: Entry = self.top
        for part in parts or ():
            assert isinstance(entry, Folder)
            found = entry.names.get(part)
            if found is None:
                return None
            entry = found
        return None if parts is None else entry

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _openat(self, call: Call) -> bool:
        where = self._path(call, 1, 0)
        descriptor = str(call.result)
        self._descriptors.pop(descriptor, None)
        if where is None or not where[1]:
            return False
        folder, name = where
        flags = str(call.arguments[2])
        created = name not in folder.names
        if created:
            folder.change(self.number, name, File())
        entry = folder.names[name]
        if isinstance(entry, File) and "O_TRUNC" in flags:
            entry.data = bytearray()
        self._descriptors[descriptor] = entry, 0, "O_APPEND" in flags
        return created or "O_TRUNC" in flags

    def _file(self, call: Call) -> File | None:
        """The open file of a call's first argument, where it lies below the root."""
        descriptor = str(call.arguments[0])
        if descriptor not in self._descriptors or 0 not in call.places or self._parts(call.places[0]) is None:
            return None
        entry = self._descriptors[descriptor][0]
        return entry if isinstance(entry, File) else None

    def _write(self, call: Call) -> bool:
        file = self._file(call)
        if file is None:
            return False
        descriptor = str(call.arguments[0])
        _, offset, append = self._descriptors[descriptor]
        offset = len(file.data) if append else offset
        self._put(file, offset, call)
        self._descriptors[descriptor] = file, offset + call.result, append
        return True

    _writev = _write

    def _pwrite64(self, call: Call) -> bool:
        file = self._file(call)
        if file is not None:
            self._put(file, int(str(call.arguments[3])), call)
        return file is not None

    def _put(self, file: File, offset: int, call: Call) -> None:
        data = call.arguments[1]
        assert isinstance(data, bytes) and len(data) >= call.result, "strace has cut the data"
        file.data.extend(bytes(max(0, offset - len(file.data))))
        file.data[offset : offset + call.result] = data[: call.result]

    def _lseek(self, call: Call) -> bool:
        file = self._file(call)
        if file is not None:
            descriptor = str(call.arguments[0])
            self._descriptors[descriptor] = file, call.result, self._descriptors[descriptor][2]
        return False

    def _ftruncate(self, call: Call) -> bool:
        file = self._file(call)
        if file is not None:
            length = int(str(call.arguments[1]))
            file.data = file.data[:length] + bytes(max(0, length - len(file.data)))
        return file is not None

    def _fsync(self, call: Call) -> bool:
        entry = self._entry(call.places[0])
        if isinstance(entry, File):
            entry.synced = bytes(entry.data)
        elif isinstance(entry, Folder):
            entry.synced = len(entry.log)
        elif Path(call.places[0]) == self.root.parent:
            self.root_lasts = True
        return entry is not None

    _fdatasync = _fsync

    def _move(self, old: tuple[Folder, str] | None, new: tuple[Folder, str] | None) -> bool:
        assert (old is None) == (new is None), "a rename across the root's border"
        if old is None or new is None:
            return False
        entry = old[0].names[old[1]]
        old[0].change(self.number, old[1], None)
        new[0].change(self.number, new[1], entry)
        return True

    def _rename(self, call: Call) -> bool:
        return self._move(self._path(call, 0), self._path(call, 1))

    def _renameat(self, call: Call) -> bool:
        return self._move(self._path(call, 1, 0), self._path(call, 3, 2))

    _renameat2 = _renameat

    def _remove(self, where: tuple[Folder, str] | None) -> bool:
        if where is not None and where[1]:
            where[0].change(self.number, where[1], None)
        return where is not None

    def _unlink(self, call: Call) -> bool:
        return self._remove(self._path(call, 0))

    _rmdir = _unlink

    def _unlinkat(self, call: Call) -> bool:
        return self._remove(self._path(call, 1, 0))

    def _mkdir(self, call: Call) -> bool:
        where = self._path(call, 0)
        if where is not None and where[1]:
            where[0].change(self.number, where[1], Folder())
        return where is not None

    # -- after a power loss --------------------------------------------------------------------------------------------

    root_lasts = False  # whether the name of the root itself has been synced

    def build(self, target: Path, pick: random.Random | None) -> None:
        """Write a folder as a power loss may leave it now. pick: draws what lasts; None: only what was synced."""
        remove(target)
        if not self.root_lasts and (pick is None or pick.random() < 0.5):
            return
        lasting = {number for number, _, _ in self.top.log[: self.top.synced]}
        self._collect(self.top, lasting)
        chosen: dict[int, bool] = dict.fromkeys(lasting, True)
        self._build(self.top, target, chosen, pick)

    def files(self) -> dict[str, bytes]:
        """Every file as it is now, by its place below the root."""
        found: dict[str, bytes] = {}

        def add(folder: Folder, place: Path) -> None:
            for name, entry in folder.names.items():
                if isinstance(entry, File):
                    found[str(place / name)] = bytes(entry.data)
                else:
                    add(entry, place / name)

        add(self.top, Path())
        return found

    def _collect(self, folder: Folder, lasting: set[int]) -> None:
        """Calls whose change of some folder was synced: a rename lasts in both of its folders."""
        lasting |= {number for number, _, _ in folder.log[: folder.synced]}
        inside = {id(entry): entry for _, _, entry in folder.log if isinstance(entry, Folder)}
        for entry in inside.values():
            self._collect(entry, lasting)

    def _build(self, folder: Folder, target: Path, chosen: dict[int, bool], pick: random.Random | None) -> None:
        target.mkdir()
        names: dict[str, Entry | None] = {}
        for number, name, entry in folder.log:
            if number not in chosen:
                chosen[number] = pick is not None and pick.random() < 0.5
            if chosen[number]:
                names[name] = entry
        for name, entry in names.items():
            if isinstance(entry, Folder):
                self._build(entry, target / name, chosen, pick)
            elif entry is not None:
                (target / name).write_bytes(content(entry, pick))


def content(file: File, pick: random.Random | None) -> bytes:
    """What may be in a file: as synced; as written; blocks of the one and of the other, unsynced ones also as zeros."""
    synced, data = file.synced or b"", bytes(file.data)
    if pick is None or synced == data:
        return synced
    kind = pick.randrange(3)
    if kind < 2:
        return (synced, data)[kind]
    size = pick.randint(*sorted((len(synced), len(data))))
    blocks = []
    for begin in range(0, size, BLOCK):
        old, new = synced[begin : begin + BLOCK], data[begin : begin + BLOCK]
        choices = [old, new] if old else [b"", new]
        blocks.append(pick.choice(choices).ljust(min(BLOCK, size - begin), b"\0")[: size - begin])
    return b"".join(blocks)


def remove(place: Path) -> None:
    if place.exists():
        shutil.rmtree(place)
