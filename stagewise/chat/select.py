"""Chooses the chat template for training and serving: --template_name, else the tokenizer's own, else vicuna.

The choice is saved in the tokenizer, text and name, and follows it through adapter, merge and the next stage. Changing
it later would leave the model with two formats, so that is refused unless --force_template is given.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from loguru import logger

from stagewise.artifacts.json_files import read_object
from stagewise.chat import thinking
from stagewise.chat.jinja import quoted
from stagewise.chat.registry import templates_by_name
from stagewise.chat.reward_template import SCORED_AT, TRAINED_IN, without_ending
from stagewise.chat.template import Template
from stagewise.chat.tokenizer_template import WAY_OUT, TokenizerTemplate, knows_thinking
from stagewise.config.arguments import ChatArguments
from stagewise.errors import ArgumentError, InexactCut
from stagewise.formats.parsers import Conversation, Message

EXAMPLE = Conversation((Message("user", "Hi"), Message("assistant", "Hello")))

AnyTemplate = Template | TokenizerTemplate


def choose_template(tokenizer: Any, chat: ChatArguments, earlier: str | None = None) -> AnyTemplate:
    """The template to train and serve with.

    Args:
        tokenizer: gets the template's text as its chat template, and its name for later stages.
        chat: --template_name, --force_template, --enable_thinking.
        earlier: the directory of an adapter that this run continues from; the template it was trained with counts.

    Raises:
        ArgumentError: an unknown name, a template that the tokenizer has no tokens for or that can't be cut exactly,
            another template than the model was trained with, or a flag without effect.
    """
    if earlier:
        _take_over(tokenizer, Path(earlier))
    own, trained_in = _own_text(tokenizer), tokenizer.init_kwargs.get(TRAINED_IN)
    if chat.template_name:
        template = _bound(tokenizer, chat)
        _check_lineage(tokenizer, chat, template, own, trained_in)
        name = chat.template_name
        instead = ", in place of the tokenizer's own" if own and not trained_in else ""
        logger.info(f"template: {name} (--template_name){instead}")
    elif chat.force_template:
        raise ArgumentError("--force_template has no effect without --template_name: give both or neither")
    elif own:
        template = _of_table(tokenizer, chat, own, trained_in) or _own_template(tokenizer, chat, own)
        name = trained_in or template.name
        since = ", which the model was trained with" if trained_in else ""
        logger.info(f"template: {name}{since}; answers end with {template.stop}")
    else:
        template = _bound(tokenizer, replace(chat, template_name="vicuna"))
        name = template.name
        logger.info("template: vicuna, because the tokenizer has none (another: --template_name)")
    tokenizer.chat_template = template.jinja()
    tokenizer.init_kwargs[TRAINED_IN] = name
    tokenizer.init_kwargs.pop(SCORED_AT, None)  # of a reward model, whose row format is set after this
    return template


# --- pieces ----------------------------------------------------------------------------------------------------------


def _take_over(tokenizer: Any, folder: Path) -> None:
    """The chat template in an adapter's directory, if it has one."""
    config, text = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if not config.is_file():  # an adapter from elsewhere, without its tokenizer
        return
    known = read_object(config, "copy the adapter's directory again")
    own = text.read_text(encoding="utf-8") if text.is_file() else known.get("chat_template")
    if own:
        tokenizer.chat_template = own
        if known.get(TRAINED_IN):
            tokenizer.init_kwargs[TRAINED_IN] = known[TRAINED_IN]


def _own_text(tokenizer: Any) -> str | None:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            raise ArgumentError(f"the tokenizer's chat templates {sorted(own)} have no default; {WAY_OUT}")
        own = own["default"]
    return without_ending(own) if own else own


def _bound(tokenizer: Any, chat: ChatArguments) -> Template:
    name, table = chat.template_name, templates_by_name()
    if name not in table:
        raise ArgumentError(f"--template_name: unknown template {name!r}; known: {', '.join(table)}")
    if chat.enable_thinking is not None and not table[name].thinking:
        raise ArgumentError(_no_thinking(f"the template {name}"))
    return replace(table[name].bind(tokenizer), enable_thinking=chat.enable_thinking)


def _no_thinking(what: str) -> str:
    return (
        f"--enable_thinking: {what} has no place for thoughts; leave the flag out, or choose a form that has "
        "(--template_name qwen3, or a model whose own chat template knows enable_thinking)"
    )


def _check_lineage(
    tokenizer: Any, chat: ChatArguments, template: Template, own: str | None, trained_in: str | None
) -> None:
    """Raises ArgumentError if the model was trained with another template, or --force_template changes nothing."""
    other = own and trained_in and thinking.thinking_default(own)[1] != thinking.thinking_default(template.jinja())[1]
    if other and not chat.force_template:
        turns = [{"role": message.role, "content": message.content} for message in EXAMPLE.messages]
        before = tokenizer.apply_chat_template(turns, chat_template=own, tokenize=False)
        now = "".join(segment.text for segment in template.segments(EXAMPLE))
        raise ArgumentError(
            f"--template_name {template.name}: the model was trained with {trained_in}; with two templates it would "
            f"use neither well\n  {trained_in}: {_beginning(before)}\n  {template.name}: {_beginning(now)}\n"
            f"leave --template_name out to continue with {trained_in}, or add --force_template"
        )
    if chat.force_template and not other:
        found = f"with {trained_in}, the same template" if trained_in else "with no template of this project"
        raise ArgumentError(f"--force_template has no effect: the model was trained {found}; leave it out")


def _beginning(text: str) -> str:
    return quoted(text[:160] + ("…" if len(text) > 160 else ""))


def _of_table(tokenizer: Any, chat: ChatArguments, own: str, trained_in: str | None) -> Template | None:
    """The template of the table that the tokenizer's text was made from, by its saved name and exact text."""
    asked, text = thinking.thinking_default(own)
    table = templates_by_name()
    if trained_in not in table:
        return None
    try:
        template = table[trained_in].bind(tokenizer)
    except ArgumentError:  # another tokenizer has been put beside the text since
        return None
    if template.jinja() != text:
        return None
    if chat.enable_thinking is None:
        return replace(template, enable_thinking=asked)
    return _bound(tokenizer, replace(chat, template_name=trained_in))


def _own_template(tokenizer: Any, chat: ChatArguments, own: str) -> TokenizerTemplate:
    if chat.enable_thinking is not None and not knows_thinking(own):
        raise ArgumentError(_no_thinking("the tokenizer's own chat template"))
    try:
        return TokenizerTemplate(tokenizer, own, enable_thinking=chat.enable_thinking)
    except InexactCut as error:
        from trl.chat_template_utils import get_training_chat_template

        if knows_thinking(own) and chat.enable_thinking is not False:
            error = InexactCut(f"{error}; or, for answers without thoughts, --enable_thinking False")
        try:
            training = get_training_chat_template(tokenizer)
        except ValueError:
            raise error from None
        if training is None or (chat.enable_thinking is not None and not knows_thinking(training)):
            raise error from None
        try:
            return TokenizerTemplate(
                tokenizer, training, "TRL's training form of the tokenizer's", chat.enable_thinking
            )
        except InexactCut:  # the owner of a tokenizer can look up problems of its template
            raise error from None
