"""Who may use the server: the token, and checks against other web pages in the same browser."""

import hashlib
import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from ssmttm.web.limits import App, Receive, Scope, Send, send_error

_LOCAL = ("localhost", "127.0.0.1", "::1")
_SAFE = ("GET", "HEAD", "OPTIONS")


class Access:
    """ASGI middleware that refuses requests without the right to be here.

    With a token, every request needs it: as `Authorization: Bearer TOKEN`, or in the cookie that the page's address
    with `?token=TOKEN` sets, or in the query of a WebSocket. Without one, the server is for this computer only, and the
    `Host` must be a local name, so that no web page reaches it by a name that resolves to 127.0.0.1 (DNS rebinding).
    A request that another web page makes the browser send (its `Origin` is not this server) is refused.
    """

    def __init__(self, app: App, token: str | None, host: str) -> None:
        self._app = app
        self._token = token
        self._hosts = (*_LOCAL, host)
        self._cookie = "" if token is None else f"ssmttm_{hashlib.sha256(token.encode()).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        status, message = self._refusal(scope, headers)
        if scope["type"] == "websocket" and message:
            await receive()  # websocket.connect
            await send({"type": "websocket.close", "code": 1008, "reason": message[:100]})
        elif message:
            await send_error(send, status, message)
        elif scope["type"] == "http" and scope["path"] == "/" and self._query_token(scope) is not None:
            await self._redirect_with_cookie(send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str]:
        """Status and message of a refusal; an empty message if the request may pass."""
        host = headers.get("host", "")
        if self._token is None and _name(host) not in self._hosts:
            return 403, f"without --token this server answers on this computer only, not as {_name(host)!r}"
        origin = headers.get("origin")
        changes = scope["type"] == "websocket" or scope["method"] not in _SAFE
        if changes and origin is not None and origin.partition("://")[2] != host:
            return 403, f"a page of {origin} may not use this server"
        if self._token is not None and not self._has_token(scope, headers):
            return 401, "the token is missing or wrong: open the address that the server printed, with ?token=..."
        return 200, ""

    def _has_token(self, scope: Scope, headers: dict[str, str]) -> bool:
        """Whether a request has the token, compared in constant time."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        found = [self._query_token(scope), bearer if scheme.lower() == "bearer" else None]
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            morsel = None
        found.append(None if morsel is None else morsel.value)
        token = (self._token or "").encode()
        return any([hmac.compare_digest(token, word.encode()) for word in found if word is not None])

    def _query_token(self, scope: Scope) -> str | None:
        words = parse_qs(scope["query_string"].decode("latin-1")).get("token")
        return words[0] if words and self._token is not None else None

    async def _redirect_with_cookie(self, send: Send) -> None:
        """Keep the token in a cookie that scripts cannot read and other pages cannot send, and drop it from the
        address."""
        cookie = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"
        headers = [(b"location", b"/"), (b"set-cookie", cookie.encode()), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def _name(host: str) -> str:
    """The host of a `Host` header, without its port and without the brackets of IPv6."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
