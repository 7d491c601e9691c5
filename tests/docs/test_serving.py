"""What is merged, served by others: transformers' own server and llama.cpp answer as inference.py does."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.launching import environment, free_port

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ("How do I keep pasta from sticking together?", "Say hello.", "煮面条老是粘成一团，有没有窍门？")
TOKENS = 40

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def merged(smollm, tmp_path_factory):
    """The small real model after a step of SFT, merged."""
    folder = tmp_path_factory.mktemp("served")
    words = ["--train_file_dir", "data/finetune/train", "--max_steps", "1", "--max_train_samples", "4"]
    words += ["--per_device_train_batch_size", "1", "--model_max_length", "128", "--learning_rate", "1e-3"]
    for command in (
        ["supervised_finetuning.py", "--model_name_or_path", smollm, "--output_dir", folder / "sft", *words],
        ["merge_peft_adapter.py", "--lora_model", folder / "sft", "--output_dir", folder / "merged"],
    ):
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "merged"


@pytest.fixture(scope="module")
def ours(merged):
    """What inference.py says: {question: (text, whether it ended by itself, the prompt's ids)}, greedy, in float32."""
    from stagewise.formats.parsers import Conversation, Message
    from stagewise.inference.chat_model import ChatModel, ChatModelArguments, SamplingArguments

    speaker = ChatModel.load(ChatModelArguments(str(merged), torch_dtype="float32", device="cpu"))
    conversations = [Conversation((Message("user", q),), None, None, "test") for q in QUESTIONS]
    sampling = SamplingArguments(do_sample=False, max_new_tokens=TOKENS)
    answers = speaker.answers(conversations, sampling, batch_size=1)
    ids = [speaker.encode(conversation) for conversation in conversations]
    return {q: (a.text, a.ended, prompt) for q, a, prompt in zip(QUESTIONS, answers, ids, strict=True)}


def test_the_answers_end_in_both_ways(ours):
    assert {ended for _, ended, _ in ours.values()} == {True, False}


@pytest.fixture
def server(merged):
    """transformers' own server for the merged model; its address."""
    pytest.importorskip("openai", reason="the server needs requirements-serving.txt")
    pytest.importorskip("uvicorn", reason="the server needs requirements-serving.txt")
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(merged), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(240):
                assert process.poll() is None, "the server ended"
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except urllib.error.HTTPError:
                    break  # it answers
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def documented_request() -> dict:
    """What the page's curl command sends."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    return json.loads(re.search(r"^curl .* -d '(\{.*?\})'$", page, re.MULTILINE | re.DOTALL)[1])


def test_transformers_own_server_answers_as_we_do(server, merged, ours):
    for question, (text, ended, prompt) in ours.items():
        asked = documented_request() | {"model": str(merged), "max_tokens": TOKENS}
        asked["messages"] = [{"role": "user", "content": question}]
        address = f"{server}/v1/chat/completions"
        if shutil.which("curl"):
            command = ["curl", "-s", address, "-H", "Content-Type: application/json", "-d", json.dumps(asked)]
            answer = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=120).stdout)
        else:
            request = urllib.request.Request(address, json.dumps(asked).encode(), {"Content-Type": "application/json"})
            answer = json.load(urllib.request.urlopen(request, timeout=120))
        (choice,) = answer["choices"]
        # The token limit may cut a character: the server then ends with U+FFFD, inference.py before that character.
        assert choice["message"]["content"].removesuffix("\N{REPLACEMENT CHARACTER}") == text
        assert choice["finish_reason"] == ("stop" if ended else "length")
        assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_llama_cpp_answers_as_we_do(merged, ours, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs requirements-llama-cpp.txt, which compiles")
    from tools.export_gguf import CONVERTER_DIR, SCRIPT, export

    converter = ROOT / CONVERTER_DIR
    if not (converter / SCRIPT).is_file():
        pytest.skip(f"{converter} is not there: python -m tools.export_gguf brings it")
    export(merged, tmp_path / "model.gguf", "f32", converter, overwrite=False)
    model = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=512, verbose=False)
    try:
        for question, (text, ended, prompt) in ours.items():
            rendered = chat_text(merged, question)
            assert model.tokenize(rendered.encode(), add_bos=False, special=True) == prompt
            messages = [{"role": "user", "content": question}]
            answer = model.create_chat_completion(messages, max_tokens=TOKENS, temperature=0)
            (choice,) = answer["choices"]
            assert choice["message"]["content"] == text
            assert choice["finish_reason"] == ("stop" if ended else "length")
            assert answer["usage"]["prompt_tokens"] == len(prompt)
    finally:
        model.close()


def chat_text(folder: Path, question: str) -> str:
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": question}]
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
