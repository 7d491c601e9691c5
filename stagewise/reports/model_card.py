"""README.md of a merged model: what it is, where it comes from and its license, in the Hub's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from stagewise.artifacts.lineage import UNKNOWN, first_model
from stagewise.config.stages import STAGES

CARD = "README.md"
# The titles of a lineage's steps, by their names in run.json.
STEP_TITLES = {stage.name: stage.title for stage in STAGES.values()} | {
    "merge": "adapter merged into its base",
    "vocabulary": "vocabulary extended",
    "quantize": "weights quantized",
}
QUESTION = [{"role": "user", "content": "What goes well with rice?"}]


def card_text(
    name: str, manifest: dict[str, Any], tokenizer: PreTrainedTokenizerBase, license: dict[str, str], scores: bool
) -> str:
    """The model card of a merged model.

    Args:
        name: the model's directory name.
        manifest: its run.json.
        tokenizer: the one saved beside it.
        license: the result of `find_license`.
        scores: whether it is a reward model.
    """
    lineage = manifest["lineage"]
    parts = [
        f"---\n{front_matter_of(manifest, license, scores)}---",
        f"# {name}",
        _first_lines(lineage, scores),
        "## License\n\n" + _license(license, lineage),
        "## How it was made\n\n" + _steps(lineage),
        _data(lineage),
        _metrics(lineage),
        _template(manifest, tokenizer),
        "## Use\n\n" + _use(name, tokenizer, scores),
        _check(manifest),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter_of(manifest: dict[str, Any], license: dict[str, str], scores: bool) -> str:
    """The card's YAML, with the fields of the Hub (https://huggingface.co/docs/hub/model-cards)."""
    lineage = manifest["lineage"]
    found: dict[str, Any] = {"license": license["id"]}
    if license["id"] == "other":
        found |= {f"license_{key}": license[key] for key in ("name", "link") if key in license}
    base, from_hub = first_model(lineage)
    if base and from_hub:
        found |= {"base_model": base, "base_model_relation": "finetune"}
    tags = [step["stage"] for step in lineage if step["stage"] in STAGES]
    methods = [step["method"] for step in lineage if step.get("method", "full") != "full"]
    found |= {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if scores else "text-generation",
        "tags": list(dict.fromkeys(["stagewise", *tags, *methods, *(["reward-model"] if scores else [])])),
    }
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def _first_lines(lineage: list[dict[str, Any]], scores: bool) -> str:
    base, _ = first_model(lineage)
    stages = [STAGES[step["stage"]].title for step in lineage if step["stage"] in STAGES]
    kind = "A reward model: one score for a conversation with its answer" if scores else "A language model"
    made = f", made from {code(public_name(base))}" if base else ""
    through = f" by {', then '.join(stages)}" if stages else " by merging an adapter that was trained elsewhere"
    return f"{kind}{made}{through}. The training records are described below; they are not part of this repository."


def _license(license: dict[str, str], lineage: list[dict[str, Any]]) -> str:
    base = public_name(first_model(lineage)[0] or "?")
    if license["id"] == UNKNOWN:
        return (
            f"**Unknown.** {license['source']}. Find out under which terms the base, {code(base)}, may be used "
            "before you publish or use what was made from it, and write them here."
        )
    shown = license["id"] if license["id"] != "other" else f"other ({license.get('name', 'see its text')})"
    return f"{shown}: the license of the base, {code(base)}. Where that is said: {code(license['source'])}."


def _steps(lineage: list[dict[str, Any]]) -> str:
    rows = ["| | step | from | method | steps | records |", "| --- | --- | --- | --- | ---: | ---: |"]
    for number, step in enumerate(lineage, 1):
        records = step.get("data", {}).get("train", {}).get("kept")
        what = STEP_TITLES.get(step["stage"], step["stage"])
        if reward := (step.get("reward_model") or {}).get("path"):
            what += f", scored by {code(public_name(reward))}"
        if merged := step.get("merged_adapter"):
            what += f", on the model with {code(public_name(merged))} merged in"
        if earlier := step.get("continued_adapter"):
            what += f", continuing from {code(public_name(earlier))}"
        cells = [
            number,
            what,
            code(public_name(step.get("base_model") or "?")),
            step.get("method", ""),
            step.get("steps", ""),
        ]
        rows.append("| " + " | ".join([*map(str, cells), "" if records is None else f"{records:,}"]) + " |")
    return "\n".join(rows)


def _data(lineage: list[dict[str, Any]]) -> str:
    rows = ["| stage | split | read | kept | left out | files |", "| --- | --- | ---: | ---: | --- | --- |"]
    every = [step for each in lineage for step in [*(each.get("reward_model") or {}).get("lineage", []), each]]
    seen: list[dict[str, Any]] = []
    for step in every:
        if not step.get("data") or step in seen:
            continue
        seen.append(step)
        for split, account in step["data"].items():
            left_out = ", ".join(f"{count:,} {reason}" for reason, count in account.get("left_out", {}).items())
            files = ", ".join(code(name) for name in account.get("files", []))
            counts = [f"{account.get(name, 0):,}" for name in ("read", "kept")]
            cells = [step["stage"].upper(), split, *counts, cell(left_out) or "none", files]
            rows.append("| " + " | ".join(cells) + " |")
    return "## Data\n\n" + "\n".join(rows) if seen else ""


def _metrics(lineage: list[dict[str, Any]]) -> str:
    rows = ["| stage | on its validation records | before | after |", "| --- | --- | ---: | ---: |"]
    for step in lineage:
        after, before = (step.get("metrics", {}).get(name, {}) for name in ("eval", "eval_before"))
        for name, value in after.items():
            if not name.endswith(("standard_error", "_tokens")) and isinstance(value, int | float):
                error = after.get(f"{name}_standard_error")
                shown = f"{value:.4g}" + (f" ± {error:.2g}" if isinstance(error, int | float) else "")
                was = f"{before[name]:.4g}" if name in before else ""
                bare = name.removeprefix("eval_").replace("_", " ")
                rows.append(f"| {step['stage'].upper()} | {bare} | {was} | {shown} |")
    return "## Metrics\n\n" + "\n".join(rows) if len(rows) > 2 else ""


def _template(manifest: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        return "## Template\n\nNone: this model continues with texts."
    name = f" ({manifest['template']})" if manifest.get("template") else ""
    shown = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    return f"## Template\n\nThe tokenizer carries the chat template{name}. A question in it:\n\n" + fenced(
        shown, "text"
    )


def _use(name: str, tokenizer: PreTrainedTokenizerBase, scores: bool) -> str:
    auto = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
    lines = [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = {auto}.from_pretrained("{name}")',
    ]
    question = '{"role": "user", "content": "What goes well with rice?"}'
    if scores:
        answer = '{"role": "assistant", "content": "Rest and drink enough."}'
        lines += [
            f"messages = [{question}, {answer}]",
            'inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)',
            "print(model(**inputs).logits[0, 0])",
        ]
    elif tokenizer.chat_template:
        lines += [
            f"messages = [{question}]",
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
            "output = model.generate(**inputs, max_new_tokens=128)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    else:
        lines += [
            'inputs = tokenizer("Drink enough water,", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
        ]
    return fenced("\n".join(lines), "python")


def _check(manifest: dict[str, Any]) -> str:
    if manifest.get("largest_difference") is None:
        return ""
    return (
        "## How the merge was checked\n\nBase with adapter and this model were run on the same prompts in float32: "
        f"the largest difference of their outputs is {manifest['largest_difference']:.2g}, and the adapter moves them "
        f"by up to {manifest['adapter_effect']:.2g}."
    )


# --- pieces ----------------------------------------------------------------------------------------------------------


def public_name(path: str) -> str:
    """A model's name for other readers: of a local directory only the last part."""
    return Path(path).name if Path(path).is_absolute() else path


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def code(text: str) -> str:
    """Text as inline code that is valid in a cell, whatever it contains."""
    text = " ".join(str(text).split()).replace("|", "\\|")
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (text.count("`") + 1)  # longer than any run of them inside
    return f"{fence} {text} {fence}"


def fenced(text: str, language: str) -> str:
    """Text as a code block, with a fence that does not occur in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def write_card(
    folder: Path,
    name: str,
    manifest: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    license: dict[str, str],
    scores: bool,
) -> None:
    """Writes the card into a model's directory."""
    text = card_text(name, manifest, tokenizer, license, scores)
    (folder / CARD).write_bytes(text.encode("utf-8", "backslashreplace"))  # file names may not be UTF-8
