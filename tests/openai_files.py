"""A small checkpoint in OpenAI's layout, and a server that hands it out with every known fault.

The writer of TensorFlow bundles is written from the format's description, with a CRC of its own, so
that it can contradict the reader in `gpt2_support`.
"""

import base64
import contextlib
import functools
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse

import numpy as np

from gpt2_support import files, hub
from gpt2_support.formats import token_table
from gpt2_support.params import Config, Params

N_VOCAB = 260  # the bytes, three merges, end-of-text


def slow_crc32c(data):
    """Return the CRC32C of bytes by the definition, one bit at a time."""
    crc = 0xFFFFFFFF
    for byte in bytes(data):
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


CRC_TABLE = [slow_crc32c([byte ^ 255]) ^ 0xFF000000 for byte in range(256)]


def masked_crc(data):
    """Return the CRC32C of bytes as LevelDB stores it, by table lookup: 4 bytes."""
    return masked_crc_of_bytes(bytes(data))


@functools.lru_cache(1000)  # the same small models are written by many tests
def masked_crc_of_bytes(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    rotated = (crc >> 15) | (crc << 17) & 0xFFFFFFFF
    return ((rotated + 0xA282EAD8) % 2**32).to_bytes(4, "little")


def varint(number):
    """Return a whole number in seven-bit groups, low ones first."""
    groups = [number & 127]
    while number := number >> 7:
        groups.append(number & 127)
    return bytes([group | 128 for group in groups[:-1]] + [groups[-1]])


def field(number, value):
    """Return a protobuf field: a varint for an int, length-delimited for bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def block(entries, restart_interval=3):
    """Return a LevelDB block of (key, value) pairs; every third key is stored whole."""
    out, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % restart_interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        last = key
    restarts = restarts or [0]
    return out + b"".join(n.to_bytes(4, "little") for n in [*restarts, len(restarts)])


def table(entries, per_block=4, compression=0):
    """Return a LevelDB table of {key: value}, `per_block` entries in every data block."""
    out, handles = b"", []

    def add(contents):
        nonlocal out
        handle = varint(len(out)) + varint(len(contents))
        contents += bytes([compression])
        out += contents + masked_crc(contents)
        return handle

    items = sorted(entries.items())
    for start in range(0, len(items), per_block):
        part = items[start : start + per_block]
        handles.append((part[-1][0] + b"\xff", add(block(part))))
    footer = add(block([])) + add(block(handles, restart_interval=1))
    return out + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def bundle_entry(array, at, **changes):
    """Return the BundleEntryProto of an array at an offset; `changes` overwrite what it says."""
    data = np.ascontiguousarray(array).tobytes()
    say = {"dtype": 1, "shape": array.shape, "shard": 0, "offset": at, "size": len(data)}
    say |= {"crc": masked_crc(data), **changes}
    shape = b"".join(field(2, field(1, size)) for size in say["shape"])
    out = field(1, say["dtype"]) + field(2, shape) + field(3, say["shard"])
    out += field(4, say["offset"]) + field(5, say["size"])
    return out + varint(6 << 3 | 5) + say["crc"]


HEADER = field(1, 1) + field(3, field(1, 1))  # one shard, little-endian, version 1


def bundle(arrays, header=HEADER, per_block=4, compression=0, **changes):
    """Return (index, data) of a bundle of {name: array}; `changes` are {name: {key: value}}."""
    entries, data = {b"": header}, b""
    for name, array in sorted(arrays.items()):
        change = changes.get(name, {})
        entries[name.encode()] = bundle_entry(array, len(data), **change)
        data += np.ascontiguousarray(array).tobytes()
    return table(entries, per_block, compression), data


def random_arrays(config, seed=0):
    """Return {name: array} of a model as OpenAI's checkpoint holds it: weights (1, in, out)."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, array in Params(config).named.items():
        shape = (1, *array.shape[::-1]) if name.endswith("/w") else array.shape
        arrays[name] = rng.standard_normal(shape, np.float32)
    return arrays


def write_tokenizer(folder):
    """Write an `encoder.json` and a `vocab.bpe` of N_VOCAB tokens."""
    letters = list(token_table.bytes_to_unicode().values())
    tokens = [*letters, "Ġt", "he", "Ġthe", "<|endoftext|>"]
    text = json.dumps({token: id for id, token in enumerate(tokens)})
    (folder / "encoder.json").write_text(text, encoding="utf-8")
    (folder / "vocab.bpe").write_text("#version: 0.2\nĠ t\nh e\nĠt he\n", encoding="utf-8")


def write_hf_tokenizer(folder):
    """Write the same table under Hugging Face's names."""
    write_tokenizer(folder)
    (folder / "encoder.json").rename(folder / "vocab.json")
    (folder / "vocab.bpe").rename(folder / "merges.txt")


def write_checkpoint(folder, config=None, arrays=None, **options):
    """Write a checkpoint in OpenAI's layout; return its config and arrays."""
    config = config or Config(N_VOCAB, n_ctx=8, n_embd=8, n_head=2, n_layer=2)
    arrays = arrays or random_arrays(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hparams.json").write_text(json.dumps(vars(config)), encoding="utf-8")
    index, data = bundle(arrays, **options)
    (folder / "model.ckpt.index").write_bytes(index)
    (folder / "model.ckpt.data-00000-of-00001").write_bytes(data)
    write_tokenizer(folder)
    return config, arrays


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET like OpenAI's storage; `server.faults[name]` lists what goes wrong first.

    A fault is a status (500), or "drop" (half the body or 20,000 bytes, then the connection is
    lost), "hang" (the same, but kept open), "no range" and "wrong part" and "short part" (of what
    was asked for), "truncated" and "altered" (on the server), "corrupt" (on the way: the MD5 is the
    original's), "page" (by its type), "hidden page" (by its contents), "gzip", or "busy" (for
    7 s, it says). `server.delay` is the pause in seconds after every 64 KB.
    """

    def do_GET(self):
        path = self.server.root / urllib.parse.urlsplit(self.path).path.lstrip("/")
        faults = self.server.faults.get(path.name, [])
        fault = faults.pop(0) if faults else None
        self.server.log.append((path.name, self.headers.get("Range"), fault))
        if isinstance(fault, int) or not path.is_file():
            self.reply(fault or 404, b"no")
        elif fault == "busy":
            self.reply(503, b"no", **{"Retry-After": "7"})
        elif fault in ("page", "hidden page"):
            content_type = (
                "text/html; charset=utf-8" if fault == "page" else "application/octet-stream"
            )
            text = b"Please log in" if fault == "page" else b"\n<!DOCTYPE html><p>Please log in"
            self.reply(200, text, **{"Content-Type": content_type})
        else:
            self.send_file(path.read_bytes(), fault)

    def send_file(self, body, fault):
        md5 = hashlib.md5(body).digest()
        if fault == "truncated":
            body = body[: len(body) // 2]
        if fault in ("altered", "corrupt"):
            half = len(body) // 2
            body = body[:half] + bytes([body[half] ^ 4]) + body[half + 1 :]
        headers = {"ETag": f'"{hashlib.md5(body).hexdigest()}"'} if self.server.etag else {}
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(requested[1]) if requested and fault != "no range" else None
        if self.headers.get("If-Range", headers.get("ETag")) != headers.get("ETag"):
            start = None
        if start is not None and start >= len(body):
            return self.reply(416, b"")
        if start is not None:
            start += 1 if fault == "wrong part" else 0
            end = start + 10_000 if fault == "short part" else len(body)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
            return self.reply(206, body[start:end], fault, **headers)
        if self.server.md5:
            md5 = md5 if fault == "corrupt" else hashlib.md5(body).digest()
            headers["Content-MD5"] = base64.b64encode(md5).decode()
        if fault == "gzip":
            headers["Content-Encoding"] = "gzip"
        return self.reply(200, body, fault, **headers)

    def reply(self, status, body, fault=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if fault in ("drop", "hang"):
            body = body[: min(20_000, len(body) // 2)]
        with contextlib.suppress(ConnectionError):  # of whoever was killed
            for start in range(0, len(body), 1 << 16):
                self.wfile.write(body[start : start + (1 << 16)])
                time.sleep(self.server.delay)
            self.wfile.flush()
        if fault == "hang":
            self.server.released.wait(30)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve(root, etag=True, md5=True):
    """Serve a folder on 127.0.0.1; yields the server, with `url`, `faults` and `log`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.etag, server.md5 = root, etag, md5
    server.faults, server.log, server.released = {}, [], threading.Event()
    server.delay = 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def serve_model(root, config, monkeypatch):
    """Serve a small model as 124M, and expect its token files; yields as `serve`."""
    write_checkpoint(root / "124M", config)
    for name in hub.TOKENIZER_SHA256:
        digest = files.file_hash(root / "124M" / name, "sha256").hexdigest()
        monkeypatch.setitem(hub.TOKENIZER_SHA256, name, digest)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(root) as server:
        yield server
