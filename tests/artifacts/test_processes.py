"""Work that processes share, with each process played in turn."""

from types import SimpleNamespace

import pytest

from stagewise.artifacts import processes
from stagewise.artifacts.processes import from_first_process, gather_by_index, in_batches, on_every_process
from stagewise.errors import ArgumentError


def test_alone_nothing_is_dealt():
    seen = []

    def work(batch):
        seen.append(batch)
        return [f"of {index}" for index in batch]

    assert in_batches([3, 9, 5, 9, 1], 2, "words", work) == [f"of {index}" for index in range(5)]
    assert seen == [[1, 3], [2, 0], [4]]
    assert (from_first_process(lambda: 7), gather_by_index(lambda: {2: "b", 0: "a"})) == (7, {2: "b", 0: "a"})


def test_the_batches_are_the_same_for_two_processes(monkeypatch):
    seen = {}
    for index in range(2):
        mine = []
        state = SimpleNamespace(num_processes=2, process_index=index, is_main_process=index == 0)
        monkeypatch.setattr(processes, "PartialState", lambda state=state: state)
        monkeypatch.setattr(processes, "gather_object", lambda own: [*own, [dict.fromkeys(range(5), "other"), None]])
        in_batches([3, 9, 5, 9, 1], 2, "words", lambda batch, mine=mine: mine.append(batch) or batch)
        seen[index] = mine
    assert seen == {0: [[1, 3], [4]], 1: [[2, 0]]}


def test_an_error_in_one_process_ends_all_with_its_words(monkeypatch):
    state = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    monkeypatch.setattr(processes, "PartialState", lambda: state)
    monkeypatch.setattr(processes, "gather_object", lambda own: [*own, [None, "a score that is NaN"]])
    with pytest.raises(ArgumentError, match="^a score that is NaN$"):
        gather_by_index(lambda: {0: 1})
    with pytest.raises(ArgumentError, match="^a score that is NaN$"):  # the other machine's fault alone
        on_every_process(lambda: 1)
    told = []
    monkeypatch.setattr(processes, "gather_object", lambda own: told.extend(own) or [*own, [None, None]])
    assert on_every_process(lambda: 1) == 1

    def missing():
        raise ArgumentError("--data_file: no such file")

    with pytest.raises(ArgumentError, match="^--data_file: no such file$"):
        on_every_process(missing)
    assert told == [[None, None], [None, "--data_file: no such file"]]
    told = []
    monkeypatch.setattr(processes, "broadcast_object_list", told.append)

    def refuse():
        raise ArgumentError("--output_dir: full")

    with pytest.raises(ArgumentError, match="--output_dir: full"):
        from_first_process(refuse)
    assert told == [[None, "--output_dir: full"]]  # the others were told, too
    with pytest.raises(ZeroDivisionError):  # a fault of the program is shown where it is
        from_first_process(lambda: 1 / 0)
