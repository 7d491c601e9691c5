"""Texts with {names} in them: filled in for training, or turned into Jinja for serving."""

import json
import re
from typing import Any


def fill(piece: str, **values: str) -> str:
    """Replaces each {name} by its value, in one pass, so a value that contains a {name} stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), piece)


def as_jinja(piece: str, **expressions: str) -> str:
    """A text as a Jinja expression that concatenates its parts and the given expressions."""
    parts = re.split(r"\{(\w+)\}", piece)
    texts = [quoted(text) if number % 2 == 0 else expressions[text] for number, text in enumerate(parts)]
    return " + ".join(text for text in texts if text != '""') or '""'


def quoted(text: str) -> str:
    """A text as a Jinja string literal."""
    return as_json(text)


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON as the `tojson` of transformers, vLLM and SGLang writes it: plain UTF-8, keys in their order."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
