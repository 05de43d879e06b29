"""One download: bounded in size and time whatever the server does, and silent about secrets."""

import contextlib
import os
import shutil
import socketserver
import sys
import threading
import time

import pytest

import utils
from gpt2_support import http, hub

BODY = bytes(range(256)) * 100


class Handler(socketserver.BaseRequestHandler):
    """Gives each request, and its connection, to the next of `server.answers`."""

    def handle(self):
        with contextlib.suppress(OSError):
            request = self.request.recv(65536).decode("latin-1")
            self.server.log.append(request)
            answers = self.server.answers
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            self.request.sendall(answer) if isinstance(answer, bytes) else answer(self.request)


@contextlib.contextmanager
def serve(*answers):
    """A server of these answers, bytes or functions of a socket; the last one again and again."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.answers, server.log = list(answers), []
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def reply(status="200 OK", body=BODY, **headers):
    """Return an answer; an underscore in the name of a header is a dash."""
    headers = {"Content_Length": len(body), **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1") + body


def drip(start, unit=b"x", seconds=0.05):
    """Return an answer that begins as it should, and goes on a unit at a time, without end."""

    def answer(connection):
        connection.sendall(start)
        for _ in range(200):
            connection.sendall(unit)
            time.sleep(seconds)

    return answer


def flood(start):
    """Return an answer that goes on without end, as fast as it can."""

    def answer(connection):
        connection.sendall(start)
        while True:
            connection.sendall(bytes(1 << 20))

    return answer


@pytest.fixture
def quick(monkeypatch):
    """A tenth of a second of patience, no pauses."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(http, "PATIENCE", 0.3)
    return http.Effort(pause=lambda seconds: None)


def fetch(url, tmp_path, effort, max_bytes=100_000, **kwargs):
    http.fetch(f"{url}/x.json", tmp_path / "x.json", max_bytes, effort=effort, **kwargs)
    return (tmp_path / "x.json").read_bytes()


START = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        drip(START + b"Content-Length: 90\r\n\r\n"),
        drip(START + b"\r\n"),
        drip(START, b"x"),
        drip(START, b"X-A: b\r\n"),
        drip(b"H", b"T"),
        drip(START + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
    ids=["body", "body without length", "header", "headers", "status", "chunks"],
)
def test_server_of_a_byte_at_a_time_is_given_up(tmp_path, quick, answer):
    started = time.monotonic()
    with serve(answer) as server, pytest.raises(ConnectionError, match="too slow: "):
        fetch(server.url, tmp_path, quick)
    assert time.monotonic() - started < 5
    assert len(server.log) >= http.MAX_FAILURES
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    "start",
    [
        START + b"\r\n",
        START + b"Content-Length: 100000\r\n\r\n",
        START + b"Transfer-Encoding: chunked\r\n\r\n" + b"ffffffffffff\r\n",
    ],
    ids=["no length", "a length", "one chunk"],
)
def test_endless_body_is_cut_off(tmp_path, quick, start):
    with serve(flood(start)) as server, contextlib.suppress(ValueError, ConnectionError):
        fetch(server.url, tmp_path, quick)
        pytest.fail() if b"Length" not in start else None
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 110_000


def test_endless_body_of_a_redirect_is_not_read(tmp_path, quick):
    quick = http.Effort(pause=lambda seconds: pytest.fail("it took too long"))
    start = b"HTTP/1.1 302 Found\r\nLocation: /y\r\nContent-Length: 10000000000\r\n\r\n"
    with serve(flood(start), reply()) as server:
        assert fetch(server.url, tmp_path, quick) == BODY


@pytest.mark.parametrize("header", ["Content_Length", "X_Linked_Size"])
def test_absurd_length_is_refused_at_once(tmp_path, quick, header):
    answer = reply(body=b"", **{"Content_Length": 90, header: 10**17})
    with serve(answer) as server, pytest.raises(ValueError, match=f"{10**17} bytes, expected at m"):
        fetch(server.url, tmp_path, quick)
    assert len(server.log) == 1
    assert not list(tmp_path.iterdir())


def test_length_beyond_the_free_space_is_refused_at_once(tmp_path, quick, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with (
        serve(reply()) as server,
        pytest.raises(OSError, match="25600 bytes to download, but"),
    ):
        fetch(server.url, tmp_path, quick)
    assert len(server.log) == 1


def test_hurried_download_gives_up_in_a_second(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(http, "HURRY", 0.2)
    effort = http.Effort(lambda seconds: pytest.fail("it waited"), hurried=True)
    for answer in (reply("500 x"), drip(START, b"x"), lambda connection: time.sleep(3), b""):
        started = time.monotonic()
        with serve(answer) as server, pytest.raises(ConnectionError):
            fetch(server.url, tmp_path, effort)
        assert len(server.log) == 1
        assert time.monotonic() - started < 1.5


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError("closed"), None])
def test_download_goes_on_when_standard_error_fails(tmp_path, quick, monkeypatch, error):
    class Broken:
        encoding = "utf-8"

        def write(self, text):
            raise error

        flush = isatty = fileno = lambda self: False

    monkeypatch.setattr(sys, "stderr", Broken() if error else None)
    with serve(reply("500 x"), reply()) as server:
        assert fetch(server.url, tmp_path, quick) == BODY


# ----------------------------------------------------------------------------------------------
# Redirects


def test_redirects_are_followed_and_what_the_first_said_is_checked(tmp_path, quick):
    with serve(reply()) as far:
        headers = {"X_Linked_Size": len(BODY), "X_Linked_ETag": f'"{"0" * 64}"'}
        answer = reply("302 Found", b"", Location=f"{far.url}/y?signature=1", **headers)
        with serve(answer) as server, pytest.raises(ValueError, match="does not have the SHA-256"):
            fetch(server.url, tmp_path, quick)
    assert far.log[0].startswith("GET /y?signature=1 ")


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "http://[", "javascript:x"],
)
def test_redirect_to_what_is_no_server_is_refused(tmp_path, quick, location):
    answer, message = reply("302 Found", b"", Location=location), r"redirects to|not an address"
    with serve(answer) as server, pytest.raises(ValueError, match=message):
        fetch(server.url, tmp_path, quick)
    assert not list(tmp_path.iterdir())


def test_redirect_from_https_to_http_is_refused():
    assert http.redirected("https://a/x", "/y") == "https://a/y"
    assert http.redirected("http://a/x", "https://b/y") == "https://b/y"
    assert http.redirected("https://a/x", "http://a/y") is None


def test_redirects_in_a_circle_end(tmp_path, quick):
    answer = reply("302 Found", b"", Location="/x.json")
    with serve(answer) as server, pytest.raises(ValueError, match="redirects more than 10 times"):
        fetch(server.url, tmp_path, quick)
    assert len(server.log) == http.MAX_REDIRECTS


def test_wrong_size_after_a_redirect_is_refused(tmp_path, quick):
    answer = reply("302 Found", b"", Location="/y", X_Linked_Size=7)
    with (
        serve(answer, reply()) as server,
        pytest.raises(ValueError, match="25600 bytes, expected"),
    ):
        fetch(server.url, tmp_path, quick)


# ----------------------------------------------------------------------------------------------
# Secrets


def test_token_goes_to_the_first_host_alone(tmp_path, quick, monkeypatch, capsys):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with serve(reply("500 x"), reply("404 x")) as far:
        home = reply("302 Found", b"", Location="/again")
        away = reply("302 Found", b"", Location=f"{far.url}/y")
        with serve(home, away) as server, pytest.raises(OSError) as caught:
            fetch(server.url, tmp_path, quick, token="secret")
    assert ["Authorization: Bearer secret" in request for request in server.log] == [True] * 3
    assert not any("secret" in request for request in far.log)
    assert "secret" not in str(caught.value) + capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1:1", "[::1", "127.0.0.1:x", "no host"])
@pytest.mark.parametrize("user", ["me:hunter2@", "me:hunt/er2@", "me:hunt?er2@", "me:h@unter2@"])
def test_password_of_an_address_is_in_no_message(tmp_path, quick, capsys, host, user):
    with pytest.raises((OSError, ValueError)) as caught:
        fetch(f"http://{user}{host}", tmp_path, quick)
    assert "unt" not in str(caught.value) + capsys.readouterr().err


@pytest.mark.parametrize("status", ["404 x", "500 x", "302 Found"])
def test_password_of_an_address_is_in_no_message_about_an_answer(tmp_path, quick, capsys, status):
    answer = reply(status, Location="file://me:hunter2@x/?hunter2")
    with serve(answer) as server, pytest.raises((OSError, ValueError)) as caught:
        fetch(server.url.replace("//", "//me:hunter2@"), tmp_path, quick)
    assert "Authorization: Basic" in server.log[0]
    assert "hunter2" not in str(caught.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    "proxy", ["http://me:hunter2@127.0.0.1:1", "http://me:hunter2@[", "x://me:hunter2@y"]
)
def test_password_of_a_proxy_is_in_no_message(tmp_path, quick, capsys, monkeypatch, proxy):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises((OSError, ValueError)) as caught:
        fetch("http://models.invalid", tmp_path, quick)
    assert "hunter2" not in str(caught.value) + capsys.readouterr().err


# ----------------------------------------------------------------------------------------------
# What is in the way


@pytest.mark.skipif(os.name == "nt", reason="needs pipes and links")
@pytest.mark.parametrize("kind", ["folder", "pipe", "circle"])
@pytest.mark.parametrize("name", ["x.json", "x.json.part", "x.json.part.json"])
def test_what_is_no_file_is_refused_before_anything_is_asked(tmp_path, quick, kind, name):
    path = tmp_path / name
    make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}
    make.get(kind, lambda: path.symlink_to(name))()
    with serve(reply()) as server, pytest.raises(OSError, match=name):
        fetch(server.url, tmp_path, quick)
    assert not server.log


@pytest.mark.skipif(os.name == "nt", reason="needs pipes and links")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("124M", "file"),
        ("124M", "pipe"),
        ("124M/model.bin", "folder"),
        ("124M/model.bin", "pipe"),
        ("124M/tokenizer.bin", "folder"),
        ("124M/.download", "file"),
        ("124M/.download/encoder.json", "folder"),
        ("124M/.download/encoder.json", "pipe"),
        ("124M/.download/encoder.json.part", "pipe"),
        (".124M.lock", "folder"),
        (".124M.lock", "pipe"),
    ],
)
def test_download_of_a_model_over_what_is_no_file_is_refused_at_once(tmp_path, quick, name, kind):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True, parents=True)
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "file": path.touch}[kind]()
    with serve(reply()) as server, pytest.raises(OSError, match=path.name):
        hub.download("124M", tmp_path, server.url)
    assert not server.log, name


def test_password_in_the_environment_is_not_in_the_help(call, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", "http://me:hunter2@host")
    monkeypatch.setenv("HF_ENDPOINT", "http://me:hunter2@host")
    done = call(utils, "download", "--help")
    assert done.returncode == 0 and "hunter2" not in done.stdout
