"""File names in an index that lead out of its directory: none is ever read or written through."""

import json
import ntpath
import posixpath
import random

import pytest

from stagewise.artifacts.weight_files import INDEX, shard_names
from stagewise.errors import FileError

PARTS = ("..", ".", "", "a", "model-1.safetensors", "...", "..a", "C:", "~", "%2e%2e", "\u2024\u2024")
SEPARATORS = ("/", "\\", "//", "/./")
STARTS = ("", "", "", "/", "\\", "\\\\host\\share\\", "C:\\", "c:/", "./")


def hostile_name(number: random.Random) -> str:
    parts = [number.choice(PARTS) for _ in range(number.randint(1, 5))]
    return number.choice(STARTS) + "".join(part + number.choice(SEPARATORS) for part in parts) + number.choice(PARTS)


def leads_out(name: str) -> bool:
    """By Python's own rules of both worlds: where the name ends, seen from a folder of which nothing else is known."""
    if name[:1] in ("/", "\\") or ntpath.splitdrive(name)[0]:
        return True
    ends = (posixpath.normpath(name).split("/"), ntpath.normpath(name).split("\\"))
    return any(parts[0] == ".." for parts in ends)


@pytest.mark.parametrize("many", [300])
def test_no_name_leads_out_of_the_directory(many, tmp_path, fault):
    number, out = random.Random(f"names {fault}"), 0
    for _ in range(many):
        name = hostile_name(number)
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
        if leads_out(name):
            out += 1
            with pytest.raises(FileError):
                shard_names(tmp_path, INDEX)
    assert many / 4 < out < many, "most lead out, not all"
