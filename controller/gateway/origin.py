"""What a browser may send here: nothing on behalf of another web site. Pure ASGI.

A page on any site can make its visitor's browser call a loopback address, and can even make its
own name resolve to one. Other clients send none of the headers looked at here, or the right ones.
"""

from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from controller.errors import Forbidden
from controller.gateway.failures import error_response

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
OWN_SITES = frozenset({"same-origin", "none"})  # `none`: typed by the user


class OriginGate:
    """Middleware that refuses calls which some other web site has made a browser send.

    Args:
        app: The rest of the application.
        is_local_only: Whether only names of this machine are addressed to us. Where keys are
            required this need not be so: a page that renames itself to us has no key of ours.
    """

    def __init__(self, app: ASGIApp, *, is_local_only: bool) -> None:
        self._app = app
        self._is_local_only = is_local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403, or pass the call on."""
        if scope["type"] == "http":
            try:
                self._check(scope["method"], Headers(scope=scope))
            except Forbidden as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, method: str, headers: Headers) -> None:
        host = headers.get("host")
        if self._is_local_only and host is not None and not _is_local(host):
            raise Forbidden(
                f"this controller listens for this machine alone and was called {host[:64]!r}; "
                "use localhost, or set COLDSPARK_REQUIRE_API_KEYS to serve other names"
            )
        if method not in SAFE_METHODS and not _is_own(headers):
            origin = headers.get("origin", "another site")
            raise Forbidden(
                f"a web page of {origin[:64]!r} may not change anything here; "
                "call from a program, or from the dashboard itself"
            )


def _is_local(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name.lower() == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _is_own(headers: Headers) -> bool:
    """Return whether a call is of our own pages, or of no page at all."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in OWN_SITES
    origin = headers.get("origin")
    # An old browser: a proxy in front may have changed the scheme, but not host and port.
    return origin is None or origin.partition("://")[2] == headers.get("host", "")
