"""Where a model lies: directories, hubs and their mirrors, ModelScope."""

import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import pytest

from stagewise.config.arguments import ModelArguments
from stagewise.errors import ModelError
from stagewise.models.config import load_config
from stagewise.models.hub import find_source
from stagewise.models.loading import load_causal_lm
from stagewise.models.tokenizer import load_tokenizer
from tests.conftest import ROOT, build_tiny_model


def arguments(path, **flags) -> ModelArguments:
    return ModelArguments(model_name_or_path=str(path), **flags)


@pytest.fixture
def no_network(monkeypatch):
    """Hub access is on, yet a connection ends the test with ConnectionAbortedError."""

    def refuse(*_, **__):
        raise ConnectionAbortedError("a hub was asked")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_local_directory_asks_no_hub(tiny_checkpoint, no_network):
    args = arguments(tiny_checkpoint("llama"))
    model = load_causal_lm(args, tokenizer=load_tokenizer(args))
    assert model.config.model_type == "llama"


def test_a_hub_name_does_ask(no_network, monkeypatch):
    """The guard of the test above works."""
    asked = []
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's five tries
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a[0]) or (_ for _ in ()).throw(OSError()))
    with pytest.raises(ModelError, match="nobody/nothing"):
        load_config(arguments("nobody/nothing"))
    assert asked


class Mirror(BaseHTTPRequestHandler):
    """A hub with one model, `someone/tiny`, whose files are in `folder`."""

    folder = None
    requests: list[str] = []  # noqa: RUF012

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        Mirror.requests.append(self.path)
        path = self.folder / self.path.rsplit("/", 1)[-1]
        content = path.read_bytes() if path.is_file() and "/resolve/" in self.path else b""
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        if content:
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{path.name}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def test_a_mirror_named_by_hf_endpoint_is_used(tiny_checkpoint, tmp_path):
    Mirror.folder, Mirror.requests = tiny_checkpoint("llama"), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from stagewise.config.arguments import ModelArguments\nfrom stagewise.models.loading import load_causal_lm\n"
        "from stagewise.models.tokenizer import load_tokenizer\n"
        f"args = ModelArguments('someone/tiny', cache_dir={str(tmp_path)!r})\n"
        "print(len(load_tokenizer(args)), load_causal_lm(args).num_parameters())"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    expected = build_tiny_model("llama").num_parameters()
    assert done.stdout.split()[-2:] == ["300", str(expected)]
    assert any(path.startswith("/someone/tiny/resolve/main/model.safetensors") for path in Mirror.requests)


def test_modelscope_downloads_when_asked(monkeypatch):
    calls = []
    fake = SimpleNamespace(snapshot_download=lambda name, **options: calls.append((name, options)) or "/somewhere")
    monkeypatch.setitem(sys.modules, "modelscope", fake)
    args = arguments("modelscope://qwen/tiny", cache_dir="cache")
    assert find_source(args.model_name_or_path, args) == "/somewhere"
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert find_source("qwen/tiny", arguments("qwen/tiny", model_revision="v2")) == "/somewhere"
    assert calls == [
        ("qwen/tiny", {"cache_dir": "cache", "revision": None}),
        ("qwen/tiny", {"cache_dir": None, "revision": "v2"}),
    ]
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "0")
    assert find_source("qwen/tiny", arguments("qwen/tiny")) == "qwen/tiny"


def test_modelscope_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelError, match="pip install modelscope"):
        find_source("modelscope://qwen/tiny", arguments("x"))


@pytest.mark.parametrize("name", ["./nothing", "/no/where", "a/b/c", "outputs/sft/"])
def test_a_directory_that_is_not_there_is_named(name):
    with pytest.raises(ModelError, match=f"--model_name_or_path {name}: no such directory"):
        find_source(name, arguments(name))


def test_a_missing_directory_beside_runs_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/sft-merged").mkdir(parents=True)
    assert find_source("runs/sft-merge", arguments("x")) == "runs/sft-merge"  # a folder of downloads, perhaps
    (tmp_path / "runs/sft-merged/run.json").write_text("{}")
    with pytest.raises(ModelError, match=r"^--model_name_or_path runs/sft-merge: .*directory; runs holds sft-merged$"):
        find_source("runs/sft-merge", arguments("x"))
    with pytest.raises(ModelError, match=r"^--model_name_or_path outputs/pt: no such directory$"):
        find_source("outputs/pt", arguments("x"))


def test_the_librarys_long_text_about_a_missing_model_is_not_repeated():
    with pytest.raises(ModelError) as found:  # the tests' environment is offline
        load_config(arguments("nobody/nothing"))
    assert str(found.value) == (
        "--model_name_or_path nobody/nothing: no such directory, and no hub model was found: "
        "https://huggingface.co was not reached and the cache has none"
    )


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="found a file"):
        find_source(str(tmp_path / "model.gguf"), arguments("x"))


@pytest.mark.parametrize("load", [load_tokenizer, load_config, load_causal_lm])
def test_an_adapter_given_as_model_names_the_merge_command(load, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError) as found:
        load(arguments(tmp_path))
    assert f"python merge_peft_adapter.py --lora_model {tmp_path} --output_dir {tmp_path}-merged" in str(found.value)
