"""The CSV files in which MMLU, CMMLU and C-Eval were published, as records for lm-eval's tasks.

    mmlu    dev/anatomy_dev.csv   test/anatomy_test.csv   no header: question, A, B, C, D, answer
    cmmlu   dev/anatomy.csv       test/anatomy.csv        header: (number), Question, A, B, C, D, Answer
    ceval   dev/law_dev.csv       val/law_val.csv         header: id, question, A, B, C, D, answer[, explanation]

C-Eval is evaluated on `val`: the answers of its `test` were never published.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagewise.errors import ArgumentError

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Layout:
    """The names and format of one benchmark's files.

    Args:
        split: the evaluated split, as the folder and lm-eval call it.
        suffix: files are {subject}{suffix with the split's name}.csv; "" if the subject alone is the name.
        columns: of the header; None: there is none, and the columns are in MMLU's order.
        task: lm-eval's name of a subject's task.
    """

    split: str
    suffix: str
    columns: tuple[str, ...] | None
    task: str

    def file(self, folder: Path, split: str, subject: str) -> Path:
        return folder / split / f"{subject}{self.suffix.format(split)}.csv"

    def subjects(self, folder: Path) -> list[str]:
        """The subjects with a file to evaluate, by name."""
        suffix = f"{self.suffix.format(self.split)}.csv"
        return sorted(path.name.removesuffix(suffix) for path in (folder / self.split).glob(f"*{suffix}"))


LAYOUTS = {
    "mmlu": Layout("test", "_{}", None, "mmlu_{}"),
    "cmmlu": Layout("test", "", ("Question", *LETTERS, "Answer"), "cmmlu_{}"),
    "ceval": Layout("val", "_{}", ("question", *LETTERS, "answer"), "ceval-valid_{}"),
}


def find_benchmark(folder: str, name: str, alone: bool) -> Path:
    """The folder with `dev` and the evaluated split: FOLDER/name, FOLDER/name/data, or FOLDER for a single benchmark.

    Raises:
        ArgumentError: with the paths that were looked for.
    """
    top, layout = Path(folder), LAYOUTS[name]
    places = [top / name, top / name / "data"] + ([top, top / "data"] if alone else [])
    for place in places:
        if layout.subjects(place):
            return place
    wanted = layout.file(Path(name), layout.split, "*")
    raise ArgumentError(f"--benchmark_dir {folder}: holds no {wanted}{' (nor without the first folder)' * alone}")


def read_subject(folder: Path, name: str, subject: str, shots: int) -> dict[str, list[dict[str, Any]]]:
    """The records of a subject by split: the evaluated one, and `dev` if `shots` examples are shown.

    Raises:
        ArgumentError: naming the file and line.
    """
    layout = LAYOUTS[name]
    found = {layout.split: read_questions(layout.file(folder, layout.split, subject), name)}
    examples = layout.file(folder, "dev", subject)
    if shots and not examples.is_file():
        raise ArgumentError(f"--num_fewshot {shots}: {examples} does not exist; --num_fewshot 0 uses no examples")
    if examples.is_file():
        found["dev"] = read_questions(examples, name)
        if len(found["dev"]) < shots:
            raise ArgumentError(
                f"--num_fewshot {shots}: {examples} has {len(found['dev'])} examples; give that or less"
            )
    return found


def read_questions(path: Path, name: str) -> list[dict[str, Any]]:
    """A file's questions with the field names of the hub's dataset.

    Raises:
        ArgumentError: for a missing column, an answer other than A to D, or text that is not UTF-8.
    """
    layout = LAYOUTS[name]
    names = layout.columns or ("question", *LETTERS, "answer")
    questions = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            places = list(range(len(names))) if layout.columns is None else _places(next(rows, []), names, path)
            for row in rows:
                if not any(cell.strip() for cell in row):
                    continue
                where = f"{path}:{rows.line_num}"
                if len(row) <= max(places) or (layout.columns is None and len(row) != len(names)):
                    raise ArgumentError(f"{where}: expected {', '.join(names)}, found {len(row)} columns")
                questions.append(_record(dict(zip(names, (row[n] for n in places), strict=True)), names, name, where))
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path}: not text in UTF-8: {error}") from error
    if not questions:
        raise ArgumentError(f"{path}: holds no question")
    return questions


def _places(header: list[str], names: tuple[str, ...], path: Path) -> list[int]:
    header = [cell.strip() for cell in header]
    missing = [name for name in names if name not in header]
    if missing:
        raise ArgumentError(f"{path}:1: the header lacks {', '.join(missing)}; found {', '.join(header) or 'nothing'}")
    return [header.index(name) for name in names]


def _record(cells: dict[str, str], names: tuple[str, ...], name: str, where: str) -> dict[str, Any]:
    letter = cells[names[-1]].strip()
    if letter not in LETTERS:
        raise ArgumentError(f"{where}: expected the answer A, B, C or D, found {letter!r}")
    if name == "mmlu":
        return {
            "question": cells["question"],
            "choices": [cells[each] for each in LETTERS],
            "answer": LETTERS.index(letter),
        }
    return {**cells, names[-1]: letter}
