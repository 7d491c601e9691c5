"""A chat page in the browser: streamed answers, several conversations, base and adapter side by side.

    python web_demo.py --base_model models/SmolLM2-135M-Instruct
    python web_demo.py --lora_model outputs/sft               # the base that the adapter names, and the adapter
    python web_demo.py --lora_model outputs/sft --server_name 0.0.0.0 --auth users.txt    # for others, with a login

It listens on 127.0.0.1 unless told otherwise. Answers are shown as text and Markdown; HTML in them is shown as text,
nothing in it is executed, and nothing is loaded from elsewhere. `pip install -r requirements-web.txt` installs gradio.
"""

from __future__ import annotations

from stagewise.training.first_look import first_look
from stagewise.web.server import FLAGS, WebArguments, check_web, serve

if __name__ == "__main__":
    first_look(FLAGS, __doc__, code=2)  # report a wrong flag or path before torch is imported

import os
import sys
import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger

import template as chat_templates  # noqa: F401  (registers them)
from stagewise.config.command_line import parse
from stagewise.errors import ArgumentError, ChatError, ChatModelError
from stagewise.inference.arguments import DRAWING, SamplingArguments
from stagewise.inference.chat_model import Answer, ChatModel
from stagewise.reports.error_hints import LESS_MEMORY, errors_explained
from stagewise.reports.logs import set_up_logging
from stagewise.reports.terminal_text import print_error
from stagewise.web.conversations import ADAPTER, BASE, Chat, Desk
from stagewise.web.translations import CHINESE, CHINESE_TAGS, ENGLISH, translate

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
try:
    import gradio as gr

    from stagewise.web.markdown import FORMULAS, escape_markdown, unescape_markdown
except ImportError as error:
    sys.exit(f"error: {error.name} is not installed: bash launch.sh set_up requirements-web.txt")

BOTH = "both"
SPEAKERS = {ADAPTER: (ADAPTER,), BASE: (BASE,), BOTH: (ADAPTER, BASE)}
EXAMPLES = ("example", "other_example")  # example questions of an empty conversation
LONGEST = 8192  # the largest answer limit that the page offers, in tokens
WAITING = 32  # the most questions that wait for the model
FRAME = 0.06  # seconds between updates of an answer
STYLE = """
.pane { flex-grow: 1 }
.pane .message-content, .pane .message { overflow-wrap: anywhere }
#head { align-items: center; flex-wrap: nowrap }
#head button { width: auto; min-width: max-content; flex: none; padding-inline: 12px }
.pane .bubble-wrap { margin-top: 38px; min-height: 0 }
#under { flex-wrap: nowrap }
#under button { min-width: 0 }
#note, #speed { opacity: .7; text-align: center; font-size: .85em }
#about { opacity: .8; font-size: .9em; overflow-wrap: anywhere }
#speed { min-height: 1.6em }
#examples { flex-wrap: wrap; justify-content: center }
#examples button { width: auto; flex: none; max-width: 100%; white-space: normal }
footer { display: none !important }
#chats label { width: 100% }
#chats label span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
#chats .wrap { max-height: 38vh; overflow-y: auto; flex-wrap: nowrap; flex-direction: column }
@media (max-width: 640px) {
    #panes { gap: 8px }
    #panes:has(#pane-base):has(#pane-adapter) .pane { height: 38dvh !important; min-height: 180px !important }
}
"""
DARK = """() => {
    document.body.classList.toggle('dark');
    document.body.style.background = 'var(--body-background-fill)';
}"""
LANGUAGE = "desk => [desk, document.documentElement.lang || navigator.language]"
# On a narrow screen the sidebar covers the page, so it starts closed.
NARROW = """() => {
    const open = document.querySelector('.sidebar.open .toggle-button');
    if (open && window.innerWidth < 768) open.click();
}"""


# ── the page ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Page:
    """The page of one chat model, which answers one question at a time.

    Args:
        speaker: the chat model; `stream` is called as in `ChatModel.stream`.
        sampling: initial values of the settings, and fixed values of those without a slider.
        compares: whether there is an adapter that can be switched off.
        about: the names of model, adapter and template, shown below the title.
    """

    def __init__(
        self,
        speaker: ChatModel,
        sampling: SamplingArguments,
        args: WebArguments,
        *,
        compares: bool,
        about: dict[str, str] | None = None,
    ):
        self.speaker, self.sampling, self.compares = speaker, sampling, compares
        self.start = {**_beginning(sampling).settled(speaker.defaults), "seed": sampling.seed}
        if not self.start["do_sample"]:
            self.start["temperature"] = 0
        # a value given by a flag is offered even if the page alone would not offer it
        self.longest = max(min(LONGEST, max(speaker.context - 64, 16)), self.start["max_new_tokens"])
        self.desks: weakref.WeakValueDictionary[str, Desk] = weakref.WeakValueDictionary()  # by browser session
        english, chinese = ({**words, "about": _about(words, about or {})} for words in (ENGLISH, CHINESE))
        self.words = gr.I18n(en=english, **dict.fromkeys(CHINESE_TAGS, chinese))
        with gr.Blocks(title=args.title, analytics_enabled=False, fill_height=True) as self.blocks:
            self.desk = gr.State(Desk(args.system_prompt))
            self.language = gr.Textbox(visible=False)
            with gr.Sidebar(open=True, width=330):
                self._list()
                self._settings()
            with gr.Row(elem_id="head"):
                gr.Markdown(f"## {escape_markdown(args.title)}")
                self.dark = gr.Button(self.words("dark"), size="sm", variant="secondary", elem_id="dark")
            if about:
                gr.Markdown(self.words("about"), elem_id="about")
            self._talk()
            self._wire()

    def _list(self) -> None:
        words = self.words
        self.new = gr.Button(words("new"), variant="primary", elem_id="new")
        self.chats = gr.Radio([], label=words("conversations"), elem_id="chats")
        self.delete = gr.Button(words("delete"), size="sm", elem_id="delete")
        names = [(words(name), name) for name in (ADAPTER, BASE, BOTH)]
        self.who = gr.Radio(names, value=ADAPTER, label=words("who"), visible=self.compares, elem_id="who")

    def _settings(self) -> None:
        words = self.words
        with gr.Accordion(words("settings"), open=False, elem_id="settings"):
            self.system = gr.Textbox(
                label=words("system"), info=words("system_help"), lines=2, max_lines=8, elem_id="system"
            )
            self.sliders = {
                "max_new_tokens": self._slider("max_new_tokens", 1, self.longest, 1),
                "temperature": self._slider("temperature", 0, 2, 0.01, info=words("temperature_help")),
                "top_p": self._slider("top_p", 0.01, 1, 0.01),
                "top_k": self._slider("top_k", 0, 200, 1),
                "min_p": self._slider("min_p", 0, 1, 0.01),
                "repetition_penalty": self._slider("repetition_penalty", 0.5, 2, 0.01),
                "seed": gr.Number(
                    self.start["seed"], precision=0, label=words("seed"), info=words("seed_help"), elem_id="seed"
                ),
            }
            self.reset = gr.Button(words("reset"), size="sm", elem_id="reset")

    def _slider(self, name: str, low: float, high: float, step: float, **more: Any) -> gr.Slider:
        """A slider whose range includes its initial value: gradio otherwise refuses the value at every answer."""
        value = self.start[name]
        return gr.Slider(
            min(low, value), max(high, value), value, step=step, label=self.words(name), elem_id=name, **more
        )

    def _talk(self) -> None:
        words = self.words
        looks = {
            "height": "calc(100dvh - 330px)",
            "min_height": 240,
            "editable": "user",
            "buttons": ["copy"],
            "layout": "bubble",
            "elem_classes": "pane",
            "min_width": 280,
            "latex_delimiters": [{"left": a, "right": b, "display": a != "\\("} for a, b in FORMULAS],
            "feedback_options": None,
            "sanitize_html": True,
            "allow_tags": False,
        }
        with gr.Row(elem_id="panes"):
            label = words("adapter" if self.compares else "model")
            self.panes = {ADAPTER: gr.Chatbot(label=label, elem_id="pane-adapter", **looks)}
            if self.compares:
                self.panes[BASE] = gr.Chatbot(label=words("base"), elem_id="pane-base", visible=False, **looks)
        with gr.Row(elem_id="examples") as self.examples:
            self.example = {key: gr.Button(words(key), size="sm") for key in EXAMPLES}
        self.speed = gr.Markdown(elem_id="speed")
        self.box = gr.Textbox(
            placeholder=words("question"), show_label=False, lines=1, max_lines=10, submit_btn=True, autofocus=True,
            elem_id="box",
        )  # fmt: skip
        with gr.Row(elem_id="under"):
            self.again = gr.Button(words("retry"), size="sm", elem_id="again")
            self.clear = gr.Button(words("clear"), size="sm", elem_id="clear")
        gr.Markdown(words("note"), elem_id="note")

    # ── what happens ────────────────────────────────────────────────────────────────────────────────────────────

    def _wire(self) -> None:
        self.view = [*self.panes.values(), self.chats, self.box, self.speed, self.system, self.examples]
        # Actions that may fail go through a queue of their own: gradio shows error messages only from a queue.
        told = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
        at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        plain = {"inputs": self.desk, "outputs": self.view, **at_once}
        self._asks(self.box.submit, self.ask, [self.desk, self.system, self.who, self.box], told)
        self._asks(self.again.click, self.retry, [self.desk, self.system, self.who], told)
        for key, button in self.example.items():
            self._asks(button.click, partial(self.ask_example, key), [self.desk, self.system, self.who], told)
        for who, pane in self.panes.items():
            self._asks(pane.edit, self.edit, [self.desk, self.system, self.who, gr.State(who)], told)
            self._asks(pane.retry, self.retry, [self.desk, self.system, gr.State(who)], told)
        self.box.stop(self.stop, trigger_mode="multiple", **plain)
        gr.on([self.clear.click, *(pane.clear for pane in self.panes.values())], self.empty, **plain)
        self.new.click(self.begin, **plain)
        self.delete.click(self.drop, **plain)
        self.chats.input(self.open, [self.desk, self.chats], self.view, **told)
        self.system.blur(self.keep_system, [self.desk, self.chats, self.system], None, **at_once)
        self.dark.click(None, js=DARK)
        sliders = list(self.sliders.values())
        self.reset.click(lambda: [slider.value for slider in sliders], None, sliders, **at_once)
        self.blocks.load(self.arrive, [self.desk, self.language], self.view, js=LANGUAGE, **at_once)
        self.blocks.load(None, js=NARROW)
        self.blocks.unload(self.leave)
        if self.compares:
            self.who.change(self.show_panes, self.who, list(self.panes.values()), **at_once)

    def _asks(self, trigger: Any, begin: Any, inputs: list, options: dict[str, Any]) -> None:
        """The event that starts a job, then the job itself: one at a time over all visitors."""
        asked = trigger(begin, inputs, self.view, **{**options, "trigger_mode": "multiple"})
        asked.then(
            self.answer, [self.desk, *self.sliders.values()], self.view[:-2],
            concurrency_limit=1, concurrency_id="model", trigger_mode="multiple", show_progress="minimal",
            api_visibility="private",
        )  # fmt: skip

    def arrive(self, desk: Desk, language: str, request: gr.Request) -> list:
        """Renders the page for a new visitor."""
        desk.language = str(language)
        self.desks[request.session_hash] = desk
        return self.look(desk)

    def leave(self, request: gr.Request) -> None:
        """Stops the answers of a visitor who has left."""
        if request.session_hash in self.desks:
            self.desks[request.session_hash].leave()

    def ask(self, desk: Desk, system: str, who: str, question: str) -> list:
        """Adds the question to the open chat."""
        return self._job(desk, system, lambda chat: chat.ask(question, SPEAKERS[who]), emptied=True)

    def ask_example(self, key: str, desk: Desk, system: str, who: str) -> list:
        """Asks one of the example questions, in the visitor's language."""
        return self._job(desk, system, lambda chat: chat.ask(translate(key, desk.language), SPEAKERS[who]))

    def retry(self, desk: Desk, system: str, who: str) -> list:
        return self._job(desk, system, lambda chat: chat.retry(SPEAKERS[who]))

    def edit(self, desk: Desk, system: str, who: str, pane: str, change: gr.EditData) -> list:
        """Replaces a question: `change.index` counts the messages of the pane in which it was edited."""

        def edited(chat: Chat):
            lines = list(chat.lines(pane))
            place = change.index if isinstance(change.index, int) else change.index[0]
            if not 0 <= place < len(lines) or lines[place][1] != "user":
                raise ChatError("gone")
            return chat.edit(lines[place][0], unescape_markdown(str(change.value)), SPEAKERS[who])

        return self._job(desk, system, edited)

    def _job(self, desk: Desk, system: str, begin: Any, *, emptied: bool = False) -> list:
        desk.current.system = system
        try:
            desk.put(begin(desk.current))
        except ChatError as error:
            gr.Warning(translate(error.key, desk.language))
            return self.look(desk)
        view = self.look(desk)
        if emptied:
            view[len(self.panes) + 1] = gr.Textbox(value="", submit_btn=False, stop_btn=True)
        return view

    def answer(self, desk: Desk, *settings: Any) -> Iterator[list]:
        """Answers the visitor's oldest question, piece by piece."""
        job = desk.next_job()
        if job is None:
            yield [gr.skip()] * (len(self.panes) + 3)
            return
        try:
            sampling = self.chosen(dict(zip(self.sliders, settings, strict=True)))
            for who in job.speakers:
                text, seen, began = "", 0.0, time.monotonic()
                if job.stop.is_set():
                    break
                conversation = job.chat.conversation(job.turn, who)
                pieces = Pieces(self.speaker.stream(conversation, sampling, adapter=who == ADAPTER, stop=job.stop))
                for piece in pieces:
                    text += piece
                    job.turn.answers[who] = text
                    if time.monotonic() - seen > FRAME:
                        seen = time.monotonic()
                        yield self._growing(desk, job.chat)
                job.turn.answers[who] = text
                if pieces.answer is not None:
                    job.turn.costs[who] = len(pieces.answer.token_ids), time.monotonic() - began
        except ChatModelError as error:
            gr.Warning(str(error))
        except Exception:
            logger.exception("an answer failed")
            gr.Warning(translate("failed", desk.language))
        finally:
            job.stop.set()  # the page may be closed
            desk.finish(job)
        yield self._growing(desk, job.chat)

    def _growing(self, desk: Desk, chat: Chat) -> list:
        """The parts of the page that change while `chat` is answered; nothing if the visitor looks at another chat."""
        if desk.current is not chat:
            return [gr.skip()] * (len(self.panes) + 3)
        panes = [self.messages(desk, who) for who in self.panes]
        if chat.job:
            return [*panes, gr.skip(), gr.skip(), gr.skip()]
        return [*panes, self._titles(desk), self._box(chat), self._speed(desk)]

    def chosen(self, values: dict[str, Any]) -> SamplingArguments:
        """The settings of the page; at temperature 0 sampling settings and the seed are left out."""
        if not values["temperature"]:
            values |= dict.fromkeys({*DRAWING, "seed"} - {"temperature"})
        seed, longest = values["seed"], min(int(values["max_new_tokens"]), self.longest)
        whole = {"max_new_tokens": longest, "seed": None if seed is None else int(seed), "num_beams": 1}
        if values["top_k"] is not None:
            whole["top_k"] = int(values["top_k"])
        return replace(self.sampling, **{**values, **whole}, do_sample=None)

    def stop(self, desk: Desk) -> list:
        desk.current.stop()
        return self.look(desk)

    def empty(self, desk: Desk) -> list:
        desk.current.clear()
        return self.look(desk)

    def begin(self, desk: Desk) -> list:
        desk.new()
        return self.look(desk)

    def drop(self, desk: Desk) -> list:
        desk.delete()
        return self.look(desk)

    def open(self, desk: Desk, number: int) -> list:
        try:
            desk.open(number)
        except ChatError as error:
            gr.Warning(translate(error.key, desk.language))
        return self.look(desk)

    def keep_system(self, desk: Desk, number: int, system: str) -> None:
        """Saves a system prompt to the chat it was written for: the click that left the box may have opened another
        chat.
        """
        with suppress(ChatError):
            desk.chat(number).system = system

    # ── what is seen ────────────────────────────────────────────────────────────────────────────────────────────

    def look(self, desk: Desk) -> list:
        """Everything that shows the open chat."""
        chat = desk.current
        panes = [self.messages(desk, who) for who in self.panes]
        examples = gr.Row(visible=not chat.turns)
        return [*panes, self._titles(desk), self._box(chat), self._speed(desk), chat.system, examples]

    def show_panes(self, who: str) -> list:
        return [gr.Chatbot(visible=pane in SPEAKERS[who]) for pane in self.panes]

    def _titles(self, desk: Desk) -> gr.Radio:
        choices = [(chat.title or translate("untitled", desk.language), chat.number) for chat in desk.chats]
        return gr.Radio(choices, value=desk.current.number)

    def _speed(self, desk: Desk) -> str:
        """The speed of the last answer, for each chat model that gave one."""
        turns, language = desk.current.turns, desk.language
        found = []
        for who, (tokens, seconds) in (turns[-1].costs if turns else {}).items():
            words = translate("tokens_per_second", language).format(tokens=tokens, speed=f"{tokens / seconds:.1f}")
            found.append(f"{translate(who, language)}: {words}" if self.compares else words)
        return " · ".join(found)

    @staticmethod
    def _box(chat: Chat) -> gr.Textbox:
        return gr.Textbox(submit_btn=chat.job is None, stop_btn=chat.job is not None)

    def messages(self, desk: Desk, speaker: str) -> list[dict[str, Any]]:
        """The open chat with one chat model as gradio shows it; an answer of the other model says so."""
        found, lines = [], list(desk.current.lines(speaker))
        for place, (_, kind, text, own) in enumerate(lines, 1):
            role = "user" if kind == "user" else "assistant"
            body = escape_markdown(text) or (translate("no_words", desk.language) if role == "assistant" else "")
            message: dict[str, Any] = {"role": role, "content": {"type": "text", "text": body}}
            if kind == "thoughts":
                status = "pending" if desk.current.job and place == len(lines) else "done"
                message["metadata"] = {"title": translate("thoughts", desk.language), "status": status}
            elif not own:
                other = BASE if speaker == ADAPTER else ADAPTER
                note = {"type": "text", "text": f"*{translate(f'said_by_{other}', desk.language)}*"}
                message["content"] = [message["content"], note]
            found.append(message)
        return found

    def serve(self, web: WebArguments, pairs: list[tuple[str, str]] | None, *, wait: bool = True) -> str:
        """Serves the page; returns its address, or with `wait` only returns once the server has stopped."""
        self.blocks.queue(max_size=WAITING)
        return serve(self.blocks, web, pairs, i18n=self.words, css=STYLE, wait=wait)


class Pieces:
    """A stream of pieces that keeps the stream's return value: the Answer, or None."""

    def __init__(self, stream: Generator[str, None, Answer]):
        self.stream, self.answer = stream, None

    def __iter__(self) -> Iterator[str]:
        self.answer = yield from self.stream


def _about(words: dict[str, str], about: dict[str, str]) -> str:
    """One line of Markdown with the names of model, adapter and template."""
    return " · ".join(f"{words[f'has_{name}']} **{escape_markdown(value)}**" for name, value in about.items())


def names_of(speaker: ChatModel, adapter: str | None) -> dict[str, str]:
    """The names of model, adapter and template, without local folders."""
    found = {"model": short_name(speaker.base.name_or_path)}
    if adapter and speaker.adapter is not None:
        found["adapter"] = f"{short_name(adapter)} ({speaker.adapter.peft_type.value})"
    return found | {"template": speaker.template.name}


def short_name(source: str) -> str:
    """A hub name unchanged; the last part of a directory, for a checkpoint the run's name, too."""
    path = Path(source)
    if not path.is_dir():
        return source
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name.startswith("checkpoint-") else path.name


def _beginning(sampling: SamplingArguments) -> SamplingArguments:
    """The flags without the seed, which does not apply at temperature 0 until the slider is moved."""
    return replace(sampling, seed=None)


def check(web: WebArguments, sampling: SamplingArguments) -> list[tuple[str, str]] | None:
    """Refuses flags that cannot be honored, before weights are read; returns the logins."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ArgumentError("web_demo.py is one process: start it with python, not with torchrun")
    if sampling.num_beams not in (None, 1):
        raise ArgumentError("--num_beams: a streamed answer has one beam; use inference.py for more")
    _beginning(sampling).settled()
    return check_web(web)


def main(argv: list[str] | None = None) -> None:
    args, sampling, web = parse(FLAGS, argv, description=__doc__)
    pairs = check(web, sampling)
    with errors_explained("output_dir", None, LESS_MEMORY, status=2):
        speaker = ChatModel.load(args)
    speaker.longest_question(_beginning(sampling).settled(speaker.defaults)["max_new_tokens"])
    about = names_of(speaker, args.lora_model)
    Page(speaker, sampling, web, compares=speaker.adapter is not None, about=about).serve(web, pairs)


if __name__ == "__main__":
    set_up_logging()
    try:
        main()
    except ArgumentError as error:
        print_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
