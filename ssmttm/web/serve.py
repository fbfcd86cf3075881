"""Bind the address, load the models, serve until interrupted."""

import asyncio
import errno
import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ssmttm.errors import UserError
from ssmttm.web.limits import Limits

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

_NEEDED = ("fastapi", "uvicorn", "websockets", "python_multipart")
_MAX_CONNECTIONS = 512  # below the usual limit of open files
_BACKLOG = 128


def serve(models: Sequence[str | None], host: str, port: int, token: str | None, limits: Limits) -> None:
    """Serve models until Ctrl-C; prints the page's address.

    Args:
        models: folders, run folders, names of embedded models or hub ids; None: the embedded tiny model.
        port: 0 for any free one.
        token: for every request; None: none on this computer, else a random one, which is printed.

    Raises:
        UserError: the extra `web` is not installed, the address cannot be bound, or a model cannot be loaded.
    """
    if missing := [name.replace("_", "-") for name in _NEEDED if find_spec(name) is None]:
        raise UserError(f"the web server needs {', '.join(missing)}: pip install 'ssmttm[web]'")
    if token is not None and not re.fullmatch(r"[\w.~-]{8,}", token, re.ASCII):
        raise UserError("--token must have at least 8 characters, all letters, digits or any of . _ ~ -")
    with bind(host, port) as listening:
        if token is None and not is_loopback(listening.getsockname()[0]):
            token = secrets.token_urlsafe(16)
        _serve(listening, models, host, token, limits)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError in one line if the address is taken, unknown or not allowed."""
    if not 0 <= port < 65536:
        raise UserError(f"--port must be in [0, 65535], got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host} is not an address of this computer: use 127.0.0.1, or 0.0.0.0") from error
    listening = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share the port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is taken, by another server: choose another --port") from error
        raise UserError(f"cannot serve at {host}, port {port} ({error.strerror}): choose another") from error
    return listening


def is_loopback(address: str) -> bool:
    """Whether only this computer reaches a bound address."""
    return ipaddress.ip_address(address).is_loopback


def _serve(
    listening: socket.socket, models: Sequence[str | None], host: str, token: str | None, limits: Limits
) -> None:
    from ssmttm.generation.pipeline import MusicPipeline
    from ssmttm.web.app import create_app

    pipelines: dict[str, MusicPipeline] = {}
    for model in models or [None]:
        pipe = MusicPipeline.from_pretrained(model)
        pipe.max_duration = limits.duration
        name = str(pipe.metadata["model"]["name"])
        if name in pipelines:
            raise UserError(f"two models are called {name}: serve one of them, or export it under another name")
        pipelines[name] = pipe
    print(f"{', '.join(pipelines)} at {address_of(listening, host, token)}  (Ctrl-C stops)", flush=True)
    with suppress(KeyboardInterrupt):  # the usual end; all has been closed then
        make_server(create_app(pipelines, limits, token, host), limits).run(sockets=[listening])


def make_server(app: "FastAPI", limits: Limits) -> "uvicorn.Server":
    """Uvicorn with our limits; silent but for errors. When it stops, generations end first."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await asyncio.to_thread(app.state.service.close)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_level="error", access_log=False, lifespan="on", limit_concurrency=_MAX_CONNECTIONS,
        ws="websockets-sansio", ws_max_size=limits.body_bytes, timeout_graceful_shutdown=2, server_header=False,
    )  # fmt: skip
    return Server(config)


def address_of(listening: socket.socket, host: str, token: str | None) -> str:
    """The page's address, with the token; by this computer's name if it listens everywhere."""
    address, port = listening.getsockname()[:2]
    host = socket.gethostname() if ipaddress.ip_address(address).is_unspecified else host
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")
