"""One file downloaded over HTTP: resumed after an interruption, retried, and verified.

The bytes of FILE are appended to FILE.part. FILE.part.json keeps what the server said about the
file, so that a later call can ask for the rest of the same file. When the length and the hashes
are right, FILE.part is renamed to FILE.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from gpt2_support import cli
from gpt2_support.files import (
    DamagedFile,
    atomic_write,
    file_hash,
    read_json,
    size_of,
    sync,
    with_path,
)
from gpt2_support.messages import info, preview

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from requests import Response

TIMEOUTS = (5, 30)  # seconds to connect, and to wait for the next bytes
MAX_FAILURES = 5  # in a row, without a new byte
MAX_PAUSE = 60  # seconds, even if a busy server asks for more
NUMBER = "[0-9]{1,18}"  # of bytes, in a header
NETWORK_ADVICE = (
    "Run this again to go on from here; or check the network and HTTPS_PROXY, name a mirror with "
    "--base_url or GPT2_BASE_URL, or use a model that you have: "
)


class RemoteFile(NamedTuple):
    """What a server said about a file; None for what it did not say."""

    size: int | None  # in bytes
    md5: str | None  # in base64
    validator: str | None  # for If-Range: an ETag, or a date


class TemporaryFailure(ConnectionError):
    """A failure after which a retry may succeed, `pause` seconds later if the server says so."""

    def __init__(self, message: str, pause: int = 0) -> None:
        super().__init__(message)
        self.pause = pause


# Attempts


def fetch(
    url: str,
    path: Path,
    sha256: str | None = None,
    has_answered: bool = False,
    pause: Callable[[float], Any] = time.sleep,
) -> None:
    """Download `url` to `path`; resume an earlier attempt, and retry after a failure.

    Gives up after MAX_FAILURES in a row without progress, or after 2 if the server has never
    answered. Raises ConnectionError when it gives up, ValueError if what arrives is not the file,
    and another OSError if the server refuses it or the disk cannot hold it.
    """
    import requests

    part = path.with_name(f"{path.name}.part")
    best, n_failures = size_of(part), 0
    while True:
        try:
            return fetch_once(url, path, part, sha256)
        except (requests.RequestException, ConnectionError, TimeoutError, DamagedFile) as error:
            failure = error
        has_answered = has_answered or not is_unreachable(failure)
        n_failures = 1 if size_of(part) > best else n_failures + 1
        best = max(best, size_of(part))
        if n_failures >= (MAX_FAILURES if has_answered else 2):
            raise final_error(url, failure)
        seconds = max(2 ** (n_failures - 1), getattr(failure, "pause", 0))
        info(f"{path.name}: {reason(failure)}; trying again in {seconds} s")
        pause(seconds)


def fetch_once(url: str, path: Path, part: Path, sha256: str | None) -> None:
    """Make one attempt: request the bytes that are missing, check the file, rename it."""
    remote = read_state(part)
    n_bytes = size_of(part) if remote else 0
    if remote is None or not n_bytes or n_bytes != remote.size:
        with request(url, n_bytes, remote) as response:
            check_response(url, response, part)
            if response.status_code == 206:
                remote = continue_part(response, part, n_bytes, remote)
            else:
                remote = start_part(response, part)
            receive(url, response, part, remote.size)
    check_hashes(part, remote.md5, sha256)
    os.replace(part, path)
    state_path(part).unlink(missing_ok=True)


def request(url: str, n_bytes: int, remote: RemoteFile | None) -> Response:
    """Request a file from byte `n_bytes` on; the whole file if it is no longer the same."""
    import requests

    headers = {"Accept-Encoding": "identity"}
    if n_bytes:
        headers["Range"] = f"bytes={n_bytes}-"
    if n_bytes and remote and remote.validator:
        headers["If-Range"] = remote.validator
    try:
        return requests.get(url, headers=headers, stream=True, timeout=TIMEOUTS)
    except ValueError as error:
        message = preview(str(error), 400)
        raise ValueError(f"{url}: not an address to download from: {message}") from None


# Failures


def is_unreachable(error: Exception) -> bool:
    """Return whether no connection was made at all, rather than one that broke."""
    return bool(error.args) and type(error.args[0]).__name__ == "MaxRetryError"


def reason(error: Exception) -> str:
    """Return the message of the innermost exception that requests and urllib3 have wrapped."""
    while True:
        causes = (getattr(error, "reason", None), *error.args)
        inner = [cause for cause in causes if isinstance(cause, Exception)]
        if not inner:
            return preview(str(error).strip(), 400)
        error = inner[0]


def final_error(url: str, failure: Exception) -> Exception:
    """Return the error to raise when `fetch` gives up."""
    if isinstance(failure, DamagedFile):
        return ValueError(f"{url}: {reason(failure)}")
    convert = cli.command("utils.py", "convert", "--help")
    return ConnectionError(f"{url}: {reason(failure)}. {NETWORK_ADVICE}{convert}")


def retry_after(text: str) -> int:
    """Return the seconds in a Retry-After header, at most MAX_PAUSE; 0 if there are none."""
    from email.utils import parsedate_to_datetime

    text = text.strip()
    if re.fullmatch("[0-9]{1,9}", text):
        seconds = int(text)
    else:
        try:
            seconds = math.ceil(parsedate_to_datetime(text).timestamp() - time.time())
        except (TypeError, ValueError, IndexError, OverflowError, OSError):  # not a date
            return 0
    return min(max(seconds, 0), MAX_PAUSE)


# Responses


def check_response(url: str, response: Response, part: Path) -> None:
    """Raise TemporaryFailure, OSError or ValueError unless the response carries the file."""
    code, headers = response.status_code, response.headers
    status = f"HTTP status {code} {preview(response.reason or '')}".strip()
    if code == 416:
        part.unlink(missing_ok=True)
        raise TemporaryFailure(f"{status}: cannot go on, starting over")
    if code in (408, 425, 429) or code >= 500:
        raise TemporaryFailure(status, retry_after(headers.get("Retry-After", "")))
    if code not in (200, 206):
        raise OSError(f"{url}: {status}")
    content_type = headers.get("Content-Type", "")
    if re.search(r"\b(html|xml)\b", content_type.lower()):
        page = f"a page ({preview(content_type)})"
        raise ValueError(f"{url}: the server sent {page} instead of the file")
    encoding = headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("", "identity"):
        raise ValueError(f"{url}: the server sent the file encoded ({preview(encoding)})")


def continue_part(
    response: Response, part: Path, n_bytes: int, remote: RemoteFile | None
) -> RemoteFile:
    """Return `remote` if the response is its bytes from `n_bytes` on; else start over.

    Starting over removes `part` and raises TemporaryFailure.
    """
    header = response.headers.get("Content-Range", "").strip()
    match = re.fullmatch(rf"bytes ({NUMBER})-{NUMBER}/({NUMBER}|\*)", header)
    if (
        (remote and match and n_bytes)
        and int(match[1]) == n_bytes
        and match[2] in ("*", str(remote.size or "*"))
    ):
        return remote
    part.unlink(missing_ok=True)
    raise TemporaryFailure("the server sent another part than asked for, starting over")


def receive(url: str, response: Response, part: Path, size: int | None) -> None:
    """Append the body of a response to `part`, with a progress bar; raise unless it is complete."""
    from tqdm import tqdm

    bar = {"desc": part.stem, "unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with (
        with_path(part),
        open(part, "ab") as file,
        tqdm(total=size, initial=size_of(part), file=sys.stderr, **bar) as progress,
    ):
        for chunk in response.iter_content(1 << 13):  # small: a chunk cut short is lost
            if file.tell() == 0 and is_page(chunk):
                raise ValueError(f"{url}: the server sent a page instead of the file")
            file.write(chunk)
            progress.update(len(chunk))
        sync(file)
    n_bytes = size_of(part)
    if size is not None and n_bytes != size:
        if n_bytes > size:
            part.unlink()
        raise TemporaryFailure(f"{n_bytes} of {size} bytes arrived")


def is_page(chunk: bytes) -> bool:
    """Return whether a file begins as a page of HTML or XML."""
    start = chunk[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error", b"<!--"))


def check_hashes(part: Path, md5: str | None, sha256: str | None) -> None:
    """Raise DamagedFile, having removed `part`, if its hashes are not the expected ones."""
    if md5 and base64.b64encode(file_hash(part, "md5").digest()).decode() != md5.strip():
        part.unlink()
        raise DamagedFile(part, "what arrived has another MD5 than the server says")
    if sha256 and file_hash(part, "sha256").hexdigest() != sha256:
        part.unlink()
        raise DamagedFile(part, "what arrived has another SHA-256 than OpenAI's file")


# The state of an unfinished download


def state_path(part: Path) -> Path:
    """Return the path of the JSON file that belongs to a `.part` file."""
    return part.with_name(f"{part.name}.json")


def start_part(response: Response, part: Path) -> RemoteFile:
    """Begin a new download: remove `part`, and store what the response says about the file."""
    part.unlink(missing_ok=True)
    headers = response.headers
    length, etag = headers.get("Content-Length", ""), headers.get("ETag", "")
    remote = RemoteFile(
        size=int(length) if re.fullmatch(NUMBER, length) else None,
        md5=headers.get("Content-MD5"),
        validator=etag if etag.startswith('"') else headers.get("Last-Modified"),
    )
    with atomic_write(state_path(part)) as file:
        file.write(json.dumps(remote._asdict()).encode("utf-8"))
    return remote


def read_state(part: Path) -> RemoteFile | None:
    """Return what the server said when `part` was begun; None if that is not known."""
    try:
        state = read_json(state_path(part))
    except (OSError, ValueError):
        return None
    types = {"size": int, "md5": str, "validator": str}
    if set(state) != set(types):
        return None
    good = all(state[name] is None or type(state[name]) is types[name] for name in types)
    return RemoteFile(**state) if good else None
