"""The page in the browser under attack: the real command, asked by plain HTTP for what nobody should get from it."""

import asyncio
import http.client
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from test_pictures import png_of_size
from test_practice import labelled

import metaseg
from metaseg.app import __main__ as app_command
from metaseg.app import session as session_module
from metaseg.app.session import VIEW, Session

pytest.importorskip("gradio")

from metaseg.app import guard
from metaseg.app.guard import FILE, MAX_EVENT, MAX_FILE, MAX_UPLOAD, SPARE, Guard

SECRET = "nothing for visitors"
MARKUP = "<img src=x onerror=alert(1)>"
REFUSED = (400, 403, 404)
HEAD = f"POST {guard.UPLOAD} HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n".encode()
PART = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Outcome(NamedTuple):
    """What came of an event: its outputs, None if it failed; and what the page says to a person."""

    data: list[Any] | None
    said: str


class Page(NamedTuple):
    process: subprocess.Popen[str]
    port: int
    folder: Path  # the command's temporary one
    init: Path

    @property
    def uploads(self) -> Path:
        return next(self.folder.glob("metaseg-*")) / "uploads"

    @property
    def files(self) -> set[Path]:
        """All that the command has written and not removed."""
        return {path for path in self.folder.rglob("*") if path.is_file()}


class Visitor:
    """Asks the page what its scripts ask it, and what they do not."""

    def __init__(self, page: Page) -> None:
        self.port, self.session = page.port, secrets.token_hex(5)
        config = json.loads(self.ask("GET", "/config").body)
        self.events = {each["api_name"]: each["id"] for each in config["dependencies"]}

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def send(self, request: bytes) -> bytes:
        """The first line of the answer to what no client would send; empty if there is none."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            return connection.makefile("rb").readline()

    def upload(self, name: str, content: bytes, field: str = "files", **headers: str) -> Answer:
        head = f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + b"\r\n--x--\r\n"
        return self.ask("POST", guard.UPLOAD, body, Content_Type="multipart/form-data; boundary=x", **headers)

    def uploaded(self, name: str, content: bytes) -> dict[str, Any]:
        return file(json.loads(self.upload(name, content).body)[0])

    def join(self, name: str, data: list[Any], chosen: Any = None) -> Answer:
        about = {"index": chosen, "value": None}
        event = {"fn_index": self.events[name], "data": data, "session_hash": self.session, "event_data": about}
        return self.ask("POST", guard.EVENT, json.dumps(event).encode(), Content_Type="application/json")

    @contextmanager
    def messages(self) -> Iterator[Iterator[dict[str, Any]]]:
        """What the page sends this visitor, as it comes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")
        with connection.getresponse() as lines:
            yield (json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: "))
        connection.close()

    def event(self, name: str, data: list[Any], chosen: Any = None) -> Outcome:
        assert self.join(name, data, chosen).status == 200
        said = []
        with self.messages() as messages:
            for message in messages:
                if message["msg"] == "log":
                    said.append(message["log"])
                elif message["msg"] == "process_completed":
                    output = message["output"]
                    return Outcome(output.get("data"), "\n".join([*said, str(output.get("error") or "")]))
        raise AssertionError(f"{name} has not been answered")

    def add(self, files: list[dict[str, Any]]) -> Outcome:
        return self.event("partial", [files, None, None, None])

    def paints(self) -> dict[str, Any]:
        """What the editor shows once two images, 0.png and 1.png, were added and the first was painted on."""
        pictures = [png(image) for image in labelled(2)[0]]
        data = self.add([self.uploaded(f"{i}.png", picture) for i, picture in enumerate(pictures)]).data
        assert data is not None
        stroke = np.zeros((VIEW, VIEW, 4), np.uint8)
        stroke[VIEW // 3 : VIEW // 2, VIEW // 3 : VIEW // 2] = 255
        return {"background": data[3]["value"]["background"], "layers": [self.uploaded("layer.png", png(stroke))]}

    def adapts(self) -> bool:
        """Whether all goes well for a person, from images to masks."""
        drawn = self.paints()
        adapted = self.event("_adapt", [None, "0.png", drawn, 0, False]).data
        masks = self.event("partial_1", [None, "0.png", drawn]).data
        return bool(adapted and masks) and set(self.names_in(masks[0])) == {"0.png", "1.png"}

    def names_in(self, archive: dict[str, Any]) -> list[str]:
        with zipfile.ZipFile(io.BytesIO(self.ask("GET", FILE + quote(archive["path"])).body)) as masks:
            return masks.namelist()


def file(path: str) -> dict[str, Any]:
    """What the page's scripts call a file by."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def png(image: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


@contextmanager
def served(theta: Path, folder: Path, *options: str) -> Iterator[Page]:
    """The command, in a folder of somebody's files, with settings of Gradio's that would open the whole disk."""
    temporary, home = folder / "temporary", folder / "home"
    temporary.mkdir()
    for notes in (home / "notes.txt", home / ".gradio" / "cached_examples" / "notes.txt"):
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.write_text(SECRET)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(Path(metaseg.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {
        "TMPDIR": str(temporary),
        "PYTHONPATH": os.pathsep.join(paths),
        "METASEG_SECRET": SECRET,
        "GRADIO_ALLOWED_PATHS": "/",
        "GRADIO_NUM_WORKERS": "1",
        "GRADIO_SHARE": "True",
        "http_proxy": "http://127.0.0.1:9",
    }
    command = [sys.executable, "-m", "metaseg.app", "--init", str(theta), "--port", str(port), *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=home, env=os.environ | settings
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().endswith(f":{port} is the page; Ctrl-C ends it\n")
            yield Page(process, port, temporary, theta)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def page(theta: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with served(theta, tmp_path_factory.mktemp("page")) as page:
        yield page


@pytest.fixture
def visitor(page: Page) -> Visitor:
    return Visitor(page)


# Who is served


def test_other_computers_cannot_reach_it(page: Page) -> None:
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    rows = [row.split() for table in tables if table.exists() for row in table.read_text().splitlines()[1:]]
    if not rows:
        pytest.skip("needs Linux's table of connections")
    listening = {row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{page.port:04X}")}
    assert listening == {f"0100007F:{page.port:04X}"}  # 127.0.0.1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", page.port), timeout=10)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},  # a name that its owner has pointed at this computer
        {"Host": "evil.example:7860", "Origin": "http://evil.example:7860"},
        {"Host": "localhost.evil.example"},
        {"Host": "["},
        {"Origin": "https://evil.example"},
        {"Origin": "http://localhost:3000"},  # another program's page on this computer
        {"Origin": "null"},  # a page in a sandbox, or of a file
    ],
    ids=str,
)
def test_another_sites_scripts_can_neither_read_nor_write(
    page: Page, visitor: Visitor, headers: dict[str, str]
) -> None:
    own = visitor.uploaded("a.png", b"mine")["path"]
    before = page.files
    for path in ("/", "/config", FILE + own):
        answer = visitor.ask("GET", path, **headers)
        assert answer.status in REFUSED
        assert b"gradio" not in answer.body
        assert answer.body != b"mine"
    assert visitor.upload("a.png", b"theirs", **headers).status in REFUSED
    assert visitor.ask("POST", guard.EVENT, b"{}", Content_Type="text/plain", **headers).status in REFUSED
    assert page.files == before


def test_a_browser_is_told_that_the_page_is_nobody_elses(visitor: Visitor) -> None:
    evil = {"Origin": "https://evil.example", "Access_Control_Request_Method": "POST"}
    assert "Access-Control-Allow-Origin" not in visitor.ask("OPTIONS", guard.UPLOAD, **evil).headers
    answer = visitor.ask("GET", "/", Origin=f"http://127.0.0.1:{visitor.port}")
    assert answer.status == 200
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "frame-ancestors 'self'" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST:8000"])
def test_this_computer_has_these_names_and_any_port_that_is_tunnelled(visitor: Visitor, host: str) -> None:
    assert visitor.ask("GET", "/", Host=host, Origin=f"http://{host}").status == 200


def test_it_takes_no_web_socket(visitor: Visitor) -> None:
    key = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
    upgrade = b"Host: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" + key
    for path in (b"/", b"/gradio_api/queue/join"):
        status = visitor.send(b"GET " + path + b" HTTP/1.1\r\n" + upgrade + b"\r\n\r\n")
        assert b" 101 " not in status
        assert status.startswith(b"HTTP/1.1 ")


# What is served


def targets(page: Page) -> Iterator[str]:
    """Paths of requests for what is not the visitor's, as they go over the wire."""
    link, loop = page.uploads / "link.txt", page.uploads / "loop.txt"
    link.symlink_to(page.init)
    loop.symlink_to(loop)
    folder = page.uploads / "folder"
    folder.symlink_to(page.init.parent)
    hidden = [
        "/etc/passwd",
        "/proc/self/environ",
        "notes.txt",
        "./notes.txt",
        ".gradio/cached_examples/notes.txt",
        str(page.init),
        str(link),
        str(loop),
        f"{folder}/{page.init.name}",
        str(page.uploads),
        f"{page.uploads}/../sessions",
        f"{page.uploads}{'/..' * 20}/etc/passwd",
        "../" * 20 + "etc/passwd",
        "..\\" * 20 + "etc\\passwd",
        "\\\\localhost\\share",
        "file:///etc/passwd",
        "http://127.0.0.1/",
        f"http://localhost:{page.port}/config",
        "https://example.com/",
        "//example.com/",
        "http:/example.com",
        "~/.bashrc",
        "/etc/passwd\0.png",
        "\0",
        "x" * 5000,
        "",
    ]
    for path in hidden:
        for way in (FILE, "/gradio_api/file/", "/gradio_api/proxy=", "/file=", "/static/", "/assets/", "/svelte/"):
            yield way + quote(path, safe="/:")
            yield way + quote(quote(path, safe=""), safe="")
            if "\0" not in path:
                yield way + path
    up = "../../../"
    for way in ("/static/", "/assets/", "/svelte/", "/gradio_api/custom_component/0/client/", "/theme.css/", "/"):
        for dots in (up, quote(up, safe=""), up.replace("..", "%2e%2e"), up.replace("/", "\\"), "%c0%ae%c0%ae/" * 3):
            yield way + dots + "routes.py"
            yield way + dots + "hash_seed.txt"
    yield from ("/static", "/assets/", "/gradio_api/heartbeat/../file=/etc/passwd", "http://127.0.0.1/etc/passwd")


def test_files_of_nobody_but_the_visitor_are_served(page: Page, visitor: Visitor) -> None:
    for target in targets(page):
        with socket.create_connection(("127.0.0.1", page.port), timeout=10) as connection:
            connection.sendall(
                f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode("latin-1")
            )
            answer = connection.makefile("rb").read()
        assert int(answer.split(maxsplit=2)[1]) in REFUSED, target[:99]
        for secret in (SECRET.encode(), b"root:", b"__metadata__", b"import fastapi"):
            assert secret not in answer, target[:99]


def test_what_was_uploaded_is_served_and_never_runs(visitor: Visitor) -> None:
    picture = png(labelled(1)[0][0])
    answer = visitor.ask("GET", FILE + quote(visitor.uploaded("ü 1.png", picture)["path"]))
    assert (answer.status, answer.body, answer.headers["Content-Type"]) == (200, picture, "image/png")
    for name in ("a.html", "a.svg", "a.js", "a.xml", "a.xhtml"):
        answer = visitor.ask("GET", FILE + visitor.uploaded(name, b"<script>alert(1)</script>")["path"])
        assert answer.headers["Content-Type"] == "application/octet-stream"
        assert answer.headers["Content-Disposition"].startswith("attachment")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_nothing_comes_from_another_site_or_goes_to_one(visitor: Visitor) -> None:
    page = visitor.ask("GET", "/")
    html = page.body.decode()
    loaded = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?([^\"'\s>]+)", html)
    assert loaded
    assert not [address for address in loaded if re.match(r"(https?:)?//", address)]
    for css in (html, visitor.ask("GET", "/theme.css").body.decode()):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", css)
    policy = dict(rule.split(maxsplit=1) for rule in page.headers["Content-Security-Policy"].split("; "))
    allowed = {"'self'", "'none'", "'unsafe-inline'", "'unsafe-eval'", "data:", "blob:"}
    assert {source for sources in policy.values() for source in sources.split()} <= allowed
    assert "default-src" in policy
    config = json.loads(visitor.ask("GET", "/config").body)
    assert config["analytics_enabled"] is False
    assert not config["run_history"]


def test_gradios_other_services_are_closed(page: Page, visitor: Visitor) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="video"; filename="a"\r\n\r\nvideo\r\n--x--\r\n'
    before = page.files
    for method, path in [
        ("POST", "/gradio_api/process_recording"),  # writes into the computer's temporary folder
        ("POST", "/gradio_api/component_server"),  # takes as much memory as a number in the request says
        ("POST", "/gradio_api/run/_use"),
        ("POST", "/gradio_api/call/_use"),
        ("POST", "/gradio_api/vibe-code"),
        ("POST", "/login"),
        ("GET", "/gradio_api/upload_progress?upload_id=x"),
        ("GET", "/gradio_api/deep_link?session_hash=x"),
        ("GET", "/gradio_api/run-history/buckets"),
        ("GET", "/gradio_api/mcp/sse"),
        ("GET", "/monitoring"),
        ("GET", "/monitoring/summary"),
        ("GET", "/openapi.json"),
        ("PUT", "/"),
        ("DELETE", guard.UPLOAD),
        ("TRACE", "/"),
    ]:
        body = form if method == "POST" else None
        assert visitor.ask(method, path, body, Content_Type="multipart/form-data; boundary=x").status == 404, path
    assert page.files == before


# What is taken


def test_events_that_name_other_files_are_refused(page: Page, visitor: Visitor) -> None:
    own = visitor.uploaded("a.png", png(labelled(1)[0][0]))
    for path in [
        "/etc/passwd",
        "notes.txt",
        str(page.init),
        f"{page.uploads}/../sessions",
        "file:///etc/passwd",
        "http://127.0.0.1/",
        "https://example.com/a.png",
        "HTTPS://example.com/a.png",
        "",
        "\0",
        "x" * 5000,
    ]:
        for data in ([[own, file(path)], None, None, None], [[{"x": [file(path)]}]]):
            assert visitor.join("partial", data).status == 403, path
        for drawn in (
            {"background": file(path), "layers": [own]},
            {"background": own, "layers": [own, file(path)]},
            {"background": own, "layers": [], "composite": file(path)},
        ):
            assert visitor.join("_use", [None, "a.png", drawn]).status == 403, path


def test_another_visitors_files_are_not_found_by_guessing(page: Page, visitor: Visitor) -> None:
    theirs = Path(Visitor(page).uploaded("private.png", png(labelled(1)[0][0]))["path"])
    assert re.fullmatch("[0-9a-f]{64}", theirs.parent.name)  # of what is in the file: who knows it has the file
    for guess in (theirs.parents[1] / "private.png", theirs.parents[1] / ("0" * 64) / "private.png"):
        assert visitor.ask("GET", FILE + str(guess)).status in REFUSED
        outcome = visitor.add([file(str(guess))])
        assert outcome.data is None or outcome.data[2] == []  # the gallery


def test_a_file_too_large_is_refused_and_leaves_nothing(page: Page, visitor: Visitor) -> None:
    before = page.files
    assert json.loads(visitor.ask("GET", "/config").body)["max_file_size"] == MAX_FILE  # the browser refuses it, too
    answer = visitor.upload("a.png", bytes(MAX_FILE + 1))
    assert answer.status == 413
    assert b"exceeded maximum allowed size" in answer.body
    assert page.files == before


def test_uploads_that_fail_leave_nothing(page: Page, visitor: Visitor) -> None:
    before = page.files
    visitor.send(HEAD + b"Content-Length: 1000\r\n\r\n" + PART + b"half of it")
    assert b" 411 " in visitor.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert visitor.upload("..", b"no name").status == 400
    visitor.upload("a.png", b"not asked for", field="others")
    visitor.ask("POST", guard.UPLOAD, b"--x\r\n\r\n", Content_Type="multipart/form-data; boundary=x")
    visitor.ask("POST", guard.UPLOAD, b"?", Content_Type="multipart/form-data")
    for _ in range(100):  # it is tidied up after the answer
        if page.files == before:
            return
        time.sleep(0.1)
    assert page.files == before


def test_a_bomb_is_named(visitor: Visitor, tmp_path: Path) -> None:
    bomb = png_of_size(tmp_path / "bomb.png", 60_000, 60_000).read_bytes()
    outcome = visitor.add([visitor.uploaded("bomb.png", bomb)])
    assert "image of too many pixels" in outcome.said
    assert "bomb.png" in outcome.said
    assert outcome.data is not None
    assert outcome.data[2] == []  # the gallery


NAMES = {  # as sent: as kept
    "../../x.png": "x.png",
    "/etc/y.png": "y.png",
    "..\\\\..\\\\z.png": "....z.png",
    "C:\\\\w.png": "w.png",
    f"{MARKUP}.png": "img src=x onerror=alert(1).png",
    "&lt;b&gt;.png": "&lt;b&gt;.png",
    "日本語 😀.png": "日本語 😀.png",
    "x.jpg": "x (2).jpg",
    "X.PNG": "X (3).PNG",
    "CON.png": "_CON.png",
}


def test_names_of_files_are_no_paths_and_no_markup(visitor: Visitor) -> None:
    picture, broken = png(labelled(1)[0][0]), b"no picture"
    outcome = visitor.add([visitor.uploaded(name, picture) for name in [*NAMES, "l" * 300 + ".png"]])
    assert outcome.data is not None
    names = [shown["caption"] for shown in outcome.data[2]]
    assert names[:-1] == list(NAMES.values())
    assert len(names[-1]) < 256
    said = visitor.add([visitor.uploaded("&lt;b&gt;.png", broken)]).said
    assert "&amp;lt;b&amp;gt;.png" in said
    said = visitor.event("_use", [None, MARKUP, None]).said
    assert MARKUP not in said
    assert "&lt;img src=x onerror=alert(1)&gt; is still being opened" in said


def test_the_zip_of_masks_can_be_unpacked_anywhere(tmp_path: Path) -> None:
    nobody: Any = None  # an initialisation, which nothing here is adapted from
    (tmp_path / "session").mkdir()
    session = Session(nobody, tmp_path / "session")
    names = ["...png", "a\\..\\..\\b.png", "C:c.png", "d.png", "D.jpg"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
        assert session.add([tmp_path / name]) == []
    for name in session.pictures:
        session.label(name, np.ones((8, 8), np.uint8))
    with zipfile.ZipFile(session.masks_zip()) as masks:
        assert masks.namelist() == ["...png", "b.png", "c.png", "d.png", "D (2).png"]


def test_a_session_takes_so_many_images_and_names_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MAX_IMAGES", 2)
    nobody: Any = None
    (tmp_path / "session").mkdir()
    session = Session(nobody, tmp_path / "session")
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    faults = session.add([tmp_path / "a.png"] * 1_000)
    assert len(session.pictures) == 2
    assert len(list(session.folder.iterdir())) == 2
    assert len(faults) == 998
    assert (faults[0].kind, faults[0].path) == ("image past the first 2", Path("a.png"))
    assert "metaseg.adapt" in faults[0].cure


# What too much is, and what is left of it


class Asked(NamedTuple):
    status: int
    said: str
    through: bytes  # what the page was given, in all
    read: bool  # all that was sent: a browser reads no answer before


def ask(guarded: Guard, path: str, length: int, *chunks: bytes, method: str = "POST", **more: str) -> Asked:
    """What a guard answers to a request that says it is so long, and has these headers."""
    sent: list[dict[str, Any]] = []
    coming = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    coming.append({"type": "http.request", "body": b""})

    async def receive() -> dict[str, Any]:
        return coming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-length", str(length).encode())]
    headers += [(name.replace("_", "-").encode(), value.encode()) for name, value in more.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(guarded(scope, receive, send))
    said = b"".join(message.get("body", b"") for message in sent).decode()
    assert isinstance(guarded.app, Taker)
    return Asked(sent[0]["status"], said, guarded.app.taken, not coming)


class Taker:
    """A page that takes whatever comes."""

    def __init__(self) -> None:
        self.taken = b""
        self.headers: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers = [name for name, _ in scope["headers"]]
        more = True
        while more:
            message = await receive()
            self.taken += message.get("body", b"")
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"taken"})


@pytest.fixture
def guarded(tmp_path: Path) -> Guard:
    return Guard(Taker(), tmp_path, local=True)


def test_too_much_at_once_is_refused_before_anything_is_kept(guarded: Guard) -> None:
    assert ask(guarded, guard.UPLOAD, 4, b"ab", b"cd") == (200, "taken", b"abcd", True)
    said = "this is more than 2,048 MB at once: add the images in several goes\n"
    assert ask(guarded, guard.UPLOAD, MAX_UPLOAD + 1, b"no", b"no") == (413, said, b"abcd", True)
    assert ask(guarded, guard.EVENT, MAX_EVENT + 1, b"[", b"]").status == 413


def test_what_says_its_length_in_two_ways_is_refused(guarded: Guard) -> None:
    """It may go by the other."""
    for path in guard.MOST:
        refused = ask(guarded, path, 2, b"[", b"]", transfer_encoding="chunked")
        assert (refused.status, refused.through) == (411, b"")


def test_the_page_is_asked_for_whole_files(guarded: Guard) -> None:
    """Some versions of Gradio never come to an end of a part that is none."""
    path = FILE + str(guarded.uploads / "a.png")
    assert ask(guarded, path, 0, method="GET", range="bytes=5-2", accept="*/*").status == 200
    assert isinstance(guarded.app, Taker)
    assert guarded.app.headers == [b"host", b"content-length", b"accept"]


@pytest.mark.parametrize(
    ("host", "address", "local"),
    [("::1", "[::1]", True), ("[::1]", "[::1]", True), ("::", "[::]", False), ("127.0.0.1", "127.0.0.1", True)],
)
def test_an_address_of_the_new_kind_is_this_computer_s_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str, address: str, local: bool
) -> None:
    """It is guarded and printed as such, with brackets, as browsers and Gradio want it."""
    given: dict[str, Any] = {}

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    blocks = SimpleNamespace(launch=given.update, close=lambda verbose: None)
    monkeypatch.setattr("metaseg.app.page.build", lambda init, folder: blocks)
    monkeypatch.setattr("metaseg.app.page.ended.set", lambda: None)
    monkeypatch.setattr(app_command, "interruptible", lambda: None)
    monkeypatch.setattr(app_command, "_settle", lambda uploads: None)
    monkeypatch.setattr(app_command, "time", SimpleNamespace(sleep=interrupted))
    nobody: Any = None
    app_command.serve(nobody, host, 7860)
    (middleware,) = given["app_kwargs"]["middleware"]
    assert (given["server_name"], middleware.kwargs["local"]) == (address, local)
    assert f"http://{address}:7860 is the page" in capsys.readouterr().out


def test_the_disk_is_never_filled(guarded: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=SPARE + 7))
    assert ask(guarded, guard.UPLOAD, 3, b"abc").status == 200
    refused = ask(guarded, guard.UPLOAD, 4, b"ab", b"cd")
    assert (refused.status, refused.through, refused.read) == (507, b"abc", True)
    assert "the disk is nearly full: make room where temporary files lie" in refused.said


def test_an_event_reaches_the_page_as_it_was_sent(guarded: Guard) -> None:
    sent = json.dumps({"data": [file(str(guarded.uploads / "a.png")), "http://example.com"]}).encode()
    assert ask(guarded, guard.EVENT, len(sent), sent[:5], sent[5:]) == (200, "taken", sent, True)


# What cannot be


def test_malformed_requests_end_nothing(page: Page, visitor: Visitor) -> None:
    own, text = visitor.uploaded("0.png", png(labelled(1)[0][0])), visitor.uploaded("text.png", b"text")
    visitor.add([own])
    large = visitor.uploaded("large.png", png(np.zeros((4 * VIEW + 1, 8), np.uint8)))
    grey = visitor.uploaded("grey.png", png(np.zeros((7, 9), np.uint8)))
    for background in (None, own, text, large, grey):
        for layers in ([], [own], [grey] * 3, [text], [large]):
            visitor.event("_use", [None, "0.png", {"background": background, "layers": layers}])
    for drawn in ({}, [], 7, "x", {"background": own}, {"id": "x"}, {"background": {"path": 3}, "layers": [None]}):
        visitor.event("_use", [None, "0.png", drawn])
    for opened in (None, "", 7, [], {}, "x" * 10_000):
        visitor.event("_use", [None, opened, None])
    for chosen in (-1, 10**9, 0.5, "0", None, [0, 0], {}):
        visitor.event("_open", [None, "0.png", None], chosen)
    for steps in (-1, 10**9, 1e300, float("nan"), "10", None, [], {"x": 1}):
        assert "none of those to choose from" in visitor.event("_adapt", [None, "0.png", None, steps, False]).said
    for data in ([], [None] * 50, [[text, text]] * 4, [7, None, None, None], [[7], None, None, None]):
        visitor.event("partial", data)
    for body in (b"", b"{", b"[]", b"null", b"\xff", b'{"data": NaN}', b"[" * 200_000, b"9" * 10_000):
        assert visitor.ask("POST", guard.EVENT, body, Content_Type="application/json").status >= 400
    for event in ({"fn_index": 99}, {"fn_index": -1}, {"fn_index": 2, "session_hash": None}, {"fn_index": "x"}):
        body = json.dumps({"data": [], "session_hash": "x", **event}).encode()
        assert visitor.ask("POST", guard.EVENT, body, Content_Type="application/json").status >= 400
    for request in (b"\0\0\0\0\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        visitor.send(request)
    visitor.send(f"POST {guard.EVENT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n".encode())
    for bounds in ("bytes=5-2", "bytes=-", "bytes=999999999-9999999999", "bytes=a-b", "bytes=0-1,2-3"):
        visitor.ask("GET", FILE + own["path"], Range=bounds)
    assert page.process.poll() is None
    assert Visitor(page).adapts()


# On the disk


def test_no_other_user_of_the_computer_can_look_into_it(page: Page) -> None:
    (folder,) = page.folder.glob("metaseg-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_nothing_is_left_at_the_end(page: Page, visitor: Visitor) -> None:
    visitor.add([visitor.uploaded("a.png", png(labelled(1)[0][0]))])
    assert page.files
    page.process.send_signal(signal.SIGTERM)
    assert page.process.wait(timeout=60) == 0
    assert not page.files
    assert not list(page.folder.glob("metaseg*"))


@pytest.mark.slow
def test_served_to_others_it_ends_as_clean_in_the_midst_of_its_work(theta: Path, tmp_path: Path) -> None:
    with served(theta, tmp_path, "--host", "0.0.0.0") as page:
        visitor = Visitor(page)
        if sys.platform == "linux":
            socket.create_connection(("127.0.0.2", page.port), timeout=10).close()
        assert visitor.ask("GET", "/", Host="computer.example", Origin="http://computer.example").status == 200
        assert visitor.ask("GET", "/", Host="computer.example", Origin="http://evil.example").status == 403

        visitor.join("_adapt", [None, "0.png", visitor.paints(), 200, False])
        with visitor.messages() as messages, socket.create_connection(("127.0.0.1", page.port)) as upload:
            assert any("adapting: step" in str(message) for message in messages)
            upload.sendall(HEAD + b"Content-Length: 9999\r\n\r\n" + PART + b"half of it")
            page.process.send_signal(signal.SIGTERM)
            assert page.process.wait(timeout=60) == 0
        assert not page.files
        assert not list(page.folder.glob("metaseg*"))
