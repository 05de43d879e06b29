"""A server that behaves as the Hugging Face hub does, and the host of its large files."""

import contextlib
import hashlib
import http.server
import re
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")  # the files that are on the other host
OLD_NAMES = {"distilgpt2": "distilbert/distilgpt2", "gpt2": "openai-community/gpt2"}
TOKEN = "hf_secret"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET; `server.site.faults[file]` lists what goes wrong first, on either host.

    A fault is a status, "page", "truncated" or "altered" (by the host of the large files), "drop"
    (half of the body), "wrong size" (in the first answer), or the address that is redirected to.
    """

    def do_GET(self):
        site, path = self.server.site, urllib.parse.urlsplit(self.path).path
        file_name = path.rsplit("/", 1)[-1]
        is_far = self.server is site.far
        token = self.headers.get("Authorization")
        site.log.append((is_far, path, token, self.headers.get("Range")))
        if is_far:
            faults = site.faults.get(file_name, [])
            return self.send_file(site.large[path], faults.pop(0) if faults else None)
        faults = site.faults.get(file_name, [])
        fault = faults.pop(0) if faults and is_for_home(faults[0]) else None
        if isinstance(fault, int):
            return self.reply(fault, b"no")
        if fault == "page":
            return self.reply(200, b"<!DOCTYPE html><p>Please log in", Content_Type="text/html")
        match = re.fullmatch("/(.+)/resolve/([^/]+)/([^/]+)", path)
        repository, revision, file_name = match.groups() if match else ("", "", "")
        if repository in OLD_NAMES:
            return self.reply(
                307, Location=f"/{OLD_NAMES[repository]}/resolve/{revision}/{file_name}"
            )
        return self.resolve(repository, revision, file_name, fault)

    def resolve(self, repository, revision, file_name, fault):
        site = self.server.site
        files = site.repositories.get(repository)
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if files is None or (repository in site.private and not has_token):
            return self.reply(401, b"no", X_Error_Code="RepoNotFound")
        if repository in site.gated and not has_token:
            return self.reply(403, b"no", X_Error_Code="GatedRepo")
        if revision not in ("main", "v1.0", COMMIT):
            return self.reply(404, b"no", X_Error_Code="RevisionNotFound")
        if file_name not in files:
            return self.reply(404, b"no", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        body = files[file_name]
        if not file_name.endswith(LARGE):
            etag = hashlib.sha1(body).hexdigest()
            return self.reply(200, body, X_Repo_Commit=COMMIT, ETag=f'"{etag}"')
        sha256 = hashlib.sha256(body).hexdigest()
        site.large[f"/{sha256}/{file_name}"] = body
        headers = {
            "Location": f"{site.far_url}/{sha256}/{file_name}?signature=abc",
            "X_Repo_Commit": COMMIT,
            "X_Linked_Size": len(body) + (fault == "wrong size"),
            "X_Linked_ETag": f'"{sha256}"',
        }
        if isinstance(fault, str) and ":" in fault:
            headers["Location"] = fault
        return self.reply(302, b"Found. Redirecting", **headers)

    def send_file(self, body, fault):
        half = len(body) // 2
        if isinstance(fault, int):
            return self.reply(fault, b"no")
        if fault == "truncated":
            body = body[:half]
        if fault == "altered":
            body = body[:half] + bytes([body[half] ^ 4]) + body[half + 1 :]
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(requested[1]) if requested else 0
        headers = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        etag = hashlib.md5(body).hexdigest()
        status, n_sent = (206 if start else 200), half if fault == "drop" else None
        return self.reply(status, body[start:], n_sent, ETag=f'"{etag}"', **headers)

    def reply(self, status, body=b"", n_sent=None, **headers):
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[:n_sent])

    def log_message(self, *args):
        pass


def is_for_home(fault):
    return fault not in ("truncated", "altered", "drop") and not isinstance(fault, tuple)


class Site:
    """Both hosts; `repositories` is {name: {file: bytes}}, `log` (is_far, path, token, range)."""

    def __init__(self):
        self.repositories, self.private, self.gated = {}, set(), set()
        self.faults, self.log, self.large = {}, [], {}
        self.home, self.far = (start(self, host) for host in ("127.0.0.1", "127.0.0.1"))
        self.url = f"http://127.0.0.1:{self.home.server_port}"
        self.far_url = f"http://127.0.0.1:{self.far.server_port}"

    def add(self, name, folder):
        """Serve the files of a folder as a repository."""
        self.repositories[name] = {path.name: path.read_bytes() for path in folder.iterdir()}


def start(site, host):
    server = http.server.ThreadingHTTPServer((host, 0), Handler)
    server.site, server.daemon_threads, server.block_on_close = site, True, False
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@contextlib.contextmanager
def serve():
    site = Site()
    try:
        yield site
    finally:
        for server in (site.home, site.far):
            server.shutdown()
            server.server_close()
