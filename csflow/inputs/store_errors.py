"""Translates exceptions of stores and parsers into errors of an image."""

import errno
import ftplib
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
import botocore.exceptions as boto
from botocore.parsers import ResponseParserError

from csflow.errors import ErrorCode, ImageError, WrongUse
from csflow.inputs.uris import as_text
from csflow.redaction import redact

logger = logging.getLogger(__name__)

S3_THROTTLES = frozenset({"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"})
NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound)
OF_DRIVERS = {
    "azure.ServiceRequestTimeoutError": ErrorCode.TIMEOUT,
    "azure.ServiceResponseTimeoutError": ErrorCode.TIMEOUT,
    "azure.ServiceRequestError": ErrorCode.CONNECTION,
    "azure.ServiceResponseError": ErrorCode.CONNECTION,
    "azure.ClientAuthenticationError": ErrorCode.PERMISSION_DENIED,
    "google.TransportError": ErrorCode.CONNECTION,
    "google.GoogleAuthError": ErrorCode.PERMISSION_DENIED,
    "gcsfs.ChecksumError": ErrorCode.CONNECTION,
    "paramiko.AuthenticationException": ErrorCode.PERMISSION_DENIED,
    "paramiko.SSHException": ErrorCode.CONNECTION,
    "smbprotocol.SMBException": ErrorCode.CONNECTION,
}
"""Codes of exceptions, by the package and the name of their class; the first that fits counts."""
OF_FTP = {
    "421": ErrorCode.THROTTLED,
    "425": ErrorCode.CONNECTION,
    "426": ErrorCode.CONNECTION,
    "530": ErrorCode.PERMISSION_DENIED,
    "550": ErrorCode.NOT_FOUND,
}
"""Codes of replies of FTP servers (RFC 959, 4.2), beside other temporary ones, which begin with 4."""
UNUSABLE_NAME = frozenset({errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.ENOTDIR, errno.EISDIR})


def check_size(size: int, limit: int) -> None:
    """Raises ImageError TOO_LARGE above `limit` bytes."""
    if size > limit:
        raise ImageError(ErrorCode.TOO_LARGE, f"{size} bytes; at most {limit} are read")


@contextmanager
def parsing(what: str) -> Iterator[None]:
    """Turns any exception of a parser on damaged or hostile bytes into ImageError CORRUPT."""
    try:
        yield
    except (ImageError, WrongUse, MemoryError):
        raise
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {as_text(str(error))}".split())
        raise ImageError(ErrorCode.CORRUPT, f"the {what} is damaged ({detail[:200]})") from error


def image_error(error: BaseException) -> ImageError:
    """The image error that an exception of a store means; INTERNAL for an unknown exception."""
    if isinstance(error, ImageError):
        return error
    if isinstance(error, WrongUse):
        return ImageError(ErrorCode.PERMISSION_DENIED, str(error))
    return _of_response(error) or _of_driver(error) or _of_type(error) or _unexpected(error)


def _of_response(error: BaseException) -> ImageError | None:
    """The error in the HTTP response behind an exception; s3fs keeps botocore's exception as the cause."""
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)
        if isinstance(response, dict) and "Error" in response:
            name = str(response["Error"].get("Code", ""))
            status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            text = f"{name}: {response['Error'].get('Message', '')}"[:300]
            code = _code_of_status(name, status)
            if code is None and isinstance(error, PermissionError):
                code = ErrorCode.PERMISSION_DENIED  # ExpiredToken and its like come with status 400
            return ImageError(code or ErrorCode.INTERNAL, f"the store answered {text}")
    # aiohttp gives an answer that ends early a cause with a status of its own, 400.
    answered = _status(error) or _status(None if isinstance(error, aiohttp.ClientError) else error.__cause__)
    if answered is None:
        return None
    code = _code_of_status("", answered)
    return ImageError(code or ErrorCode.INTERNAL, f"the store answered with status {answered}")


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error of aiohttp, requests, Google's or Azure's clients; None if it has none."""
    response = getattr(error, "response", None)
    names = ("status", "status_code", "code")
    found = (getattr(holder, name, None) for holder in (error, response) for name in names)
    statuses = (int(value) for value in found if isinstance(value, int | str) and str(value).isdigit())
    return next((status for status in statuses if 400 <= status < 600), None)


def _code_of_status(name: str, status: int) -> ErrorCode | None:
    if name in S3_THROTTLES or status in (429, 503):
        return ErrorCode.THROTTLED
    if name == "RequestTimeout" or status == 408:
        return ErrorCode.TIMEOUT
    if status >= 500:
        return ErrorCode.SERVER_ERROR
    return {
        401: ErrorCode.PERMISSION_DENIED,
        403: ErrorCode.PERMISSION_DENIED,
        404: ErrorCode.NOT_FOUND,
        410: ErrorCode.NOT_FOUND,
        412: ErrorCode.CHANGED,
    }.get(status)


def _of_driver(error: BaseException) -> ImageError | None:
    """The error of a driver that need not be installed, by the names of its classes; of FTP, by its reply."""
    detail = type(error).__name__
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    code: ErrorCode | None = next((code for name, code in OF_DRIVERS.items() if name in names), None)
    if isinstance(error, ftplib.Error):
        reply = str(error)[:3]
        code = OF_FTP.get(reply, ErrorCode.SERVER_ERROR if reply < "5" else ErrorCode.INTERNAL)
        detail = f"reply {reply}"
    return ImageError(code, f"the store's driver failed ({detail})") if code else None


def _of_type(error: BaseException) -> ImageError | None:
    detail = type(error).__name__
    if isinstance(error, boto.ParamValidationError):
        return ImageError(ErrorCode.NOT_FOUND, "S3 allows no such bucket or key name")
    if isinstance(error, FileNotFoundError):
        return ImageError(ErrorCode.NOT_FOUND, "there is no such file")
    if isinstance(error, PermissionError):
        return ImageError(ErrorCode.PERMISSION_DENIED, "reading is not permitted")
    if isinstance(error, TimeoutError | boto.ReadTimeoutError | boto.ConnectTimeoutError):
        return ImageError(ErrorCode.TIMEOUT, f"no answer in time ({detail})")
    if isinstance(error, EOFError):
        return ImageError(ErrorCode.CONNECTION, "the store closed the connection")
    if isinstance(error, boto.HTTPClientError | boto.IncompleteReadError | aiohttp.ClientError):
        return ImageError(ErrorCode.CONNECTION, f"the connection failed ({detail})")
    if isinstance(error, boto.ConnectionError):
        return ImageError(ErrorCode.CONNECTION, f"the connection failed ({detail}); check AWS_ENDPOINT_URL")
    if isinstance(error, ResponseParserError):
        return ImageError(ErrorCode.SERVER_ERROR, "the store's answer cannot be parsed")
    if isinstance(error, OSError):
        if str(error).startswith("Forbidden: "):  # gcsfs says 403 by this alone
            return ImageError(ErrorCode.PERMISSION_DENIED, "reading is not permitted")
        if error.errno in UNUSABLE_NAME:
            return ImageError(ErrorCode.NOT_FOUND, f"no file can be read there ({error.strerror})")
        # Disks and mounts fail for a while too (EIO, ESTALE, EMFILE); none of it says that the image is bad.
        return ImageError(ErrorCode.CONNECTION, f"reading failed ({detail}: {error.strerror})")
    return None


def _unexpected(error: BaseException) -> ImageError:
    # The text of an unknown exception may hold anything, secrets included: it goes to the log alone.
    logger.error("unexpected error while reading\n%s", redact("".join(traceback.format_exception(error))))
    return ImageError(ErrorCode.INTERNAL, f"unexpected {type(error).__name__}; the log has its traceback")
