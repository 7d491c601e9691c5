r"""Evaluates a model: on records with reference answers, on benchmarks, and against other models.

    python evaluation.py --model_name_or_path outputs/sft-merged --test_file data/finetune/validation \
        --output_dir outputs/eval-sft
    python evaluation.py --model_name_or_path outputs/rm-merged --test_file data/reward/validation \
        --output_dir outputs/eval-rm
    python evaluation.py --model_name_or_path outputs/sft-merged --benchmarks mmlu,cmmlu,ceval \
        --benchmark_dir benchmark_files --output_dir outputs/eval-mmlu
    python evaluation.py --compare outputs/eval-sft outputs/eval-dpo --output_dir outputs/compared

    torchrun --nproc_per_node 8 evaluation.py …                                                # eight GPUs

A language model answers the conversations of --test_file: ROUGE, BLEU, perplexity of the references, length. A reward
model scores its pairs: accuracy and margin. Either may be a base with --lora_model. Writes metrics.json, every answer
as a line of jsonl, and examples.html, a page with the best and worst ones.
"""

from __future__ import annotations

from stagewise.evaluation.arguments import FLAGS, EvaluationJob, read_flags, refuse
from stagewise.training.first_look import first_look

if __name__ == "__main__":
    first_look(FLAGS, __doc__, code=2)  # report a wrong flag or path before torch is imported

import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from loguru import logger

import template as chat_templates  # noqa: F401  (registers them)
from stagewise.artifacts.manifest import given_flags, read_manifest, versions
from stagewise.artifacts.processes import is_main, leave_processes, on_every_process
from stagewise.config.arguments import ChatArguments, PairArguments
from stagewise.data.bad_records import WAY_OUT, check_share, too_long_line
from stagewise.data.records import Account, find_files, load_records, nothing_left, write_rejected
from stagewise.errors import ArgumentError, ChatModelError, RecordError, TooLongError
from stagewise.evaluation.answers import QuestionEncoder, answer_rows, answers_to, reference_losses, rewards_of
from stagewise.evaluation.compare import METRICS, PARTS, write_comparison
from stagewise.evaluation.folder import COMPARISON, PAGE, output_folder
from stagewise.evaluation.lm_eval import Benchmarks
from stagewise.evaluation.page import (
    answer_section,
    as_text,
    benchmark_section,
    metric_table,
    metric_text,
    page,
    pair_section,
)
from stagewise.evaluation.pairs import encode_pair, is_reward_model, load_pair_scorer, pair_rows
from stagewise.evaluation.statistics import BENCHMARK_METRICS, LEVEL, RM_METRICS, SFT_METRICS, by_length, measure
from stagewise.evaluation.text_metrics import PACKAGES, check_packages
from stagewise.formats.json_lines import json_bytes, write_json_lines
from stagewise.formats.parsers import parse_conversation, parse_preference
from stagewise.formats.readers import RECORD_FILES
from stagewise.inference.chat_model import ChatModel, ChatModelArguments, SamplingArguments
from stagewise.inference.loading import choose_device, explain_missing_base, loader_arguments, local_adapter
from stagewise.reports.error_hints import LESS_MEMORY, errors_explained
from stagewise.reports.logs import set_up_logging
from stagewise.reports.terminal_text import visible
from stagewise.rl.reward_model import load_scorer
from stagewise.training.first_look import print_error_once

Record, Prepared = TypeVar("Record"), TypeVar("Prepared")


# ── records ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_test(
    job: EvaluationJob, parse_record: Callable[[dict[str, Any], str], Record]
) -> tuple[list[Record], Account]:
    """The parsed records of --test_file and the account of them. Raises ArgumentError, RecordError."""
    files = find_files(job.args.test_file, RECORD_FILES, "--test_file")
    how = {"on_bad_record": job.args.on_bad_record, "max_samples": job.args.max_samples}
    return load_records(files, parse_record, rejected_path=rejected_of(job), **how)


def rejected_of(job: EvaluationJob) -> Path | None:
    """The file for rejected records, on the first process only; every process reads the records."""
    return job.work / "rejected.jsonl" if is_main() else None


def prepared(
    job: EvaluationJob, records: Sequence[Record], account: Account, prepare: Callable[[Record], tuple[Prepared, bool]]
) -> list[Prepared]:
    """Records as the model takes them; those that are too long are left out and counted.

    Raises:
        RecordError: for any other bad record, unless --on_bad_record skip counts it, too.
        ArgumentError: if more records are too long than fit, or none is left.
    """
    found, first_too_long = [], None
    for record in records:
        try:
            ready, cut = prepare(record)
        except RecordError as error:
            if isinstance(error, TooLongError):
                first_too_long = first_too_long or error
            elif job.args.on_bad_record == "error":
                raise error.saying(f"{error.message} ({WAY_OUT})") from error.__cause__
            account.leave_out(error.reason)
            account.kept -= 1
            write_rejected(rejected_of(job), error, account.again(error.where))
            continue
        found.append(ready)
        account.cut += cut
    if job.args.on_bad_record == "error":
        check_share(account.left_out, account.kept, first_too_long, "--test_file")
    if line := too_long_line(account.left_out, account.kept):
        logger.info(f"test: {line}")
    if not found:
        raise nothing_left(account)
    return found


# ── what is measured ────────────────────────────────────────────────────────────────────────────────────────────────


def measure_answers(
    job: EvaluationJob, speaker: ChatModel, records: tuple[list, Account]
) -> tuple[dict[str, Any], str]:
    """Runs the SFT test: its entry in metrics.json and its section of the page."""
    conversations, account = records
    longest = job.sampling.settled(speaker.defaults)["max_new_tokens"]
    questions = prepared(job, conversations, account, QuestionEncoder(speaker, longest))
    logger.info(f"test: {len(questions)} conversations, answers of at most {longest} tokens")
    size, scorer = job.args.batch_size, None
    if job.args.reward_model_name_or_path:
        load = partial(
            load_scorer,
            job.args.reward_model_name_or_path,
            loader_arguments(job.model),
            label=job.args.reward_label,
            tokenizer=speaker.tokenizer,
            template=speaker.template,
            device=speaker.model.device,
            longest=max(len(speaker.encode(question.prompt, longest)) for question in questions) + longest,
        )
        scorer = on_every_process(load)
    losses = reference_losses(speaker, [question.example for question in questions], size)
    answers = answers_to(speaker, questions, job.sampling, size)
    rewards = rewards_of(scorer, speaker, questions, answers, longest, size) if scorer else None
    if not is_main():
        return {}, ""
    rows = answer_rows(speaker, questions, answers, losses, rewards)
    write_json_lines(job.work / PARTS["sft"][0], rows)
    parts = {"all": measure(rows, SFT_METRICS)}
    languages = sorted({row["language"] for row in rows})
    if len(languages) > 1:
        parts |= {name: measure([row for row in rows if row["language"] == name], SFT_METRICS) for name in languages}
    numbers = metric_table(parts, SFT_METRICS, f"{len(rows)} conversations")
    print(visible(as_text(numbers)) + "\n")
    sampling = {name: value for name, value in job.sampling.settled(speaker.defaults).items() if value is not None}
    return {"records": account.as_dict(), "sampling": sampling, **parts}, answer_section(rows, numbers)


def measure_pairs(
    job: EvaluationJob, adapter: str | None, records: tuple[list, Account]
) -> tuple[dict[str, Any], str]:
    """Runs the RM test: its entry in metrics.json and its section of the page; `adapter` is a local directory."""
    preferences, account = records
    chat = ChatArguments(job.model.template_name, job.model.force_template, job.model.enable_thinking)
    loading = loader_arguments(job.model)
    scorer = on_every_process(partial(load_pair_scorer, loading, adapter, chat, choose_device(job.model)))
    pairs = prepared(job, preferences, account, lambda preference: encode_pair(scorer, preference, job.limits))
    logger.info(f"test: {len(pairs)} pairs")
    scores = scorer([pair.example for pair in pairs], job.args.batch_size)
    if not is_main():
        return {}, ""
    rows = pair_rows(pairs, scores)
    write_json_lines(job.work / PARTS["rm"][0], rows)
    found, lengths = measure(rows, RM_METRICS), by_length(rows)
    numbers = metric_table({"all": found}, RM_METRICS, f"{len(rows)} pairs")
    by_lengths = [["tokens", "pairs", "accuracy", "margin"]]
    for name, part in lengths.items():
        cells = (metric_text(part[metric.name], metric) for metric in RM_METRICS[:2])
        by_lengths.append([name, str(part["correct"]["records"]), *cells])
    print(visible(f"{as_text(numbers)}\n\n{as_text(by_lengths)}\n"))
    return {"records": account.as_dict(), "all": found, "by_length": lengths}, pair_section(rows, numbers, by_lengths)


def measure_benchmarks(
    job: EvaluationJob, speaker: ChatModel, benchmarks: Benchmarks
) -> tuple[dict[str, Any], list[str]]:
    """Runs the benchmarks: their entries in metrics.json and their sections of the page."""
    found, rows = benchmarks.run(speaker, job.args.batch_size, job.args.apply_chat_template)
    if not is_main():
        return {}, []
    write_json_lines(job.work / PARTS["benchmarks"][0], rows)
    sections, metric = [], BENCHMARK_METRICS[0]
    for name, numbers in found.items():
        parts = {f"  {each}": part for each, part in numbers["subjects"].items()}
        parts |= {f"group {each}": part for each, part in numbers.get("groups", {}).items()}
        table = [[f"{name}, {numbers['num_fewshot']}-shot", "questions", numbers["metric"]]]
        for each, part in {**parts, "in all": numbers["all"]}.items():
            if metric.name in part:
                table.append([each, str(part[metric.name]["records"]), metric_text(part[metric.name], metric)])
        if numbers["mean_of_subjects"] is not None:
            table.append(["mean of the subjects", "", f"{numbers['mean_of_subjects']:.4f}"])
        print(visible(as_text(table)) + "\n")
        sections.append(benchmark_section(name, [row for row in rows if row["benchmark"] == name], table))
    return found, sections


# ── one evaluation ──────────────────────────────────────────────────────────────────────────────────────────────────


def about_model(model: ChatModelArguments, adapter: str | None) -> dict[str, Any]:
    """The model, and the last stage that trained it if its run.json, or the one in `adapter`, says so."""
    manifest = read_manifest(adapter or model.base_model) or {}
    stages = [step["stage"] for step in manifest.get("lineage", []) if step["stage"] not in ("merge", "quantize")]
    found = {"base_model": model.base_model, "lora_model": model.lora_model, "stage": stages[-1] if stages else None}
    return {name: value for name, value in found.items() if value is not None}


def kind_of_model(job: EvaluationJob) -> tuple[str | None, bool]:
    """The adapter's local directory, and whether the model is a reward model. Raises ArgumentError."""
    args, model = job.args, job.model
    if args.test_file:
        find_files(args.test_file, RECORD_FILES, "--test_file")
    folder, adapter = local_adapter(model)
    if adapter:
        model.base_model = model.base_model or adapter.base_model_name_or_path
    if not model.base_model and not model.lora_model:
        raise ArgumentError("--model_name_or_path: missing; give a model directory, a hub name, or --lora_model")
    return folder, bool(model.base_model) and is_reward_model(loader_arguments(model), adapter)


def what_is_asked(job: EvaluationJob) -> tuple[tuple[list, Account] | None, Benchmarks | None]:
    """Loads the records and benchmarks for a language model. Raises ArgumentError, RecordError."""
    args, records, benchmarks = job.args, None, None
    if args.test_file:
        check_packages(PACKAGES, "--test_file")
        records = read_test(job, parse_conversation)
    if args.benchmarks:
        names = [name.strip() for name in args.benchmarks.split(",") if name.strip()]
        benchmarks = Benchmarks(names, args.benchmark_dir, args.num_fewshot, args.max_samples)
    return records, benchmarks


def load_speaker(job: EvaluationJob) -> ChatModel:
    """Loads the language model. Raises ChatModelError."""
    try:
        return ChatModel.load(job.model)
    except ChatModelError as error:
        name = "model_name_or_path" if "model_name_or_path" in job.given else "base_model"
        raise ChatModelError(str(error).replace("--base_model", f"--{name}")) from error


def evaluate(job: EvaluationJob) -> None:
    """Runs every evaluation of one model; the processes share the work, and the first one writes.

    Raises:
        ArgumentError, RecordError: before any weights are read, where that is possible.
    """
    began, args, model = time.time(), job.args, job.model
    folder, scores = on_every_process(partial(kind_of_model, job))
    found: dict[str, Any] = {"model": about_model(model, folder)}
    sections: list[str] = []
    if scores:
        if args.benchmarks:
            raise ArgumentError("--benchmarks: this is a reward model, which gives scores and no text")
        refuse(job, {f.name for f in fields(SamplingArguments)} | {"reward_model_name_or_path"}, "on a reward model")
        pairs = on_every_process(partial(read_test, job, parse_preference))
        found["rm"], section = measure_pairs(job, folder, pairs)
        sections.append(section)
    else:
        refuse(job, {f.name for f in fields(PairArguments)}, "on a language model, whose context is the limit")
        records, benchmarks = on_every_process(partial(what_is_asked, job))
        speaker = on_every_process(partial(load_speaker, job))
        if records:
            found["sft"], section = measure_answers(job, speaker, records)
            sections.append(section)
        if benchmarks:
            found["benchmarks"], parts = measure_benchmarks(job, speaker, benchmarks)
            sections += parts
    if not is_main():
        return
    flags = given_flags([args, model, job.sampling, job.limits], job.given)
    found |= {"level": LEVEL, "flags": flags, "versions": versions(), "seconds": round(time.time() - began, 1)}
    found["processes"] = PartialState().num_processes
    title = f"Evaluation of {model.lora_model or model.base_model}"
    about = {name: str(value) for name, value in found["model"].items()} | {"intervals": f"{LEVEL:.0%}"}
    (job.work / PAGE).write_text(page(title, about, sections), encoding="utf-8")
    (job.work / METRICS).write_bytes(json_bytes(found, indent=2))


def main(argv: list[str] | None = None) -> None:
    set_up_logging()
    job = None
    try:
        job = read_flags(argv, __doc__)
        if job.args.compare and not is_main():
            return
        if not job.args.compare:
            choose_device(job.model)  # sets up the process group
        with errors_explained("output_dir", job.args.output_dir, LESS_MEMORY, status=2), output_folder(job):
            if job.args.compare:
                table, sentences = write_comparison(job.args.compare, job.work)
                print(visible("\n".join([as_text(table), "", *sentences])))
            else:
                evaluate(job)
        written = COMPARISON if job.args.compare else (METRICS, PAGE)
        logger.info(f"written: {', '.join(str(job.folder / name) for name in written)}")
        leave_processes(0)
    except ValueError as error:
        if not type(error).__module__.startswith("stagewise"):
            raise
        given = job is None or bool({"base_model", "model_name_or_path"} & job.given)
        print_error_once(explain_missing_base(str(error), job and job.model.lora_model, given=given))
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        logger.warning("stopped; nothing was written")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
