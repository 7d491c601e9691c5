"""A tokenizer's own chat template, cut into segments.

The whole conversation is rendered once. Its answers are located with a skeleton (skeleton.py): the same turns with
placeholders instead of words, cut once for all conversations with that many turns. The cut is accepted if the skeleton
with the words filled in equals the rendered text, character by character; otherwise this conversation is rendered turn
by turn, and refused if that gives no exact cut either.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jinja2

from stagewise.chat import thinking
from stagewise.chat.jinja import quoted
from stagewise.chat.skeleton import Cut, Skeleton, filled, lengthened, marked_messages, short_count, skeleton_of
from stagewise.chat.template import Joined, Segment, adds_bos, check_end
from stagewise.chat.tool_formats import openai_messages, openai_tools, turns
from stagewise.errors import InexactCut, RecordError
from stagewise.formats.parsers import Conversation

WAY_OUT = "choose a form of this project with --template_name (vicuna, for instance)"
PROBE = ("First one?", "Answer 1st.", "And then?", "2nd it is.")

Rendered = Callable[[int, bool], str]  # the first n messages, and whether an answer comes next → text


class TokenizerTemplate:
    """A tokenizer's own chat template.

    An answer is the text between the prompt and the end marker. Both must appear unchanged in the whole conversation:
    the prompt, and the answer. Two differences are allowed for answers before the last question, as in thinking
    families: their thoughts are left out, and so is the part of them that the prompt opens.

    Args:
        tokenizer: renders, and determines the end marker.
        chat_template: the text.
        name: for messages.
        enable_thinking: passed to the template; None: not passed, unless the text sets it itself.

    Raises InexactCut for a template that can't be cut; `segments` raises RecordError for such a record.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str,
        name: str = "the tokenizer's own",
        enable_thinking: bool | None = None,
    ):
        self.name = name
        self.thinking = knows_thinking(chat_template)
        self._tokenizer = tokenizer
        asked, chat_template = thinking.thinking_default(chat_template)
        self.enable_thinking = asked if enable_thinking is None else enable_thinking
        self._text = thinking.default_jinja(self.enable_thinking) + without_generation_marks(chat_template)
        self._skeletons: dict[tuple[int, bool, bool], Skeleton | None] = {}
        self._tail, self.stop = self._probe()
        rendered = self._render([{"role": "user", "content": "Hi"}], None, True, "the template")
        if adds_bos(tokenizer) and not rendered.startswith(tokenizer.bos_token):
            # In front of every text the model was trained on; the template alone leaves it out.
            default = thinking.default_jinja(self.enable_thinking)
            self._text = f"{default}{{{{ {quoted(tokenizer.bos_token)} }}}}{self._text.removeprefix(default)}"
            self._skeletons.clear()

    def segments(self, conversation: Conversation, *, generation: bool = False) -> list[Segment]:
        """The conversation as the template renders it; with `generation` it ends at the start of the next answer.

        Raises RecordError if this conversation can't be cut exactly, if its tools don't appear in the text, and for
        thoughts if thinking is off.
        """
        check_end(conversation, generation)
        where = conversation.where
        said = turns(conversation.messages)
        messages, tools = openai_messages(said, conversation.system), openai_tools(conversation.tools)
        whole = self._render(messages, tools, generation, where)
        learned = [turn.learn for turn in said if turn.role == "assistant"]
        thinks = any("</think>" in message["content"] for message in messages if message["role"] == "assistant")
        if thinks and self.enable_thinking is False and _think(messages):
            raise RecordError(where, "thoughts switched off", thinking.SWITCHED_OFF)
        if tools or thinks or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
            self._check_tools(whole, messages, tools, where)
        else:
            filled = self._by_skeleton(messages, conversation.system is not None, generation, whole)
            if filled is not None:
                return _joined(filled, learned)
        if thinks:
            messages = self._without_earlier_thoughts(messages, tools, generation, whole, where)

        def rendered(number: int, prompt: bool) -> str:
            return self._render(messages[:number], tools, prompt, where)

        return _joined(self._turn_by_turn(messages, whole, rendered, where), learned)

    @property
    def stops(self) -> tuple[str, ...]:
        """The end markers: one, since every answer must end alike."""
        return (self.stop,)

    @property
    def closing(self) -> str:
        """What ends an answer: the end marker, and what the template writes before it."""
        return self._tail[: len(self._tail) - len(self.tail)]

    @property
    def tail(self) -> str:
        """What follows the end marker of a last answer."""
        return self._tail.partition(self.stop)[2]

    def jinja(self) -> str:
        """The chat template without {% generation %}."""
        return self._text

    # --- one rendering -----------------------------------------------------------------------------------------------

    def _by_skeleton(
        self, messages: Sequence[dict[str, Any]], system: bool, generation: bool, whole: str
    ) -> Cut | None:
        """The cut of `whole`, or None if the skeleton of these turns doesn't give the same text."""
        shape = (len(messages), system, generation)
        if shape not in self._skeletons:
            self._skeletons[shape] = self._skeleton(*shape)
        skeleton = self._skeletons[shape]
        return None if skeleton is None else filled(skeleton, [message["content"] for message in messages], whole)

    def _skeleton(self, count: int, system: bool, generation: bool) -> Skeleton | None:
        try:
            cut = self._lengthened(count, system, generation) or self._marked(count, system, generation)
        except RecordError:  # reported for the record itself, which is rendered turn by turn
            return None
        return skeleton_of(cut)

    def _marked(self, count: int, system: bool, generation: bool) -> Cut:
        marked = marked_messages(count, system)

        def rendered(number: int, prompt: bool) -> str:
            return self._render(marked[:number], None, prompt, "?")

        return self._turn_by_turn(marked, rendered(count, generation), rendered, "?")

    def _lengthened(self, count: int, system: bool, generation: bool) -> Cut | None:
        """A long conversation's cut derived from a short one's, if it gives the same text and holds for its middle and
        end.
        """
        short = short_count(count, system)
        if short is None:
            return None
        cut, marked = lengthened(self._marked(short, system, generation), count), marked_messages(count, system)
        whole = self._render(marked, None, generation, "?")
        if "".join(text for text, _ in cut) != whole:
            return None
        answers = [number for number, message in enumerate(marked) if message["role"] == "assistant"]
        for place in (len(answers) // 2, len(answers) - 1):
            number, piece = answers[place], 2 * place + 1
            start = sum(len(text) for text, _ in cut[:piece])
            prompt, spoken = (
                self._render(marked[:end], None, asked, "?") for end, asked in ((number, True), (number + 1, False))
            )
            if self._find(whole, prompt, spoken, number < count - 1) != (start, start + len(cut[piece][0])):
                return None
        return cut

    # --- turn by turn ------------------------------------------------------------------------------------------------

    def _turn_by_turn(self, messages: Sequence[dict[str, Any]], whole: str, rendered: Rendered, where: str) -> Cut:
        """(text, whether it is an answer) pieces of `whole`. Raises RecordError if there is no exact cut."""
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        question = max(number for number, message in enumerate(messages) if message["role"] == "user")
        pieces: Cut = []
        cursor = 0
        for number in answers:
            prompt, spoken = rendered(number, True), rendered(number + 1, False)
            earlier = number < question or number != answers[-1]
            found = self._find(whole, prompt, spoken, earlier)
            if found is None or found[0] < cursor:
                raise RecordError(where, "inexact cut", f"{self.name} chat template does not keep turn {number + 1} "
                                  f"unchanged, so its labels can't be located; {WAY_OUT}")  # fmt: skip
            start, end = found
            if not _says(whole[start:end], messages[number]):
                raise RecordError(where, "words changed", f"{self.name} chat template changes the words of turn "
                                  f"{number + 1}; {WAY_OUT}")  # fmt: skip
            pieces += [(whole[cursor:start], False), (whole[start:end], True)]
            cursor = end
        return [*pieces, (whole[cursor:], False)]

    def _find(self, whole: str, prompt: str, spoken: str, earlier: bool) -> tuple[int, int] | None:
        """Start and end of an answer in `whole`: `prompt` ends at its start, `spoken` at its end."""
        if not (spoken.startswith(prompt) and spoken.endswith(self._tail)):
            return None
        end = len(spoken) - len(self._tail) + self._tail.index(self.stop) + len(self.stop)
        if whole.startswith(spoken[:end]):
            return len(prompt), end
        asked = thinking.without_opening(prompt)
        words = thinking.split_thoughts(spoken[len(asked) : end])[1]
        if earlier and whole.startswith(asked + words):
            return len(asked), len(asked) + len(words)
        return None

    def _without_earlier_thoughts(
        self, messages: list[dict[str, Any]], tools: Any, generation: bool, whole: str, where: str
    ) -> list[dict[str, Any]]:
        """The messages without thoughts that the template omits anyway: those before the last question."""
        question = max(number for number, message in enumerate(messages) if message["role"] == "user")
        bare = [
            {**message, "content": thinking.split_thoughts(message["content"])[1]}
            if message["role"] == "assistant" and number < question
            else message
            for number, message in enumerate(messages)
        ]
        return bare if self._render(bare, tools, generation, where) == whole else messages

    # --- rendering ---------------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[dict[str, Any]], tools: Any, generation: bool, where: str) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self._text, add_generation_prompt=generation, tokenize=False
            )
        except (jinja2.TemplateError, TypeError) as error:  # a filter given another type raises a TypeError
            raise RecordError(where, "refused by the chat template", f"{self.name} chat template refuses the "
                              f"conversation: {error}; {WAY_OUT}") from error  # fmt: skip

    def _probe(self) -> tuple[str, str]:
        """What follows an answer, and the end marker in it; determined from two exchanges, which must cut exactly."""
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(PROBE)]

        def rendered(number: int, prompt: bool) -> str:
            return self._render(messages[:number], None, prompt, "a first try")

        try:
            whole = rendered(4, False)
            tails = [rendered(2, False).rpartition(PROBE[1])[2], whole.rpartition(PROBE[3])[2]]
        except RecordError as error:
            raise InexactCut(error.message) from error
        markers = [token for token in self._tokenizer.get_added_vocab() if token.strip() and token in tails[0]]
        if tails[0] != tails[1] or not markers:
            raise InexactCut(f"{self.name} chat template ends an answer with {tails[0]!r}, where no token of the "
                           f"tokenizer marks the end; {WAY_OUT}")  # fmt: skip
        stop = min(markers, key=lambda token: (tails[0].index(token), -len(token)))
        # After the marker the last answer may differ from the others (Phi-3 ends the text there).
        self._tail, self.stop = tails[0], stop
        try:
            self._turn_by_turn(messages, whole, rendered, "a first try")
        except RecordError as error:
            raise InexactCut(f"{self.name} chat template rewrites earlier turns; {WAY_OUT}") from error
        return tails[0], stop

    def _check_tools(self, whole: str, messages: Sequence[dict[str, Any]], tools: Any, where: str) -> None:
        called = [call for message in messages for call in message.get("tool_calls", [])]
        names = [tool["function"]["name"] for tool in [*(tools or []), *called]]
        results = [message["content"] for message in messages if message["role"] == "tool"]
        missing = [text for text in names if text.strip() not in whole]
        missing += [text for text in results if text.strip() not in whole and quoted(text) not in whole]
        if missing:
            raise RecordError(where, "tools not shown", f"{self.name} chat template leaves out the tool text "
                              f"{missing[0][:60]!r}; {WAY_OUT}")  # fmt: skip


def knows_thinking(chat_template: str) -> bool:
    """Whether a chat template uses the variable enable_thinking."""
    return re.search(r"\benable_thinking\b", chat_template) is not None


def without_generation_marks(chat_template: str) -> str:
    """Replaces {% generation %} marks, which fail in every server but transformers, by {% if true %}, which keeps
    their white space.
    """
    chat_template = re.sub(r"(\{%[-+]?\s*)generation(?=\s*[-+]?%\})", r"\1if true", chat_template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(?=\s*[-+]?%\})", r"\1endif", chat_template)


# --- pieces ----------------------------------------------------------------------------------------------------------


def _joined(pieces: Sequence[tuple[str, bool]], learned: Sequence[bool]) -> list[Segment]:
    segments, flags = Joined(), iter(learned)
    for text, is_answer in pieces:
        if is_answer:
            segments.answer(text, learn=next(flags))
        else:
            segments.add(text)
    return segments.done


def _think(messages: Sequence[dict[str, Any]]) -> bool:
    answers = (message["content"] for message in messages if message["role"] == "assistant")
    return any(thinking.split_thoughts(content)[0].strip() for content in answers)


def _says(answer: str, message: dict[str, Any]) -> bool:
    """Whether the words of a message appear in the text; a family may strip them or move its thoughts."""
    words = [part.strip() for part in re.split(r"</?think>", message["content"])]
    names = [call["function"]["name"] for call in message.get("tool_calls", [])]
    return all(part in answer for part in [*words, *names])
