"""One file downloaded over HTTP: resumed after an interruption, retried, verified, and bounded.

    fetch("https://host/x.txt", Path("x.txt"), max_bytes=10_000, sha256="...")

The bytes of FILE are appended to FILE.part. FILE.part.json keeps what the server said about the
file, so that a later call can ask for the rest of the same file. When the length and the hashes
are right, FILE.part is renamed to FILE. A server may be slow, but not without end: the answer and
each chunk of the body have to arrive within PATIENCE, and no more than `max_bytes` are taken.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import queue
import re
import shutil
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from gpt2_support.files import (
    DamagedFile,
    atomic_write,
    check_regular,
    file_hash,
    read_json,
    size_of,
    sync,
    with_path,
)
from gpt2_support.messages import BarStream, info, preview

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path
    from typing import TypeVar

    from requests import PreparedRequest, Response

    T = TypeVar("T")

TIMEOUTS = (5, 30)  # seconds to connect, and to wait for the next bytes
PATIENCE = 30.0  # seconds until the answer, and for CHUNK bytes: 273 a second are the lowest speed
HURRY = 1.0  # until the first answer, where another model is at hand
CHUNK = 1 << 13  # bytes: small, because a chunk cut short is lost
MAX_FAILURES = 5  # in a row, without CHUNK new bytes
MAX_PAUSE = 60  # seconds, even if a busy server asks for more
MAX_REDIRECTS = 10
NUMBER = "[0-9]{1,18}"  # of bytes, in a header
LINKED = ("X-Linked-Size", "X-Linked-ETag", "X-Repo-Commit")  # of the hub's first answer
NETWORK_ADVICE = (
    ". Run this again to go on from here; or check the network and HTTPS_PROXY, or name a mirror: "
    "--base_url or GPT2_BASE_URL for OpenAI's files, HF_ENDPOINT for the Hugging Face hub's"
)


class Source(NamedTuple):
    """A file to download: where it is, and what it has to be."""

    url: str
    max_bytes: int  # a longer file is refused
    sha256: str | None = None
    token: str | None = None  # sent to the host of `url`, and to no other


class Effort(NamedTuple):
    """How much is tried before a download is given up."""

    pause: Callable[[float], Any] = time.sleep  # waits before a retry
    hurried: bool = False  # gives up at the first failure, unless something has arrived
    has_answered: bool = False  # the server is known to be there


class RemoteFile(NamedTuple):
    """What a server said about a file; None for what it did not say."""

    size: int | None = None  # in bytes
    md5: str | None = None  # in base64
    validator: str | None = None  # for If-Range: an ETag, or a date
    sha256: str | None = None  # in hexadecimal
    commit: str | None = None  # of the hub's repository


class TemporaryFailure(ConnectionError):
    """A failure after which a retry may succeed, `pause` seconds later if the server says so."""

    def __init__(self, message: str, pause: int = 0) -> None:
        super().__init__(message)
        self.pause = pause


class BadAnswer(ValueError):
    """An answer that is not the file: a page, too many bytes, a redirect to nowhere."""


class RefusedRequest(OSError):
    """An answer such as 404; `status` is its number, `code` what the hub says about it."""

    def __init__(self, message: str, status: int, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


# Attempts


def fetch(
    url: str,
    path: Path,
    max_bytes: int,
    sha256: str | None = None,
    token: str | None = None,
    effort: Effort = Effort(),  # noqa: B008 (it cannot be changed)
) -> None:
    """Download `url` to `path`; resume an earlier attempt, and retry after a failure.

    Gives up after MAX_FAILURES in a row without progress, or after 2 if the server has never
    answered. A file of more than `max_bytes` or of another SHA-256 is refused. Raises
    ConnectionError when it gives up, BadAnswer or another ValueError if what arrives is not the
    file, RefusedRequest if the server refuses it, and another OSError if the disk cannot hold it.
    """
    part = path.with_name(f"{path.name}.part")
    for name in filter(os.path.lexists, (path, part, state_path(part))):
        check_regular(name)
    source = Source(url, max_bytes, sha256, token)
    persist(lambda s: fetch_once(source, path, part, s), url, lambda: size_of(part), effort)


def look(
    url: str,
    max_bytes: int,
    token: str | None = None,
    effort: Effort = Effort(),  # noqa: B008 (it cannot be changed)
) -> RemoteFile:
    """Return what a server says about a file, without fetching it; raises as `fetch` does."""

    def ask(seconds: float) -> RemoteFile:
        items = in_time(answer(Source(url, max_bytes, None, token), {}), seconds)
        with contextlib.closing(items):
            response: Any = next(items)
            check_response(url, response)
            return describe(url, response, max_bytes)

    return persist(ask, url, lambda: 0, effort)


def persist(
    attempt: Callable[[float], T], url: str, n_bytes: Callable[[], int], effort: Effort
) -> T:
    """Return what `attempt(seconds)` returns, called again after each failure, as `fetch` says.

    `n_bytes()` counts the bytes that are there.
    """
    import requests

    name, has_answered = public(url).rsplit("/", 1)[-1], effort.has_answered
    start = best = n_bytes()
    n_failures = 0
    while True:
        hurried = effort.hurried and best == start  # nothing has arrived yet
        try:
            return attempt(HURRY if hurried and not has_answered else PATIENCE)
        except (requests.RequestException, ConnectionError, TimeoutError, DamagedFile) as error:
            failure = error
        has_answered = has_answered or not is_unreachable(failure)
        if n_bytes() >= best + CHUNK:
            best, n_failures = n_bytes(), 0
        n_failures += 1
        if n_failures >= (MAX_FAILURES if has_answered else 2) or (hurried and best == start):
            raise final_error(url, failure)
        seconds = max(2 ** (n_failures - 1), getattr(failure, "pause", 0))
        info(f"{name}: {reason(failure)}; trying again in {seconds} s")
        effort.pause(seconds)


def fetch_once(source: Source, path: Path, part: Path, seconds: float) -> None:
    """Make one attempt: request the bytes that are missing, check the file, rename it."""
    remote = read_state(part)
    n_bytes = size_of(part) if remote else 0
    if remote is None or not n_bytes or n_bytes != remote.size:
        items = in_time(answer(source, range_headers(n_bytes, remote)), seconds)
        with contextlib.closing(items):
            response: Any = next(items)
            check_response(source.url, response, part)
            if response.status_code == 206:
                remote = continue_part(response, part, n_bytes, remote)
            else:
                remote = start_part(source, response, part)
            check_space(part, remote.size)
            in_speed = at_speed(items, seconds)
            receive(source, in_speed, part, remote.size)
    check_hashes(part, remote.md5, source.sha256 or remote.sha256)
    os.replace(part, path)
    state_path(part).unlink(missing_ok=True)


# Requests


def range_headers(n_bytes: int, remote: RemoteFile | None) -> dict[str, str]:
    """Return headers that ask for a file from byte `n_bytes` on, or whole if it has changed."""
    headers = {"Range": f"bytes={n_bytes}-"} if n_bytes else {}
    if n_bytes and remote and remote.validator:
        headers["If-Range"] = remote.validator
    return headers


def answer(source: Source, headers: dict[str, str]) -> Generator[Response | bytes, None, None]:
    """Yield the response to a request, and then its body in chunks."""
    with request(source, {"Accept-Encoding": "identity", **headers}) as response:
        yield response
        yield from response.iter_content(CHUNK)


def request(source: Source, headers: dict[str, str]) -> Response:
    """Request a file, and follow redirects; the token goes to the first host alone.

    What the first answers say about the file (LINKED) is added to the headers of the last one.
    """
    import requests

    url, linked = source.url, dict[str, str]()
    for _ in range(MAX_REDIRECTS):
        options: Any = {"timeout": TIMEOUTS, "stream": True, "allow_redirects": False}
        session: Any = requests.Session()
        session.resolve_redirects = lambda *args, **kwargs: iter(())  # it would read the whole body
        try:
            is_home = urlsplit(url)[:2] == urlsplit(source.url)[:2]  # the scheme, the host and port
            auth = bearer(source.token) if source.token and is_home else None
            response = session.get(url, headers=headers, auth=auth, **options)
        except ValueError as error:
            where = "" if url == source.url else f"the server redirects to {preview(public(url))}: "
            message = "" if set(url) & set("@?") else f": {preview(str(error), 400)}"
            message = f"{where}not an address to download from{message}"
            raise BadAnswer(f"{public(source.url)}: {message}") from None
        linked = {name: x for name, x in response.headers.items() if name in LINKED} | linked
        if not response.is_redirect:
            response.headers.update(linked)
            return response
        response.close()
        location = response.headers["Location"]
        url = redirected(url, location) or ""
        if not url:
            message = f"the server redirects to {preview(public(location))}"
            raise BadAnswer(f"{public(source.url)}: {message}, expected an https address")
    raise BadAnswer(f"{public(source.url)}: the server redirects more than {MAX_REDIRECTS} times")


def bearer(token: str) -> Callable[[PreparedRequest], PreparedRequest]:
    """Return what adds a token to a request; a password in ~/.netrc does not replace it."""

    def authorize(prepared: PreparedRequest) -> PreparedRequest:
        prepared.headers["Authorization"] = f"Bearer {token}"
        return prepared

    return authorize


def redirected(url: str, location: str) -> str | None:
    """Return the address that a server redirects to; None unless it is one of http or https.

    From https it never leads to http.
    """
    try:
        target = urljoin(url, location)
        scheme, host = urlsplit(target)[:2]
    except ValueError:
        return None
    return target if host and scheme in ("https", urlsplit(url).scheme) else None


def in_time(items: Generator[T, None, None], seconds: float) -> Generator[T, None, None]:
    """Yield the items of a generator, which runs in a thread; TemporaryFailure if one is late.

    The timeout of a socket starts anew at each byte, so that a byte a second would never meet it.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(8)
    stopped = threading.Event()

    def work() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    ready.put((item, None))
                    if stopped.is_set():
                        break
            ready.put((None, StopIteration()))
        except BaseException as error:
            ready.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            item, error = take(ready, seconds)
            if isinstance(error, StopIteration):
                return
            if error:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        while not ready.empty():
            ready.get()


def at_speed(chunks: Iterator[Any], seconds: float) -> Iterator[Any]:
    """Yield the chunks of a body; raise TemporaryFailure if CHUNK bytes take longer than that."""
    n_bytes, since = 0, time.monotonic()
    for chunk in chunks:
        n_bytes += len(chunk)
        if n_bytes >= CHUNK:
            n_bytes, since = 0, time.monotonic()
        elif time.monotonic() > since + seconds:
            raise TemporaryFailure(f"too slow: {n_bytes} bytes in {seconds:g} s")
        yield chunk


def take(ready: queue.Queue[T], seconds: float) -> T:
    """Return the next item of a queue, or raise TemporaryFailure if there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return ready.get(timeout=min(seconds, 0.5))  # on Windows, Ctrl-C waits for it
        except queue.Empty:
            if time.monotonic() >= deadline:
                raise TemporaryFailure(f"too slow: nothing within {seconds:g} s") from None


# Failures


def public(url: str) -> str:
    """Return an address without a user's name, a password or a query, which may be secret."""
    return re.sub("//.*@", "//", url).split("?")[0]


def hide_secrets(text: str) -> str:
    """Return a message without the names and passwords of the addresses in it."""
    return re.sub(r"//\S*@", "//", text)


def is_unreachable(error: Exception) -> bool:
    """Return whether no connection was made at all, rather than one that broke."""
    return bool(error.args) and type(error.args[0]).__name__ == "MaxRetryError"


def reason(error: Exception) -> str:
    """Return the message of the innermost exception that requests and urllib3 have wrapped."""
    while True:
        causes = (getattr(error, "reason", None), *error.args)
        inner = [cause for cause in causes if isinstance(cause, Exception)]
        if not inner:
            text = re.sub(r"^(<.*?>|\w+Connection(Pool)?\(.*?\)): ", "", str(error).strip())
            return preview(hide_secrets(text), 400)
        error = inner[0]


def final_error(url: str, failure: Exception) -> Exception:
    """Return the error to raise when a download is given up."""
    if isinstance(failure, DamagedFile):
        return BadAnswer(f"{public(url)}: {reason(failure)}")
    return ConnectionError(f"{public(url)}: {reason(failure)}")


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


def check_response(url: str, response: Response, part: Path | None = None) -> None:
    """Raise TemporaryFailure, RefusedRequest or BadAnswer unless the response carries the file."""
    code, headers, url = response.status_code, response.headers, public(url)
    status = f"HTTP status {code} {preview(response.reason or '')}".strip()
    if code == 416 and part:
        part.unlink(missing_ok=True)
        raise TemporaryFailure(f"{status}: cannot go on, starting over")
    if code in (408, 425, 429) or code >= 500:
        raise TemporaryFailure(status, retry_after(headers.get("Retry-After", "")))
    if code not in (200, 206):
        raise RefusedRequest(f"{url}: {status}", code, headers.get("X-Error-Code", ""))
    content_type = headers.get("Content-Type", "")
    if re.search(r"\b(html|xml)\b", content_type.lower()):
        page = f"a page ({preview(content_type)})"
        raise BadAnswer(f"{url}: the server sent {page} instead of the file")
    encoding = headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("", "identity"):
        raise BadAnswer(f"{url}: the server sent the file encoded ({preview(encoding)})")


def describe(url: str, response: Response, max_bytes: int) -> RemoteFile:
    """Return what a response that begins a file says about it; raise BadAnswer if it is too long.

    The hub's first answer has the size and, in quotes, the SHA-256 of a large file.
    """
    headers = response.headers
    length, etag = headers.get("Content-Length", ""), headers.get("ETag", "")
    linked_size = headers.get("X-Linked-Size", "")
    linked = re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', headers.get("X-Linked-ETag", ""))
    sizes = [int(text) for text in (length, linked_size) if re.fullmatch(NUMBER, text)]
    if sizes and max(sizes) > max_bytes:
        expected = f"expected at most {max_bytes}"
        raise BadAnswer(f"{public(url)}: the server has a file of {max(sizes)} bytes, {expected}")
    if len(set(sizes)) > 1:
        raise BadAnswer(f"{public(url)}: the server sends {sizes[0]} bytes, expected {sizes[1]}")
    return RemoteFile(
        size=sizes[0] if sizes else None,
        md5=headers.get("Content-MD5"),
        validator=etag if etag.startswith('"') else headers.get("Last-Modified"),
        sha256=linked[1] if linked else None,
        commit=headers.get("X-Repo-Commit"),
    )


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
    raise TemporaryFailure("the server sent the wrong part, starting over")


def check_space(part: Path, size: int | None) -> None:
    """Raise OSError if the disk has no room for the rest of a file."""
    needed, free = (size or 0) - size_of(part), shutil.disk_usage(part.parent).free
    if needed > free:
        raise OSError(f"{part}: {needed} bytes to download, but only {free} are free there")


def receive(source: Source, items: Iterator[Any], part: Path, size: int | None) -> None:
    """Append the body of a response to `part`, with a progress bar; raise unless it is complete."""
    from tqdm import tqdm

    url, limit = public(source.url), source.max_bytes if size is None else size
    bar = {"desc": part.stem, "unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with (
        with_path(part),
        open(part, "ab") as file,
        tqdm(total=size, initial=size_of(part), file=BarStream(), **bar) as progress,
    ):
        n_bytes = file.tell()
        for chunk in items:
            if n_bytes == 0 and is_page(chunk):
                raise BadAnswer(f"{url}: the server sent a page instead of the file")
            n_bytes += len(chunk)
            if n_bytes > limit:
                break
            file.write(chunk)
            progress.update(len(chunk))
        sync(file)
    if n_bytes > limit:
        part.unlink()
    if size is None and n_bytes > limit:
        raise BadAnswer(f"{url}: the server sends more than {limit} bytes, expected at most these")
    if size is not None and n_bytes != size:
        raise TemporaryFailure(f"{n_bytes} of {size} bytes arrived")


def is_page(chunk: bytes) -> bool:
    """Return whether a file begins as a page of HTML or XML."""
    start = chunk[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error", b"<!--"))


def check_hashes(part: Path, md5: str | None, sha256: str | None) -> None:
    """Raise DamagedFile, having removed `part`, if its hashes are not the expected ones."""
    if md5 and base64.b64encode(file_hash(part, "md5").digest()).decode() != md5.strip():
        part.unlink()
        raise DamagedFile(part, "what arrived does not have the MD5 that the server says")
    if sha256 and file_hash(part, "sha256").hexdigest() != sha256:
        part.unlink()
        raise DamagedFile(part, "what arrived does not have the SHA-256 that the file should have")


# The state of an unfinished download


def state_path(part: Path) -> Path:
    """Return the path of the JSON file that belongs to a `.part` file."""
    return part.with_name(f"{part.name}.json")


def start_part(source: Source, response: Response, part: Path) -> RemoteFile:
    """Begin a new download: remove `part`, and store what the response says about the file."""
    remote = describe(source.url, response, source.max_bytes)
    part.unlink(missing_ok=True)
    with atomic_write(state_path(part)) as file:
        file.write(json.dumps(remote._asdict()).encode("utf-8"))
    return remote


def read_state(part: Path) -> RemoteFile | None:
    """Return what the server said when `part` was begun; None if that is not known."""
    try:
        state = read_json(state_path(part))
    except (OSError, ValueError):
        return None
    types: dict[str, type] = {**dict.fromkeys(RemoteFile._fields, str), "size": int}
    if set(state) != set(types):
        return None
    good = all(state[name] is None or type(state[name]) is types[name] for name in types)
    return RemoteFile(**state) if good else None
