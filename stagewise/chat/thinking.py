"""Thinking blocks before an answer, `<think>\\n…\\n</think>\\n\\nanswer`, as in Qwen3 and similar families.

An answer's thoughts are only in the text after the last question; there the last answer always has a block, an empty
one if it has no thoughts. Earlier answers are rendered without thoughts.
"""

import re

EMPTY = "<think>\n\n</think>\n\n"
SWITCHED_OFF = (
    "an answer holds thoughts, which --enable_thinking False leaves no place for; leave the flag out, or take them "
    "out of the record"
)


def split_thoughts(content: str) -> tuple[str, str]:
    """(thoughts, words) of an answer; ("", content) if it has no closed block."""
    if "</think>" not in content:
        return "", content
    thoughts = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thoughts.strip("\n"), content.split("</think>")[-1].lstrip("\n")


def block(thoughts: str) -> str:
    """The thoughts as rendered before an answer's words."""
    return f"<think>\n{thoughts}\n</think>\n\n"


# The same in Jinja. `question` is the index of the last question in `turns`.
LAST_QUESTION = (
    "{% set last = namespace(question=-1) %}{% for message in turns %}"
    '{% if message["role"] == "user" %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}'
)
# From an assistant's `words`: `thought`, its block or "", and `words` without it.
SPLIT = (
    '{% set thought = message["reasoning_content"] if message["reasoning_content"] is string else '
    '(words.split("</think>")[0].rstrip("\\n").split("<think>")[-1].lstrip("\\n") if "</think>" in words else "") %}'
    '{% set words = words.split("</think>")[-1].lstrip("\\n") if "</think>" in words else words %}'
    '{% set thought = ("<think>\\n" + thought.strip("\\n") + "\\n</think>\\n\\n") '
    'if loop.index0 > last.question and (loop.last or thought) else "" %}'
)
# The end of a prompt, after the template's `lead`.
PROMPT = (
    '{% if enable_thinking is defined and enable_thinking is false %}{{ "<think>\\n\\n</think>\\n\\n" }}{% endif %}'
)


def default_jinja(enable_thinking: bool | None) -> str:
    """The first line of a template trained with --enable_thinking, which makes it the default when serving."""
    if enable_thinking is None:
        return ""
    value = "true" if enable_thinking else "false"
    return f"{{% if enable_thinking is not defined %}}{{% set enable_thinking = {value} %}}{{% endif %}}"


def thinking_default(chat_template: str) -> tuple[bool | None, str]:
    """The setting of `default_jinja` at the beginning of a chat template, and the text after it."""
    for value in (True, False):
        if chat_template.startswith(default_jinja(value)):
            return value, chat_template.removeprefix(default_jinja(value))
    return None, chat_template


def without_opening(prompt: str) -> str:
    """A prompt without the thinking block that it opens, or opens and closes, at its end."""
    return re.sub(r"<think>\s*(</think>\s*)?\Z", "", prompt)
