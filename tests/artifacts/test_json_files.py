import os

import pytest

from stagewise.artifacts.file_hashes import hash_file, hash_files
from stagewise.artifacts.json_files import inside, leads_outside, read_json, read_object, write_durably
from stagewise.errors import FileError

WAY_OUT = "take another"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "run.json: is empty; take another"),
        (b" \n", "run.json: is empty; take another"),
        (b'{"stage": "sf', "run.json: not valid JSON (Unterminated string starting at, line 1); take another"),
        (b'{"a": 1}\n}', "run.json: not valid JSON (Extra data, line 2); take another"),
        (b'{"a": "\xe9"}', "run.json: not UTF-8 text (byte 8); take another"),
        (b"[" * 100_000, "run.json: its JSON is nested too deeply; take another"),
        (b"[1]", "run.json: expected a JSON object, found a list; take another"),
        (b"null", "run.json: expected a JSON object, found null; take another"),
        (b'"text"', "run.json: expected a JSON object, found text; take another"),
        (b"3.5", "run.json: expected a JSON object, found a number; take another"),
        (b"true", "run.json: expected a JSON object, found true or false; take another"),
    ],
)
def test_a_broken_file_is_one_line_with_its_name(tmp_path, content, says):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(FileError) as caught:
        read_object(path, WAY_OUT)
    assert str(caught.value) == f"{tmp_path}/{says}"


def test_what_is_no_file_is_one_line_with_its_name(tmp_path):
    with pytest.raises(FileError, match="run.json: no such file; take another"):
        read_json(tmp_path / "run.json", WAY_OUT)
    os.mkfifo(tmp_path / "run.json")  # opening it would wait for a writer
    with pytest.raises(FileError, match="run.json: not a file; take another"):
        read_json(tmp_path / "run.json", WAY_OUT)


def test_a_sound_file_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "Zoë", "list": [1, null]}', encoding="utf-8")
    assert read_object(tmp_path / "a.json", WAY_OUT) == {"name": "Zoë", "list": [1, None]}


@pytest.mark.parametrize("name", ["model.safetensors", "sub/rng_state_0.pth", "model..safetensors", "a b.txt"])
def test_a_file_below_its_folder_is_taken(tmp_path, name):
    assert inside(tmp_path, name, "index.json") == tmp_path / name


OUTSIDE = [
    "/etc/passwd",
    "../x",
    "a/../../x",
    "..",
    "a/..",
    "",
    ".",
    "..\\x",
    "C:\\x",
    "C:x",
    "\\\\host\\x",
    "a\0b",
    None,
    5,
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_file_elsewhere_is_refused_by_name(tmp_path, name):
    with pytest.raises(FileError, match=r"^index\.json: names the file .*, which is not below"):
        inside(tmp_path, name, "index.json")


def test_a_link_out_of_a_directory_is_known_from_those_of_a_hub_s_cache(tmp_path):
    cached = tmp_path / "models--a--b" / "snapshots" / "1234"
    for folder in (tmp_path / "model" / "sub", tmp_path / "models--a--b" / "blobs", cached):
        folder.mkdir(parents=True)
    for path in ("secret", "model/plain", "models--a--b/blobs/5678"):
        (tmp_path / path).write_text("text")
    (tmp_path / "model" / "LICENSE").symlink_to(tmp_path / "secret")
    (tmp_path / "model" / "NOTICE").symlink_to("plain")
    (cached / "LICENSE").symlink_to("../../blobs/5678")
    (cached / "NOTICE").symlink_to(tmp_path / "secret")
    assert leads_outside(tmp_path / "model" / "LICENSE", tmp_path / "model")
    assert not leads_outside(tmp_path / "model" / "NOTICE", tmp_path / "model")
    assert not leads_outside(cached / "LICENSE", cached)
    assert leads_outside(cached / "NOTICE", cached)


def test_a_text_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_durably(path, '{"a": "é"}'.encode())
    assert path.read_bytes() == '{"a": "é"}'.encode()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, b"other")
    assert path.read_bytes() == '{"a": "é"}'.encode()


def test_hashes_are_those_of_the_whole_file(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    # The test vector of XXH3-128 for no bytes and seed 0, in xxHash's own repository.
    assert hash_file(tmp_path / "empty") == "99aa06d3014798d86001c324468d497f"
    large = bytes(range(256)) * (1 << 16)  # two blocks
    (tmp_path / "large").write_bytes(large + b"end")
    (tmp_path / "cut").write_bytes(large + b"en")
    (tmp_path / "copy").write_bytes(large + b"end")
    found = hash_files([tmp_path / name for name in ("large", "cut", "copy")], durable=True)
    assert found[tmp_path / "large"] == found[tmp_path / "copy"] != found[tmp_path / "cut"]
