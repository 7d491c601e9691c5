"""Tools, calls and observations in each family's format; the same text from Python and from Jinja.

A format is a few pieces, like a `stagewise.chat.template.Template`. For Qwen:

    context  "<|im_start|>system\\n…# Tools…<tools>\\n{…}\\n</tools>…<|im_end|>\\n<|im_start|>user\\nWeather?…"
    learned  "<tool_call>\\n{"name": "get_weather", "arguments": {"city": "Rome"}}\\n</tool_call><|im_end|>"
    context  "\\n<|im_start|>user\\n<tool_response>\\nsunny\\n</tool_response><|im_end|>\\n<|im_start|>assistant\\n"
    learned  "It is sunny.<|im_end|>"
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stagewise.chat.jinja import as_jinja, as_json, fill, quoted
from stagewise.formats.parsers import ANSWERS, Message

# A call and a tool in Jinja; clients send {"type": "function", "function": {…}}, some only the inner object.
_CALL = {
    "name": 'call["name"]',
    "arguments": '(call["arguments"] if call["arguments"] is string else call["arguments"] | tojson)',
}
_TOOL = {
    "name": 'tool["function"]["name"]',
    "tool": "tool | tojson",
    "indented_tool": "tool | tojson(indent=4)",
    "function": 'tool["function"] | tojson',
    "indented_function": 'tool["function"] | tojson(indent=4)',
}
_TOLD = {"content": 'message["content"]', "quoted": 'message["content"] | tojson'}


@dataclass(frozen=True)
class ToolForm:
    """How a family lists its tools, calls them and receives their results.

    `tool` may contain {name} {tool} {indented_tool} {function} {indented_function}; {tools} is all of them. `system`
    contains {tools} and the system prompt: {system}, and {gap}, which is empty if there is no system prompt;
    `before_user` precedes the first user turn, `in_user` is at the beginning of its words. `call` contains {name} and
    {arguments}, `calls` the {calls}; `observation` contains {content}, or {quoted} for its JSON text.
    """

    name: str
    tool: str
    call: str
    observation: str
    between_tools: str = "\n"
    system: str = "{system}"
    own_system: str = ""  # a separate system turn before that of the system prompt
    before_user: str = ""
    in_user: str = ""
    gap: str = "\n\n"
    calls: str = "{calls}"
    between_calls: str = "\n"
    after_words: str = "\n"  # between words and calls of one turn
    as_words: bool = True  # calls take the place of the words; False: of the template's `answer` piece
    between_observations: str = "\n"
    observations: str = "{observations}"
    own_turn: bool = False  # observations are a separate turn; False: the content of a user turn
    lead: str | None = None  # the end of a prompt after observations, if not the template's `lead`
    end: str | None = None  # the end of calls, if not the template's `end`; observations that begin with it omit it

    # --- text --------------------------------------------------------------------------------------------------------

    def listing(self, tools: Sequence[dict[str, Any]]) -> str:
        """All tools, each {"type": "function", "function": {…}}, in the family's format."""
        return self.between_tools.join(
            fill(
                self.tool,
                name=tool["function"]["name"],
                tool=as_json(tool),
                indented_tool=as_json(tool, 4),
                function=as_json(tool["function"]),
                indented_function=as_json(tool["function"], 4),
            )
            for tool in tools
        )

    def say_system(self, tools: Sequence[dict[str, Any]], system: str) -> str:
        """The system prompt with the tools, if this format lists them there."""
        return fill(self.system, tools=self.listing(tools), system=system, gap=self.gap if system else "")

    def say_calls(self, calls: Sequence[dict[str, Any]]) -> str:
        """One or more calls {"name", "arguments"} of one turn."""
        said = (fill(self.call, name=call["name"], arguments=_arguments(call)) for call in calls)
        return fill(self.calls, calls=self.between_calls.join(said))

    def say_observations(self, contents: Sequence[str]) -> str:
        """The results of the tools in reply to one turn."""
        told = (fill(self.observation, content=content, quoted=as_json(content)) for content in contents)
        text = fill(self.observations, observations=self.between_observations.join(told))
        return text.removeprefix(self.end or "")

    # --- Jinja -------------------------------------------------------------------------------------------------------

    def jinja_listing(self) -> str:
        """Jinja statements that set `listing` to `listing(tools)`."""
        tool = as_jinja(self.tool, **_TOOL)
        return f"{{% set listing %}}{_loop('tool', 'tools', tool, self.between_tools)}{{% endset %}}"

    def jinja_system(self) -> str:
        """A Jinja expression for `say_system(tools, system)`, after `jinja_listing`."""
        gap = f'({quoted(self.gap)} if system else "")'
        return as_jinja(self.system, tools="listing", system="system", gap=gap)

    def jinja_calls(self) -> str:
        """Jinja statements that set `calls` to `say_calls` of an assistant message, "" if it has no calls."""
        unwrap = '{% set call = item["function"] if "function" in item else item %}'
        call = as_jinja(self.call, **_CALL)
        before, after = self.calls.split("{calls}")
        loop = (
            f'{{% for item in message["tool_calls"] %}}{unwrap}{{{{ {call} }}}}'
            f"{{% if not loop.last %}}{{{{ {quoted(self.between_calls)} }}}}{{% endif %}}{{% endfor %}}"
        )
        return (
            f'{{% set calls %}}{{% if message["tool_calls"] %}}{{{{ {quoted(before)} }}}}{loop}'
            f"{{{{ {quoted(after)} }}}}{{% endif %}}{{% endset %}}"
        )

    def jinja_observation(self, before: str = '""', after: str = '""') -> str:
        """Jinja statements for one tool message; `before` and `after` are the expressions around all of one turn's."""
        begin, end = self.observations.split("{observations}")
        first = '{% if loop.first or turns[loop.index0 - 1]["role"] != "tool" %}'
        last = '{% if loop.last or turns[loop.index0 + 1]["role"] != "tool" %}'
        opening = begin + self.observation if self.end else begin
        opening = as_jinja(opening.removeprefix(self.end or ""), **_TOLD)
        said = f"{{{{ {as_jinja(self.observation, **_TOLD)} }}}}"
        start = f"{first}{{{{ {before} + {opening} }}}}{{% endif %}}{said}"
        if self.end:  # the first observation omits the end of the call
            start = f"{first}{{{{ {before} + {opening} }}}}{{% else %}}{said}{{% endif %}}"
        joint = f"{{% else %}}{{{{ {quoted(self.between_observations)} }}}}{{% endif %}}"
        return f"{start}{last}{{{{ {quoted(end)} + {after} }}}}{joint}"


@dataclass(frozen=True)
class Turn:
    """Messages that form one turn: words and calls of an answer, or the observations that reply to it."""

    role: str  # user, assistant or observation
    words: str
    calls: tuple[dict[str, Any], ...] = ()
    observations: tuple[str, ...] = ()
    learn: bool = True


def turns(messages: Sequence[Message]) -> list[Turn]:
    """Groups messages into turns; a turn has labels only if all its messages do."""
    grouped: list[list[Message]] = []
    for message in messages:
        goes_on = grouped and (
            (message.role == "tool_call" and grouped[-1][-1].role in ANSWERS)
            or (message.role == "observation" == grouped[-1][-1].role)
        )
        if goes_on:
            grouped[-1].append(message)
        else:
            grouped.append([message])
    return [
        Turn(group[0].role, group[0].content, learn=group[0].learn)
        if len(group) == 1 and group[0].role in ("user", "assistant")
        else _turn(group)
        for group in grouped
    ]


def openai_tools(tools: str | None) -> list[dict[str, Any]] | None:
    """A conversation's tools in the form that chat templates take."""
    if tools is None:
        return None
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in json.loads(tools)]


def openai_messages(said: Sequence[Turn], system: str | None = None) -> list[dict[str, Any]]:
    """Turns in the form that chat templates take; words and tool calls of one turn are one message."""
    given: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for turn in said:
        if turn.role == "observation":
            given += [{"role": "tool", "content": content} for content in turn.observations]
            continue
        given.append({"role": turn.role, "content": turn.words})
        if turn.calls:
            given[-1]["tool_calls"] = [{"type": "function", "function": call} for call in turn.calls]
    return given


def _turn(group: Sequence[Message]) -> Turn:
    learn = all(message.learn for message in group)
    if group[0].role == "observation":
        return Turn("observation", "", observations=tuple(message.content for message in group), learn=learn)
    words = group[0].content if group[0].role == "assistant" else ""
    calls = tuple(_call(message.content) for message in group if message.role == "tool_call")
    return Turn("assistant", words, calls, learn=learn)


def _call(text: str) -> dict[str, Any]:
    call = json.loads(text)
    arguments = call.get("arguments", {})
    return {"name": call["name"], "arguments": _parsed(arguments) if isinstance(arguments, str) else arguments}


def _parsed(arguments: str) -> Any:
    """OpenAI's clients send arguments as JSON text, templates take the object; other text stays text."""
    try:
        return json.loads(arguments)
    except json.JSONDecodeError:
        return arguments


def _arguments(call: dict[str, Any]) -> str:
    return call["arguments"] if isinstance(call["arguments"], str) else as_json(call["arguments"])


def _loop(name: str, of: str, said: str, between: str) -> str:
    joint = f"{{% if not loop.last %}}{{{{ {quoted(between)} }}}}{{% endif %}}"
    return f"{{% for {name} in {of} %}}{{{{ {said} }}}}{joint}{{% endfor %}}"


# --- the families ----------------------------------------------------------------------------------------------------

QWEN = ToolForm(  # the chat template of Qwen2.5 and Qwen3; Hermes 2 Pro's words
    "qwen",
    tool="{tool}",
    system="{system}{gap}# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
    call='<tool_call>\n{"name": "{name}", "arguments": {arguments}}\n</tool_call>',
    observation="<tool_response>\n{content}\n</tool_response>",
)
LLAMA3 = ToolForm(  # the chat template of Llama 3.1, tools in the user's first turn; several calls as vLLM reads them
    "llama3",
    tool="{indented_tool}\n\n",
    between_tools="",
    system="Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{system}",
    in_user="Given the following functions, please respond with a JSON for a function call with its proper arguments "
    'that best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
    "argument name and its value}.Do not use variables.\n\n{tools}",
    call='{"name": "{name}", "parameters": {arguments}}',
    between_calls="; ",
    observation="<|start_header_id|>ipython<|end_header_id|>\n\n{quoted}<|eot_id|>",
    between_observations="",
    own_turn=True,
)
MISTRAL = ToolForm(  # the chat template of Mistral-7B-Instruct-v0.3, without the identifiers of calls
    "mistral",
    tool='{"type": "function", "function": {function}}',
    between_tools=", ",
    before_user="[AVAILABLE_TOOLS] [{tools}][/AVAILABLE_TOOLS]",
    calls="[TOOL_CALLS] [{calls}]",
    call='{"name": "{name}", "arguments": {arguments}}',
    between_calls=", ",
    after_words="",
    as_words=False,
    observation='[TOOL_RESULTS] {"content": {content}}[/TOOL_RESULTS]',
    between_observations="",
    own_turn=True,
)
GLM4 = ToolForm(  # the chat template of GLM-4-9B-0414: a call is an assistant turn with a name in its header
    "glm4",
    tool="## {name}\n\n{indented_function}\n在调用上述函数时，请使用 Json 格式表示调用的参数。",
    between_tools="\n\n",
    own_system="# 可用工具\n\n{tools}",
    call="{name}\n{arguments}",
    between_calls="<|assistant|>",
    after_words="<|assistant|>",
    as_words=False,
    end="<|observation|>",
    observation="<|observation|>\n{content}",
    between_observations="",
    own_turn=True,
)
DEEPSEEK = ToolForm(  # calls and outputs: the chat template of DeepSeek-V3; the list of tools: vLLM's template for it
    "deepseek",
    tool="{tool}",
    system="{system}{gap}# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}\n</tools>\n\n"
    "For function call returns, you should first print <｜tool▁calls▁begin｜>\n"
    "For each function call, you should return object like:\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    "<function_name>\n```json\n<function_arguments_in_json_format>\n```<｜tool▁call▁end｜>\n"
    "At the end of function call returns, you should print <｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
    calls="<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>",
    call="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>",
    after_words="",
    observation="<｜tool▁output▁begin｜>{content}<｜tool▁output▁end｜>",
    between_observations="",
    observations="<｜tool▁outputs▁begin｜>{observations}<｜tool▁outputs▁end｜>",
    own_turn=True,
    lead="",
)
DEFAULT = ToolForm(  # ReAct, https://arxiv.org/abs/2210.03629, with the input as JSON
    "default",
    tool="{function}",
    system="{system}{gap}You can call these tools, each described by its JSON schema:\n{tools}\n\n"
    "To call a tool, answer with its name and its arguments as a JSON object:\n"
    'Action: tool name\nAction Input: {"argument name": value}\n\n'
    "What it returns is given to you as:\nObservation: result",
    call="Action: {name}\nAction Input: {arguments}",
    observation="Observation: {content}",
)
FORMS: dict[str, ToolForm] = {form.name: form for form in (QWEN, LLAMA3, MISTRAL, GLM4, DEEPSEEK, DEFAULT)}
