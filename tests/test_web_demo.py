"""The web page, read and used in a real Chromium; what answers is scripted, or a model."""

import re
import socket
import threading
import time
from types import SimpleNamespace

import psutil
import pytest

from stagewise.errors import ArgumentError

gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-web.txt")

import web_demo  # noqa: E402
from stagewise.errors import ChatModelError  # noqa: E402
from stagewise.inference.arguments import ChatModelArguments, SamplingArguments  # noqa: E402
from stagewise.inference.chat_model import Answer, ChatModel  # noqa: E402

PATIENCE = 60_000  # milliseconds that the page has for anything
EVIL = """<script>window.ran = 1</script> before <img src=x onerror="window.ran = 2"> <b>bold?</b> **bold**

<details open ontoggle="window.ran = 3"><summary>s</summary></details>
<iframe srcdoc="<script>parent.ran = 4</script>">
[link](javascript:window.ran=5) ![picture](http://127.0.0.1:9/seen.png) <style>body { display: none }</style>

```html
<script>window.ran = 6</script><img src=x onerror="window.ran = 7">
```

```mermaid
graph TD; A["<img src=x onerror='window.ran = 8'>"] --> B
```

$$\\frac{1}{2} <img src=x onerror="window.ran = 9">$$ and the end of it"""


class Scripted:
    """Answers from a table; `slow` waits for `go` behind its first word, `endless` until it is stopped."""

    context = 2048
    adapter = object()

    def __init__(self):
        from transformers import GenerationConfig

        self.defaults = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, top_k=20, max_new_tokens=100)
        self.go = threading.Event()
        self.asked = []
        self.ends = []

    def stream(self, conversation, sampling, *, adapter=True, stop=None):
        question = conversation.messages[-1].content
        self.asked.append(SimpleNamespace(conversation=conversation, sampling=sampling, adapter=adapter))
        if question == "too long":
            raise ChatModelError("the last question alone is longer than the 10 tokens that the context leaves")
        if question == "broken":
            raise RuntimeError("out of memory at 0xdeadbeef")
        return self._pieces(question, adapter, stop)

    def _pieces(self, question, adapter, stop):
        who = "adapter" if adapter else "base"
        try:
            if question == "endless":
                yield "first words "
                assert stop.wait(90), "was not stopped"
            elif question == "slow":
                yield "first "
                assert self.go.wait(90), "was not let continue"
                yield "second"
            elif question == "evil":
                yield from re.findall(r"(?s).{1,40}", EVIL)
            elif question == "think":
                yield "<think>\nhm <b>\n</think>\n\nforty-two"
            elif question == "wide":
                yield "w" * 400 + "\n\n```\n" + "c" * 400 + "\n```\n\n|" + " cell cell |" * 40 + "\n|" + "---|" * 40
            else:
                yield f"{who} heard {question}"
                return Answer(f"{who} heard {question}", (5, 6, 7), True)
        finally:
            self.ends.append(question)


@pytest.fixture(scope="module")
def speaker():
    return Scripted()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def opened(speaker, **web) -> tuple[web_demo.Page, str]:
    args = web_demo.WebArguments(server_port=free_port(), **web)
    about = {"model": "some/base", "adapter": "<b>sft</b> (LORA)", "template": "chatml"}
    page = web_demo.Page(speaker, SamplingArguments(), args, compares=speaker.adapter is not None, about=about)
    return page, page.serve(args, web_demo.check(args, SamplingArguments()), wait=False)


@pytest.fixture(scope="module")
def address(speaker):
    page, address = opened(speaker, system_prompt="Be brief.")
    yield address
    page.blocks.close(verbose=False)


@pytest.fixture
def visit(browser, address):
    """Factory: a page opened by a visitor of its own; visit(locale="zh-CN", viewport=…)."""
    contexts = []

    def enter(url=address, **options):
        contexts.append(browser.new_context(**{"locale": "en-US", **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.foreign = []
        page.on("request", lambda request: request.url.startswith((url, "data:", "blob:")) or
                page.foreign.append(request.url))  # fmt: skip
        page.goto(url)
        page.wait_for_selector("#chats label")  # the first look has come from the server
        return page

    yield enter
    for context in contexts:
        context.close()


def ask(page, question: str) -> None:
    page.fill("#box textarea", question)
    page.press("#box textarea", "Enter")


def wait_for(page, text: str, pane="adapter") -> None:
    page.wait_for_function("([pane, text]) => document.querySelector(pane)?.innerText.includes(text)",
                           arg=[f"#pane-{pane}", text])  # fmt: skip


def wait_until(what, seconds=60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def finished(page) -> None:
    """The page may be asked again."""
    page.wait_for_selector("#box .submit-button")


# --- talking ---------------------------------------------------------------------------------------------------------


def test_an_answer_is_read_as_it_comes(visit, speaker):
    page = visit()
    speaker.go.clear()
    ask(page, "slow")
    wait_for(page, "first")
    assert "second" not in page.inner_text("#pane-adapter")
    assert page.input_value("#box textarea") == ""
    page.wait_for_selector("#box .stop-button")
    speaker.go.set()
    wait_for(page, "first second")
    finished(page)
    settings = speaker.asked[-1].sampling
    assert speaker.asked[-1].conversation.system == "Be brief."
    assert (settings.temperature, settings.top_p, settings.top_k, settings.max_new_tokens) == (0.7, 0.9, 20, 100)
    assert not page.foreign


def test_stop_ends_the_answer_and_keeps_it(visit, speaker):
    page = visit()
    ask(page, "endless")
    wait_for(page, "first words")
    page.click("#box .stop-button")
    finished(page)
    assert speaker.ends[-1] == "endless"
    ask(page, "and then")
    wait_for(page, "adapter heard and then")
    told = [(message.role, message.content) for message in speaker.asked[-1].conversation.messages]
    assert told == [("user", "endless"), ("assistant", "first words "), ("user", "and then")]


def test_leaving_the_page_ends_the_answer(visit, speaker):
    page = visit()
    before = speaker.ends.count("endless")
    ask(page, "endless")
    wait_for(page, "first words")
    page.context.close()
    wait_until(lambda: speaker.ends.count("endless") == before + 1)


def test_clear_empties_the_conversation(visit, speaker):
    page = visit()
    ask(page, "one")
    wait_for(page, "adapter heard one")
    finished(page)
    page.click("#clear")
    page.wait_for_function("() => !document.querySelector('#pane-adapter').innerText.includes('heard')")
    ask(page, "two")
    wait_for(page, "adapter heard two")
    assert len(speaker.asked[-1].conversation.messages) == 1


def test_an_answer_is_asked_for_again(visit, speaker):
    page = visit()
    ask(page, "one")
    wait_for(page, "adapter heard one")
    finished(page)
    count = len(speaker.asked)
    page.click("#again")
    wait_until(lambda: len(speaker.asked) == count + 1)
    finished(page)
    assert [message.content for message in speaker.asked[-1].conversation.messages] == ["one"]
    page.click("#pane-adapter button[title=Retry], #pane-adapter button[aria-label=Retry]")
    wait_until(lambda: len(speaker.asked) == count + 2)


def test_a_question_is_edited(visit, speaker):
    page = visit()
    for question in ("one <b>", "two"):
        ask(page, question)
        wait_for(page, f"adapter heard {question}")
        finished(page)
    page.click("#pane-adapter button[aria-label=Edit], #pane-adapter button[title=Edit]")
    page.locator("#pane-adapter textarea").fill("three <i>")
    page.click("#pane-adapter button[aria-label=Submit], #pane-adapter button[title=Submit]")
    wait_for(page, "adapter heard three <i>")
    finished(page)
    assert [message.content for message in speaker.asked[-1].conversation.messages] == ["three <i>"]
    assert "heard two" not in page.inner_text("#pane-adapter")


def test_system_prompt_and_settings_reach_the_model(visit, speaker):
    page = visit()
    page.click("#settings button >> nth=0")
    page.fill("#system textarea", "Answer in rhymes.")
    page.fill("#temperature input[type=number]", "0")
    page.press("#temperature input[type=number]", "Tab")
    page.fill("#seed input", "7")
    page.press("#seed input", "Tab")
    ask(page, "one")
    wait_for(page, "adapter heard one")
    found = speaker.asked[-1]
    assert found.conversation.system == "Answer in rhymes."
    assert (found.sampling.temperature, found.sampling.top_p, found.sampling.seed) == (0, None, None)
    assert found.sampling.settled(speaker.defaults)["do_sample"] is False
    finished(page)
    page.fill("#temperature input[type=number]", "0.5")
    page.press("#temperature input[type=number]", "Tab")
    ask(page, "two")
    wait_for(page, "adapter heard two")
    assert (speaker.asked[-1].sampling.temperature, speaker.asked[-1].sampling.seed) == (0.5, 7)


def test_thoughts_are_folded_away_and_stay_whole_for_the_model(visit, speaker):
    page = visit()
    ask(page, "think")
    wait_for(page, "forty-two")
    finished(page)
    text = page.inner_text("#pane-adapter")
    assert "Thoughts" in text and "hm" not in text and "think>" not in text
    page.click("#pane-adapter .thought-group [role=button]")
    wait_for(page, "hm <b>")
    ask(page, "and")
    wait_for(page, "adapter heard and")
    assert speaker.asked[-1].conversation.messages[1].content == "<think>\nhm <b>\n</think>\n\nforty-two"


def test_settings_make_room_for_what_the_flags_ask_for(speaker):
    asked = {"temperature": 2.5, "top_p": 0.005, "top_k": 500, "repetition_penalty": 3.0, "max_new_tokens": 2040}
    page = web_demo.Page(speaker, SamplingArguments(**asked), web_demo.WebArguments(), compares=True)
    chosen = page.chosen({name: slider.preprocess(slider.value) for name, slider in page.sliders.items()})
    assert {name: getattr(chosen, name) for name in asked} == asked


def test_flags_without_a_slider_hold_and_what_shapes_a_draw_waits_at_temperature_zero(speaker):
    asked = {"typical_p": 0.5, "stop_strings": ["X"], "min_new_tokens": 3}
    page = web_demo.Page(speaker, SamplingArguments(**asked), web_demo.WebArguments(), compares=True)
    values = {name: slider.value for name, slider in page.sliders.items()}
    drawn = page.chosen({**values, "temperature": 0.5}).settled(speaker.defaults)
    assert {name: drawn[name] for name in asked} == asked
    plain = page.chosen({**values, "temperature": 0}).settled(speaker.defaults)
    assert (plain["do_sample"], plain["typical_p"], plain["stop_strings"]) == (False, None, ["X"])


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ("too long", "the last question alone is longer"),
        ("broken", "The answer failed; the server"),
        (" ", "is empty"),
    ],
)
def test_what_cannot_be_answered_is_said_and_the_page_lives_on(visit, question, told):
    page = visit()
    ask(page, question)
    page.wait_for_selector(f".toast-body:has-text('{told}')")
    assert "0xdeadbeef" not in page.inner_text("body")
    finished(page)
    ask(page, "one")
    wait_for(page, "adapter heard one")


# --- kept apart ------------------------------------------------------------------------------------------------------


def test_two_conversations_are_kept_apart(visit, speaker):
    page = visit()
    ask(page, "red")
    wait_for(page, "adapter heard red")
    finished(page)
    page.click("#new")
    page.wait_for_function("() => !document.querySelector('#pane-adapter').innerText.includes('red')")
    ask(page, "blue")
    wait_for(page, "adapter heard blue")
    finished(page)
    assert [message.content for message in speaker.asked[-1].conversation.messages] == ["blue"]
    assert page.locator("#chats label").all_inner_texts() == ["blue", "red"]
    page.click("#chats label:has-text('red')")
    wait_for(page, "adapter heard red")
    assert "blue" not in page.inner_text("#pane-adapter")
    page.click("#delete")
    wait_for(page, "adapter heard blue")
    assert page.locator("#chats label").all_inner_texts() == ["blue"]


def test_a_system_prompt_goes_where_it_was_written_for(speaker):
    page = web_demo.Page(speaker, SamplingArguments(), web_demo.WebArguments(), compares=True)
    desk = web_demo.Desk()
    first = desk.current
    page.ask(desk, "", "adapter", "one")
    page.begin(desk)  # the click on "New conversation" overtakes the box that it left
    page.keep_system(desk, first.number, "Be brief.")
    assert (first.system, desk.current.system) == ("Be brief.", "")
    page.keep_system(desk, 99, "of a conversation that is gone")


def test_an_answer_goes_where_it_was_asked_for(visit, speaker):
    page = visit()
    speaker.go.clear()
    ask(page, "slow")
    wait_for(page, "first")
    page.click("#new")
    page.wait_for_function("() => !document.querySelector('#pane-adapter').innerText.includes('first')")
    ends = speaker.ends.count("slow")
    speaker.go.set()
    wait_until(lambda: speaker.ends.count("slow") == ends + 1)
    page.wait_for_timeout(500)
    assert "second" not in page.inner_text("#pane-adapter")
    page.click("#chats label:has-text('slow')")
    wait_for(page, "first second")
    finished(page)


def test_visitors_do_not_see_each_others_conversations(visit):
    one, other = visit(), visit()
    ask(one, "mine")
    wait_for(one, "adapter heard mine")
    ask(other, "theirs")
    wait_for(other, "adapter heard theirs")
    assert "theirs" not in one.inner_text("body")
    assert "mine" not in other.inner_text("body")


def test_base_and_adapter_side_by_side(visit, speaker):
    page = visit()
    page.click("#who label:has-text('side by side')")
    page.wait_for_selector("#pane-base")
    for question in ("one", "two"):
        ask(page, question)
        wait_for(page, f"adapter heard {question}")
        wait_for(page, f"base heard {question}", pane="base")
        finished(page)
    assert "base heard" not in page.inner_text("#pane-adapter")
    assert "adapter heard" not in page.inner_text("#pane-base")
    told = {found.adapter: [m.content for m in found.conversation.messages] for found in speaker.asked[-2:]}
    assert told == {True: ["one", "adapter heard one", "two"], False: ["one", "base heard one", "two"]}
    page.click("#who label:has-text('base alone')")
    page.wait_for_selector("#pane-adapter", state="hidden")
    ask(page, "three")
    wait_for(page, "base heard three", pane="base")
    finished(page)
    page.click("#who label:has-text('side by side')")
    wait_for(page, "answered by the base alone")  # the adapter was not asked the third one


def test_the_page_names_what_answers(visit):
    page = visit()
    assert page.inner_text("#about") == "Model some/base · adapter <b>sft</b> (LORA) · template chatml"
    assert page.locator("footer").count() == 0 or not page.locator("footer").is_visible()
    assert visit(locale="zh-CN").inner_text("#about").startswith("模型 some/base · 适配器")


@pytest.mark.parametrize(
    ("locale", "question"),
    [("en-US", "How do I keep basil on the windowsill alive?"), ("zh-CN", "窗台上的罗勒怎样才养得活？")],
)
def test_an_empty_conversation_offers_questions(visit, speaker, locale, question):
    page = visit(locale=locale)
    page.wait_for_selector(f"#examples button:has-text('{question}')")
    assert page.locator("#examples button").count() == 2
    page.click("#examples button >> nth=0")
    wait_for(page, f"adapter heard {question}")
    finished(page)
    assert speaker.asked[-1].conversation.messages[-1].content == question
    page.wait_for_selector("#examples", state="hidden")
    page.click("#new")
    page.wait_for_selector("#examples button")


def test_the_page_says_how_fast_an_answer_came(visit):
    page = visit()
    page.click("#who label:has-text('side by side')")
    ask(page, "one")
    wait_for(page, "base heard one", pane="base")
    finished(page)
    page.wait_for_selector("#speed:has-text('tokens per second')")
    found = page.inner_text("#speed")
    pattern = r"base \+ adapter: 3 tokens, [\d.]+ tokens per second · base alone: 3 tokens, [\d.]+ tokens per second"
    assert re.fullmatch(pattern, found.strip())
    page.click("#new")
    page.wait_for_function("() => !document.querySelector('#speed').innerText.includes('tokens')")


def test_names_have_no_folders_of_the_server_in_them(tmp_path):
    (tmp_path / "sft" / "checkpoint-5").mkdir(parents=True)
    assert web_demo.short_name(str(tmp_path / "sft")) == "sft"
    assert web_demo.short_name(str(tmp_path / "sft" / "checkpoint-5")) == "sft/checkpoint-5"
    assert web_demo.short_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


# --- what an answer cannot do ----------------------------------------------------------------------------------------


def test_html_in_an_answer_is_text(visit):
    page = visit()
    ask(page, "evil")
    wait_for(page, "and the end of it")
    finished(page)
    page.wait_for_timeout(500)  # for what would run late
    assert page.evaluate("window.ran") is None
    text = page.inner_text("#pane-adapter")
    for written in ("<script>window.ran = 1</script>", '<img src=x onerror="window.ran = 2">', "<b>bold?</b>",
                    "<details open", "<iframe srcdoc", "<style>body { display: none }</style>",
                    "<script>window.ran = 6</script>", "graph TD;"):  # fmt: skip
        assert written in text
    answer = page.locator("#pane-adapter [data-testid=bot]")
    for tag in ("script", "img", "b", "iframe", "details", "style", "svg.mermaid", "[onerror]", "a[href^=javascript]"):
        assert answer.locator(f".md {tag}").count() == 0, tag
    assert answer.locator(".md strong").inner_text() == "bold"
    assert answer.locator(".md .katex").count() > 0
    assert not page.foreign


def test_the_policy_stops_what_would_get_past(visit):
    """The second wall by itself: an element with a handler, and an image from elsewhere, put into the page."""
    page = visit()
    page.evaluate("""() => {
        const box = document.createElement('div');
        box.innerHTML = '<img src="data:," onerror="window.ran = 1"><img src="http://127.0.0.1:9/a.png">';
        document.body.append(box);
    }""")
    page.wait_for_timeout(500)
    assert page.evaluate("window.ran") is None


# --- how it looks ----------------------------------------------------------------------------------------------------


def test_a_phone_needs_no_sideways_scrolling(visit):
    page = visit(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page.wait_for_selector(".sidebar:not(.open)", state="attached")
    ask(page, "wide")
    wait_for(page, "wwww")
    finished(page)

    def widths():
        return page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")

    assert widths()[1] == 360
    assert widths()[0] <= 360
    box = page.locator("#box textarea").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 740
    page.click(".sidebar .toggle-button")
    page.click("#who label:has-text('side by side')")
    page.click(".sidebar .toggle-button")
    page.wait_for_selector("#pane-base")
    assert widths()[0] <= 360


def brightness(page) -> float:
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3


def test_dark_mode_follows_the_system_and_a_button(visit):
    assert brightness(visit(color_scheme="light")) > 200
    page = visit(color_scheme="dark")
    assert brightness(page) < 60
    page.click("#dark")
    wait_until(lambda: brightness(page) > 200)


@pytest.mark.parametrize(
    ("locale", "new", "untitled"),
    [
        ("en-US", "New conversation", "New conversation"),
        ("de-DE", "New conversation", "New conversation"),
        ("zh-CN", "新对话", "新对话"),
        ("zh-TW", "新对话", "新对话"),
    ],
)
def test_the_page_speaks_the_browsers_language(visit, locale, new, untitled):
    page = visit(locale=locale)
    page.wait_for_function("([text]) => document.querySelector('#new').innerText.trim() === text", arg=[new])
    assert page.locator("#chats label").all_inner_texts() == [untitled]
    page.click("#again")
    told = web_demo.translate("nothing_to_retry", locale)
    page.wait_for_selector(f".toast-body:has-text('{told}')")


def test_both_languages_have_every_sentence():
    assert web_demo.ENGLISH.keys() == web_demo.CHINESE.keys()


# --- the server ------------------------------------------------------------------------------------------------------


def fetch(url: str):
    import httpx

    return httpx.get(url, follow_redirects=False, trust_env=False)


def test_it_listens_on_this_machine_alone(address):
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    assert web_demo.WebArguments().server_name == "127.0.0.1" and web_demo.WebArguments().share is False
    own = psutil.Process().net_connections()
    assert {found.laddr.ip for found in own if found.status == "LISTEN" and found.laddr.port == port} == {"127.0.0.1"}


def test_every_answer_of_the_server_has_the_policy(address):
    for path in ("", "config", "nothing-there"):
        policy = fetch(address + path).headers["content-security-policy"]
        assert "script-src-attr 'none'" in policy and "img-src 'self' data: blob:;" in policy


def test_a_login_is_asked_for(speaker, tmp_path):
    users = tmp_path / "users.txt"
    users.write_text("ann:secret:with:colons\n\nbob:x\n")
    page, address = opened(speaker, auth=str(users))
    try:
        import httpx

        assert fetch(f"{address}config").status_code == 401
        with httpx.Client(trust_env=False) as client:
            wrong = client.post(f"{address}login", data={"username": "ann", "password": "guess"})
            assert wrong.status_code == 400
            assert client.get(f"{address}config").status_code == 401
            right = client.post(f"{address}login", data={"username": "ann", "password": "secret:with:colons"})
            assert right.status_code == 200
            assert client.get(f"{address}config").status_code == 200
    finally:
        page.blocks.close(verbose=False)


def test_a_port_that_is_taken_is_an_error(speaker, address):
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    args = web_demo.WebArguments(server_port=port)
    page = web_demo.Page(speaker, SamplingArguments(), args, compares=True)
    with pytest.raises(ArgumentError, match=f"--server_port {port}"):
        page.serve(args, None, wait=False)


def test_torchrun_is_refused_and_a_seed_waits_for_the_slider(speaker, monkeypatch):
    at_zero = SamplingArguments(temperature=0, seed=7)
    assert web_demo.check(web_demo.WebArguments(), at_zero) is None
    page = web_demo.Page(speaker, at_zero, web_demo.WebArguments(), compares=True)
    values = {name: slider.value for name, slider in page.sliders.items()}
    assert (values["temperature"], values["seed"]) == (0, 7)
    assert page.chosen({**values, "temperature": 0.5}).seed == 7
    assert page.chosen(values).settled(speaker.defaults)["do_sample"] is False
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match="start it with python, not with torchrun"):
        web_demo.check(web_demo.WebArguments(), SamplingArguments())


# --- models ----------------------------------------------------------------------------------------------------------


def answers_of(page: web_demo.Page, question: str, who: str) -> list[str]:
    """What the page's own event shows in the end, without a browser."""
    desk = web_demo.Desk()
    page.ask(desk, "", who, question)
    list(page.answer(desk, *[slider.value for slider in page.sliders.values()]))
    return [desk.current.turns[0].answers[speaker] for speaker in web_demo.SPEAKERS[who]]


def test_the_page_says_what_the_speaker_says(tiny_checkpoint):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from stagewise.formats.parsers import Conversation, Message

    base = tiny_checkpoint("llama")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(init_lora_weights=False))
    model.save_pretrained(base / "adapter")
    speaker = ChatModel.load(ChatModelArguments(str(base), lora_model=str(base / "adapter")))
    sampling = SamplingArguments(temperature=0, max_new_tokens=12)
    page = web_demo.Page(speaker, sampling, web_demo.WebArguments(), compares=True)
    asked = [Conversation((Message("user", "drink water"),))]
    expected = [speaker.answers(asked, sampling, batch_size=1, adapter=on)[0].text for on in (True, False)]
    assert expected[0] != expected[1]
    assert answers_of(page, "drink water", "both") == expected


@pytest.mark.real
def test_the_small_model_answers_on_the_page(smollm, visit):
    from stagewise.formats.parsers import Conversation, Message

    speaker = ChatModel.load(ChatModelArguments(str(smollm)))
    sampling = SamplingArguments(temperature=0, max_new_tokens=24)
    question = "What is the capital of France?"
    expected = speaker.answers([Conversation((Message("user", question),))], sampling, batch_size=1)[0].text
    assert "Paris" in expected
    args = web_demo.WebArguments(server_port=free_port())
    served = web_demo.Page(speaker, sampling, args, compares=False)
    address = served.serve(args, None, wait=False)
    try:
        page = visit(address)
        assert page.locator("#who").count() == 0 or not page.locator("#who").is_visible()
        ask(page, question)
        page.wait_for_selector("#box .stop-button")
        page.wait_for_selector("#box .submit-button", timeout=60_000)
        found = page.inner_text("#pane-adapter [data-testid=bot]")
        assert " ".join(found.split()) == " ".join(expected.split())
    finally:
        served.blocks.close(verbose=False)
