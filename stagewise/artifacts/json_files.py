"""Reading JSON files from elsewhere: completely, or with a one-line error that names the file."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path, PureWindowsPath
from typing import Any

from stagewise.errors import FileError

KINDS = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # file systems that cannot sync folders


def read_json(path: str | Path, way_out: str) -> Any:
    """The value in a JSON file.

    Args:
        path: the file.
        way_out: what the user can do if it is broken; the end of the message.

    Raises:
        FileError: it is missing, unreadable, not UTF-8, or not JSON.
    """
    try:
        if not os.path.isfile(path):
            raise FileError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}; {way_out}")
        text = Path(path).read_bytes().decode("utf-8")
        return json.loads(text)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); {way_out}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 text (byte {error.start + 1}); {way_out}") from error
    except json.JSONDecodeError as error:
        found = "is empty" if not text.strip() else f"not valid JSON ({error.msg}, line {error.lineno})"
        raise FileError(f"{path}: {found}; {way_out}") from error
    except RecursionError as error:
        raise FileError(f"{path}: its JSON is nested too deeply; {way_out}") from error


def read_object(path: str | Path, way_out: str) -> dict[str, Any]:
    """The object in a JSON file; see `read_json`.

    Raises:
        FileError: also if the file holds a list, a text, a number or null.
    """
    value = read_json(path, way_out)
    if not isinstance(value, dict):
        raise FileError(f"{path}: expected a JSON object, found {KINDS[type(value)]}; {way_out}")
    return value


def inside(folder: str | Path, name: Any, named_by: str | Path) -> Path:
    """The path of a file named by another file; it has to be below `folder`.

    Symbolic links are followed: a hub's cache consists of them.

    Args:
        folder: where the file has to be.
        name: as it was read; a relative path without "..", on any system.
        named_by: the file that names it, for the message.

    Raises:
        FileError: for an absolute path, one with "..", an empty one, or a value that is not text.
    """
    parts = PureWindowsPath(name) if isinstance(name, str) else None  # splits at both / and \
    if parts is None or not parts.parts or parts.anchor or ".." in parts.parts or "\0" in name:
        raise FileError(
            f"{named_by}: names the file {name!r:.200}, which is not below {folder}: such files are neither read nor "
            "written; get the directory from a source that you trust"
        )
    return Path(folder) / name


def leads_outside(path: Path, folder: Path) -> bool:
    """Whether a file is a link that leaves its directory, other than into the hub's cache that the directory belongs
    to.

    Files copied beside a model and published with it must not come from elsewhere on this machine.
    """
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    return not any(path.resolve().is_relative_to(each) for each in homes)


def write_durably(path: str | Path, content: bytes) -> None:
    """Writes a file completely or not at all, even after a power failure.

    Raises:
        OSError: it could not be written; an earlier file is still there.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: str | Path) -> None:
    """Makes the names in a folder durable, if the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)
