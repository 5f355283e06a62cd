"""A real S3 protocol server behind an HTTP front that counts requests and fails on demand."""

import http.client
import random
import threading
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import s3fs
from moto.server import ThreadedMotoServer

BUCKET = "inputs"
ANSWERS = {
    "slow down": (503, "SlowDown", "Please reduce your request rate."),
    "too many": (429, "TooManyRequests", "Too many requests."),
    "broken": (500, "InternalError", "We encountered an internal error."),
    "denied": (403, "AccessDenied", "Access Denied"),
}
READ_FAULTS = ["slow down", "too many", "broken", "cut", "reset", "hang"]
WRITE_FAULTS = ["slow down", "too many", "broken", "reset", "lost answer", "hang"]


class FaultyFront:
    """An HTTP front before a server on this machine. Faults are an answer above, or

    - "cut": half of the body, then the connection is closed;
    - "reset": the connection is closed, and the store has seen nothing;
    - "lost answer": the store does what it is asked to, then the connection is closed;
    - "hang": no answer for as long as the client waits.

    `faults` are used up one by one, by the requests as they come; "none" is a request that goes through.
    When they are used up, `weather` decides by method and path. `before` is called ahead of every request,
    one at a time. `rewrite` changes what is answered to a GET.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._front = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._front.front = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._front.server_address[1]}"
        self._thread = threading.Thread(target=self._front.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.faults: deque[str] = deque()
        self.weather: Callable[[str, str], str | None] = clear_sky
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.rewrite: Callable[[str, bytes], bytes] = lambda path, data: data
        self.lock = threading.Lock()
        self.requests: list[str] = []
        self.user_agents: list[str] = []
        self.authorizations: list[str] = []
        """The header that signs a request, of each since the requests were cleared."""

    def clear(self) -> None:
        """Forgets all faults and requests."""
        self.faults.clear()
        self.weather = clear_sky
        self.rewrite = lambda path, data: data
        self.requests.clear()
        self.user_agents.clear()
        self.authorizations.clear()

    def stop(self) -> None:
        self._front.shutdown()
        self._front.server_close()
        self._thread.join()


class FaultyS3(FaultyFront):
    """moto behind the front, with one bucket."""

    def __init__(self) -> None:
        self._moto = ThreadedMotoServer(port=0, verbose=False)
        self._moto.start()
        super().__init__(*self._moto.get_host_and_port())
        self.options: dict[str, Any] = {"key": "testing", "secret": "testing", "endpoint_url": self.url}
        self.behind = boto3.client(
            "s3",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
            endpoint_url=f"http://{self.host}:{self.port}",
        )
        """Past the front, where nothing fails and nothing is counted."""
        self.fs = s3fs.S3FileSystem(**self.options, use_listings_cache=False)
        # moto keeps its buckets per process, not per server.
        self.fs.makedirs(BUCKET, exist_ok=True)
        self.empty()

    def put(self, key: str, data: bytes) -> str:
        """Stores an object and returns its URI; the request is not counted."""
        self.fs.pipe_file(f"{BUCKET}/{key}", data)
        self.requests.clear()
        return f"s3://{BUCKET}/{key}"

    def empty(self) -> None:
        """Removes all objects by their very names: `fs.rm` takes `[` for a pattern."""
        self.faults.clear()
        self.weather = clear_sky
        keys = [path.partition("/")[2] for path in self.fs.find(BUCKET)]
        if keys:
            self.fs.call_s3("delete_objects", Bucket=BUCKET, Delete={"Objects": [{"Key": k} for k in keys]})
        self.clear()

    def stop(self) -> None:
        super().stop()
        self._moto.stop()


def clear_sky(method: str, path: str) -> str | None:
    """The weather in which no request fails."""
    return None


def storm(share: float, seed: int, without: frozenset[str] = frozenset()) -> Callable[[str, str], str | None]:
    """The weather in which this share of all reads, writes and listings fails, each in a way drawn anew."""
    generator = random.Random(seed)

    def fault(method: str, path: str) -> str | None:
        if generator.random() >= share:
            return None
        kinds = READ_FAULTS if method in ("GET", "HEAD") else WRITE_FAULTS
        return generator.choice([kind for kind in kinds if kind not in without])

    return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        server: FaultyFront = self.server.front  # type: ignore[attr-defined]
        server.requests.append(f"{self.command} {self.path}")
        server.user_agents.append(self.headers.get("User-Agent", ""))
        server.authorizations.append(self.headers.get("Authorization", ""))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with server.lock:
            server.before(self.command, self.path)
            fault = server.faults.popleft() if server.faults else server.weather(self.command, self.path)
        if fault in ANSWERS:
            status, code, message = ANSWERS[fault]
            xml = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            return self._answer(status, [("Content-Type", "application/xml")], xml, len(xml))
        if fault == "hang":
            self.rfile.read(1)  # returns when the client hangs up
        if fault in ("reset", "hang"):
            self.close_connection = True
            return None
        connection = http.client.HTTPConnection(server.host, server.port)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        data = server.rewrite(self.path, response.read())
        length = int(response.getheader("Content-Length", 0)) if self.command == "HEAD" else len(data)
        skipped = ("connection", "content-length", "transfer-encoding")
        headers = [header for header in response.getheaders() if header[0].lower() not in skipped]
        if fault == "cut":
            data = data[: len(data) // 2]
            self.close_connection = True
        connection.close()
        if fault == "lost answer":
            self.close_connection = True
            return None
        return self._answer(response.status, headers, data, length)

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def log_message(self, format: str, *args: Any) -> None:
        pass
