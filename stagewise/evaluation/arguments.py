"""The command line of evaluation.py, and its checks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from stagewise.config.arguments import PairArguments
from stagewise.config.checks import check_choice, check_shared
from stagewise.config.command_line import Given, parse
from stagewise.errors import ArgumentError
from stagewise.inference.arguments import ChatModelArguments, SamplingArguments


@dataclass
class EvaluationArguments:
    """What to evaluate."""

    heading = "What is measured"

    output_dir: str = field(metadata={"help": "Output folder for metrics, answers and the page."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "The same as --base_model."})
    test_file: str | None = field(
        default=None,
        metadata={"help": "File, or folder (searched recursively), of conversations, or of pairs for a reward model."},
    )
    max_samples: int = field(
        default=-1, metadata={"help": "Use at most this many records, and questions per benchmark subject; -1 = all."}
    )
    batch_size: int = field(default=8, metadata={"help": "Rows per forward pass."})
    on_bad_record: str = field(
        default="error",
        metadata={"help": "error: stop at the first malformed record; skip: count it and write it to rejected.jsonl."},
    )
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Scores the answers, as in PPO: a reward model, merged or its adapter, or any classifier."},
    )
    reward_label: int | None = field(default=None, metadata={"help": "The label whose logit is the score."})
    benchmarks: str | None = field(
        default=None, metadata={"help": "mmlu, cmmlu, ceval, or any task of lm-eval; several joined by commas."}
    )
    benchmark_dir: str | None = field(
        default=None, metadata={"help": "Folder with the benchmarks' published CSV files; default: the hub."}
    )
    num_fewshot: int | None = field(
        default=None,
        metadata={"help": "Few-shot examples; default: 5 for MMLU, CMMLU and C-Eval, else the task's own."},
    )
    apply_chat_template: bool = field(
        default=False, metadata={"help": "Benchmarks: format questions and examples with the model's chat template."}
    )
    compare: list[str] = field(
        default_factory=list, metadata={"help": "Output directories of evaluations to compare."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an evaluation in --output_dir."})


@dataclass
class PairLimits(PairArguments):
    """Length limits for a reward model."""

    heading = "A reward model's pairs"

    max_source_length: int = field(
        default=2048, metadata={"help": "Maximum tokens of the prompt, including earlier turns."}
    )
    max_target_length: int = field(
        default=512,
        metadata={
            "help": "Maximum tokens of an answer for a reward model; for generated answers see --max_new_tokens."
        },
    )


FLAGS = [EvaluationArguments, ChatModelArguments, SamplingArguments, PairLimits]


@dataclass
class EvaluationJob:
    """A parsed command line."""

    args: EvaluationArguments
    model: ChatModelArguments
    sampling: SamplingArguments
    limits: PairLimits
    given: set[str]

    @property
    def folder(self) -> Path:
        """The final folder of the results."""
        return Path(self.args.output_dir)

    @property
    def work(self) -> Path:
        """The folder while the evaluation runs."""
        return self.folder / ".unfinished"


# ── flags ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_flags(argv: list[str] | None, description: str | None = None) -> EvaluationJob:
    """Raises ArgumentError for flags that contradict each other or would have no effect."""
    given: set[str] = set()

    def before(flags: Given) -> Given:
        given.update(name for name, _ in flags)
        return flags

    job = EvaluationJob(*parse(FLAGS, argv, before=before, description=description), given)
    args = job.args
    if args.compare:
        others = sorted(given - {"compare", "output_dir", "overwrite_output_dir"})
        if others:
            raise ArgumentError(f"--{others[0]} has no effect with --compare, which loads no model: leave it out")
        return job
    if not args.test_file and not args.benchmarks:
        raise ArgumentError("nothing to measure: give --test_file, --benchmarks or --compare")
    if {"model_name_or_path", "base_model"} <= given and args.model_name_or_path != job.model.base_model:
        raise ArgumentError("--model_name_or_path and --base_model mean the same: give one of them")
    job.model.base_model = args.model_name_or_path or job.model.base_model
    check_choice("on_bad_record", args.on_bad_record, ("error", "skip"))
    for name in ("batch_size", "max_samples"):
        value = getattr(args, name)
        if value < 1 and (name, value) != ("max_samples", -1):
            raise ArgumentError(f"--{name}: expected at least 1, found {value}")
    check_shared(job.limits)
    settle_sampling(job.sampling)
    names = {f.name for f in fields(SamplingArguments)} | {f.name for f in fields(PairArguments)}
    if not args.test_file:
        refuse(job, names | {"reward_model_name_or_path", "reward_label", "on_bad_record"}, "without --test_file")
        if not args.apply_chat_template:
            chat = {"template_name", "force_template", "enable_thinking"}
            refuse(job, chat, "without --test_file or --apply_chat_template")
    if not args.benchmarks:
        refuse(job, {"benchmark_dir", "num_fewshot", "apply_chat_template"}, "without --benchmarks")
    if not args.reward_model_name_or_path:
        refuse(job, {"reward_label"}, "without --reward_model_name_or_path")
    return job


def refuse(job: EvaluationJob, names: set[str], why: str) -> None:
    """Raises ArgumentError if a flag without effect was given."""
    for name in sorted(names & job.given):
        raise ArgumentError(f"--{name} has no effect {why}: leave it out")


def settle_sampling(sampling: SamplingArguments) -> None:
    """Greedy decoding, unless sampling is requested, which then starts from seed 0."""
    if sampling.do_sample is None and not sampling.draws:
        sampling.do_sample = False
    if sampling.settled()["do_sample"] and sampling.seed is None:
        sampling.seed = 0
