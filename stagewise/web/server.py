"""The server of a gradio page: its address, logins, allowed requests, and security headers."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger

from stagewise.errors import ArgumentError
from stagewise.inference.arguments import ChatModelArguments, SamplingArguments

# Further restrictions on an answer: nothing from elsewhere, no code in attributes, no frames.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; script-src-attr 'none'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'"
)


# The page takes text, never files. Only the gradio routes that its own frontend uses are served; uploads, proxying,
# server files, API descriptions and monitoring answer 404, with or without a login.
READS = {"login_check", "user", "token", "app_id", "theme.css", "queue/data", "startup-events"}
WRITES = {"queue/join", "run/predict", "cancel", "reset"}
PAGES = {"", "config", "theme.css", "favicon.ico", "manifest.json", "robots.txt", "login", "logout"}
ASSETS = ("assets/", "static/", "svelte/", "gradio_api/heartbeat/")
LARGEST = 1024 * 1024  # bytes of a request: a question and its settings
HOST_NAME = re.compile(r"[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]")


@dataclass
class WebArguments:
    """The page's address and access."""

    heading = "The page"

    server_name: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0: all addresses of this machine."}
    )
    server_port: int = field(default=7860, metadata={"help": "Port to listen on."})
    auth: str | None = field(
        default=None, metadata={"help": "Require a login: NAME:PASSWORD, or a file with one per line."}
    )
    allowed_hosts: list[str] | None = field(
        default=None,
        metadata={"help": "Host names allowed in requests beside this machine's own, such as a proxy's."},
    )
    share: bool = field(
        default=False, metadata={"help": "Also open a public address through gradio's servers; needs --auth."}
    )
    system_prompt: str = field(default="", metadata={"help": "Initial system prompt of every conversation."})
    title: str = field(default="Stagewise", metadata={"help": "Title of the page."})


FLAGS = [ChatModelArguments, SamplingArguments, WebArguments]


class Headers:
    """Adds the content security policy to every response."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def with_headers(message) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        await self.app(scope, receive, with_headers)


class Guard:
    """Refuses requests that the page never makes.

    Args:
        hosts: the names allowed in the Host header beside loopback addresses; None: any name. Without this check a
            foreign site could point its own name at 127.0.0.1 (DNS rebinding) and read the page from the browser of
            whoever runs it.
    """

    def __init__(self, app: Any, hosts: frozenset[str] | None = None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":  # the page has none
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self.refusal(scope)
        if refusal is None:
            await self.app(scope, receive, send)
            return
        body = refusal[1].encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": refusal[0], "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def refusal(self, scope: dict[str, Any]) -> tuple[int, str] | None:
        """(status, reason) of a refused request; None if it is allowed."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = host_of(headers.get(b"host", b"").decode("latin-1"))
        if self.hosts is not None and not (is_loopback(host) or host in self.hosts):
            return 421, f"this page does not answer to the host {host!r}: see --allowed_hosts"
        if not is_of_the_page(scope["method"], scope["path"]):
            return 404, "not found"
        if b"transfer-encoding" in headers:
            return 411, "a request says how long it is"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > LARGEST:
            return 413, f"a request is at most {LARGEST} bytes"
        return None


def is_of_the_page(method: str, path: str) -> bool:
    """Whether the page itself makes such a request."""
    path = path.strip("/")
    if method == "POST":
        return path == "login" or path.removeprefix("gradio_api/") in WRITES
    known = path in PAGES or path.startswith(ASSETS) or path.removeprefix("gradio_api/") in READS
    return method in ("GET", "HEAD") and known


def host_of(header: str) -> str:
    """The name in a Host header, in lower case, without port and brackets."""
    name = re.sub(r":\d*$", "", header.strip()) if header.count(":") < 2 or "]" in header else header.strip()
    return name.strip("[]").rstrip(".").lower()


def logins(auth: str | None) -> list[tuple[str, str]] | None:
    """The names and passwords of --auth.

    Raises:
        ArgumentError: a colon is missing, a half is empty, or a name is given twice.
    """
    if auth is None:
        return None
    lines = [auth]
    if Path(auth).is_file():
        lines = [line for line in Path(auth).read_text(encoding="utf-8").splitlines() if line.strip()]
    pairs = [tuple(line.strip().split(":", 1)) for line in lines]
    if not pairs or any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ArgumentError("--auth: expected NAME:PASSWORD, or a file with one on each line")
    if len(dict(pairs)) < len(pairs):
        raise ArgumentError("--auth: a name is given twice")
    return pairs


def check_web(web: WebArguments) -> list[tuple[str, str]] | None:
    """Refuses flags that cannot be honored; returns the logins."""
    if not 0 < web.server_port < 65536:
        raise ArgumentError(f"--server_port: expected 1 to 65535, found {web.server_port}")
    for name in web.allowed_hosts or ():
        if not HOST_NAME.fullmatch(name):
            raise ArgumentError(
                f"--allowed_hosts {name}: expected a name such as chat.example.org, without scheme or port"
            )
    if web.allowed_hosts and web.share:
        raise ArgumentError("--allowed_hosts: the name of --share is known only when it is open; give one of them")
    pairs = logins(web.auth)
    if web.share and not pairs:
        raise ArgumentError("--share: opens the page to everyone on the internet; give --auth NAME:PASSWORD too")
    return pairs


def is_loopback(name: str) -> bool:
    """Whether a name or address is this machine's own, without a DNS query."""
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_local_only(address: str) -> bool:
    """Whether a server on an address or name can only be reached from this machine."""
    if is_loopback(address):
        return True
    try:
        return all(is_loopback(str(found[4][0])) for found in socket.getaddrinfo(address, None))
    except OSError:  # gradio refuses it with its own flag
        return False


def hosts_of(web: WebArguments) -> frozenset[str] | None:
    """The names allowed as a request's Host; None: any, since a public page may be reached under unknown names."""
    if web.allowed_hosts is None and (web.share or not is_local_only(web.server_name)):
        return None
    return frozenset(map(host_of, [web.server_name, *(web.allowed_hosts or ())]))


def serve(
    blocks: Any, web: WebArguments, pairs: list[tuple[str, str]] | None, *, i18n: Any, css: str, wait: bool = True
) -> str:
    """Starts the server of a gradio page and returns its address, or with `wait` returns once it has ended.

    Raises:
        ArgumentError: the address or port is not available, or there is no public address to --share.
    """
    import gradio as gr
    from starlette.middleware import Middleware

    if not is_local_only(web.server_name) and not pairs:
        logger.info(f"--server_name {web.server_name} without --auth: whoever reaches this address can use the model")
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, local, public = blocks.launch(
            server_name=web.server_name, server_port=web.server_port, share=web.share, auth=pairs,
            prevent_thread_lock=True, quiet=True, ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False,
            footer_links=[], i18n=i18n, theme=theme, css=css, max_file_size=LARGEST,
            app_kwargs={
                "middleware": [Middleware(Headers), Middleware(Guard, hosts=hosts_of(web))],
                "docs_url": None, "redoc_url": None, "openapi_url": None,
            },
        )  # fmt: skip
    except OSError as error:
        raise ArgumentError(f"--server_name {web.server_name} --server_port {web.server_port}: {error}") from error
    if web.share and not public:
        blocks.close(verbose=False)
        raise ArgumentError("--share: no public address could be opened; leave it out, or see gradio's words above")
    logger.info(f"open {local}" + (f" or {public}" if public else "") + "; Ctrl-C ends the server")
    if wait:
        blocks.block_thread()
    return local
