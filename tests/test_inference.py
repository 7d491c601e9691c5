"""inference.py as a person uses it: in a terminal of its own, over files, stopped and started again."""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest
import torch

import inference
from stagewise.errors import ChatModelError
from stagewise.formats.parsers import Conversation, Message
from stagewise.inference.batch_file import AnswerFile, read_prompts
from stagewise.inference.chat_model import Answer, ChatModel, ChatModelArguments, SamplingArguments
from stagewise.inference.repl import ChatSession
from stagewise.reports.terminal_text import visible
from tests.conftest import EOS_ID, build_tiny_model, build_tiny_tokenizer
from tests.launching import environment, python, run, torchrun

RECORDS = [
    {"id": 1, "conversations": [{"from": "human", "value": "a fever"}, {"from": "gpt", "value": "rest"}]},
    {"id": 2, "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "water?"}]},
    {"id": 3, "instruction": "drink", "input": "what", "output": "water"},
    {"id": 4, "question": "when", "answer": "now", "tags": ["甲", {"b": None}]},
    {"id": 5, "prompt": "多喝水"},
    {"id": 6, "prompt": "the user asks", "chosen": "A", "rejected": "B"},
]


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(base: Path, data: Path, out: Path, *more) -> list[str]:
    flags = ["--base_model", base, "--data_file", data, "--output_file", out, "--max_new_tokens", 6, *more]
    return [str(word) for word in flags]


# ── a file ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_answers_are_in_order_and_records_keep_their_fields(tiny_checkpoint, tmp_path):
    base, data = tiny_checkpoint("llama"), write(tmp_path / "prompts.jsonl", RECORDS)
    inference.main(words(base, data, tmp_path / "out.jsonl", "--batch_size", 4))
    found = read(tmp_path / "out.jsonl")
    assert [{k: v for k, v in line.items() if not k.startswith("response")} for line in found] == RECORDS
    assert all(isinstance(line["response"], str) and line["response_ended"] in (True, False) for line in found)
    assert not (tmp_path / "out.jsonl.part").exists()
    inference.main(words(base, data, tmp_path / "alone.jsonl", "--batch_size", 1))
    assert read(tmp_path / "alone.jsonl") == found
    with pytest.raises(ChatModelError, match="--output_file .*out.jsonl: is there already; --overwrite_output_file"):
        inference.main(words(base, data, tmp_path / "out.jsonl"))
    inference.main(words(base, data, tmp_path / "out.jsonl", "--overwrite_output_file", "--system_prompt", "Be brief"))
    assert read(tmp_path / "out.jsonl") != found


def test_beams_and_stop_strings_from_the_command_line(tiny_checkpoint, tmp_path):
    base, data = tiny_checkpoint("llama"), write(tmp_path / "prompts.jsonl", RECORDS)
    beams = ("--num_beams", 2, "--length_penalty", -1.5, "--early_stopping", "never", "--min_new_tokens", 2)
    inference.main(words(base, data, tmp_path / "out.jsonl", *beams))
    whole = read(tmp_path / "out.jsonl")
    inference.main(words(base, data, tmp_path / "plain.jsonl"))
    letter = read(tmp_path / "plain.jsonl")[0]["response"][1]
    inference.main(words(base, data, tmp_path / "short.jsonl", "--stop_strings", letter, "never said"))
    short = read(tmp_path / "short.jsonl")
    assert not any(letter in line["response"] for line in short) and any(line["response_ended"] for line in short)
    typed = "a fever\n/quit\n"
    command = python("inference", "--base_model", base, "--interactive", "--max_new_tokens", 6, *beams)
    done = subprocess.run(command, input=typed, text=True, capture_output=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"model: {visible(whole[0]['response'])}\n" in done.stdout


def test_what_each_record_asks(tmp_path):
    prompts = read_prompts(write(tmp_path / "prompts.jsonl", RECORDS), "response", "Be brief")
    asked = [(p.conversation.system, *(m.content for m in p.conversation.messages)) for p in prompts]
    assert asked == [
        ("Be brief", "a fever"),
        ("S", "water?"),
        ("Be brief", "drink\nwhat"),
        ("Be brief", "when"),
        ("Be brief", "多喝水"),
        ("Be brief", "the user asks"),
    ]
    (tmp_path / "prompts.txt").write_text("one\n\n二\r\n", encoding="utf-8")
    assert [p.record for p in read_prompts(tmp_path / "prompts.txt", "response")] == [
        {"prompt": "one"},
        {"prompt": "二"},
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "a", "response": "b"},
            "prompts.jsonl:1: has a field 'response' already: give another --answer_field",
        ),
        ({"prompt": "a", "response_ended": 3}, "prompts.jsonl:1: has a field 'response_ended' already"),
        ({"prompt": "a", "response_error": 3}, "prompts.jsonl:1: has a field 'response_error' already"),
        ({"text": "a"}, "prompts.jsonl:1: found a text"),
        ({"prompt": 3}, "prompts.jsonl:1: "),
        ({"prompt": None}, 'prompts.jsonl:1: "prompt" is null'),
    ],
)
def test_records_that_ask_nothing_are_named(tmp_path, record, message):
    with pytest.raises(ChatModelError, match=message):
        read_prompts(write(tmp_path / "prompts.jsonl", [record]), "response")
    for name, hint in (("none.jsonl", "no such file"), ("", "is a folder"), ("x.pdf", "expected .jsonl")):
        (tmp_path / "x.pdf").touch()
        with pytest.raises(ChatModelError, match=hint):
            read_prompts(tmp_path / name, "response")


def test_a_prompt_that_is_too_long_is_an_error_or_has_no_answer(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama", max_position_embeddings=256)
    long = {"prompt": "long " * 300}
    data = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}, long, {"prompt": "b"}])
    with pytest.raises(ChatModelError, match="prompts.jsonl:2: the last question alone is longer") as raised:
        inference.main(words(base, data, tmp_path / "out.jsonl"))
    end = "(1 of 3 questions cannot be answered; --on_bad_record skip answers the others)"
    assert str(raised.value).endswith(end)
    more = ("--on_bad_record", "skip", "--overwrite_output_file")
    inference.main(words(base, data, tmp_path / "out.jsonl", *more))
    first, second, third = read(tmp_path / "out.jsonl")
    assert second["response"] is None and "longer than the" in second["response_error"]
    assert first["response"] and third["response"]


def test_records_that_ask_nothing_come_back_with_the_reason(tiny_checkpoint, tmp_path):
    base, odd = tiny_checkpoint("llama"), [{"prompt": " ", "n": 1}, {"a": 2}, {"messages": []}]
    data = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}, *odd, {"prompt": "b"}])
    with pytest.raises(ChatModelError, match="prompts.jsonl:2: turn 1 .user. is empty"):
        inference.main(words(base, data, tmp_path / "out.jsonl"))
    inference.main(words(base, data, tmp_path / "out.jsonl", "--on_bad_record", "skip"))
    first, *found, last = read(tmp_path / "out.jsonl")
    assert first["response"] and last["response"] and "response_error" not in first
    for record, line, place in zip(odd, found, (2, 3, 4), strict=True):
        assert {name: line[name] for name in record} == record and line["response"] is None
        assert line["response_error"].startswith(f"prompts.jsonl:{place}: ")
    data.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ChatModelError, match="prompts.jsonl:2: not JSON"):  # there is no record to come back
        inference.main(words(base, data, tmp_path / "no.jsonl", "--on_bad_record", "skip"))


def test_what_no_record_can_help_is_an_error_also_where_records_are_skipped(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama", max_position_embeddings=256)
    data = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    flags = words(base, data, tmp_path / "out.jsonl", "--on_bad_record", "skip")
    flags[flags.index("--max_new_tokens") + 1] = "256"
    with pytest.raises(ChatModelError, match="--max_new_tokens 256: the model's context of 256 tokens leaves no room"):
        inference.main(flags)
    with pytest.raises(ChatModelError, match="--max_new_tokens 256: "):
        inference.main(["--base_model", str(base), "--interactive", "--max_new_tokens", "256"])
    with pytest.raises(ChatModelError, match="--output_file .*prompts.jsonl/out.jsonl: File exists"):
        inference.main(words(base, data, data / "out.jsonl"))


def test_a_stopped_run_goes_on_where_it_was(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama")
    data = write(tmp_path / "prompts.jsonl", [{"n": n, "prompt": f"question {n}"} for n in range(60)])
    more = ("--batch_size", 1, "--temperature", 1, "--seed", 4, "--max_new_tokens", 40)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    part = Path(f"{out}.part")
    started = subprocess.Popen(
        python("inference", *words(base, data, out, *more)), env=environment(), stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 240
    while not (part.exists() and part.read_bytes().count(b"\n") > 5) and time.time() < deadline:
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    lines = part.read_bytes().count(b"\n")
    assert 5 < lines < 61 and not out.exists()
    with part.open("ab") as file:
        file.write(b'{"n": 99, "prom')  # as if it was killed while it wrote
    with pytest.raises(ChatModelError, match="of a run that was stopped, with other settings .seed 4, now 5"):
        inference.main(words(base, data, out, *more[:-4], "--seed", 5, "--max_new_tokens", 40))
    inference.main(words(base, data, out, *more))
    inference.main(words(base, data, whole, *more))
    assert out.read_bytes() == whole.read_bytes()
    assert [line["n"] for line in read(out)] == list(range(60))


@pytest.mark.parametrize("text", ["notes", "notes\nof mine\n", "[1]\n{}\n", '{"settings": 3}\n{}\n', '{"a": 1}\n'])
def test_a_part_that_is_none_of_ours_is_named_and_kept(tmp_path, text):
    part = tmp_path / "out.jsonl.part"
    part.write_text(text)
    with pytest.raises(
        ChatModelError, match="out.jsonl: out.jsonl.part is not a file of unfinished answers.*--overwrite_"
    ):
        AnswerFile(tmp_path / "out.jsonl", {"seed": 1}, [{}], "response").begin()
    assert part.read_text() == text
    part.write_text('{"settings": {"se')  # killed in its first line
    file = AnswerFile(tmp_path / "out.jsonl", {"seed": 1}, [{}], "response")
    assert file.begin() == 0
    file.close()
    assert part.read_text() == '{"settings": {"seed": 1}}\n'


@pytest.mark.distributed
def test_two_processes_write_what_one_writes(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama")
    data = write(tmp_path / "prompts.jsonl", [{"n": n, "prompt": f"question {n}"} for n in range(7)])
    more = ("--batch_size", 2, "--temperature", 1, "--seed", 4)
    inference.main(words(base, data, tmp_path / "one.jsonl", *more))
    run(torchrun("inference", *words(base, data, tmp_path / "two.jsonl", *more)))
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    failed = subprocess.run(
        torchrun("inference", *words(base, data, tmp_path / "two.jsonl", *more)),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert failed.returncode and failed.stderr.count("is there already") == 1  # said once, and nobody waits


# ── flags ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give --interactive to chat, or --data_file"),
        (["--interactive", "--data_file", "x"], "not both"),
        (["--data_file", "x"], "--output_file: missing"),
        (["--data_file", "x", "--output_file", "./x"], "--output_file ./x: is the file of prompts"),
        (["--interactive", "--batch_size", "2"], "--batch_size has no effect with --interactive"),
        (["--interactive", "--do_sample", "False", "--top_p", "0.5"], "--top_p has no effect"),
        (["--interactive", "--temperature", "0", "--seed", "1"], "--seed has no effect on the most probable tokens"),
        (["--interactive", "--do_sample", "False", "--seed", "1"], "--seed has no effect on the most probable tokens"),
        (["--interactive", "--length_penalty", "2"], "--length_penalty has no effect without beam search"),
        (
            ["--interactive", "--typical_p", "0.5", "--temperature", "0"],
            "--typical_p has no effect with --temperature",
        ),
        (["--interactive", "--lora_model", "a", "--output_dir", "b"], "--lora_model names the adapter"),
        (["--interactive", "--base_modle", "a"], "--base_modle: no such flag; the nearest known flag is --base_model"),
    ],
)
def test_flags_that_do_not_fit_together(given, message):
    with pytest.raises(ValueError, match=message):
        inference.main(["--base_model", "nowhere", *given] if "--base_modle" not in given else given)


def test_the_adapter_is_looked_for(tmp_path):
    (tmp_path / "with").mkdir()
    (tmp_path / "with" / "adapter_config.json").write_text("{}")
    for first, second, found in (("with", "none", "with"), ("none", "with", "with"), ("none", None, None)):
        which = ChatModelArguments("base")
        args = inference.InferenceArguments(
            checkpoint_dir=str(tmp_path / first), output_dir=second and str(tmp_path / second)
        )
        inference.look_for_adapter(args, which)
        assert which.lora_model == (found and str(tmp_path / found))


def test_help_names_every_flag_once(capsys):
    with pytest.raises(SystemExit):
        inference.main(["--help"])
    text = capsys.readouterr().out
    assert "python inference.py --base_model models/SmolLM2-135M-Instruct --interactive" in text
    for flag in ("--base_model", "--temperature", "--output_file"):
        assert text.count(f"\n  {flag} ") == 1
    assert "default: None" not in text


# ── a terminal ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Terminal:
    """A program in a terminal of its own, 100 columns wide, with a person who types."""

    def __init__(self, command: list[str], cwd: Path):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execve(command[0], command, {**environment(), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"})
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.seen = ""

    def read(self, seconds: float) -> str:
        """What is written within that time, at least once something is."""
        if not select.select([self.fd], [], [], seconds)[0]:
            return ""
        try:
            return os.read(self.fd, 65536).decode("utf-8", "replace")
        except OSError:  # the program has ended
            raise EOFError(self.seen[-3000:]) from None

    def wait_for(self, text: str, seconds: float = 240) -> str:
        """Reads until `text` is there; returns what stood before it, and continues after it."""
        deadline = time.time() + seconds
        while text not in self.seen:
            assert time.time() < deadline, f"waited for {text!r}; the end of what was seen:\n{self.seen[-3000:]}"
            self.seen += self.read(1)
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def ended(self) -> int:
        """The exit code."""
        try:
            while True:
                self.read(5)
        except EOFError:
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


PROMPT = "you:"  # the space behind it is a move of the cursor
LEFT, BACKSPACE, ALT_ENTER, CTRL_C = "\x1b[D", "\x7f", "\x1b\r", "\x03"


def never_ending(folder: Path) -> Path:
    """A tiny model whose answers never come to the end marker."""
    model = build_tiny_model("llama", max_position_embeddings=40_000)
    with torch.no_grad():
        model.lm_head.weight[EOS_ID] = 0
    model.save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


def test_answers_on_a_terminal_are_broken_between_words(monkeypatch):
    def pieces():
        yield from ("Boil the e", "ggs for seven min", "utes.\x1b[2J")
        return Answer("all of it", (), True)

    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 20, 0, 0))
    with open(writer, "w", buffering=1, encoding="utf-8") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert inference.printed(pieces()) == Answer("all of it", (), True)
        monkeypatch.undo()
        written = b""
        while not written.decode().endswith("[2J\r\n"):  # a terminal hands over in parts
            written += os.read(reader, 1000)
        assert written.decode().split("\r\n") == [
            "model: Boil the eggs", "for seven", "minutes.␛[2J", ""]  # fmt: skip
    os.close(reader)


def test_answers_into_a_pipe_are_as_they_are(capsys):
    def pieces():
        yield from ("word " * 40, "end")
        return Answer("", (), True)

    inference.printed(pieces())
    assert capsys.readouterr().out == "model: " + "word " * 40 + "end\n"


def test_a_talk_in_a_terminal(tmp_path):
    base = never_ending(tmp_path / "model")
    command = python(
        "inference", "--base_model", base, "--interactive", "--max_new_tokens", 30_000, "--do_sample", "False"
    )
    terminal = Terminal(command, tmp_path)
    try:
        terminal.wait_for(PROMPT)
        # Chinese, two columns wide: one character is taken back, one is put before the last
        terminal.type(f"你好码{BACKSPACE}吗{LEFT}们\r")
        terminal.wait_for("model: ")
        time.sleep(1)
        terminal.type(CTRL_C)  # the answer ends, the program does not
        terminal.wait_for("[stopped]")
        terminal.wait_for(PROMPT)
        terminal.type("/save talk.jsonl\r")
        terminal.wait_for("2 messages appended to talk.jsonl")
        terminal.wait_for(PROMPT)
        terminal.type("/system 简短回答\r")
        terminal.wait_for("system prompt: 简短回答")
        terminal.wait_for(PROMPT)
        terminal.type("/clear\r")
        terminal.wait_for("forgotten")
        terminal.wait_for(PROMPT)
        terminal.type(f"one{ALT_ENTER}two\\\rthree\r")  # three lines
        terminal.wait_for("model: ")
        time.sleep(0.5)
        terminal.type(CTRL_C)
        terminal.wait_for("[stopped]")
        terminal.wait_for(PROMPT)
        terminal.type("/regen\r")
        terminal.wait_for("the most probable answer, the same every time")
        terminal.wait_for("model: ")
        time.sleep(0.5)
        terminal.type(CTRL_C)
        terminal.wait_for("[stopped]")
        terminal.wait_for(PROMPT)
        terminal.type("half a question")
        terminal.type(CTRL_C)  # drops the line
        terminal.wait_for("/quit or Ctrl-D ends")
        terminal.wait_for(PROMPT)
        terminal.type("/nonsense\r")
        terminal.wait_for("/nonsense: no such command")
        terminal.wait_for(PROMPT)
        terminal.type("/save talk.jsonl\r")
        terminal.wait_for("2 messages appended")
        terminal.wait_for(PROMPT)
        terminal.type("/quit\r")
        assert terminal.ended() == 0
    finally:
        os.close(terminal.fd)
    first, second = read(tmp_path / "talk.jsonl")
    assert first["conversations"][0] == {"from": "human", "value": "你好们吗"}
    assert first["conversations"][1]["from"] == "gpt" and first["conversations"][1]["value"]
    assert second["system"] == "简短回答"
    assert second["conversations"][0]["value"] == "one\ntwo\nthree"


def test_a_talk_over_a_pipe_has_history_and_a_seed(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama", max_position_embeddings=2048)
    script = "hello\nand \\\nmore\n/regen\n/save a.jsonl\n//slash\n/save a.jsonl\n/save /nowhere/b\n/regen now\n"
    command = python(
        "inference", "--base_model", base, "--interactive", "--max_new_tokens", 8, "--temperature", 1, "--seed", 3
    )
    outputs = []
    for folder, more in (("one", []), ("two", ["--rope_scaling", "dynamic"])):  # which changes nothing so early
        (tmp_path / folder).mkdir()
        done = subprocess.run(
            [*command, *more],
            input=script,
            text=True,
            capture_output=True,
            env=environment(),
            cwd=tmp_path / folder,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]  # the seed
    assert "error: /nowhere/b: No such file or directory" in outputs[0]
    first, second = read(tmp_path / "one" / "a.jsonl")
    assert [turn["value"] for turn in first["conversations"][::2]] == ["hello", "and \nmore"]
    assert second["conversations"][:4] == first["conversations"]
    assert second["conversations"][4]["value"] == "/slash"


def test_the_next_answer_sees_what_was_said(tiny_checkpoint):
    speaker = ChatModel.load(ChatModelArguments(str(tiny_checkpoint("llama", max_position_embeddings=2048))))
    greedy = SamplingArguments(do_sample=False, max_new_tokens=8)
    talk = ChatSession(speaker, greedy, system="S")
    first, second = "".join(talk.ask("one")), "".join(talk.ask("two"))
    said = (Message("user", "one"), Message("assistant", first), Message("user", "two"))
    assert speaker.answers([Conversation(said, "S")], greedy, batch_size=1)[0].text == second
    assert [m.content for m in talk.messages] == ["one", first, "two", second] and talk.forgotten == 0
    assert "".join(talk.again()) == second and len(talk.messages) == 4
    speaker.context = len(speaker.encode(Conversation(said, "S"), 8)) + 7  # one token too few for both questions
    assert "".join(talk.again()) == speaker.answers([Conversation(said[2:], "S")], greedy, batch_size=1)[0].text
    assert talk.forgotten == 1
    talk.clear()
    assert talk.messages == [] and talk.system == "S"


def test_an_answer_stopped_before_its_first_word_is_not_gone_on_from(tiny_checkpoint, tmp_path):
    speaker = ChatModel.load(ChatModelArguments(str(tiny_checkpoint("llama", max_position_embeddings=2048))))
    talk = ChatSession(speaker, SamplingArguments(do_sample=False, max_new_tokens=8))
    alone = "".join(talk.ask("two"))
    talk.messages = [Message("user", "one"), Message("assistant", "")]
    with pytest.raises(ValueError, match="the conversation is empty"):  # training refuses such a record
        talk.save(tmp_path / "talk.jsonl")
    assert "".join(talk.ask("two")) == alone
    assert [m.content for m in talk.messages] == ["two", alone]
    talk.messages = [Message("user", "two"), Message("assistant", "")]
    assert "".join(talk.again()) == alone


def test_what_cannot_be_asked_is_refused_before_the_model_is_said_to_speak(tiny_checkpoint, capsys):
    speaker = ChatModel.load(ChatModelArguments(str(tiny_checkpoint("llama", max_position_embeddings=64))))
    talk = ChatSession(speaker, SamplingArguments(do_sample=False, max_new_tokens=8))
    refusals = {"/regen": "nothing was asked", "long " * 99: "longer than the", "/save": "the conversation is empty"}
    for text, refused in refusals.items():
        with pytest.raises(ValueError, match=refused):
            inference.do(talk, text)
    assert capsys.readouterr().out == ""
    inference.do(talk, "/system\nin two\nlines")
    assert talk.system == "in two\nlines"


def test_a_full_gpu_ends_the_answer_and_not_the_talk(tiny_checkpoint, monkeypatch, capsys):
    speaker = ChatModel.load(ChatModelArguments(str(tiny_checkpoint("llama", max_position_embeddings=2048))))
    talk, own = ChatSession(speaker, SamplingArguments(do_sample=False, max_new_tokens=4)), speaker.base.generate

    def generate(**inputs):
        if inputs["input_ids"].shape[1] > 700:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(**inputs)

    monkeypatch.setattr(speaker.base, "generate", generate)
    questions = iter(["one", "long " * 300, "two"])

    class Typed:
        def read(self, prompt):
            try:
                return next(questions)
            except StopIteration:
                raise EOFError from None

    inference.converse(talk, Typed())
    assert "error: the GPU's memory is full" in capsys.readouterr().out
    assert [m.content for m in talk.messages[::2]] == ["one", "two"]


@pytest.mark.real
def test_the_small_model_talks(smollm, tmp_path):
    command = python(
        "inference", "--base_model", smollm, "--interactive", "--max_new_tokens", 16, "--do_sample", "False"
    )
    done = subprocess.run(
        [*command, "--torch_dtype", "bfloat16"],
        input="What is the capital of France?\n",
        text=True,
        capture_output=True,
        env=environment(),
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0 and "Paris" in done.stdout, done.stdout + done.stderr[-2000:]
