"""Servers beside S3 and disks: which one is read, and are changes seen? FTP and HTTP stand for all."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.ioloop import IOLoop
from pyftpdlib.servers import ThreadedFTPServer
from test_inputs import contents, listing, png, write

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
