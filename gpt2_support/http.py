"""One resumable, verified download."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import sys
import time
from typing import TYPE_CHECKING

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
    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray


TIMEOUTS = (5, 30)  # seconds to connect, and to wait for the next bytes


MOST_FAILURES = 5  # in a row, without a byte of progress


LONGEST_PAUSE = 60  # seconds, however long a busy server asks to wait


SIZE = "[0-9]{1,18}"  # in a header


def fetch(url, path, sha256=None, reached=False, pause=time.sleep):
    """Download `url` to `path`, going on with an earlier part and trying again after a failure.

    Gives up after MOST_FAILURES in a row that brought nothing, or after 2 if the server was never
    `reached`. Raises as `download` does.
    """
    import requests

    part = path.with_name(f"{path.name}.part")
    best, failures = size_of(part), 0
    while True:
        try:
            return fetch_once(url, path, part, sha256)
        except (requests.RequestException, ConnectionError, TimeoutError, DamagedFile) as error:
            problem = error
        reached = reached or not is_unreachable(problem)
        failures = 1 if size_of(part) > best else failures + 1
        best = max(best, size_of(part))
        reason = preview(str(root_cause(problem)).strip(), 400)
        if failures >= (MOST_FAILURES if reached else 2):
            if isinstance(problem, DamagedFile):
                raise ValueError(f"{url}: {reason}")
            convert = cli.command("utils.py", "convert", "--help")
            raise ConnectionError(f"{url}: {reason}. {NETWORK_ADVICE}: {convert}")
        seconds = max(2 ** (failures - 1), getattr(problem, "pause", 0))
        info(f"{path.name}: {reason}; trying again in {seconds} s")
        pause(seconds)


NETWORK_ADVICE = (
    "Run this again to go on from here; or check the network and HTTPS_PROXY, name a mirror with "
    "--base_url or GPT2_BASE_URL, or use a model that you have"
)


def is_unreachable(error):
    """Return whether an error means that no connection was made, not that one was lost."""
    return bool(error.args) and type(error.args[0]).__name__ == "MaxRetryError"


def root_cause(error):
    """Return the innermost of the exceptions that requests and urllib3 wrap into one another."""
    while True:
        inner = [
            x for x in (getattr(error, "reason", None), *error.args) if isinstance(x, Exception)
        ]
        if not inner:
            return error
        error = inner[0]


def fetch_once(url, path, part, sha256):
    """Make one attempt at `fetch`: the request (unless all is here), the checks, the rename."""
    import requests

    state = read_state(part)
    have = size_of(part) if state else 0
    if not have or have != state["size"]:
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        if have and state["validator"]:
            headers["If-Range"] = state["validator"]  # the rest only if the file is the same
        try:
            answer = requests.get(url, headers=headers, stream=True, timeout=TIMEOUTS)
        except ValueError as error:
            reason = preview(str(error), 400)
            raise ValueError(f"{url}: not an address to download from: {reason}") from None
        with answer:
            check_answer(url, answer, part)
            state = begin_part(answer, part, have, state)
            receive(url, answer, part, state["size"])
    check_hashes(part, state["md5"], sha256)
    os.replace(part, path)
    state_path(part).unlink(missing_ok=True)


def state_path(part):
    """Return the path of the small file that says what a `.part` file is a part of."""
    return part.with_name(f"{part.name}.json")


def read_state(part):
    """Return what the server said of a file when its part was begun, None if that is not known.

    The keys: `size` in bytes, `md5` (base64), `validator` (for If-Range), each None if not said.
    """
    try:
        state = read_json(state_path(part))
    except (OSError, ValueError):
        return None
    kinds = {"size": int, "md5": str, "validator": str}
    good = set(state) == set(kinds) and all(
        state[name] is None or type(state[name]) is kind for name, kind in kinds.items()
    )
    return state if good else None


def check_answer(url, answer, part):
    """Raise ConnectionError for a failure that may pass, OSError or ValueError for another."""
    status = f"HTTP status {answer.status_code} {preview(answer.reason or '')}".strip()
    if answer.status_code == 416:
        part.unlink(missing_ok=True)
        raise ConnectionError(f"{status}: cannot go on, starting over")
    if answer.status_code in (408, 425, 429) or answer.status_code >= 500:
        error = ConnectionError(status)
        error.pause = seconds_to_wait(answer.headers.get("Retry-After", ""))
        raise error
    if answer.status_code not in (200, 206):
        raise OSError(f"{url}: {status}")
    kind = answer.headers.get("Content-Type", "")
    if re.search(r"\b(html|xml)\b", kind.lower()):
        raise ValueError(f"{url}: the server sent a page ({preview(kind)}) instead of the file")
    encoding = answer.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("", "identity"):
        raise ValueError(f"{url}: the server sent the file encoded ({preview(encoding)})")


def seconds_to_wait(text):
    """Return the seconds that a Retry-After header asks for, LONGEST_PAUSE at most; 0 if none."""
    from email.utils import parsedate_to_datetime

    text = text.strip()
    if re.fullmatch("[0-9]{1,9}", text):
        seconds = int(text)
    else:
        try:
            seconds = math.ceil(parsedate_to_datetime(text).timestamp() - time.time())
        except (TypeError, ValueError, IndexError, OverflowError, OSError):  # not a date
            return 0
    return min(max(seconds, 0), LONGEST_PAUSE)


def begin_part(answer, part, have, state):
    """Make `part` ready for the bytes of an answer to be appended; return the state of it."""
    if answer.status_code == 206:
        found = re.fullmatch(
            rf"bytes ({SIZE})-{SIZE}/({SIZE}|\*)", answer.headers.get("Content-Range", "").strip()
        )
        as_asked = found and have and int(found[1]) == have
        if not as_asked or found[2] not in ("*", str(state["size"] or "*")):
            part.unlink(missing_ok=True)
            raise ConnectionError("the server sent another part than asked for, starting over")
        return state
    part.unlink(missing_ok=True)
    length, etag = answer.headers.get("Content-Length", ""), answer.headers.get("ETag", "")
    state = {
        "size": int(length) if re.fullmatch(SIZE, length) else None,
        "md5": answer.headers.get("Content-MD5"),
        "validator": etag if etag.startswith('"') else answer.headers.get("Last-Modified"),
    }
    with atomic_write(state_path(part)) as file:
        file.write(json.dumps(state).encode("utf-8"))
    return state


def receive(url, answer, part, size):
    """Append the body of an answer to `part`, showing progress; raise unless `size` is reached."""
    from tqdm import tqdm

    have, units = size_of(part), {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with (
        with_path(part),
        open(part, "ab") as file,
        tqdm(desc=part.stem, total=size, initial=have, file=sys.stderr, **units) as bar,
    ):
        for chunk in answer.iter_content(1 << 13):  # an unfinished chunk is lost: small ones
            if file.tell() == 0 and is_page(chunk):
                raise ValueError(f"{url}: the server sent a page instead of the file")
            file.write(chunk)
            bar.update(len(chunk))
        sync(file)
    if size is not None and size_of(part) != size:
        if size_of(part) > size:
            part.unlink()
        raise ConnectionError(f"{size_of(part)} of {size} bytes arrived")


def is_page(chunk):
    """Return whether bytes begin as a page of HTML or XML does."""
    start = chunk[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error", b"<!--"))


def check_hashes(part, md5, sha256):
    """Raise DamagedFile, having removed `part`, unless its hashes are as they should be."""
    if md5 and base64.b64encode(file_hash(part, "md5").digest()).decode() != md5.strip():
        part.unlink()
        raise DamagedFile(part, "what arrived has another MD5 than the server says")
    if sha256 and file_hash(part, "sha256").hexdigest() != sha256:
        part.unlink()
        raise DamagedFile(part, "what arrived has another SHA-256 than OpenAI's file")
