"""No secret in what a job prints, logs or writes."""

import json
import sys
from pathlib import Path

import faulty_s3
import pyarrow.parquet as pq
import pytest
from conftest import copy_some, read_errors, run_score

from csflow.errors import ExitStatus, WrongUse
from csflow.exit import run_job
from csflow.inputs.listing import list_images
from csflow.redaction import SECRET_VARIABLES, holds_credentials, redact, secret_values
from csflow.scoring.config import ScoreConfig

SECRET = "wJalrXUtnFEMI-K7MDENG"
PRESIGNED = f"https://plant.example/a.png?X-Amz-Credential=AKIA&X-Amz-Signature={SECRET}"
REQUIRED = ["--model", "m", "--input", "i", "--output", "o"]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs a job's command line with a `main` of ours; returns exit status and all that was printed."""

    def run(arguments: list[str], main=lambda config: ExitStatus.DONE) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["jobs/score.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_job(ScoreConfig, main, None)
        printed = capfd.readouterr()
        return ended.value.code or 0, printed.out + printed.err

    return run


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIA:{SECRET}@plant/images",
        f"https://user:{SECRET}@plant.example/images",
        f"s3://AKIA:a/b/{SECRET}@plant/images",
        f"ftp://user:a/2#{SECRET}@plant.example/images",
        PRESIGNED,
        f"https://plant.example/a.png?sig={SECRET}&se=2026",
        f"s3://plant/a.png?X-Amz-Signature={SECRET}",
        f"abfs://user:{SECRET}@plant.dfs.core.windows.net/a.png",
        f"abfs://images@plant.dfs.core.windows.net/a.png?sv=2026&sig={SECRET}",
    ],
)
@pytest.mark.parametrize("setting", ["--model", "--input", "--output"])
def test_a_location_with_credentials_is_refused_without_repeating_it(job, setting, url):
    for more in ([], ["--print_config"]):
        status, printed = job([*REQUIRED, setting, url, *more])
        assert status == 2
        assert f"{setting} holds credentials in a URL" in printed
        assert SECRET not in printed


def test_what_only_looks_like_credentials_is_left_alone():
    for location in (
        "s3://plant/night@home/a:b.png",
        *(f"{scheme}://plant/a.png?key=1" for scheme in ("s3", "s3a", "s3n")),  # keys may hold anything
        "/data/user:name@site/a.png",
        "https://plant.example/a.png?width=300",
        *(f"{scheme}://images@plant.dfs.core.windows.net/a.png" for scheme in ("abfs", "abfss", "az")),
        "s3://arn:aws:s3:eu-central-1:123456789012:accesspoint/plant/a.png",
        "s3://arn:aws:s3:eu-central-1:123456789012:accesspoint/plant/a@2x.png",
        "http://plant.example:8080/a:b@2x.png",
    ):
        assert holds_credentials(location) is False
        assert redact(location) == location or "key=" in location
    for message in (
        "NoSuchKey: The specified key does not exist",
        "ExpiredToken: The provided token has expired",
        "error: --batch_size must be a number",
    ):
        assert redact(message) == message


def test_a_manifest_with_presigned_urls_is_refused_without_repeating_them(tmp_path):
    manifest = tmp_path / "night.csv"
    manifest.write_text(f'image_uri\n/a.png\n"{PRESIGNED}"\n')
    with pytest.raises(WrongUse, match="row 2 holds credentials in its URL") as raised:
        list(list_images([str(manifest)], {}))
    assert SECRET not in str(raised.value)


def test_settings_that_cannot_be_parsed_are_not_repeated_with_their_secrets(job, tmp_path):
    options = json.dumps({"secret": SECRET})
    config = tmp_path / "nightly.yaml"
    config.write_text(f"storage_options: {{key: x, secret: {SECRET}\nmodel: m\n")
    for arguments in (
        [*REQUIRED, "--storage-optoins", options],
        [*REQUIRED, "--storage_options", options[:-1]],
        [*REQUIRED, f"--storage_option={options}"],
        ["--config", str(config)],
    ):
        status, printed = job(arguments)
        assert status == 2, printed
        assert printed.startswith("error: ")
        assert SECRET not in printed
    status, printed = job([*REQUIRED, "--storage_options", options, "--print_config"])
    assert status == 0
    assert "secret: '***'" in printed
    assert SECRET not in printed


def test_messages_and_tracebacks_of_a_failing_job_are_without_secrets(job, monkeypatch):
    session = "FQoGZXIvYXdzEBYaDGp0"
    monkeypatch.setenv("AWS_SESSION_TOKEN", session)
    options = json.dumps({"client_kwargs": {"aws_secret_access_key": SECRET}})

    def fails(error: Exception):
        def main(config: ScoreConfig) -> ExitStatus:
            raise error

        return main

    said = f"no answer with {SECRET} and {session} from http://user:hunter22@plant.example"
    status, printed = job([*REQUIRED, "--storage_options", options], fails(WrongUse(said)))
    assert (status, printed) == (2, "error: no answer with *** and *** from http://***@plant.example\n")
    status, printed = job([*REQUIRED, "--storage_options", options], fails(RuntimeError(said)))
    assert status == 1
    assert "Traceback" in printed
    assert "RuntimeError: no answer with *** and *** from http://***@plant.example" in printed
    for secret in (SECRET, session, "hunter22"):
        assert secret not in printed


def test_nothing_that_a_run_writes_or_prints_holds_a_secret(model, cells, tmp_path, capfd):
    store, output = faulty_s3.FaultyS3(), tmp_path / "output"
    try:
        for path in copy_some(cells / "functional" / "test", tmp_path / "cells", 4).iterdir():
            store.put(f"night/{path.name}", path.read_bytes())
        store.put("night/torn.png", b"\x89PNG\r\n\x1a\n torn")
        options = store.options | {"key": "AKIAIOSFODNN7", "secret": SECRET, "token": f"session-{SECRET}"}
        location = f"s3://{faulty_s3.BUCKET}/night"
        arguments = ["--model", model, "--input", location, "--output", output]
        arguments += ["--storage_options", json.dumps(options)]
        assert run_score(*arguments) == ExitStatus.DONE
    finally:
        store.stop()
    printed = capfd.readouterr()
    assert "5 images listed" in printed.out
    assert len(read_errors(output)) == 1
    texts = [printed.out + printed.err]
    for path in output.rglob("*"):
        if path.suffix == ".parquet":
            texts.append(str(pq.read_table(path).to_pylist()))
        elif path.is_file():
            texts.append(path.read_text())
    assert len(texts) >= 5
    assert [text for text in texts if SECRET in text] == []
    assert Path(next(output.glob("_runs/*/run.json"))).read_text().count(location) == 1


@pytest.mark.parametrize("variable", SECRET_VARIABLES)
def test_secrets_of_the_environment_are_hidden_wherever_they_stand(monkeypatch, variable):
    monkeypatch.setenv(variable, SECRET)
    assert redact(f"refused {SECRET}, {SECRET[:-1]} is another") == f"refused ***, {SECRET[:-1]} is another"
    monkeypatch.setenv(variable, "secret")
    assert redact("a secret.") == "a ***."
    monkeypatch.setenv(variable, "short")  # five letters may be a syllable of any word
    assert redact("shortly") == "shortly"


def test_of_storage_options_only_those_with_the_name_of_a_secret_are_hidden():
    options = {
        "secret": "abcdef",
        "connection_string": "a;b=mno",
        "endpoint_url": "http://plant.example",
        "token": 5,
        "anon": False,
    }
    options |= {"client_kwargs": {"region_name": "eu-central-1", "aws_secret_access_key": "ghijkl"}}
    assert list(secret_values(options)) == ["abcdef", "a;b=mno", "ghijkl"]
    said = "abcdef and ghijkl at http://plant.example in eu-central-1"
    assert redact(said, options) == "*** and *** at http://plant.example in eu-central-1"


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("GET /a.png?width=3&sig=abc&se=2026", "GET /a.png?width=3&sig=***&se=2026"),
        ("X-Amz-Security-Token = abc, then", "X-Amz-Security-Token = ***, then"),
        (
            """{"secret": "a b", 'account_key':'c d', token: abc}""",
            """{"secret": ***, 'account_key':***, token: ***}""",
        ),
        (
            "s3://AKIA:a/b@plant/a.png, passphrase=abc",
            "s3://***@plant/a.png, passphrase=***",
        ),
        (
            "https://user:a:b@plant.example and https://c@other.example",
            "https://***@plant.example and https://***@other.example",
        ),
        ("monkey=abc, keyboard: abc", "monkey=abc, keyboard: abc"),
        (
            "DefaultEndpointsProtocol=https;AccountName=plant;AccountKey=a+b/c==;EndpointSuffix=core.windows.net",
            "DefaultEndpointsProtocol=https;AccountName=plant;AccountKey=***;EndpointSuffix=core.windows.net",
        ),
        (
            """{"connection_string": "a;b=c", "api_key": "d"}""",
            """{"connection_string": ***, "api_key": ***}""",
        ),
        (
            """{"SecretAccessKey": "a", "SessionToken": "b"}""",
            """{"SecretAccessKey": ***, "SessionToken": ***}""",
        ),
        ("ApiKey: abc, private_key=abc", "ApiKey: ***, private_key=***"),
        ("Authorization: Bearer ya29.a0-b_c", "Authorization: Bearer ***"),
        ("SharedKey plant:ab+c/d==", "SharedKey ***"),
        (
            "-----BEGIN PRIVATE KEY-----\nab\ncd\n-----END PRIVATE KEY-----\nend",
            "-----BEGIN PRIVATE KEY-----***-----END PRIVATE KEY-----\nend",
        ),
        (
            "abfs://images@plant.dfs.core.windows.net/a.png, abfs://a:b@plant.dfs.core.windows.net/a.png",
            "abfs://images@plant.dfs.core.windows.net/a.png, abfs://***@plant.dfs.core.windows.net/a.png",
        ),
    ],
)
def test_what_has_the_name_of_a_secret_is_hidden_and_the_rest_stays(text, without):
    assert redact(text) == without


def test_a_secret_within_another_one_leaves_nothing_of_that():
    assert redact("refused a-zz-longer", {"secret": "zz-longer", "token": "a-zz-longer"}) == "refused ***"


def test_credentials_are_found_in_front_of_another_url():
    assert holds_credentials(f"https://user:{SECRET}@plant.example/?from=http://other.example")
