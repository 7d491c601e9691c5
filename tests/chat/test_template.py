"""Template: pieces → segments, learned or not, and Jinja that says the same. The table's own forms stand, written out,
in test_template_forms.py, tools in test_tool_forms.py, a tokenizer's own template in test_own_template.py.
"""

import jinja2
import pytest
from tokenizers import AddedToken

from stagewise.chat.template import Joined, Template, adds_bos
from stagewise.errors import ArgumentError, RecordError
from stagewise.formats.parsers import Conversation, Message
from template import TEMPLATES


def talk(*texts, system=None):
    roles = ("user", "assistant")
    messages = tuple(Message(roles[number % 2], text) for number, text in enumerate(texts))
    return Conversation(messages, system, where="a.jsonl:7")


def openai(conversation):
    system = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
    return system + [{"role": message.role, "content": message.content} for message in conversation.messages]


def joined(segments):
    return "".join(segment.text for segment in segments)


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer):
    found = {"plain": tiny_tokenizer(), "adds bos": tiny_tokenizer(adds_bos=True), "no bos": tiny_tokenizer(bos=False)}
    for tokenizer in found.values():
        tokenizer.add_tokens([AddedToken(marker, special=True) for marker in ("<|im_start|>", "<|im_end|>")])
    return found


# --- what the pieces of a form do ------------------------------------------------------------------------------------


def texts(template, conversation, **more):
    """The segments in short: learned ones begin with a star; the Jinja text must be the same."""
    segments = template.segments(conversation, **more)
    jinja = jinja2.Environment().from_string(template.jinja())
    rendered = jinja.render(messages=openai(conversation), add_generation_prompt=more.get("generation", False))
    assert rendered == joined(segments)
    return ["*" * segment.learn + segment.text for segment in segments]


def test_a_new_form_is_a_few_pieces(tokenizers):
    template = Template("mine", user="Q: {content}\n", lead="A:", answer=" {content}", end="{eos}", after="\n")
    template = template.bind(tokenizers["plain"])
    conversation = talk("Hi", "Hello", "Bye", "Ciao", system="S|")
    assert texts(template, conversation) == ["S|Q: Hi\nA:", "* Hello</s>", "\nQ: Bye\nA:", "* Ciao</s>", "\n"]
    assert texts(template, talk("Hi", "Hello", "Bye"), generation=True) == [
        "Q: Hi\nA:", "* Hello</s>", "\nQ: Bye\nA:",
    ]  # fmt: skip
    assert template.stop == "</s>"


def test_the_system_piece_stands_before_or_inside_the_first_question(tokenizers):
    conversation = talk("Hi", "Hello", "Bye", "Ciao", system="S")
    before = Template("before", system="[{content}]", user="({content})", lead="").bind(tokenizers["plain"])
    assert texts(before, conversation) == ["[S](Hi)", "*Hello</s>", "(Bye)", "*Ciao</s>"]
    inside = Template("inside", system="[{content}]", user="({system}{content})", lead="").bind(tokenizers["plain"])
    assert texts(inside, conversation) == ["([S]Hi)", "*Hello</s>", "(Bye)", "*Ciao</s>"]
    assert texts(inside, talk("Hi", "Hello")) == ["(Hi)", "*Hello</s>"]


def test_a_default_system_prompt_and_one_that_is_always_there(tokenizers):
    default = Template("default", system="[{content}]", default_system="D", user="({content})", lead="")
    default = default.bind(tokenizers["plain"])
    assert texts(default, talk("Hi", "Hello")) == ["[D](Hi)", "*Hello</s>"]
    assert texts(default, talk("Hi", "Hello", system="S")) == ["[S](Hi)", "*Hello</s>"]
    assert texts(default, talk("Hi", "Hello", system="")) == ["(Hi)", "*Hello</s>"]
    always = Template("always", system="[{content}]", always_system=True, user="({content})", lead="")
    always = always.bind(tokenizers["plain"])
    assert (
        texts(always, talk("Hi", "Hello")) == texts(always, talk("Hi", "Hello", system="")) == ["[](Hi)", "*Hello</s>"]
    )
    assert texts(always, talk("Hi", "Hello", system="S")) == ["[S](Hi)", "*Hello</s>"]


def test_exchanges_are_numbered(tokenizers):
    template = Template("numbered", user="{round0}/{round}: {content}\n", lead="").bind(tokenizers["plain"])
    assert texts(template, talk("a", "b", "c", "d", "e", "{round}", system="S")) == [
        "S0/1: a\n", "*b</s>", "1/2: c\n", "*d</s>", "2/3: e\n", "*{round}</s>",
    ]  # fmt: skip


def test_an_end_marker_that_begins_the_next_question_is_said_once(tokenizers):
    template = Template("tags", start="^", user="<|im_start|>{content}", lead="|", end="<|im_start|>")
    template = template.bind(tokenizers["plain"])
    conversation = talk("Hi", "Hello", "Bye", "Ciao")
    assert texts(template, conversation) == ["^<|im_start|>Hi|", "*Hello<|im_start|>", "Bye|", "*Ciao<|im_start|>"]
    assert texts(template, talk("Hi", "Hello", "Bye"), generation=True) == [
        "^<|im_start|>Hi|", "*Hello<|im_start|>", "Bye|",
    ]  # fmt: skip


def test_a_bos_that_is_also_the_eos_is_no_shared_end_marker(tiny_tokenizer):
    """As in GPT-2's and SmolLM2's tokenizers: llama2's second question begins with a bos of its own."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "</s>"
    template = TEMPLATES["llama2"].bind(tokenizer)
    assert texts(template, talk("Hi", "Hello", "Bye", "Ciao")) == [
        "</s>[INST] Hi [/INST]", "* Hello </s>", "</s>[INST] Bye [/INST]", "* Ciao </s>",
    ]  # fmt: skip


def test_context_joins_and_answers_do_not():
    segments = Joined()
    for text in ("a", "", "b"):
        segments.add(text)
    segments.answer("c", learn=True)
    segments.answer("d", learn=False)
    segments.add("e")
    segments.add("f", learn=True)
    segments.answer("", learn=True)
    assert [(segment.text, segment.learn) for segment in segments.done] == [
        ("ab", False),
        ("c", True),
        ("d", False),
        ("e", False),
        ("f", True),
    ]


# --- bos -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [None, "S"])
def test_the_tokenizers_bos_comes_first_unless_the_form_says_it(system, tokenizers):
    pieces = {"system": "[{content}]", "lead": ""}
    forms = {
        "none": Template("none", user="({content})", **pieces),
        "start": Template("start", start="{bos}", user="({content})", **pieces),
        "user": Template("user", user="{bos}({content})", **pieces),
        "inside": Template("inside", user="{bos}({system}{content})", **pieces),
        "later": Template("later", user="({bos}{content})", **pieces),
    }
    expected = {
        (None, "plain"): ["(a)", "<s>(a)", "<s>(a)", "<s>(a)", "(<s>a)"],
        (None, "adds bos"): ["<s>(a)", "<s>(a)", "<s>(a)", "<s>(a)", "<s>(<s>a)"],
        ("S", "plain"): ["[S](a)", "<s>[S](a)", "[S]<s>(a)", "<s>([S]a)", "[S](<s>a)"],
        ("S", "adds bos"): ["<s>[S](a)", "<s>[S](a)", "<s>[S]<s>(a)", "<s>([S]a)", "<s>[S](<s>a)"],
    }
    for kind in ("plain", "adds bos"):
        found = [texts(form.bind(tokenizers[kind]), talk("a", system=system))[0] for form in forms.values()]
        assert found == expected[system, kind]
    for form in forms.values():
        assert "<s>" not in joined(form.bind(tokenizers["no bos"]).segments(talk("a", system=system)))


def test_adds_bos(tokenizers):
    assert {kind: adds_bos(tokenizer) for kind, tokenizer in tokenizers.items()} == {
        "plain": False,
        "adds bos": True,
        "no bos": False,
    }


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_prompt_must_end_with_what_the_model_is_told(tokenizers):
    with pytest.raises(RecordError, match="a prompt must end with a user turn"):
        TEMPLATES["vicuna"].bind(tokenizers["plain"]).segments(talk("Hi", "Hello"), generation=True)


def test_a_form_whose_tokens_are_missing_is_refused_with_the_way_out(tiny_tokenizer):
    way_out = "vicuna, llama2, alpaca"
    with pytest.raises(ArgumentError, match=rf"chatml: answers end with '<\|im_end\|>', which is not one.*{way_out}"):
        TEMPLATES["chatml"].bind(tiny_tokenizer())
    with pytest.raises(ArgumentError, match=rf"baichuan2: the form has a token '<reserved_106>', which.*{way_out}"):
        TEMPLATES["baichuan2"].bind(tiny_tokenizer())
    with pytest.raises(ArgumentError, match="--template_name vicuna: the tokenizer has no eos token"):
        TEMPLATES["vicuna"].bind(tiny_tokenizer(eos=False))
