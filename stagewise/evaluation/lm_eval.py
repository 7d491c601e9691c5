"""Benchmarks with lm-eval (EleutherAI's harness): any of its tasks, with the loaded model.

A benchmark comes from the hub, or from a folder of the files in which it was published; prompts and scoring are
lm-eval's in both cases.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from loguru import logger

from stagewise.errors import ArgumentError
from stagewise.evaluation.benchmark_csv import LAYOUTS, find_benchmark, read_subject
from stagewise.evaluation.statistics import BENCHMARK_METRICS, measure
from stagewise.evaluation.text_metrics import check_packages
from stagewise.inference.chat_model import ChatModel

TASKS = {"mmlu": "mmlu", "cmmlu": "cmmlu", "ceval": "ceval-valid"}  # our name of a benchmark -> lm-eval's
FOLDERS = {"mmlu": "mmlu/default", "cmmlu": "cmmlu", "ceval": "ceval"}  # of their tasks in lm-eval
_TITLES = {"acc": "accuracy"}  # lm-eval's name of a metric -> its name in tables
SHOTS = 5  # few-shot examples of the three, as in their papers


class Benchmarks:
    """The benchmarks to run, checked by name before any weights are read.

    Args:
        names: mmlu, cmmlu, ceval, or any task, group or tag of lm-eval.
        folder: --benchmark_dir, or None for the hub.
        shots: few-shot examples; None: SHOTS for the three, else the task's own number.
        limit: questions per subject; -1 for all.

    Raises:
        ArgumentError: with the flag, the file or the subject, and the known values.
    """

    def __init__(self, names: Sequence[str], folder: str | None, shots: int | None, limit: int):
        check_packages({"lm_eval": "lm-eval"}, "--benchmarks")
        if shots is not None and shots < 0:
            raise ArgumentError(f"--num_fewshot: expected 0 or more, found {shots}")
        if not names:
            raise ArgumentError("--benchmarks: names no set; mmlu, cmmlu, ceval, or a task of lm-eval")
        if len(set(names)) < len(names):
            raise ArgumentError(f"--benchmarks {','.join(names)}: names a set twice")
        _quiet()
        self.manager = _manager(names)
        self.names, self.shots, self.limit = list(names), shots, limit
        unknown = [name for name in names if name not in TASKS and name not in self.manager.all_tasks]
        if unknown:
            raise ArgumentError(
                f"--benchmarks {unknown[0]}: lm-eval has no such task; `lm-eval ls tasks` lists those that it has"
            )
        self.local: dict[str, dict[str, dict[str, Any]]] = {}
        if folder is not None:
            odd = [name for name in names if name not in LAYOUTS]
            if odd:
                raise ArgumentError(f"--benchmark_dir: is read for {', '.join(LAYOUTS)}, not {odd[0]}; leave it out")
            self.local = {name: self._read(name, folder) for name in names}
        self.tasks = {name: self._load(name) for name in names}

    def shots_of(self, name: str) -> int | None:
        return SHOTS if self.shots is None and name in TASKS else self.shots

    def _read(self, name: str, folder: str) -> dict[str, dict[str, Any]]:
        """lm-eval's task of each subject in the folder -> the subject's records."""
        place, layout = find_benchmark(folder, name, alone=len(self.names) == 1), LAYOUTS[name]
        found = {}
        for subject in layout.subjects(place):
            task = layout.task.format(subject)
            if task not in self.manager.all_tasks:
                raise ArgumentError(
                    f"{layout.file(place, layout.split, subject)}: {name} has no subject {subject!r} in lm-eval; "
                    "rename the file as it was published, or move it away"
                )
            found[task] = read_subject(place, name, subject, self.shots_of(name) or 0)
        questions = sum(len(records[layout.split]) for records in found.values())
        logger.info(f"benchmark: {name} from {place}, {len(found)} subjects, {questions} questions")
        return found

    def _load(self, name: str) -> list[Any]:
        """lm-eval's tasks and groups of a benchmark, with their questions."""
        spec: str | dict[str, Any] = TASKS.get(name, name)
        if name in self.local:
            own = self.local[name].items()
            members = [{"task": task, "custom_dataset": partial(_dataset, records)} for task, records in own]
            spec = {"group": f"local_{name}", "task": members}
        try:
            loaded = self.manager.load([spec])
        except (OSError, ValueError) as error:
            way_out = "; a folder of its files is read with --benchmark_dir" if name in LAYOUTS else ""
            raise ArgumentError(f"--benchmarks {name}: could not be read: {error}{way_out}") from error
        inner = {child for children in loaded["group_map"].values() for child in children}
        known = {**loaded["tasks"], **loaded["groups"]}
        return [found for each, found in known.items() if each not in inner]

    def run(self, speaker: ChatModel, batch_size: int, chat: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Runs every benchmark; returns its entry in metrics.json, and a row for each question.

        On processes other than the first, which only help, it returns nothing.

        Args:
            speaker: the model, with its adapter.
            batch_size: rows of a forward pass.
            chat: format questions and examples as a conversation, with the model's chat template.
        """
        from lm_eval import simple_evaluate

        from stagewise.evaluation.harness import SharedModel

        model, first = SharedModel(speaker, batch_size), PartialState().is_main_process
        is_cut = partial(longer_than, tokenizer=speaker.tokenizer, context=speaker.context, answer=model.max_gen_toks)
        found, rows = {}, []
        for name in self.names:
            with _without_bars(sys.stderr.isatty() and first):
                results = simple_evaluate(
                    model,
                    tasks=self.tasks[name],
                    num_fewshot=self.shots_of(name),
                    limit=None if self.limit == -1 else self.limit,
                    apply_chat_template=chat,
                    task_manager=self.manager,
                    bootstrap_iters=0,
                )
            if not first:
                continue
            own = []
            for task, samples in results["samples"].items():
                entry = self.manager.task_index.get(task)
                own += question_rows(name, task, samples, entry.tags if entry else (), is_cut)
            found[name] = self._summary(name, own, results)
            if cut := found[name]["cut"]:
                logger.warning(
                    f"{name}: {cut} of {len(own)} questions are longer than the model's context of {speaker.context} "
                    "tokens and lost their beginning; a lower --num_fewshot leaves room"
                )
            rows += own
        return found, rows

    def _summary(self, name: str, rows: Sequence[dict[str, Any]], results: dict[str, Any]) -> dict[str, Any]:
        """The benchmark as a whole, the mean over its subjects, and each subject, with lm-eval's own numbers."""

        def by(key: str) -> dict[str, Any]:
            names = sorted({row[key] for row in rows if row[key] is not None})
            return {each: measure([row for row in rows if row[key] == each], BENCHMARK_METRICS) for each in names}

        subjects = by("subject")
        means = [subject["correct"]["value"] for subject in subjects.values() if "correct" in subject]
        shots = sorted({int(count) for count in results["n-shot"].values() if count is not None})
        found = {
            "source": "folder" if name in self.local else "hub",
            "num_fewshot": shots[0] if len(shots) == 1 else shots,
            "cut": sum(row["cut"] for row in rows),
            "metric": ", ".join(sorted({_TITLES.get(row["metric"], row["metric"]) for row in rows if row["metric"]})),
            "all": measure(rows, BENCHMARK_METRICS),
            "mean_of_subjects": sum(means) / len(means) if means else None,
            "subjects": subjects,
            "lm_eval": {task: _plain(numbers) for task, numbers in results["results"].items()},
        }
        groups = by("group")
        return {**found, "groups": groups} if groups else found


# --- pieces ----------------------------------------------------------------------------------------------------------


def _manager(names: Sequence[str]) -> Any:
    """lm-eval's task registry: restricted to the three benchmarks if no other is requested, which is fast."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    if set(names) <= set(FOLDERS):
        return lm_eval.tasks.TaskManager(include_defaults=False, include_path=[folder / FOLDERS[n] for n in names])
    return lm_eval.tasks.TaskManager()


def question_rows(
    name: str,
    task: str,
    samples: Sequence[dict[str, Any]],
    tags: Iterable[str],
    is_cut: Callable[[Sequence[tuple[Any, ...]]], bool],
) -> Iterator[dict[str, Any]]:
    """A row of benchmarks.jsonl for each question.

    If a task parses an answer in several ways (lm-eval's filters), there is a sample for each: the first counts.
    """
    for sample in samples:
        if sample["filter"] != samples[0]["filter"]:
            continue
        metric = next((metric for metric in sample["metrics"] if _is_number(sample[metric])), None)
        row = {
            "where": f"{task}:{sample['doc_id'] + 1}",
            "benchmark": name,
            "subject": subject_of(name, task),
            "group": next((tag.removeprefix(f"{name}_").removesuffix("_tasks") for tag in sorted(tags)), None),
            "question": sample["doc"],
            "cut": is_cut(sample["arguments"]),
            "metric": metric,
            "correct": None if metric is None else float(sample[metric]),
        }
        if isinstance(sample["target"], int) and len(sample["filtered_resps"]) > 1:
            row |= _choice([float(response[0]) for response in sample["filtered_resps"]], sample["target"])
        else:
            row |= {"target": sample["target"], "answer": sample["filtered_resps"]}
        yield row


def longer_than(asked: Sequence[tuple[Any, ...]], *, tokenizer: Any, context: int, answer: int) -> bool:
    """Whether lm-eval would truncate the beginning of a request: (prompt, choice) or (prompt, generation settings)."""
    for prompt, more in (each for each in asked if len(each) == 2):
        if isinstance(more, str):
            text, room = prompt + more, context + 1  # the last token of a choice is not an input
        else:
            text, room = prompt, context - more.get("max_gen_toks", answer)
        if len(text.encode()) > room and len(tokenizer.encode(text)) > room:  # a token has at least one byte
            return True
    return False


def subject_of(name: str, task: str) -> str:
    """A task's subject: "anatomy" of "mmlu_anatomy"."""
    if name in LAYOUTS:
        return task.removeprefix(LAYOUTS[name].task.format(""))
    return task


def _choice(logps: Sequence[float], target: int) -> dict[str, Any]:
    """Of a question with choices: the correct one, the most probable one, and each one's probability, by letter."""
    letters = [chr(ord("A") + number) for number in range(len(logps))]
    best = max(logps)
    shares = [math.exp(logp - best) for logp in logps]
    return {
        "target": letters[target],
        "answer": letters[max(range(len(logps)), key=logps.__getitem__)],
        "probabilities": {
            letter: round(share / sum(shares), 6) for letter, share in zip(letters, shares, strict=True)
        },
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or getattr(value, "shape", None) == ()


def _plain(numbers: dict[str, Any]) -> dict[str, Any]:
    return {key: float(value) for key, value in numbers.items() if _is_number(value) and not isinstance(value, bool)}


def _dataset(records: dict[str, list[dict[str, Any]]], **_: Any) -> dict[str, Any]:
    """The splits of a subject as lm-eval takes them; it also passes the task's metadata."""
    import datasets

    return {split: datasets.Dataset.from_list(rows) for split, rows in records.items()}


@contextmanager
def _without_bars(shown: bool) -> Iterator[None]:
    """Hides lm-eval's progress bars unless they are to be `shown`; the log has its own stream."""
    if shown:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


def _quiet() -> None:
    """Silences lm-eval's messages about each task."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
