"""Checkpoint folders, last-<iter_num>/, which the processes of a sharded run write together, each its part.

    .metadata        which tensors there are, and where their parts are
    __0_0.distcp     the parts that process 0 has written, and so on
    state.json       iter_num, config, tokenizer and all else that is no tensor
    checksums.json   the size and CRC-32 of every file above

A folder is written under a temporary name and renamed when it is whole, and verified before it is read. Its tensors are
in sharded.py.
"""

import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

from configurator import UserError

NAME = re.compile(r"last-(\d+)(\.old)?")


def newest_first(out_dir: Path) -> list[Path]:
    """An out_dir's checkpoint folders, the newest first; one that is being replaced after the one that replaces it."""
    found = [path for path in out_dir.glob("last-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (-updates(path), path.name))


def updates(folder: Path) -> int:
    """A checkpoint folder's iter_num, which its name says."""
    return int(NAME.fullmatch(folder.name)[1])


def is_folder(path: Path) -> bool:
    """Whether it is a checkpoint folder, whole or not, under whatever name."""
    return path.is_dir() and (path / "state.json").is_file()


def complete(folder: Path, state: dict[str, Any], parts: dict[str, list[int]]) -> None:
    """Adds to the `parts` that the processes have written what is no tensor, and all checksums. OSError where the disk
    refuses; UserError where the parts are not all here."""
    here = {path.name: path.stat().st_size for path in folder.glob("__*.distcp")}
    if here != {name: size for name, (size, _) in parts.items()}:
        raise UserError(
            f"{folder.parent} does not have what all processes have written: it has to be one folder for all of them, "
            f"on a disk that their machines share"
        )
    _write(folder / "state.json", state)
    own = {name: checksum(folder / name) for name in (".metadata", "state.json")}
    _write(folder / "checksums.json", parts | own)
    sync_folder(folder)


def _write(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Puts a folder's names on the disk."""
    if os.name == "posix":  # Windows cannot open a folder, and its renames need no such help
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def take_name(temporary: Path, folder: Path) -> None:
    """Renames what is whole; a folder of that name is there as `.old` until then, and gone afterwards."""
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        remove(old)
        os.rename(folder, old)
    os.rename(temporary, folder)
    sync_folder(folder.parent)
    remove(old)


def remove(folder: Path) -> None:
    """Deletes a folder, which from the first moment on is none to resume from."""
    if folder.is_dir():
        doomed = folder.with_name(folder.name + ".gone.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def checksum(path: Path) -> list[int]:
    """A file's size in bytes and CRC-32."""
    found, size = 0, 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            found, size = zlib.crc32(piece, found), size + len(piece)
    return [size, found]


def checksums(folder: Path) -> dict[str, list[int]]:
    """What is told of the files in a folder, by name. OSError or ValueError where that is damaged."""
    wanted = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
    if not {".metadata", "state.json"} <= wanted.keys() or any(Path(name).name != name for name in wanted):
        raise ValueError("checksums.json is not whole")
    return wanted


def is_numbered(folder: Path) -> bool:
    """Whether it is one that keep_checkpoints has asked for."""
    try:
        return bool(read_state(folder).get("numbered"))
    except UserError:
        return False


def verify(folder: Path) -> None:
    """UserError where a file is not what was written."""
    try:
        wanted = checksums(folder)
        if not all((folder / name).is_file() for name in wanted):
            raise ValueError("a file is missing")
        broken = next((name for name, told in wanted.items() if checksum(folder / name) != told), "")
        reason = broken and f"checksum of {broken}"
    except Exception as error:  # what is damaged can raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if reason:
        raise UserError(f"{folder} is damaged or no checkpoint of a sharded run ({reason})")


def read_state(folder: Path) -> dict[str, Any]:
    """What is no tensor; `checksums` besides, which tell the folder from any other. UserError where it is damaged."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        state["checksums"] = checksums(folder)
        if not (isinstance(state["model_args"], dict) and isinstance(state["config"], dict)):
            raise ValueError("model_args or config is missing")
        state["iter_num"], state["best_val_loss"] = int(state["iter_num"]), float(state["best_val_loss"])
        return state
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} is damaged or no checkpoint of a sharded run ({error})") from error
