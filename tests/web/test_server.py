"""The page's server by real HTTP requests: what it takes, from whom, and under which names."""

import http.client
import socket

import pytest

from stagewise.errors import ArgumentError

gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-web.txt")

import web_demo  # noqa: E402
from stagewise.inference.chat_model import ChatModel  # noqa: E402
from stagewise.web.server import LARGEST, WebArguments, check_web, host_of, hosts_of, serve  # noqa: E402


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def opened():
    """Factory: the port of a page with one box, served as the chat page is."""
    pages = []

    def enter(**web) -> int:
        with gr.Blocks(analytics_enabled=False) as blocks:
            box = gr.Textbox()
            box.submit(lambda text: text[:5], box, box, api_visibility="private")
        args = WebArguments(server_port=free_port(), **web)
        serve(blocks, args, check_web(args), i18n=None, css="", wait=False)
        pages.append(blocks)
        return args.server_port

    yield enter
    for blocks in pages:
        blocks.close(verbose=False)


@pytest.fixture(scope="module")
def port(opened) -> int:
    return opened()


def send(port: int, method: str, path: str, body=None, headers=(), chunked=False) -> tuple[int, str, dict]:
    """(status, text, headers) of one request, whose Host is what `headers` says, else the address itself."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, dict(headers), encode_chunked=chunked)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode("utf-8", "replace"), {k.lower(): v for k, v in answer.getheaders()}
    connection.close()
    return found


FILE = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


UPLOADS = ("upload", "upload/", "component_server", "process_recording")
OFF = ("/openapi.json", "/docs", "/redoc", "/gradio_api/openapi.json", "/gradio_api/info", "/monitoring",
       "/gradio_api/vibe-code", "/gradio_api/file=/etc/hostname", "/gradio_api/proxy=http://127.0.0.1:9/",
       "/gradio_api/deep_link")  # fmt: skip


@pytest.mark.parametrize("path", ["/upload", *(f"/gradio_api/{path}" for path in UPLOADS)])
def test_no_file_can_be_uploaded(port, path):
    assert send(port, "POST", path, FILE, FORM)[0] == 404


def test_no_file_can_be_uploaded_with_a_login_either(opened):
    port = opened(auth="ann:secret")
    status, _, headers = send(port, "POST", "/login", "username=ann&password=secret",
                              {"Content-Type": "application/x-www-form-urlencoded"})  # fmt: skip
    assert status == 200
    cookie = {"Cookie": headers["set-cookie"].split(";")[0]}
    assert send(port, "GET", "/config")[0] == 401
    assert send(port, "GET", "/config", headers=cookie)[0] == 200
    assert send(port, "POST", "/gradio_api/upload", FILE, {**FORM, **cookie})[0] == 404


@pytest.mark.parametrize("path", OFF)
def test_descriptions_files_and_proxies_are_off(port, path):
    assert send(port, "GET", path)[0] == 404


def test_the_page_itself_is_there(port):
    assert send(port, "GET", "/")[0] == 200
    assert send(port, "HEAD", "/")[0] == 200
    assert '"components"' in send(port, "GET", "/config")[1]
    for path in ("/theme.css", "/gradio_api/startup-events", "/robots.txt"):
        assert send(port, "GET", path)[0] == 200


def test_a_request_has_a_size(port):
    kind = {"Content-Type": "application/json"}
    status, said, headers = send(port, "POST", "/gradio_api/queue/join", b"x" * (LARGEST + 1), kind)
    assert (status, said) == (413, "a request is at most 1048576 bytes")
    assert "script-src-attr 'none'" in headers["content-security-policy"]
    assert send(port, "POST", "/gradio_api/queue/join", iter([b"x" * 10]), kind, chunked=True)[0] == 411
    assert send(port, "POST", "/gradio_api/queue/join", b"x" * LARGEST, kind)[0] == 422  # looked at, and no JSON


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:7860", 200),
        ("LOCALHOST.", 200),
        ("[::1]:80", 200),
        ("rebound.example", 421),
        ("rebound.example:7860", 421),
        ("127.0.0.1.rebound.example", 421),
        ("localhost.rebound.example", 421),
        ("10.0.0.1", 421),
        ("", 421),
    ],
)
def test_a_foreign_host_is_refused_on_loopback(port, host, status):
    found = send(port, "GET", "/config", headers={"Host": host})
    assert found[0] == status
    if status == 421:
        assert "see --allowed_hosts" in found[1]
        assert send(port, "POST", "/gradio_api/queue/join", b"{}", {"Host": host})[0] == 421


def test_further_hosts_are_allowed_by_name(opened):
    port = opened(allowed_hosts=["chat.example.org"])
    assert send(port, "GET", "/config", headers={"Host": "Chat.example.org:443"})[0] == 200
    assert send(port, "GET", "/config", headers={"Host": "127.0.0.1"})[0] == 200
    assert send(port, "GET", "/config", headers={"Host": "other.example.org"})[0] == 421


def test_where_others_are_let_in_every_host_is_unless_some_are_named(opened):
    port = opened(server_name="0.0.0.0")
    assert send(port, "GET", "/config", headers={"Host": "my-server:80"})[0] == 200
    port = opened(server_name="0.0.0.0", allowed_hosts=["my-server"])
    assert send(port, "GET", "/config", headers={"Host": "my-server:80"})[0] == 200
    assert send(port, "GET", "/config", headers={"Host": "rebound.example"})[0] == 421


def test_hosts_by_address():
    assert hosts_of(WebArguments(server_name="localhost")) == {"localhost"}
    assert hosts_of(WebArguments(server_name="::1")) == {"::1"}
    assert hosts_of(WebArguments(server_name="10.0.0.1")) is None
    assert hosts_of(WebArguments(auth="a:b", share=True)) is None


@pytest.mark.parametrize(
    ("header", "name"),
    [("a.b:80", "a.b"), ("[::1]:80", "::1"), ("::1", "::1"), ("A.B.", "a.b"), ("[fe80::1]", "fe80::1"), ("", "")],
)
def test_names_in_host_headers(header, name):
    assert host_of(header) == name


@pytest.mark.parametrize("name", ["https://chat.example.org", "chat.example.org:443", "a b", ""])
def test_an_allowed_host_is_a_name(name):
    with pytest.raises(ArgumentError, match="--allowed_hosts .*: expected a name such as chat.example.org"):
        check_web(WebArguments(allowed_hosts=[name]))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--num_beams", "4"], "--num_beams"),
        (["--share"], "--share: opens the page to everyone on the internet; give --auth"),
        (["--auth", "justaname"], "--auth: expected NAME:PASSWORD"),
        (["--auth", "name:"], "--auth: expected NAME:PASSWORD"),
        (["--server_port", "0"], "--server_port: expected 1 to 65535, found 0"),
        (["--top_p", "2"], "--top_p"),
        (["--color", "red"], "--color"),
        (["--temperature", "0", "--top_k", "3"], "--top_k has no effect"),
    ],
)
def test_flags_are_refused_by_name_before_anything_is_loaded(words, named, monkeypatch):
    monkeypatch.setattr(ChatModel, "load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ArgumentError) as error:
        web_demo.main(["--base_model", "nowhere", *words])
    assert named in str(error.value)
