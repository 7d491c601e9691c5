"""What may stand in a data folder besides files: one line that names it, from every reader, and nothing waits."""

import os
import socket

import pytest

import convert_dataset
from stagewise.data.mixture import find_sources
from stagewise.data.records import find_files
from stagewise.errors import ArgumentError
from stagewise.formats.byte_stream import read_blocks
from stagewise.formats.data_files import open_file, trouble_with
from stagewise.formats.readers import RECORD_FILES, TEXT_FILES
from stagewise.inference.batch_file import read_prompts
from stagewise.tokenizer.vocabulary_files import read_texts


def dead_link(path):
    path.symlink_to("gone.jsonl")


def link_loop(path):
    path.symlink_to(path.name)


def pipe(path):
    os.mkfifo(path)


def sock(path):
    there = os.getcwd()
    os.chdir(path.parent)  # a socket's name may have 107 bytes only
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(there)


def device(path):
    path.symlink_to(os.devnull)


ODD = [
    (dead_link, "a link to nothing (gone.jsonl)"),
    (link_loop, "a link that leads back to itself"),
    (pipe, "a pipe (FIFO), not a file"),
    (sock, "a socket, not a file"),
    (device, "a device, not a file"),
]


@pytest.fixture(params=ODD, ids=[make.__name__ for make, _ in ODD])
def odd(request, tmp_path):
    """A folder with a good file and an odd one, the odd one, and what is wrong with it."""
    make, why = request.param
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    make(folder / "b.jsonl")
    return folder, folder / "b.jsonl", why


def test_every_reader_names_it(odd, tmp_path, capsys):
    folder, path, why = odd
    readers = {
        "stages": lambda given: find_files(given, RECORD_FILES, "--train_file_dir"),
        "sources": lambda given: find_sources(str(given), None, TEXT_FILES, "--train_file_dir"),
        "build_tokenizer": lambda given: read_texts(given, "train_file_dir"),
    }
    for name, read in readers.items():
        for given in (folder, path):
            with pytest.raises(ArgumentError) as caught:
                read(given)
            assert str(caught.value) == f"--train_file_dir: {path}: {why}", (name, given)
    with pytest.raises(ArgumentError) as caught:
        read_prompts(path, "response")
    assert str(caught.value) == f"--data_file {path}: {why}"
    with pytest.raises(SystemExit) as ended:
        convert_dataset.main(["--in_file", str(path), "--out_file", str(tmp_path / "out.jsonl")])
    assert ended.value.code == f"convert_dataset.py: --in_file: {path}: {why}"
    for read in (open_file, lambda path: next(read_blocks(path))):
        with pytest.raises(ArgumentError) as caught:
            read(path)
        assert str(caught.value) == f"{path}: {why}"


def test_a_broken_link_without_an_ending_may_have_been_a_folder(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "more").symlink_to("gone")
    with pytest.raises(ArgumentError, match=r"--x: .*/more: a link to nothing \(gone\)"):
        find_files(tmp_path, TEXT_FILES, "--x")


def test_files_and_folders_without_permission(tmp_path, monkeypatch):
    """Root may read everything, so that what the system answers is put in its place."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    assert trouble_with(path) is None and find_files(tmp_path, TEXT_FILES, "--x") == [path]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ArgumentError, match=r"--x: .*/a.jsonl: can't be read: Permission denied"):
        find_files(tmp_path, TEXT_FILES, "--x")
    monkeypatch.undo()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ArgumentError, match=rf"--x: {tmp_path}: can't be read: Permission denied"):
        find_files(tmp_path, TEXT_FILES, "--x")


def test_a_folder_with_the_name_of_a_file_is_a_folder(tmp_path):
    """As other programs write large sets; given where one file is asked for it is named."""
    (tmp_path / "x.jsonl").mkdir()
    part = tmp_path / "x.jsonl" / "part-0.jsonl"
    part.write_text('{"text": "a"}\n')
    assert find_files(tmp_path / "x.jsonl", TEXT_FILES, "--x") == [part]
    with pytest.raises(ArgumentError, match="is a folder; give a file"):
        read_prompts(tmp_path / "x.jsonl", "response")
