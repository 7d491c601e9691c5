"""Conversation → segments of text with and without labels; the same text as a Jinja template for serving.

context  "A chat between … USER: Hi ASSISTANT:"
labels   " Hello!</s>"                               the answer and the end marker
context  "USER: How are you? ASSISTANT:"
labels   " Fine.</s>"
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from stagewise.chat import thinking
from stagewise.chat.jinja import as_jinja, fill, quoted
from stagewise.chat.tool_formats import DEFAULT, ToolForm, Turn, openai_tools, turns
from stagewise.errors import ArgumentError, RecordError
from stagewise.formats.parsers import QUESTIONS, Conversation

PLAIN_FORMS = (
    "choose a form of plain text that ends with the tokenizer's own eos token (vicuna, llama2, alpaca), or add the "
    "token to the tokenizer"
)


@dataclass(frozen=True)
class Segment:
    """A piece of text; `learn` is True if its tokens have labels."""

    text: str
    learn: bool


@dataclass(frozen=True)
class Template:
    """A chat template as a few named pieces, in the order in which they appear.

        start system user lead answer end after user lead answer end after …

    `start` appears once, at the beginning. The system piece precedes the first user piece, or is inside it if `user`
    contains {system} (llama2). A prompt ends with `lead`; `answer` and `end` have labels, `after` has none. If `user`
    begins with `end` (glm4: an answer ends with the tag of the next role), that text appears once.

    In a piece, {content} is the message, {bos} and {eos} are the tokenizer's tokens; in `user`, {round} is the number
    of the exchange, counted from 1, {round0} from 0.
    """

    name: str
    user: str
    lead: str
    answer: str = "{content}"
    end: str = "{eos}"
    after: str = ""
    start: str = ""
    system: str = "{content}"
    default_system: str = ""
    always_system: bool = False  # the system piece also appears, empty, without a system prompt (starchat)
    tokens: tuple[str, ...] = ()  # the special tokens of the family's tokenizers besides the end marker
    tools: ToolForm | None = DEFAULT  # how tools are listed, called and answered; None: not supported
    thinking: bool = False  # the answer to the last question begins with a thinking block, as in Qwen3
    enable_thinking: bool | None = None  # False: that block is empty and belongs to the prompt
    bos: str = ""
    eos: str = "</s>"
    own_bos: bool = False  # the tokenizer adds one to every text

    @property
    def stop(self) -> str:
        """The end marker at which generation stops, one token of the tokenizer that the template is bound to."""
        return self._filled(self.end).strip()

    @property
    def stops(self) -> tuple[str, ...]:
        """All end markers: tool calls may have their own."""
        own = self.tools.end if self.tools else None
        return (self.stop, own) if own else (self.stop,)

    @property
    def closing(self) -> str:
        """What ends an answer: the end marker, and what the template writes before it."""
        return self._filled(self.end)

    @property
    def tail(self) -> str:
        """What follows the end marker of a last answer."""
        return self._filled(self.after)

    def bind(self, tokenizer: Any) -> "Template":
        """The template with the tokenizer's bos and eos.

        Raises ArgumentError if the tokenizer lacks the end marker or another special token of the template.
        """
        if "{eos}" in self.end and tokenizer.eos_token is None:
            raise ArgumentError(f"--template_name {self.name}: the tokenizer has no eos token to end an answer with")
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        bound = replace(self, bos=bos, eos=eos, own_bos=adds_bos(tokenizer))
        if not _is_token(tokenizer, bound.stop):
            raise ArgumentError(
                f"--template_name {self.name}: answers end with {bound.stop!r}, which is not one token of this "
                f"tokenizer, so that generation could not stop at it; {PLAIN_FORMS}"
            )
        for token in self.tokens:
            if not _is_token(tokenizer, token):
                raise ArgumentError(f"--template_name {self.name}: the form has a token {token!r}, which this "
                                    f"tokenizer does not have; {PLAIN_FORMS}")  # fmt: skip
        return bound

    def segments(self, conversation: Conversation, *, generation: bool = False) -> list[Segment]:
        """The rendered conversation; with `generation` it ends at the start of the next answer.

        Raises RecordError for tools if the template supports none, and for thoughts if thinking is off.
        """
        check_end(conversation, generation)
        said, tools = turns(conversation.messages), openai_tools(conversation.tools)
        if self.tools is None and (tools or any(turn.calls or turn.observations for turn in said)):
            raise RecordError(conversation.where, "tools not shown", f"the template {self.name!r} has no form for "
                              "tools; choose another with --template_name")  # fmt: skip
        system = self._system_text(conversation, tools)
        segments = Joined()
        segments.add(self._front(bool(system)) + ("" if self._system_inside else system))
        asked, lead = 0, self._filled(self.lead)
        questions = [number for number, turn in enumerate(said) if turn.role == "user"]
        for number, turn in enumerate(said):
            if turn.role == "assistant":
                segments.add(lead)
                after_question = not questions or number > questions[-1]
                context, answer = self._answer(turn, after_question, number == len(said) - 1, conversation.where)
                segments.add(context)
                segments.answer(answer, learn=turn.learn)
                segments.add(self._filled(self.after))
                continue
            if turn.role == "user":
                segments.add(self._asked(turn.words, asked, system, tools))
                asked += 1
            else:
                segments.add(self._observed(turn, asked - 1))
            lead = self._lead(turn.role == "observation")
        if generation:
            segments.add(lead + (thinking.EMPTY if self.enable_thinking is False else ""))
        return segments.done

    def jinja(self) -> str:
        """The same template as a plain Jinja chat template, in one line."""
        unknown = quoted(f"the template {self.name} has no form for the role ")
        tool = f'{{% elif message["role"] == "tool" %}}{self._observed_jinja()}' if self.tools else ""
        told = 'turns and turns[-1]["role"] == "tool"'
        return (
            (thinking.default_jinja(self.enable_thinking) if self.thinking else "")
            + '{% if messages and messages[0]["role"] == "system" %}'
            '{% set system = messages[0]["content"] %}{% set turns = messages[1:] %}'
            f"{{% else %}}{{% set system = {quoted(self.default_system)} %}}{{% set turns = messages %}}{{% endif %}}"
            + self._opening_jinja()
            + (thinking.LAST_QUESTION if self.thinking else "")
            + "{% for message in turns %}"
            f'{{% if message["role"] == "user" %}}{self._user_jinja()}'
            f'{{% elif message["role"] == "assistant" %}}{self._answer_jinja()}{tool}'
            f'{{% else %}}{{{{ raise_exception({unknown} + message["role"]) }}}}{{% endif %}}'
            "{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {self._lead_jinja(told)} }}}}"
            f"{thinking.PROMPT if self.thinking else ''}{{% endif %}}"
        )

    # shared by `segments` and `jinja`

    @property
    def _system_inside(self) -> bool:
        return "{system}" in self.user

    def _system_text(self, conversation: Conversation, tools: list[dict[str, Any]] | None) -> str:
        system = self.default_system if conversation.system is None else conversation.system
        before = ""
        if tools and self.tools:
            own = fill(self.tools.own_system, tools=self.tools.listing(tools))
            before = fill(self._filled(self.system), content=own) if own else ""
            system = self.tools.say_system(tools, system)
        return before + (fill(self._filled(self.system), content=system) if system or self.always_system else "")

    def _front(self, system: bool) -> str:
        """The beginning of a text: `start`, preceded by the tokenizer's bos if the template doesn't contain it."""
        first = self.start or (self.system if system and not self._system_inside else self.user)
        return (self.bos if self.own_bos and not first.startswith("{bos}") else "") + self._filled(self.start)

    def _user(self, first: bool) -> str:
        return self.user if first or self.after else self.user.removeprefix(self.end)

    def _lead(self, after_observation: bool) -> str:
        own = after_observation and self.tools and self.tools.lead is not None
        return self._filled(self.tools.lead if own else self.lead)

    def _asked(self, words: str, asked: int, system: str, tools: list[dict[str, Any]] | None) -> str:
        """A user turn after `asked` others; the first one includes the list of tools if the template puts it there."""
        before = ""
        if tools and self.tools and asked == 0:
            listing = self.tools.listing(tools)
            before = fill(self.tools.before_user, tools=listing)
            words = fill(self.tools.in_user, tools=listing) + words
        values = {"system": "" if asked else system, "round0": str(asked), "round": str(asked + 1)}
        return before + fill(self._filled(self._user(asked == 0)), content=words, **values)

    def _observed(self, turn: Turn, asked: int) -> str:
        """The results of tools, as their own turn or in a user turn."""
        text = self.tools.say_observations(turn.observations)
        if self.tools.own_turn:
            return text
        values = {"system": "", "round0": str(asked), "round": str(asked + 1)}
        return fill(self._filled(self._user(False)), content=text, **values)

    def _answer(self, turn: Turn, after_question: bool, last: bool, where: str) -> tuple[str, str]:
        """What precedes an assistant turn, besides `lead`, and the turn's text."""
        words, context, thought = turn.words, "", ""
        if self.thinking:
            thoughts, words = thinking.split_thoughts(words)
            if thoughts and self.enable_thinking is False:
                raise RecordError(where, "thoughts switched off", thinking.SWITCHED_OFF)
            if after_question and (last or thoughts):
                thought = thinking.block(thoughts)
            if self.enable_thinking is False:
                context, thought = thought, ""
        calls = self.tools.say_calls(turn.calls) if turn.calls else ""
        joint = self.tools.after_words if words and calls else ""
        if self.tools is None or self.tools.as_words:
            said = fill(self._filled(self.answer), content=thought + words + joint + calls)
        else:
            alone = fill(self._filled(self.answer), content=thought + words)
            said = (alone if words or not calls else "") + joint + calls
        end = self.tools.end if calls and self.tools.end is not None else self.end
        return context, said + self._filled(end)

    def _opening_jinja(self) -> str:
        system = as_jinja(self._filled(self.system), content="system")
        system = f"({system})" if self.always_system else f'(({system}) if system else "")'
        tools, before = "", ""
        if self.tools:
            own = f"{{% set system = {self.tools.jinja_system()} %}}"
            if self.tools.own_system:
                text = as_jinja(fill(self._filled(self.system), content=self.tools.own_system), tools="listing")
                own += f"{{% set tools_text = {text} %}}"
                before = '(tools_text or "") + '
            tools = f"{{% if tools %}}{self.tools.jinja_listing()}{own}{{% endif %}}"
        front, alone = quoted(self._front(True)), quoted(self._front(False))
        front = front if front == alone else f"{front} if system_text else {alone}"
        shown = "" if self._system_inside else "{{ system_text }}"
        return f"{tools}{{% set system_text = {before}{system} %}}{{{{ {front} }}}}{shown}"

    def _user_jinja(self) -> str:
        content, before = 'message["content"]', ""
        if self.tools and self.tools.in_user:
            listed = as_jinja(self.tools.in_user, tools="listing")
            content = f'(({listed}) if tools and loop.first else "") + {content}'
        if self.tools and self.tools.before_user:
            listed = as_jinja(self.tools.before_user, tools="listing")
            before = f"{{% if tools and loop.first %}}{{{{ {listed} }}}}{{% endif %}}"
        values = {"content": content, "system": '(system_text if loop.first else "")', **_rounds("loop.index0", 0)}
        first, later = (as_jinja(self._filled(self._user(is_first)), **values) for is_first in (True, False))
        return f"{before}{{{{ {first if first == later else f'({first}) if loop.first else ({later})'} }}}}"

    def _observed_jinja(self) -> str:
        if self.tools.own_turn:
            return self.tools.jinja_observation()
        values = {"system": '""', **_rounds("loop.index0", -1)}
        before, after = self._filled(self._user(False)).split("{content}")
        return self.tools.jinja_observation(as_jinja(before, **values), as_jinja(after, **values))

    def _answer_jinja(self) -> str:
        told = 'not loop.first and turns[loop.index0 - 1]["role"] == "tool"'
        thought = "thought + " if self.thinking else ""
        answer, end = self._filled(self.answer), quoted(self._filled(self.end))
        calls = self.tools.jinja_calls() if self.tools else ""
        if self.tools is None:
            said = as_jinja(answer, content=f"{thought}words")
        else:
            joint = f'({quoted(self.tools.after_words)} if words and calls else "")'
            if self.tools.as_words:
                said = as_jinja(answer, content=f"{thought}words + {joint} + calls")
            else:
                alone = as_jinja(answer, content=f"{thought}words")
                said = f'(({alone}) if words or not calls else "") + {joint} + calls'
            if self.tools.end is not None:
                end = f"({quoted(self._filled(self.tools.end))} if calls else {end})"
        return (
            f'{{% set words = message["content"] or "" %}}{thinking.SPLIT if self.thinking else ""}{calls}'
            f"{{{{ {self._lead_jinja(told)} + {said} + {end} + {quoted(self._filled(self.after))} }}}}"
        )

    def _lead_jinja(self, told: str) -> str:
        lead, after = quoted(self._lead(False)), quoted(self._lead(True))
        return lead if lead == after else f"({after} if {told} else {lead})"

    def _filled(self, piece: str) -> str:
        return _with_tokens(piece, self.bos, self.eos)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer adds a bos token to every text."""
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]


# --- pieces ----------------------------------------------------------------------------------------------------------


class Joined:
    """Collects segments; neighboring context is merged into one segment, an answer always stays separate."""

    def __init__(self) -> None:
        self.done: list[Segment] = []
        self._open = False  # the last segment is context, to which more is appended

    def add(self, text: str, *, learn: bool = False) -> None:
        """Adds context, or text with labels."""
        if learn:
            self.answer(text, learn=True)
        elif text and self._open:
            self.done[-1] = Segment(self.done[-1].text + text, False)
        elif text:
            self.done.append(Segment(text, False))
            self._open = True

    def answer(self, text: str, *, learn: bool) -> None:
        """Adds an answer: the same segment, so the same token ids, with or without labels."""
        if text:
            self.done.append(Segment(text, learn))
            self._open = False


@lru_cache(maxsize=1024)  # the same few pieces for every turn
def _with_tokens(piece: str, bos: str, eos: str) -> str:
    return fill(piece, bos=bos, eos=eos)


def _is_token(tokenizer: Any, text: str) -> bool:
    return len(tokenizer.encode(text, add_special_tokens=False)) == 1


def check_end(conversation: Conversation, generation: bool) -> None:
    if generation and conversation.messages[-1].role not in QUESTIONS:
        raise RecordError(conversation.where, "prompt ends with an answer", "a prompt must end with a user turn or an "
                          "observation")  # fmt: skip


def _rounds(place: str, less: int) -> dict[str, str]:
    """The number of the exchange in Jinja: the questions before an index."""
    count = f'turns[:{place}] | selectattr("role", "equalto", "user") | list | length'
    return {"round0": f"({count} + {less}) | string", "round": f"({count} + {less + 1}) | string"}
