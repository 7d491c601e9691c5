"""The server of a gradio page: where it listens, who may come in, and what its pages may not do."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger

from stagewise.arguments import ArgumentError
from stagewise.speaker_arguments import SamplingArguments, SpeakerArguments

# What an answer could still bring along: nothing from elsewhere, no code in attributes, no frames.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; script-src-attr 'none'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'"
)


@dataclass
class WebArguments:
    """Where the page is, and for whom."""

    _argument_group_name = "the page"

    server_name: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0: every address of this machine."}
    )
    server_port: int = field(default=7860, metadata={"help": "Port to listen on."})
    auth: str | None = field(
        default=None, metadata={"help": "Ask for a login: NAME:PASSWORD, or a file with one on each line."}
    )
    share: bool = field(
        default=False, metadata={"help": "Also open a public address through gradio's servers; needs --auth."}
    )
    system_prompt: str = field(default="", metadata={"help": "What every conversation's system prompt is at first."})
    title: str = field(default="Stagewise", metadata={"help": "What stands at the top of the page."})


FLAGS = [SpeakerArguments, SamplingArguments, WebArguments]


class Headers:
    """Adds the content security policy to every answer of the server."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def with_headers(message) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        await self.app(scope, receive, with_headers)


def logins(auth: str | None) -> list[tuple[str, str]] | None:
    """--auth as names and passwords.

    Raises:
        ArgumentError: there is no colon, an empty half, or a name stands there twice.
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
        raise ArgumentError("--auth: a name stands there twice")
    return pairs


def check_web(web: WebArguments) -> list[tuple[str, str]] | None:
    """Refuses by name what cannot be honoured; returns the logins."""
    if not 0 < web.server_port < 65536:
        raise ArgumentError(f"--server_port: expected 1 to 65535, found {web.server_port}")
    pairs = logins(web.auth)
    if web.share and not pairs:
        raise ArgumentError("--share: opens the page to everyone on the internet; give --auth NAME:PASSWORD too")
    return pairs


def only_here(address: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def serve(
    blocks: Any, web: WebArguments, pairs: list[tuple[str, str]] | None, *, i18n: Any, css: str, wait: bool = True
) -> str:
    """Starts the server of a gradio page and returns its address; with `wait` only when it has ended.

    Raises:
        ArgumentError: the address or port cannot be listened on, or there is no public address to --share.
    """
    import gradio as gr
    from starlette.middleware import Middleware

    if not only_here(web.server_name) and not pairs:
        logger.info(f"--server_name {web.server_name} without --auth: whoever reaches this address can use the model")
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, local, public = blocks.launch(
            server_name=web.server_name, server_port=web.server_port, share=web.share, auth=pairs,
            prevent_thread_lock=True, quiet=True, ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False,
            footer_links=["settings"], i18n=i18n, theme=theme, css=css,
            app_kwargs={"middleware": [Middleware(Headers)], "docs_url": None, "redoc_url": None},
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
