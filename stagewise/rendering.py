"""Conversation → segments of text, learned or not; the same text as a Jinja template for serving.

context  "A chat between … USER: Hi ASSISTANT:"
learned  " Hello!</s>"                               the assistant's words and the end marker
context  "USER: How are you? ASSISTANT:"
learned  " Fine.</s>"
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jinja2
from loguru import logger

from stagewise.arguments import ArgumentError
from stagewise.conversation import ANSWERS, QUESTIONS, Conversation, Message, RecordError

WAY_OUT = "choose a form of this project with --template_name (vicuna, for instance)"


@dataclass(frozen=True)
class Segment:
    """A piece of text; `learn` is True where the loss is taken."""

    text: str
    learn: bool


@dataclass(frozen=True)
class Template:
    """A chat form as a few named pieces, in the order in which they appear.

    In a piece, {content} stands for the message, {bos} and {eos} for the tokenizer's tokens. A `user` piece with
    {system} takes the system piece into the first user turn (llama2); otherwise it stands before it.
    `lead` is what a prompt ends with, `answer` and `end` are learned, `after` is not.
    """

    name: str
    user: str
    lead: str
    answer: str = "{content}"
    end: str = "{eos}"
    after: str = ""
    system: str = "{content}"
    default_system: str = ""
    bos: str = ""
    eos: str = "</s>"
    own_bos: bool = False  # the tokenizer puts one before every text

    @property
    def stop(self) -> str:
        """The end marker, one token of the tokenizer that the template was bound to."""
        return self._filled(self.end).strip()

    def bind(self, tokenizer: Any) -> "Template":
        """The template with the tokenizer's own bos and eos. Raises ArgumentError where it has no end marker."""
        if "{eos}" in self.end and tokenizer.eos_token is None:
            raise ArgumentError(f"--template_name {self.name}: the tokenizer has no eos token to end an answer with")
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        bound = replace(self, bos=bos, eos=eos, own_bos=adds_bos(tokenizer))
        if len(tokenizer.encode(bound.stop, add_special_tokens=False)) != 1:
            raise ArgumentError(
                f"--template_name {self.name}: answers end with {bound.stop!r}, which is not one token of this "
                "tokenizer, so that generation could not stop at it; choose a form that ends with the tokenizer's own "
                "eos token (vicuna, llama2, alpaca), or add the token to the tokenizer"
            )
        return bound

    def segments(self, conversation: Conversation, *, generation: bool = False) -> list[Segment]:
        """The conversation in this form; with `generation` it ends where the assistant is to speak.

        Raises RecordError for conversations with tools, which this form has no place for.
        """
        _check_end(conversation, generation)
        used = sorted({message.role for message in conversation.messages} - {"user", "assistant"})
        if conversation.tools or used:
            raise RecordError(conversation.where, "tools not shown", f"the template {self.name!r} has no form for "
                              f"tools ({', '.join(used) or 'tools'}); use a model whose own chat template "
                              "shows tools, without --template_name")  # fmt: skip
        system = self.default_system if conversation.system is None else conversation.system
        system = _fill(self._filled(self.system), content=system) if system else ""
        segments = _Joined()
        segments.add(self._start() + ("" if "{system}" in self.user else system), learn=False)
        for number, message in enumerate(conversation.messages):
            if message.role == "user":
                inside = system if number == 0 else ""
                segments.add(_fill(self._filled(self.user), system=inside, content=message.content), learn=False)
            else:
                segments.add(self._filled(self.lead), learn=False)
                segments.add(_fill(self._filled(self.answer + self.end), content=message.content), learn=True)
                segments.add(self._filled(self.after), learn=False)
        if generation:
            segments.add(self._filled(self.lead), learn=False)
        return segments.done

    def jinja(self) -> str:
        """The same form as a plain Jinja chat template, in one line, its texts written out."""
        content = 'message["content"]'
        user = _jinja(self._filled(self.user), system='(system_text if loop.first else "")', content=content)
        answer = _jinja(self._filled(self.lead + self.answer + self.end + self.after), content=content)
        system = _jinja(self._filled(self.system), content="system")
        unknown = _quoted(f"the template {self.name} has no form for the role ")
        before = "" if "{system}" in self.user else "{{ system_text }}"
        return (
            '{% if messages and messages[0]["role"] == "system" %}'
            '{% set system = messages[0]["content"] %}{% set turns = messages[1:] %}'
            f"{{% else %}}{{% set system = {_quoted(self.default_system)} %}}{{% set turns = messages %}}{{% endif %}}"
            f'{{% set system_text = ({system}) if system else "" %}}'
            f"{{{{ {_quoted(self._start())} }}}}{before}"
            "{% for message in turns %}"
            f'{{% if message["role"] == "user" %}}{{{{ {user} }}}}'
            f'{{% elif message["role"] == "assistant" %}}{{{{ {answer} }}}}'
            f'{{% else %}}{{{{ raise_exception({unknown} + message["role"]) }}}}{{% endif %}}'
            "{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {_quoted(self._filled(self.lead))} }}}}{{% endif %}}"
        )

    def _start(self) -> str:
        return self.bos if self.own_bos and "{bos}" not in self.system + self.user else ""

    def _filled(self, piece: str) -> str:
        return _fill(piece, bos=self.bos, eos=self.eos)


class CutError(ArgumentError):
    """A tokenizer's chat template that can't be cut exactly into learned and unlearned text."""


class TokenizerTemplate:
    """A tokenizer's own chat template, cut by rendering turn by turn.

    What stands between a prompt and the prompt with its answer is the answer. It must be the beginning of what the
    whole conversation renders to: anything else raises, here for the template (CutError), in `segments` for a record
    (RecordError).
    """

    def __init__(self, tokenizer: Any, chat_template: str, name: str = "the tokenizer's own"):
        self.name = name
        self._tokenizer = tokenizer
        # {% generation %} marks fail in every server but transformers; {% if true %} keeps their white space.
        chat_template = re.sub(r"(\{%[-+]?\s*)generation(?=\s*[-+]?%\})", r"\1if true", chat_template)
        chat_template = re.sub(r"(\{%[-+]?\s*)endgeneration(?=\s*[-+]?%\})", r"\1endif", chat_template)
        self._text = chat_template
        self._tail, self.stop = self._probe()
        rendered = self._render([{"role": "user", "content": "Hi"}], None, True, "the template")
        if adds_bos(tokenizer) and not rendered.startswith(tokenizer.bos_token):
            # In front of every text the model was trained on; the form alone leaves it out.
            self._text = f"{{{{ {_quoted(tokenizer.bos_token)} }}}}" + chat_template

    def segments(self, conversation: Conversation, *, generation: bool = False) -> list[Segment]:
        """The conversation as the template renders it; with `generation` it ends where the assistant is to speak.

        Raises RecordError where this conversation can't be cut exactly or its tools don't appear in the text.
        """
        _check_end(conversation, generation)
        where = conversation.where
        messages = _openai_messages(conversation)
        tools = _openai_tools(conversation.tools)
        whole = self._render(messages, tools, generation, where)
        self._check_tools(whole, messages, tools, where)
        segments = _Joined()
        cursor = 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:number], tools, True, where)
            spoken = self._render(messages[: number + 1], tools, False, where)
            end = len(spoken) - len(self._tail) + self._tail.index(self.stop) + len(self.stop)
            if not (spoken.startswith(prompt) and whole.startswith(spoken[:end]) and spoken.endswith(self._tail)):
                raise RecordError(where, "inexact cut", f"{self.name} chat template does not keep turn {number + 1} "
                                  f"as it was said, so that what is learned can't be told; {WAY_OUT}")  # fmt: skip
            answer = spoken[len(prompt) : end]
            if not _says(answer, message):
                raise RecordError(where, "words changed", f"{self.name} chat template changes the words of turn "
                                  f"{number + 1}; {WAY_OUT}")  # fmt: skip
            segments.add(whole[cursor : len(prompt)], learn=False)
            segments.add(answer, learn=True)
            cursor = end
        segments.add(whole[cursor:], learn=False)
        return segments.done

    def jinja(self) -> str:
        """The chat template that was cut, without {% generation %}."""
        return self._text

    def _render(self, messages: list[dict[str, Any]], tools: Any, generation: bool, where: str) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self._text, add_generation_prompt=generation, tokenize=False
            )
        except jinja2.TemplateError as error:
            raise RecordError(where, "refused by the chat template", f"{self.name} chat template refuses the "
                              f"conversation: {error}; {WAY_OUT}") from error  # fmt: skip

    def _probe(self) -> tuple[str, str]:
        """What follows an answer, and the end marker in it; found on two exchanges, which must cut exactly."""
        said = ("First one?", "Answer 1st.", "And then?", "2nd it is.")
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
        try:
            texts = [self._render(messages[:n], None, n % 2 == 1, "a first try") for n in range(1, 5)]
        except RecordError as error:
            raise CutError(error.message) from error
        tails = [texts[number].rpartition(said[number])[2] for number in (1, 3)]
        markers = [token for token in self._tokenizer.get_added_vocab() if token.strip() and token in tails[0]]
        if tails[0] != tails[1] or not markers:
            raise CutError(f"{self.name} chat template ends an answer with {tails[0]!r}, where no token of the "
                           f"tokenizer marks the end; {WAY_OUT}")  # fmt: skip
        stop = min(markers, key=lambda token: (tails[0].index(token), -len(token)))
        # Behind the marker the last answer may differ from the others (Phi-3 closes the text there).
        ends = [text.rfind(stop) + len(stop) if number % 2 else len(text) for number, text in enumerate(texts)]
        if any(not texts[n + 1].startswith(texts[n][: ends[n]]) for n in range(3)):
            raise CutError(f"{self.name} chat template rewrites earlier turns; {WAY_OUT}")
        return tails[0], stop

    def _check_tools(self, whole: str, messages: list[dict[str, Any]], tools: Any, where: str) -> None:
        called = [call for message in messages for call in message.get("tool_calls", [])]
        names = [tool["function"]["name"] for tool in [*(tools or []), *called]]
        results = [message["content"] for message in messages if message["role"] == "tool"]
        missing = [text for text in (*names, *results) if text.strip() not in whole]
        if missing:
            raise RecordError(where, "tools not shown", f"{self.name} chat template leaves out the tool text "
                              f"{missing[0][:60]!r}; use a model whose chat template shows tools")  # fmt: skip


def choose_template(
    tokenizer: Any, template_name: str | None, table: Mapping[str, Template]
) -> Template | TokenizerTemplate:
    """The form to train and serve in: `template_name` from `table`, else the tokenizer's own, else vicuna.

    The choice is written into `tokenizer.chat_template`, so that what is saved and served is what was trained.
    Families whose template rewrites earlier turns (Qwen3) get TRL's training template. Raises ArgumentError for
    an unknown name, and where no exact cut exists.
    """
    if template_name:
        if template_name not in table:
            raise ArgumentError(f"--template_name: unknown template {template_name!r}; known: {', '.join(table)}")
        template = table[template_name].bind(tokenizer)
        logger.info(f"template: {template_name} (--template_name)")
    elif tokenizer.chat_template:
        template = _own_template(tokenizer)
        logger.info(f"template: {template.name}; answers end with {template.stop}")
    else:
        template = table["vicuna"].bind(tokenizer)
        logger.info("template: vicuna, because the tokenizer has none (another: --template_name)")
    tokenizer.chat_template = template.jinja()
    return template


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a bos token before every text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]


# --- pieces ----------------------------------------------------------------------------------------------------------


class _Joined:
    """Collects segments; neighbouring context becomes one segment, answers never join."""

    def __init__(self) -> None:
        self.done: list[Segment] = []

    def add(self, text: str, *, learn: bool) -> None:
        if text and not learn and self.done and not self.done[-1].learn:
            self.done[-1] = Segment(self.done[-1].text + text, False)
        elif text:
            self.done.append(Segment(text, learn))


def _own_template(tokenizer: Any) -> TokenizerTemplate:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            raise ArgumentError(f"the tokenizer's chat templates {sorted(own)} have no default; {WAY_OUT}")
        own = own["default"]
    try:
        return TokenizerTemplate(tokenizer, own)
    except CutError as error:
        from trl.chat_template_utils import get_training_chat_template

        try:
            training = get_training_chat_template(tokenizer)
        except ValueError:
            raise error from None
        if training is None:
            raise
        return TokenizerTemplate(tokenizer, training, "TRL's training form of the tokenizer's")


def _check_end(conversation: Conversation, generation: bool) -> None:
    if generation and conversation.messages[-1].role not in QUESTIONS:
        raise RecordError(conversation.where, "prompt ends with an answer", "a prompt must end with a user turn or an "
                          "observation")  # fmt: skip


def _openai_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Turns as chat templates take them; words and tool calls of one turn are one message."""
    messages: list[dict[str, Any]] = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    before: Message | None = None
    for message in conversation.messages:
        if message.role == "tool_call":
            call = json.loads(message.content)
            function = {"name": call["name"], "arguments": call.get("arguments", {})}
            if before is None or before.role not in ANSWERS:
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append({"type": "function", "function": function})
        else:
            role = "tool" if message.role == "observation" else message.role
            messages.append({"role": role, "content": message.content})
        before = message
    return messages


def _openai_tools(tools: str | None) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in json.loads(tools)]


def _says(answer: str, message: dict[str, Any]) -> bool:
    """Whether the words of a message stand in the text; a family may trim them or set its thoughts apart."""
    words = [part.strip() for part in re.split(r"</?think>", message["content"])]
    names = [call["function"]["name"] for call in message.get("tool_calls", [])]
    return all(part in answer for part in [*words, *names])


def _fill(piece: str, **values: str) -> str:
    """{name} → value, in one pass, so that a value that itself holds a {name} stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), piece)


def _jinja(piece: str, **expressions: str) -> str:
    """A piece as a Jinja expression that joins its texts and the given expressions."""
    parts = re.split(r"\{(\w+)\}", piece)
    texts = [_quoted(text) if number % 2 == 0 else expressions[text] for number, text in enumerate(parts)]
    return " + ".join(text for text in texts if text != '""') or '""'


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
