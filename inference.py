"""Chats with a model in the terminal, or answers a file of prompts.

    python inference.py --base_model models/SmolLM2-135M-Instruct --interactive
    python inference.py --base_model models/SmolLM2-135M-Instruct --lora_model outputs/sft --interactive
    python inference.py --base_model outputs/sft-merged --data_file prompts.jsonl --output_file answers.jsonl

    torchrun --nproc_per_node 8 inference.py --base_model … --data_file … --output_file …      # eight GPUs

The model is a base model, a base with any adapter, or a merged model; the chat template comes from the tokenizer.
Answers to a file keep its order and its records' fields; rerun the same command to continue a run that was stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stagewise.inference.arguments import ChatModelArguments, SamplingArguments
from stagewise.training.first_look import first_look


@dataclass
class InferenceArguments:
    """What to do with the model."""

    heading = "What is done with it"

    interactive: bool = field(default=False, metadata={"help": "Chat with the model in the terminal."})
    system_prompt: str | None = field(
        default=None, metadata={"help": "System prompt for records without one; default: the template's own."}
    )
    data_file: str | None = field(
        default=None,
        metadata={"help": "Prompts to answer: .jsonl, .json, .csv, .parquet in any format of docs/data.md, or .txt."},
    )
    output_file: str | None = field(default=None, metadata={"help": "Output file for the answers, as jsonl."})
    answer_field: str = field(default="response", metadata={"help": "Name of the answer's field in a record."})
    batch_size: int = field(default=8, metadata={"help": "Prompts per batch and process."})
    on_bad_record: str = field(
        default="error",
        metadata={
            "help": "A prompt that is too long or has no question: error, or skip (the reason in place of an answer)."
        },
    )
    overwrite_output_file: bool = field(
        default=False, metadata={"help": "Replace --output_file instead of continuing it."}
    )
    checkpoint_dir: str | None = field(
        default=None, metadata={"help": "Without --lora_model: the adapter in this folder is used, if there is one."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Without --lora_model: searched for an adapter after --checkpoint_dir."}
    )


FLAGS = [ChatModelArguments, SamplingArguments, InferenceArguments]
if __name__ == "__main__":
    first_look(FLAGS, __doc__, code=2)  # report a wrong flag or path before torch is imported

import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from loguru import logger
from tqdm import tqdm

import template as chat_templates  # noqa: F401  (registers them)
from stagewise.artifacts.processes import from_first_process, gather_by_index, leave_processes, on_every_process
from stagewise.config.command_line import parse
from stagewise.errors import ArgumentError, ChatModelError
from stagewise.inference.batch_file import AnswerFile, Prompt, fingerprint, read_prompts
from stagewise.inference.chat_model import Answer, ChatModel
from stagewise.inference.loading import choose_device
from stagewise.inference.repl import ChatSession, chat_help
from stagewise.inference.terminal_input import Lines, open_input
from stagewise.inference.word_wrap import WordWrap
from stagewise.reports.console import columns_of
from stagewise.reports.error_hints import LESS_MEMORY, errors_explained
from stagewise.reports.logs import set_up_logging
from stagewise.reports.terminal_text import visible
from stagewise.training.first_look import print_error_once

DEFAULT_SYSTEM = "the template's own, or none"
# Flags that do not affect the answers: a run that continues may change them.
WITHOUT_TRACE = ("device", "device_map", "hf_hub_token", "cache_dir", "trust_remote_code")


# ── what is asked for ───────────────────────────────────────────────────────────────────────────────────────────────


def check(args: InferenceArguments, sampling: SamplingArguments) -> None:
    """Raises ChatModelError for flags that do not fit together, before anything is loaded."""
    if args.interactive == bool(args.data_file):
        raise ChatModelError("give --interactive to chat, or --data_file and --output_file to answer a file"
                           + (", not both" if args.interactive else ""))  # fmt: skip
    if args.data_file and not args.output_file:
        raise ChatModelError("--output_file: missing; give the file that the answers are written to")
    if args.data_file and Path(args.data_file).resolve() == Path(args.output_file).resolve():
        raise ChatModelError(f"--output_file {args.output_file}: is the file of prompts; give another name")
    if args.interactive:
        usual = InferenceArguments()
        names = ("output_file", "answer_field", "batch_size", "on_bad_record", "overwrite_output_file")
        if given := [name for name in names if getattr(args, name) != getattr(usual, name)]:
            raise ChatModelError(f"--{given[0]} has no effect with --interactive: it belongs to --data_file")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ChatModelError("--interactive: runs in one process; start it without torchrun")
    if args.batch_size < 1:
        raise ChatModelError(f"--batch_size: expected at least 1, found {args.batch_size}")
    if args.on_bad_record not in ("error", "skip"):
        raise ChatModelError(f"--on_bad_record: expected error or skip, found {args.on_bad_record!r}")
    sampling.settled()


def look_for_adapter(args: InferenceArguments, which: ChatModelArguments) -> None:
    """Sets --lora_model from --checkpoint_dir, else --output_dir, and logs which one it was."""
    folders = [folder for folder in (args.checkpoint_dir, args.output_dir) if folder]
    if which.lora_model:
        if folders:
            raise ChatModelError("--lora_model names the adapter: leave --checkpoint_dir and --output_dir out")
        return
    for folder in folders:
        if (Path(folder) / "adapter_config.json").is_file():
            which.lora_model = folder
            logger.info(f"adapter: found in {folder}")
            return
    if folders:
        logger.info(f"adapter: none in {' or '.join(folders)}; only the base answers")


# ── in the terminal ─────────────────────────────────────────────────────────────────────────────────────────────────


def converse(talk: ChatSession, lines: Lines) -> None:
    """Handles questions and commands until /quit or the end of the input."""
    print(f"Type a question, or a command:\n{chat_help(columns_of(sys.stdout))}")
    while True:
        try:
            text = lines.read("you: ")
        except KeyboardInterrupt:
            print("(/quit or Ctrl-D ends)")
            continue
        except EOFError:
            return
        if not text.strip():
            continue
        try:
            if not do(talk, text):
                return
        except ValueError as error:  # the question or command fails; the chat continues
            print(f"error: {visible(str(error))}")
        except torch.OutOfMemoryError:
            print("error: the GPU's memory is full; what was said before is kept. Lower --max_new_tokens, ask less, "
                  "or /clear")  # fmt: skip
        except KeyboardInterrupt:  # pressed again just after the answer had ended
            print()


def do(talk: ChatSession, text: str) -> bool:
    """Runs one command or answers one question; False for /quit."""
    name, *rest = text.strip().split(maxsplit=1)
    rest = rest[0] if rest else ""
    if not name.startswith("/"):
        tell(talk, talk.ask, text)
    elif name.startswith("//"):
        tell(talk, talk.ask, text.replace("//", "/", 1))
    elif name == "/quit":
        return False
    elif name == "/clear":
        talk.clear()
        print("forgotten; the system prompt stays")
    elif name == "/system":
        if rest:
            talk.system = None if rest == "-" else rest
        print(f"system prompt: {visible(talk.system or DEFAULT_SYSTEM)}")
    elif name == "/regen":
        if talk.messages and talk.always_the_same:
            print("(the most probable answer, the same every time: --do_sample or --temperature draws others)")
        tell(talk, talk.again)
    elif name == "/save":
        file = rest or "conversation.jsonl"
        print(f"{talk.save(file)} messages appended to {visible(file)}")
    elif name == "/help":
        print(chat_help(columns_of(sys.stdout)))
    else:
        print(f"{visible(name)}: no such command\n{chat_help(columns_of(sys.stdout))}")
    return True


def tell(talk: ChatSession, ask: Any, *question: str) -> None:
    """Streams an answer to the terminal; Ctrl-C ends the answer, not the program."""
    with stopped_by_ctrl_c() as stop:
        pieces = ask(*question, stop=stop)  # raises here if the question cannot be asked
        answer = printed(pieces)
    if stop.is_set():
        print("[stopped]")
    elif not answer.ended:
        print("[cut at --max_new_tokens]")
    if talk.forgotten:
        print(f"[the first {talk.forgotten} questions no longer fit into the context and were not seen]")


def printed(pieces: Generator[str, None, Answer]) -> Answer:
    """Prints an answer as it is generated, wrapped at words on a terminal; returns the text."""
    head = "model: "
    print(head, end="", flush=True)
    wrap = WordWrap(partial(columns_of, sys.stdout), len(head)) if sys.stdout.isatty() else None
    try:
        while True:
            piece = visible(next(pieces))
            print(wrap.add(piece) if wrap else piece, end="", flush=True)
    except StopIteration as end:
        return end.value
    finally:
        print(wrap.rest() if wrap else "")


@contextmanager
def stopped_by_ctrl_c() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets within the context, instead of ending the program."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


# ── a file ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def answer_file(args: InferenceArguments, which: ChatModelArguments, sampling: SamplingArguments) -> None:
    """Answers every prompt of --data_file, one batch per process at a time."""
    skips = args.on_bad_record == "skip"
    choose_device(which)  # sets up the process group
    read = partial(read_prompts, args.data_file, args.answer_field, args.system_prompt, skips=skips)
    prompts = on_every_process(read)
    target: AnswerFile | None = None

    def begin() -> int:
        nonlocal target
        asked = {**asdict(which), **asdict(sampling), "system_prompt": args.system_prompt}
        asked |= {"answer_field": args.answer_field}
        asked = {name: value for name, value in asked.items() if name not in WITHOUT_TRACE}
        settings = {"data_file": fingerprint(args.data_file), **asked}
        records = [prompt.record for prompt in prompts]
        overwrite = args.overwrite_output_file
        try:
            target = AnswerFile(args.output_file, settings, records, args.answer_field, overwrite=overwrite)
            return target.begin()
        except OSError as error:
            raise ChatModelError(f"--output_file {args.output_file}: {error.strerror or error}") from error

    done = from_first_process(begin)
    if done:
        logger.info(f"{args.output_file}: continues after {done} of {len(prompts)} answers")
    speaker = on_every_process(partial(ChatModel.load, which))
    left_out = unanswerable(speaker, prompts, sampling, args.on_bad_record)
    try:
        for first, found in windows(speaker, prompts, done, left_out, sampling, args.batch_size):
            for place, answer in enumerate(found, first):
                if isinstance(answer, Answer):
                    target.write(place, answer.text, ended=answer.ended)
                else:
                    target.write(place, None, error=answer)
            target.flush()
        if target:
            target.finish()
    except KeyboardInterrupt:
        logger.warning(f"stopped; the same command continues from {args.output_file}.part")
        raise
    finally:
        if target:
            target.close()
    unanswered = f", {len(left_out)} records without one" if left_out else ""
    logger.info(f"{args.output_file}: {len(prompts) - len(left_out)} answers{unanswered}")
    leave_processes(0)


def unanswerable(
    speaker: ChatModel, prompts: list[Prompt], sampling: SamplingArguments, on_bad_record: str
) -> dict[int, str]:
    """The reasons why prompts cannot be answered, by index.

    Raises:
        ChatModelError: unless such prompts are skipped: the first reason, and how many prompts share it.
    """
    reasons: dict[int, str] = {}
    errors = []
    room = sampling.settled(speaker.defaults)["max_new_tokens"]
    speaker.longest_question(room)  # caused by a flag, not by a record
    for place, prompt in enumerate(prompts):
        if prompt.conversation is None:
            reasons[place] = prompt.reason
            continue
        try:
            speaker.encode(prompt.conversation, room)
        except ChatModelError as error:
            errors.append(error)
            reasons[place] = str(error)
    if errors and on_bad_record == "error":
        count = f"{len(errors):,} of {len(prompts):,} questions cannot be answered"
        raise ChatModelError(f"{errors[0]} ({count}; --on_bad_record skip answers the others)")
    return reasons


def windows(
    speaker: ChatModel,
    prompts: list[Prompt],
    done: int,
    left_out: dict[int, str],
    sampling: SamplingArguments,
    batch_size: int,
) -> Iterator[tuple[int, list[Answer | str]]]:
    """Yields (first index, answers or reasons) of one batch per process, in order; on the first process only."""
    state = PartialState()
    step = batch_size * state.num_processes
    bar = tqdm(
        total=len(prompts), initial=done, unit="answer", disable=not (state.is_main_process and sys.stderr.isatty())
    )
    with bar:
        for first in range(done, len(prompts), step):
            places = range(first, min(first + step, len(prompts)))
            mine = [place for place in places[state.process_index :: state.num_processes] if place not in left_out]

            def answer(places: list[int] = mine) -> dict[int, Answer]:
                asked = [prompts[place].conversation for place in places]
                answers = speaker.answers(asked, sampling, batch_size=batch_size) if asked else []
                return dict(zip(places, answers, strict=True))

            found = {**left_out, **gather_by_index(answer)}
            if state.is_main_process:
                yield first, [found[place] for place in places]
            bar.update(len(places))
            if bar.disable:
                logger.info(f"{places[-1] + 1} of {len(prompts)} answered")


def main(argv: list[str] | None = None) -> None:
    which, sampling, args = parse(FLAGS, argv, description=__doc__)
    check(args, sampling)
    look_for_adapter(args, which)
    with errors_explained("output_file", args.output_file, LESS_MEMORY, status=2):
        if args.data_file:
            answer_file(args, which, sampling)
            return
        speaker = ChatModel.load(which)
        speaker.longest_question(sampling.settled(speaker.defaults)["max_new_tokens"])
        converse(ChatSession(speaker, sampling, args.system_prompt), open_input())


if __name__ == "__main__":
    set_up_logging()
    try:
        main()
    except ArgumentError as error:
        print_error_once(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
