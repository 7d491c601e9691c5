"""JSON that any text survives."""

import json
import os

from stagewise.formats.json_lines import json_bytes, read_json_lines, write_json_lines

# Where str.splitlines splits beside newlines, control characters, and a file name that is not UTF-8.
ODD = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\r\n", "\x00", os.fsdecode(b"\xe9")]


def test_lines_come_back_whatever_their_strings_hold(tmp_path):
    values = [{"where": f"a{odd}b:1", "text": f"中{odd}\n{odd}文"} for odd in ODD]
    path = tmp_path / "folder" / "lines.jsonl"
    write_json_lines(path, values)
    assert read_json_lines(path) == values
    assert path.read_bytes().count(b"\n") == len(values)  # any reader of lines finds as many
    path.read_text(encoding="utf-8")


def test_text_stays_readable_and_surrogates_are_json(tmp_path):
    assert json_bytes({"name": "文\udce9"}) == '{"name": "文\\udce9"}\n'.encode()
    assert json.loads(json_bytes({"\udce9": 1}, indent=2)) == {"\udce9": 1}


def test_a_missing_file_has_no_lines(tmp_path):
    assert read_json_lines(tmp_path / "none.jsonl") == []
