"""The chat templates by name. template.py in the root, where templates are added, registers them when imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from stagewise.chat.template import Template

_TEMPLATES: dict[str, Template] = {}


def register(templates: Iterable[Template]) -> None:
    """Adds templates to the table.

    Raises:
        ValueError: two templates have one name.
    """
    for template in templates:
        if _TEMPLATES.setdefault(template.name, template) != template:
            raise ValueError(f"template.py: two templates are named {template.name!r}")


def templates_by_name() -> Mapping[str, Template]:
    """The registered templates.

    Raises:
        RuntimeError: none is registered, because template.py was not imported.
    """
    if not _TEMPLATES:
        raise RuntimeError("no chat templates are registered: import template (template.py in the root)")
    return _TEMPLATES
