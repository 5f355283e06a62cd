"""Servers beside S3 and disks: which one is read, and are changes seen? FTP and HTTP stand for all."""

import ftplib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import azure.core.exceptions as azure
import gcsfs.retry
import google.auth.exceptions as google
import pytest
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.ioloop import IOLoop
from pyftpdlib.servers import ThreadedFTPServer
from test_inputs import contents, failure, listing, png, write, zip_of

from csflow.errors import ErrorCode, ImageError
from csflow.inputs import http_objects
from csflow.inputs.listing import list_table
from csflow.inputs.reading import ImageReader
from csflow.inputs.selection import Selection
from csflow.inputs.store_errors import image_error
from csflow.inputs.unlisted import Unlisted

FTP_OPTIONS = {"username": "line", "password": "1"}


class FtpServer:
    """Serves a folder on a port of its own."""

    def __init__(self, folder: Path) -> None:
        authorizer = DummyAuthorizer()
        authorizer.add_user("line", "1", str(folder))
        handler = type("Handler", (FTPHandler,), {"authorizer": authorizer, "banner": "ready"})
        self._server = ThreadedFTPServer(("127.0.0.1", 0), handler, ioloop=IOLoop())
        self.folder = folder
        self.url = f"ftp://127.0.0.1:{self._server.address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.close_all()
        self._thread.join(10)


@pytest.fixture
def ftp(tmp_path: Path) -> Iterator[list[FtpServer]]:
    """Two servers, each with the images a.png and d/#1.png, which differ."""
    servers = []
    for shade, name in enumerate(("one", "two")):
        write(tmp_path / name / "d" / "a.png", png(shade))
        write(tmp_path / name / "d" / "#1.png", png(10 + shade))
        servers.append(FtpServer(tmp_path / name))
    yield servers
    for server in servers:
        server.stop()


@pytest.mark.parametrize("form", ["/d/a.png", "/d", "/d/", "/*/a.png", "/**/a.png"])
def test_two_hosts_of_one_scheme_are_two(ftp: list[FtpServer], form: str) -> None:
    found = listing(*(server.url + form for server in ftp), options=FTP_OPTIONS)
    read = {uri: data for uri, data in contents(found, FTP_OPTIONS).items() if uri.endswith("a.png")}
    assert read == {f"{server.url}/d/a.png": png(shade) for shade, server in enumerate(ftp)}


def test_a_number_sign_belongs_to_a_name(ftp: list[FtpServer]) -> None:
    found = listing(f"{ftp[1].url}/d", options=FTP_OPTIONS)
    assert contents(found, FTP_OPTIONS)[f"{ftp[1].url}/d/#1.png"] == png(11)


def test_a_changed_file_on_ftp_has_another_version(ftp: list[FtpServer]) -> None:
    uri = f"{ftp[0].url}/d/a.png"
    before = listing(uri, options=FTP_OPTIONS)
    os.utime(ftp[0].folder / "d" / "a.png", (1e9, 1e9))
    assert listing(uri, options=FTP_OPTIONS) == {uri: f"{len(png(0))}-2001-09-09T01:46:40+00:00"} != before
    assert list(
        listing(ftp[0].url, options=FTP_OPTIONS, selection=Selection(since=datetime(2020, 1, 1, tzinfo=UTC)))
    ) == [f"{ftp[0].url}/d/#1.png"]


def test_files_on_ftp_are_read_up_to_the_limit_and_the_next_one_after_it(ftp: list[FtpServer]) -> None:
    write(ftp[0].folder / "d" / "large.png", bytes(1 << 20))
    found = listing(f"{ftp[0].url}/d", options=FTP_OPTIONS)
    reader = ImageReader(FTP_OPTIONS, deadline_s=20, max_bytes=1000)
    with pytest.raises(ImageError) as raised:
        reader.read(f"{ftp[0].url}/d/large.png", found[f"{ftp[0].url}/d/large.png"])
    assert raised.value.code == ErrorCode.TOO_LARGE
    assert reader.read(f"{ftp[0].url}/d/a.png", found[f"{ftp[0].url}/d/a.png"]) == png(0)


class WebServer:
    """Serves `files`, each with headers of its own; all of a GET for `endless` never ends."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.statuses: deque[int] = deque()
        """Answers to the next requests, used up one by one; 200 lets one through."""
        self.without_head = False
        self.links: list[str] = []
        """What the page of files links to besides; `loop/` is the page itself."""
        self.head: dict[str, str] = {}
        """Headers of answers to HEAD, in place of those of GET."""
        self.sent_bytes = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _WebHandler)
        self._server.site = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _WebHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        site: WebServer = self.server.site  # type: ignore[attr-defined]
        status = site.statuses.popleft() if site.statuses else 200
        if self.command == "HEAD" and site.without_head:
            status = 405
        if status != 200:
            return self._head(status, {"Content-Length": "0"})
        if self.path in ("/endless.png", "/endless/"):
            return self._endless(site)
        path = self.path.replace("loop/", "")
        if path == "/":
            links = "".join(f'<a href="{escape(link)}">a link</a>' for link in [*site.files, *site.links])
            data, headers = links.encode(), {"Content-Type": "text/html"}
        elif path in site.files:
            data, headers = site.files[path]
        else:
            return self._head(404, {"Content-Length": "0"})
        of_head = site.head if self.command == "HEAD" else {}
        self._head(200, headers | {"Content-Length": str(len(data))} | of_head)
        if self.command == "GET":
            self.wfile.write(data)
        return None

    do_HEAD = do_GET

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _endless(self, site: WebServer) -> None:
        self._head(200, {"Connection": "close"})
        with suppress(ConnectionError):
            while self.command == "GET":
                self.wfile.write(bytes(1 << 16))
                site.sent_bytes += 1 << 16
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[WebServer]:
    server = WebServer()
    yield server
    server.stop()


FIRST, SECOND = {"ETag": '"1"'}, {"ETag": '"2"'}
EARLIER = {"Last-Modified": "Fri, 27 Nov 2026 08:00:00 GMT"}
LATER = {"Last-Modified": "Fri, 27 Nov 2026 09:00:00 GMT"}


@pytest.mark.parametrize(("before", "after"), [(FIRST, SECOND), (EARLIER, LATER)])
@pytest.mark.parametrize("without_head", [False, True])
def test_a_changed_file_on_a_web_server_is_seen_by_listing_and_by_reading(
    site: WebServer, before: dict[str, str], after: dict[str, str], without_head: bool
) -> None:
    site.without_head = without_head
    uri = f"{site.url}/a.png"
    site.files["/a.png"] = (png(1), before)
    listed = listing(uri)
    assert contents(listed) == {uri: png(1)}
    site.files["/a.png"] = (png(2), after)
    assert failure(uri, listed[uri]).code == ErrorCode.CHANGED
    assert contents(listing(uri)) == {uri: png(2)}
    assert listing(uri) != listed


def test_a_file_that_a_web_server_describes_otherwise_in_listings_is_read(site: WebServer) -> None:
    site.files["/a.png"] = (png(1), FIRST)
    site.head = {"ETag": '"of HEAD"'}
    uri = f"{site.url}/a.png"
    listed = listing(uri)
    assert listed == {uri: "of HEAD"}
    assert contents(listed) == {uri: png(1)}
    site.head = SECOND
    assert failure(uri, listed[uri]).code == ErrorCode.CHANGED


def test_the_images_of_a_web_page_have_versions(site: WebServer) -> None:
    site.files |= {"/a.png": (png(1), FIRST), "/b&b.png": (png(2), EARLIER), "/c.png": (png(3), {})}
    found = listing(f"{site.url}/")
    names = ["a", "b&b", "c"]
    assert contents(found) == {f"{site.url}/{name}.png": png(i + 1) for i, name in enumerate(names)}
    assert list(found.values()) == ["1", f"{len(png(2))}-2026-11-27T08:00:00+00:00", f"{len(png(3))}-"]


def test_a_folder_that_links_to_itself_is_listed_once_and_named(site: WebServer) -> None:
    site.files["/b.png"] = (png(1), FIRST)
    site.links = ["loop/", "b.png"]
    unlisted = Unlisted()
    found = list_table([f"{site.url}/"], {}, unlisted=unlisted)
    assert found["image_uri"].to_pylist() == [f"{site.url}/b.png"]
    assert unlisted.failures == {f"{site.url}/loop/": "it is the same as a folder above it: a link?"}


def test_a_folder_that_a_page_links_to_and_is_gone_is_named_and_the_rest_is_listed(site: WebServer) -> None:
    site.files["/b.png"] = (png(1), FIRST)
    site.links = ["gone/"]
    unlisted = Unlisted()
    found = list_table([f"{site.url}/"], {}, unlisted=unlisted)
    assert found["image_uri"].to_pylist() == [f"{site.url}/b.png"]
    assert list(unlisted.failures) == [f"{site.url}/gone/"]


def test_a_link_of_a_folder_to_one_above_it_on_ftp_is_named(ftp: list[FtpServer]) -> None:
    (ftp[0].folder / "d" / "up").symlink_to(ftp[0].folder)
    unlisted = Unlisted()
    found = list_table([f"{ftp[0].url}/"], FTP_OPTIONS, unlisted=unlisted)
    assert [uri.removeprefix(ftp[0].url) for uri in found["image_uri"].to_pylist()] == [
        "/d/#1.png",
        "/d/a.png",
    ]
    assert all(uri.startswith(f"{ftp[0].url}/d/up/") for uri in unlisted.failures)
    assert unlisted.failed


def test_a_web_server_without_ranges_gives_the_images_of_an_archive(site: WebServer) -> None:
    site.files["/a.zip"] = (zip_of({"a.png": png(1), "b.png": png(2)}), FIRST)
    found = listing(f"{site.url}/a.zip")
    assert list(contents(found).values()) == [png(1), png(2)]


def test_an_answer_without_end_is_too_large_and_ended(site: WebServer) -> None:
    limit = 1 << 20
    assert failure(f"{site.url}/endless.png", "None-", max_bytes=limit).code == ErrorCode.TOO_LARGE
    assert limit < site.sent_bytes < 64 * limit  # what the sockets hold comes on top


def test_a_page_of_links_without_end_is_ended(site: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_objects, "PAGE_BYTES", 1 << 20)
    with pytest.raises(ConnectionError, match=r"/endless/ cannot be listed: .* at most 1048576 are read"):
        list_table([f"{site.url}/endless/"], {})
    assert site.sent_bytes < 64 << 20  # what the sockets hold comes on top


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (404, "not_found"),
        (410, "not_found"),
        (403, "permission_denied"),
        (503, "throttled"),
    ],
)
def test_what_a_web_server_refuses_is_told_from_what_is_not_there(
    site: WebServer, status: int, code: str
) -> None:
    site.files["/a.png"] = (png(1), FIRST)
    site.statuses.extend([status] * 2)
    assert failure(f"{site.url}/a.png", "1", deadline_s=0).code == code


def test_a_web_server_that_is_busy_is_asked_again(site: WebServer) -> None:
    site.files["/a.png"] = (png(1), FIRST)
    site.statuses.extend([503, 429, 200, 503, 200])
    assert contents(listing(f"{site.url}/a.png")) == {f"{site.url}/a.png": png(1)}
    assert not site.statuses


def gcs_error(status: int) -> Exception:
    with pytest.raises(Exception) as raised:
        gcsfs.retry.validate_response(status, b'{"error": {"message": "no"}}', "b/o")
    return raised.value


def azure_error(status: int) -> Exception:
    return azure.HttpResponseError("no", response=SimpleNamespace(status_code=status, reason="", headers={}))


@pytest.mark.parametrize("of_status", [gcs_error, azure_error])
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (429, "throttled"),
        (503, "throttled"),
        (500, "server_error"),
        (408, "timeout"),
        (403, "permission_denied"),
        (401, "permission_denied"),
    ],
)
def test_errors_of_google_and_azure_are_what_their_status_says(
    of_status: Callable[[int], Exception], status: int, code: str
) -> None:
    assert image_error(of_status(status)).code == code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (azure.ServiceRequestError("no"), "connection"),
        (azure.ServiceResponseError("no"), "connection"),
        (azure.ServiceRequestTimeoutError("no"), "timeout"),
        (azure.ServiceResponseTimeoutError("no"), "timeout"),
        (azure.ClientAuthenticationError("no"), "permission_denied"),
        (google.TransportError("no"), "connection"),
        (google.DefaultCredentialsError("no"), "permission_denied"),
        (gcs_error(502), "connection"),
        (gcs_error(404), "not_found"),
        (ftplib.error_temp("421 too many connections"), "throttled"),
        (ftplib.error_temp("451 local error"), "server_error"),
        (ftplib.error_perm("530 please log in"), "permission_denied"),
        (ftplib.error_perm("550 no such file"), "not_found"),
        (EOFError(), "connection"),
    ],
)
def test_errors_of_drivers_are_known_without_importing_them(error: Exception, code: str) -> None:
    assert image_error(error).code == code
