"""What may be asked of the page: each request is looked at here before Gradio sees it.

A browser lets any web site send requests to this computer, and Gradio answers far more of them than this page needs:
it fetches addresses that a request names, for one. So only what the page's own scripts ask for is answered.
"""

import ipaddress
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_FILE = 100 * 2**20  # bytes of one file: a photograph of the largest cameras, as PNG
MAX_UPLOAD = 2 * 2**30  # of all files that are added at once
MAX_EVENT = 16 * 2**20  # of what a button sends: names, no pictures
SPARE = 2**30  # of the disk, left free

UPLOAD, EVENT = "/gradio_api/upload", "/gradio_api/queue/join"
MOST = {UPLOAD: MAX_UPLOAD, EVENT: MAX_EVENT}
FILE = "/gradio_api/file="
ADDRESSES = re.compile(  # what the page asks for besides files
    r"/|/config|/favicon\.ico|/manifest\.json|/theme\.css|/(assets|static)(/\w[\w.-]{0,200})+|"
    r"/gradio_api/(app_id|heartbeat/\w+|info|queue/data|startup-events)",
    re.ASCII,
)

# Gradio's page runs scripts that it composes. But nothing comes from another site, nor goes to one.
HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class RefusedError(Exception):
    """A request that is not answered; the message says to a person why."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status = status


class Guard:
    """The page, of which nobody but its own scripts can ask anything.

    Args:
        app: the page as Gradio serves it.
        uploads: the one folder of which files are served, and may be named by an event; Gradio's own.
        local: the page is for this computer alone, and answers to no other name. Else a web site could let its own
            name mean this computer, and the browser would take the page for a part of that site.
    """

    def __init__(self, app: ASGIApp, uploads: Path, local: bool) -> None:
        self.app, self.uploads, self.local = app, uploads.resolve(), local
        self._coming = 0  # bytes of the uploads that are under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # the page has no web sockets
            return await send({"type": "websocket.close", "code": 1008})
        # the page asks for whole files; for parts that are none, some versions of Gradio never come to an end
        scope = {**scope, "headers": [each for each in scope["headers"] if each[0] != b"range"]}
        headers, path = Headers(scope=scope), scope["path"]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            self._check_sender(headers)
            self._check_address(scope["method"], path)
            if scope["method"] != "POST":
                await self.app(scope, receive, send_with_headers)
            elif path == UPLOAD:
                await self._upload(_length(headers, MOST[path]), scope, receive, send_with_headers)
            else:
                _length(headers, MOST[path])
                await self.app(scope, await self._checked(scope, receive), send_with_headers)
        except RefusedError as refused:
            if refused.status in (413, 507):  # or the browser would not read the answer while it is still sending
                await _discard(receive)
            await PlainTextResponse(f"{refused}\n", refused.status)(scope, receive, send_with_headers)
        except ClientDisconnect:
            pass

    def _check_sender(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.local and not is_local(host):
            raise RefusedError(403, "the page is for this computer alone: open it at localhost, or serve it by --host")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise RefusedError(403, "the request is another site's: open the page itself, at its own address")

    def _check_address(self, method: str, path: str) -> None:
        if method == "POST" and path in MOST:
            return
        if method in ("GET", "HEAD"):
            named = path.startswith(FILE) and self._may_be_read(path.removeprefix(FILE))
            if named or ADDRESSES.fullmatch(path):
                return
        raise RefusedError(404, "there is nothing here: the page is at /")

    def _may_be_read(self, path: str) -> bool:
        """Whether a path, or what it links to, lies in the folder of uploads; an `https://…` does not."""
        try:
            return Path(path).resolve().is_relative_to(self.uploads)
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, a loop of links
            return False

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """What an event sends, once it is known that all files that it names may be read."""
        body = await Request(scope, receive).body()
        try:
            sound = await run_in_threadpool(lambda: all(map(self._may_be_read, _files(json.loads(body)))))
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, "this is no event of the page's: open the page anew") from error
        if not sound:
            raise RefusedError(403, "the event names what is no file of the page's: add images by the page's button")
        messages: list[Message] = [{"type": "http.request", "body": body}]

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        return again

    async def _upload(self, length: int, scope: Scope, receive: Receive, send: Send) -> None:
        # twice, for the page keeps a copy of each image
        if shutil.disk_usage(self.uploads).free - 2 * (self._coming + length) < SPARE:
            raise RefusedError(507, "the disk is nearly full: make room where temporary files lie (TMPDIR)")
        self._coming += length
        try:
            await self.app(scope, receive, send)
        finally:
            self._coming -= length
            if not self._coming:  # what uploads that failed have left: sound ones lie in folders of their own
                for left in filter(Path.is_file, self.uploads.iterdir()):
                    with suppress(OSError):  # Windows holds on to files that are open
                        left.unlink()


def is_local(host: str) -> bool:
    """Whether a name or address, as in a `Host` header, is this computer's own and out of reach of any other one."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _length(headers: Headers, most: int) -> int:
    """How many bytes a request sends; the server sees to it that there are no more."""
    length = headers.get("content-length", "")
    if not length.isdecimal() or "transfer-encoding" in headers:
        raise RefusedError(411, "the request does not say how long it is: open the page itself")
    if int(length) > most:
        raise RefusedError(413, f"this is more than {most / 2**20:,.0f} MB at once: add the images in several goes")
    return int(length)


async def _discard(receive: Receive) -> None:
    while (await receive()).get("more_body"):
        pass


def _files(value: Any) -> Iterator[str]:
    """The paths in what an event sends: each file is an object that has one."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            if isinstance(value.get("path"), str):
                yield value["path"]
            rest += value.values()
        elif isinstance(value, list):
            rest += value
