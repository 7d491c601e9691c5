"""The report of a pipeline run: the effect of each stage on validation records, and sample answers of the models.

    python -m tools.report --outputs outputs

Reads `outputs/<stage>/run.json`, the first and last file of `outputs/<stage>/eval_records/` and the loss history of
each of the five stages; writes `outputs/report.md` and `outputs/curves.png` and prints the report. The conditions
apply to the English records; the Chinese ones are shown as well. Exit status 0: every condition holds; 1: one does
not; 2: the report could not be made.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from stagewise.artifacts.json_files import read_object
from stagewise.artifacts.weight_files import AGAIN
from stagewise.config.paths import path_of
from stagewise.config.stages import STAGES
from stagewise.data.records import find_files, load_records
from stagewise.formats.json_lines import read_json_lines
from stagewise.formats.parsers import Conversation, parse_conversation, parse_preference
from stagewise.reports.curves import both, panels_with_points, plot
from stagewise.reports.terminal_text import print_error
from tools import judging
from tools.judging import Line, Rows, in_language

LANGUAGES = ("english", "chinese")
TALKERS = ("sft", "dpo", "ppo")  # in the order of their answers; the base comes first


class ReportError(ValueError):
    """A report that cannot be made; the message names the file and what to do."""


@dataclass
class Stage:
    """The results of a finished stage: its manifest, its first and last evaluation, its history."""

    name: str
    run: dict[str, Any]
    before: Rows
    after: Rows
    history: list[dict[str, Any]]


# ------------------------------------------------------------------------------------------------------------ reading


def read_rows(path: Path) -> Rows:
    """A file of eval_records as location -> numbers; the blocks of one document are summed."""
    rows: dict[str, dict[str, float]] = {}
    for row in read_json_lines(path):
        total = rows.setdefault(row.pop("where"), dict.fromkeys(row, 0.0))
        for name, value in row.items():
            total[name] += value
    return rows


def read_stage(outputs: Path, name: str) -> Stage:
    """Reads one stage's directory.

    Raises:
        ReportError: the stage is missing, did not finish, or was not evaluated before and after.
    """
    folder = outputs / name
    manifest = folder / "run.json"
    if not manifest.is_file():
        raise ReportError(f"{manifest}: no such file; run the stage first: bash run_{name}.sh")
    run = read_object(manifest, AGAIN)
    if run.get("status") != "finished":
        raise ReportError(f"{manifest}: the stage's status is {run.get('status')!r}, expected 'finished'")
    evaluations = [folder / "eval_records" / f"step-{step}.jsonl" for step in (0, run["steps"])]
    for path in evaluations:
        if not path.is_file():
            raise ReportError(f"{path}: no such file; run the stage with --eval_on_start --save_eval_records")
    history = read_object(folder / "trainer_state.json", AGAIN).get("log_history", [])
    return Stage(name, run, *map(read_rows, evaluations), history)


def read_seconds(outputs: Path) -> dict[str, float]:
    """`seconds.tsv` of run_pipeline.sh, one name and its seconds per line; empty if there is none."""
    path = outputs / "seconds.tsv"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {name: float(value) for name, value in (line.split("\t") for line in lines)}


def read_pairs(run: dict[str, Any], split: str, language: str | None = None) -> list[tuple[str, str]]:
    """(chosen, rejected) of the preference records of a run's --{split}_file_dir."""
    files = find_files(run["flags"][f"{split}_file_dir"], (".jsonl", ".json"), f"--{split}_file_dir")
    files = [file for file in files if language is None or file.name.startswith(language)]
    records, _ = load_records(files, parse_preference)
    return [tuple("\n".join(m.content for m in side) for side in (r.chosen, r.rejected)) for r in records]


# ------------------------------------------------------------------------------------------------------------ judging


def judge(stages: dict[str, Stage], language: str) -> list[Line]:
    """All lines of the report for the records of one language.

    Raises:
        ReportError: a stage has no validation records of that language.
    """
    rows = {}
    for name, stage in stages.items():
        rows[name] = in_language(stage.before, language), in_language(stage.after, language)
        if not rows[name][0]:
            raise ReportError(f"{name}: no validation record comes from a file named {language}*.jsonl")
    rm = stages["rm"].run
    validation = read_pairs(rm, "validation", language)
    words = judging.bag_of_words(read_pairs(rm, "train"), validation)
    return [
        judging.language_model("PT", *rows["pt"]),
        judging.language_model("SFT", *rows["sft"]),
        *judging.reward_model(*rows["rm"], judging.length_alone(validation), words),
        *judging.ppo(*rows["ppo"]),
        *judging.dpo(*rows["dpo"]),
    ]


# ------------------------------------------------------------------------------------------------------------ answers


def held_out_prompts(folder: str) -> list[Conversation]:
    """The first questions of three English validation conversations, from the beginning, middle and end."""
    files = [
        f for f in find_files(folder, (".jsonl", ".json"), "--validation_file_dir") if f.name.startswith("english")
    ]
    conversations, _ = load_records(files, parse_conversation)
    chosen = [conversations[round(share * (len(conversations) - 1))] for share in (0.05, 0.4, 0.9)]
    return [Conversation(c.messages[:1], c.system, c.tools, c.where) for c in chosen]


def answers(model_dir: str, prompts: Sequence[Conversation], chat_template: str, max_new_tokens: int) -> list[str]:
    """Greedy answers of a saved model, with its own tokenizer and generation config.

    `chat_template` is used if the model's tokenizer has none, as for a base model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stagewise.models.attention.choose import attention_for_generation

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    tokenizer.chat_template = tokenizer.chat_template or chat_template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").to(device).eval()
    texts = []
    for prompt in prompts:
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        turns = system + [{"role": m.role, "content": m.content} for m in prompt.messages]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_token_type_ids=False, return_tensors="pt")
    with torch.inference_mode(), attention_for_generation():
        out = model.generate(**batch.to(device), do_sample=False, max_new_tokens=max_new_tokens)
    new = out[:, batch["input_ids"].shape[1] :]
    eos = model.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos])
    cut = ["" if ends & set(row.tolist()) else " …" for row in new]
    return [
        text.strip() + more
        for text, more in zip(tokenizer.batch_decode(new, skip_special_tokens=True), cut, strict=True)
    ]


def ask_all(outputs: Path, stages: dict[str, Stage], max_new_tokens: int) -> list[tuple[str, dict[str, str]]]:
    """Each prompt with each model's answer."""
    from transformers import AutoTokenizer

    models = {"base": stages["pt"].run["base_model"]}
    for name in TALKERS:
        folder = outputs / f"{name}-merged"
        models[STAGES[name].label] = str(folder)
        if not (folder / "config.json").is_file():
            raise ReportError(
                f"{folder}: no merged model; python merge_peft_adapter.py --lora_model {outputs / name} "
                f"--output_dir {folder}"
            )
    template = AutoTokenizer.from_pretrained(models["SFT"]).chat_template
    prompts = held_out_prompts(stages["sft"].run["flags"]["validation_file_dir"])
    given = {}
    for name, folder in models.items():
        logger.info(f"three held-out questions to {name}: {folder}")
        given[name] = answers(folder, prompts, template, max_new_tokens)
    return [
        (prompt.messages[0].content, {name: given[name][i] for name in models}) for i, prompt in enumerate(prompts)
    ]


# ------------------------------------------------------------------------------------------------------------ writing


def number(value: float | None, signed: bool = False) -> str:
    return "" if value is None else f"{value:{'+' if signed else ''}.3f}"


def table(lines: Sequence[Line], minutes: dict[str, float]) -> str:
    """Lines as a Markdown table; a stage's minutes are in its first line."""
    out = [
        "| stage | metric | before | after | difference | standard error | minutes | asked | verdict |",
        "|---|---|---:|---:|---:|---:|---:|---|---|",
    ]
    last = None
    for line in lines:
        cells = [
            line.stage if line.stage != last else "",
            line.metric,
            number(line.before),
            number(line.after),
            number(line.difference, signed=True),
            number(line.error),
            f"{minutes[line.stage]:.1f}" if line.stage != last and line.stage in minutes else "",
            line.rule,
            {True: "holds", False: "**FAILS**", None: ""}[line.holds],
        ]
        out.append(f"| {' | '.join(cells)} |")
        last = line.stage
    return "\n".join(out)


def report(
    stages: dict[str, Stage],
    lines: dict[str, list[Line]],
    said: Sequence[tuple[str, dict[str, str]]],
    minutes: dict[str, float],
    total: float | None,
) -> str:
    """The report as Markdown."""
    run = stages["sft"].run
    failed = [f"{line.stage} {line.metric}" for line in lines["english"] if line.holds is False]
    verdict = f"**{len(failed)} of the lines below fail**: {'; '.join(failed)}." if failed else "Every line holds."
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers", "peft"))
    took = f" The whole took {total:.1f} minutes." if total is not None else ""
    parts = [
        "# What the pipeline did",
        f"From `{stages['pt'].run['base_model']}` on {run['device']}; {versions}.{took} {verdict}",
        "Before and after are measured on the same validation records, none of which was trained on; a difference is "
        "paired over them, and counts beyond two standard errors. Minutes include the stage's merge.",
        "## English records, judged",
        table(lines["english"], minutes),
        "## Chinese records, beside",
        table([Line(**{**vars(line), "holds": None, "rule": ""}) for line in lines["chinese"]], {}),
        "## Curves",
        "![loss and reward of each stage by step](curves.png)",
        "## Three questions that no stage was trained on",
    ]
    for question, by_model in said:
        parts.append(f"**{question}**")
        parts.append("\n".join(f"- *{name}*: {' '.join(answer.split())}" for name, answer in by_model.items()))
    return "\n\n".join(parts) + "\n"


def draw(stages: dict[str, Stage], path: Path) -> None:
    """One panel per stage: the training loss (PPO: the reward) by step, with the validation loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6))
    axes.flat[-1].axis("off")
    for axis, (name, stage) in zip(axes.flat, stages.items(), strict=False):
        key = STAGES[name].curve
        for _, lines in panels_with_points(stage.history, [both("", key)]):
            for line in lines:
                plot(axis, line, "C0" if line.label == "training" else "C1")
        axis.set(title=STAGES[name].label, xlabel="step", ylabel=key)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--outputs", type=path_of, default=Path("outputs"), help="folder of the stages; default outputs"
    )
    parser.add_argument("--max_new_tokens", type=int, default=80, help="of an answer; default 80")
    args = parser.parse_args(argv)
    try:
        stages = {name: read_stage(args.outputs, name) for name in STAGES}
        lines = {language: judge(stages, language) for language in LANGUAGES}
        draw(stages, args.outputs / "curves.png")
        said = ask_all(args.outputs, stages, args.max_new_tokens)
        seconds = read_seconds(args.outputs)
    except ValueError as error:
        print_error(error)
        sys.exit(2)
    minutes = {STAGES[n].label: seconds.get(n, stage.run["seconds"]) / 60 for n, stage in stages.items()}
    total = (time.time() - seconds["started"]) / 60 if "started" in seconds else None
    text = report(stages, lines, said, minutes, total)
    (args.outputs / "report.md").write_text(text, encoding="utf-8")
    print(text)
    sys.exit(0 if all(line.holds is not False for line in lines["english"]) else 1)


if __name__ == "__main__":
    main()
