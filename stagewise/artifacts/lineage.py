"""The lineage in run.json: the steps that made a model, with the data and results of each, and the license of the
first model.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from loguru import logger

from stagewise.artifacts.json_files import leads_outside
from stagewise.artifacts.manifest import read_manifest

UNKNOWN = "unknown"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# The beginning of a license's text, within its first 400 characters -> its name on the Hub.
TEXTS = (
    (r"apache license\s+version 2\.0", "apache-2.0"),
    (r"mit license|permission is hereby granted, free of charge", "mit"),
    (r"llama (\d(?:\.\d)?) community license", "llama{}"),
    (r"gemma terms of use", "gemma"),
    (r"bsd 3-clause", "bsd-3-clause"),
    (r"gnu general public license\s+version 3", "gpl-3.0"),
)
ACCOUNT = ("read", "kept", "left_out", "cut")


def start_lineage_step(stage: str, parts: list[Any]) -> dict[str, Any]:
    """The entry of a run in the lineage, before anything has been read."""
    step: dict[str, Any] = {"stage": stage, "base_model": _flag(parts, "model_name_or_path")}
    if step["base_model"] and not Path(step["base_model"]).is_dir():
        step["from_hub"] = True
    if (revision := _flag(parts, "model_revision")) not in (None, "main"):
        step["revision"] = revision
    if adapter := _flag(parts, "peft_path"):
        step["continued_adapter"] = adapter
    if reward := _flag(parts, "reward_model_name_or_path"):
        step["reward_model"] = {"path": reward, "lineage": _lineage(reward)}
    return step


def earlier_steps(parts: list[Any]) -> list[dict[str, Any]]:
    """The steps before a run's own: those of the adapter it continues from, else those of its model."""
    adapter = _flag(parts, "peft_path")
    return (_lineage(adapter) if adapter else []) or _lineage(_flag(parts, "model_name_or_path"))


def finish_lineage_step(manifest: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """The lineage entry of a finished run, with its data and results, for readers who only have the model."""
    step = dict(manifest["lineage"][-1])
    step |= {"output_dir": str(output_dir), **{k: manifest[k] for k in KEPT if manifest.get(k) is not None}}
    data = manifest.get("data") or {}
    step["data"] = {
        split: {
            **{name: data[split][name] for name in ACCOUNT if data[split].get(name)},
            "files": [Path(name).name for name in data[split].get("files", [])],
        }
        for split in ("train", "validation")
        if split in data
    }
    found = manifest.get("metrics") or {}
    step["metrics"] = {name: plain_metrics(values) for name, values in found.items() if name != "train"}
    if loss := (found.get("train") or {}).get("train_loss"):
        step["metrics"]["train"] = {"train_loss": loss}
    return step


KEPT = ("method", "parameters", "template", "steps", "seconds", "device", "processes", "began")


def plain_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without the time they took."""
    unsaid = ("runtime", "per_second", "epoch", "step")
    return {name: value for name, value in metrics.items() if not name.endswith(unsaid)}


def first_model(lineage: list[dict[str, Any]]) -> tuple[str | None, bool]:
    """The model that everything started from, and whether that is a name on the Hub."""
    first = next((step for step in lineage if step.get("base_model")), {})
    return first.get("base_model"), bool(first.get("from_hub"))


def _flag(parts: list[Any], name: str) -> Any:
    return next((value for part in parts if (value := getattr(part, name, None)) is not None), None)


def _lineage(folder: str | None) -> list[dict[str, Any]]:
    found = read_manifest(folder) if folder and Path(folder).is_dir() else None
    return list((found or {}).get("lineage", []))


# --- license ---------------------------------------------------------------------------------------------------------


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML front matter of a model card; empty if there is none, or none that can be parsed."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if not found:
        return {}
    try:
        values = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        logger.warning(f"{card}: its front matter is not valid YAML and is not read: {error}")
        return {}
    return values if isinstance(values, dict) else {}


def find_license(base: Path, called: str | None = None) -> dict[str, str]:
    """The license of a model's directory (called `called` in messages) by its Hub name, and its source.

    It is looked for in run.json (of a merged model), the front matter of README.md, and the text of a LICENSE file;
    otherwise it is "unknown". A license without a name on the Hub is "other", with `name` and `link` if they are
    known.
    """
    called = called or str(base)
    manifest = read_manifest(base) or {}
    earlier = manifest.get("license", manifest.get("licence"))  # the second is the spelling of earlier versions
    earlier = earlier if isinstance(earlier, dict) and isinstance(earlier.get("id"), str) else None
    if earlier and earlier["id"] != UNKNOWN:
        return dict(earlier)
    card = front_matter(base / "README.md")
    if isinstance(card.get("license"), str) and card["license"] not in ("", UNKNOWN):
        found = {"id": card["license"], "source": f"the front matter of {called}/README.md"}
        more = {"name": card.get("license_name"), "link": card.get("license_link")}
        return found | {name: str(value) for name, value in more.items() if value}
    for path in _files(base):
        head = " ".join(path.read_text(encoding="utf-8", errors="replace")[:400].lower().split())
        for pattern, name in TEXTS:
            if found := re.search(pattern, head):
                return {"id": name.format(*found.groups()), "source": f"the text of {called}/{path.name}"}
        return {
            "id": "other",
            "name": "see-license-file",
            "link": path.name,
            "source": f"{called}/{path.name}, whose text is none that is known here: read it",
        }
    missing = f"{called} has no README.md with a license in its front matter, and no LICENSE file"
    return dict(earlier) if earlier else {"id": UNKNOWN, "source": missing}


def carry_license(base: Path, folder: Path, called: str | None = None) -> dict[str, str]:
    """Copies the license text beside a model made from the directory; returns the result of `find_license`."""
    copy_beside(base, LICENCE_FILES, folder)
    return find_license(base, called)


def copy_beside(base: Path, patterns: Sequence[str], folder: Path) -> None:
    """Copies files of a model's directory beside a model made from it; links that lead elsewhere are left out."""
    for path in (path for pattern in patterns for path in base.glob(pattern) if path.is_file()):
        if leads_outside(path, base):
            logger.warning(f"{path}: is a link to {path.resolve()}, outside of the model's directory: not copied")
        else:
            shutil.copy(path, folder)


def _files(base: Path) -> Iterator[Path]:
    for pattern in LICENCE_FILES[:2]:
        yield from sorted(path for path in base.glob(pattern) if path.is_file())
