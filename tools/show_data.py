r"""Shows a stage's data before it runs: records, lengths, labels, the contents of a step, samples.

    python -m tools.show_data supervised_finetuning.py --model_name_or_path models/SmolLM2-135M-Instruct \
        --train_file_dir data/finetune/train --samples 3 --figure data.png

    python -m tools.show_data sft run.yaml --processes 8      # pt, sft, rm, dpo, ppo are short names of the stages

The stage is followed by its own flags. The data are read, checked and encoded by the stage's own `read_data`; weights
are not loaded, no GPU is used, and nothing is written to --output_dir. The report goes to stdout, log lines to stderr.
Exit status 0: the stage can read its data; 1: it cannot; 2: a flag cannot be honored.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stagewise.config.paths import path_of
from stagewise.config.stages import BY_SCRIPT, STAGES
from stagewise.formats.readers import RECORD_FILES, TEXT_FILES
from stagewise.training.first_look import first_look
from tools.stage_scripts import dataclasses_of, early_flags


def own_parser() -> argparse.ArgumentParser:
    """The parser of this tool's own flags; unknown ones belong to the stage."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.show_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("stage", type=stage_name, help=f"the stage's script, or one of {', '.join(STAGES)}")
    parser.add_argument("--samples", type=natural, default=10, help="samples that are shown; default 10")
    parser.add_argument("--processes", type=positive, default=1, help="processes that the run will have; default 1")
    parser.add_argument("--figure", metavar="FILE.png", type=picture, help="a picture of the lengths is written there")
    return parser


def stage_name(word: str) -> str:
    """ "sft" of "sft", "supervised_finetuning.py" or "path/to/supervised_finetuning.py"."""
    name = Path(word).name.removesuffix(".py")
    if name not in STAGES and name not in BY_SCRIPT:
        scripts = ", ".join(f"{stage.script}.py ({stage.name})" for stage in STAGES.values())
        raise argparse.ArgumentTypeError(f"expected a stage, one of {scripts}; found {word!r}")
    return name if name in STAGES else BY_SCRIPT[name].name


def natural(word: str) -> int:
    number = int(word)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, found {number}")
    return number


def positive(word: str) -> int:
    if (number := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {number}")
    return number


def picture(word: str) -> Path:
    """The path of a picture that can be written."""
    path = path_of(word)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png, .pdf or .svg, found {word!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path


if __name__ == "__main__":  # a wrong flag or path is answered before torch has loaded
    own, words = own_parser().parse_known_args()
    first_look(
        early_flags(STAGES[own.stage].script),
        None,
        stage=True,
        texts=TEXT_FILES if own.stage == "pt" else RECORD_FILES,
        argv=words,
        before=lambda given: [*given, ("output_dir", ["outputs"])],
    )

import importlib
import sys
import tempfile
import typing
from collections.abc import Sequence
from typing import Any

from loguru import logger

from stagewise.adapters.compatibility import set_method_from_adapter
from stagewise.config.arguments import AdapterArguments, DataArguments, LanguageModelArguments
from stagewise.config.checks import check_shared
from stagewise.config.command_line import Given, parse
from stagewise.data.bad_records import remedy
from stagewise.data.splits import Splits
from stagewise.data.statistics import measure, summarize
from stagewise.data.streaming.dataset import RecordStream
from stagewise.errors import ArgumentError, RecordError
from stagewise.formats.json_lines import read_json_lines
from stagewise.reports.logs import set_up_logging
from stagewise.reports.results import has_color
from stagewise.reports.terminal_text import print_error
from stagewise.training.settings import settle_long_context, settle_what_to_do
from stagewise.training.stream_trainer import check_streaming
from tools.data_report import Shown, draw, report

STREAMED = 10_000  # records that stand for a stream, unless --max_train_samples asks for more
# Flags that say where a stage computes or writes, which is not done here.
ELSEWHERE = {
    *("use_cpu", "fp16", "bf16", "tf32", "fp16_full_eval", "bf16_full_eval", "deepspeed", "fsdp", "fsdp_config"),
    *("ddp_backend", "accelerator_config", "use_liger_kernel", "liger_kernel_config", "local_rank"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "output_dir", "logging_dir"),
}


# --- flags -----------------------------------------------------------------------------------------------------------


def without_devices(given: Given) -> Given:
    """A stage's flags without those of ELSEWHERE."""
    return [(name, words) for name, words in given if name not in ELSEWHERE]


def stage_flags(script: str, words: list[str], folder: str) -> dict[type, Any]:
    """The stage's dataclasses by type, checked like in the stage; `folder` is its --output_dir.

    Raises:
        ArgumentError: a flag that the stage would refuse before it reads any data.
    """
    given: Given = []

    def before(flags: Given) -> Given:
        given.extend(flags)
        return [*without_devices(flags), ("output_dir", [folder]), ("use_cpu", ["True"])]

    args, *parts = parse(dataclasses_of(script), words, before=before)
    flags = {type(part): part for part in (args, *parts)}
    adapter = flags[AdapterArguments]
    adapter.given = frozenset(name for name, _ in given)
    check_shared(*parts)
    settle_what_to_do(args, flags[DataArguments], given)
    if adapter.peft_path:
        set_method_from_adapter(adapter, BY_SCRIPT[script].task)
    settle_long_context(BY_SCRIPT[script].name, parts)
    if LanguageModelArguments in flags:
        check_streaming(args, flags[DataArguments], flags[LanguageModelArguments])
    return flags


# --- data ------------------------------------------------------------------------------------------------------------


def read(stage: str, flags: dict[type, Any], folder: str) -> Shown:
    """Reads, checks and encodes a stage's data with its own `read_data`.

    Raises:
        ArgumentError, RecordError: the stage's own errors.
    """
    read_data = importlib.import_module(STAGES[stage].script).read_data
    wanted = typing.get_type_hints(read_data)
    splits, tokenizer, *others = read_data(**{name: flags[kind] for name, kind in wanted.items() if name != "return"})
    refused = []
    if isinstance(splits.train, RecordStream):
        refused = first_of_stream(splits, max(STREAMED, flags[DataArguments].max_train_samples))
    path = Path(folder, "rejected.jsonl")
    rejected = [*map(str, refused), *(f"{entry['where']}: {entry['message']}" for entry in read_json_lines(path))]
    return Shown(stage, STAGES[stage].script, flags, splits, tokenizer, others[0].name if others else None, rejected)


def first_of_stream(splits: Splits, limit: int) -> list[RecordError]:
    """Replaces a stream by its first records; returns the errors of records that were left out."""
    examples, account, refused = splits.train.first(limit)
    if not examples:
        why = account.reasons() + remedy(account.left_out)
        raise ArgumentError(f"--train_file_dir: none of the first {account.read} records is left: {why}")
    limits = splits.summary["train"].limits if "train" in splits.summary else None
    splits.summary["train"] = summarize(measure(examples), account.kept, account.cut, limits, streamed=True)
    account.files = [file for files in splits.accounts["train"].files for file in files]
    splits.train, splits.accounts["train"] = examples, account
    return refused


def main(argv: Sequence[str] | None = None) -> None:
    own, words = own_parser().parse_known_args(argv)
    set_up_logging()
    logger.remove()  # the report shows what read_splits logs
    logger.add(
        sys.stderr,
        level="INFO",
        format="{message}",
        filter={"stagewise.data.read_splits": "WARNING", "stagewise.data.streaming.splits": "WARNING"},
    )
    code = 2  # until the flags are understood
    with tempfile.TemporaryDirectory() as folder:
        try:
            flags = stage_flags(STAGES[own.stage].script, words, folder)
            code = 1
            shown = read(own.stage, flags, folder)
        except ValueError as error:
            if not type(error).__module__.startswith("stagewise"):
                raise
            print_error(error)
            sys.exit(code)
    print(report(shown, own.processes, own.samples, has_color(sys.stdout)))
    if own.figure:
        draw(shown, own.figure)
        print(f"{own.figure}: lengths and shares of labels, as a picture")


if __name__ == "__main__":
    main()
