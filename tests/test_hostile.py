"""Hostile input: any bytes give a good object or a clear ValueError, whatever reads them.

Every parser is given thousands of files: valid ones that were damaged on purpose (bytes flipped,
cut, moved and repeated; lengths, counts and offsets replaced by awkward numbers; JSON with every
kind of wrong value, nesting and number), and random bytes. Each file must be read, or refused by a
ValueError that names it on one line, in seconds, and in memory in proportion to its size.

Everything is drawn from fixed seeds. A quick run makes a twentieth of the files, and FUZZ=20 in the
environment makes 20 times as many.
"""

import contextlib
import copy
import io
import itertools
import json
import operator
import os
import random
import re
import shutil
import signal
import socketserver
import struct
import sys
import threading
import tracemalloc
import zipfile

import numpy as np
import openai_files
import pytest
from helpers import TINY, random_params

import encoder
import train
from gpt2_support import http, hub, runlog, weights
from gpt2_support.formats import crc32c, huggingface, llmc, tensorflow, token_table
from gpt2_support.params import Config, named_shapes

# Counting lines doubles the time, and other tests reach the same lines.
pytestmark = pytest.mark.no_cover
FUZZ = float(os.environ.get("FUZZ", 1))
FUZZ_DIVISOR = 1
SECONDS = 20  # of computing: more than this for a small file counts as a hang
MEMORY = 64  # bytes allowed for each byte of the files, and on top of that
MEMORY_AT_LEAST = 1 << 20


class Hang(BaseException):
    """Raised in the midst of whatever takes too long."""


@contextlib.contextmanager
def time_limit(seconds=SECONDS):
    """Raise Hang if the block computes for longer, where there is a signal to do so."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number, frame):
        raise Hang(f"over {seconds} s")

    old = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def amount(n):
    """Return how many files to make, of the n in a thorough run."""
    return int(n * FUZZ / FUZZ_DIVISOR)


@pytest.fixture(autouse=True)
def traced(thorough, monkeypatch):
    """Trace memory, and set the amount of files."""
    monkeypatch.setattr(sys.modules[__name__], "FUZZ_DIVISOR", 1 if thorough else 20)
    tracemalloc.start()
    yield
    tracemalloc.stop()


def assert_good_or_refused(read, folder, allowed=()):
    """Call `read()`, which may use any file in `folder`; return whether it gave an object.

    Otherwise it must have raised a ValueError that names a file there, or one of `allowed`.
    """
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        with time_limit():
            read()
        return True
    except ValueError as error:
        message = str(error).replace(str(folder), "FOLDER")
        if "FOLDER" not in message or "\n" in message or len(message) > 500:
            pytest.fail(f"not a clear message: {type(error).__name__}: {message[:500]!r}")
        return False
    except allowed:
        return False
    finally:
        used = tracemalloc.get_traced_memory()[1] - before
        if used > MEMORY_AT_LEAST + MEMORY * size:
            pytest.fail(f"{used} bytes of memory for {size}")


def fuzz(folder, name, contents, read, n=400, allowed=(), mutate=None):
    """Give `read()` the file `name` in n damaged versions of `contents`, a list of valid ones."""
    n_good = 0
    for i in range(amount(n)):
        rng = random.Random(f"{name} {i}")
        data = (mutate or mutate_bytes)(rng, rng.choice(contents), contents)
        (folder / name).write_bytes(data)
        try:
            n_good += assert_good_or_refused(read, folder, allowed)
        except BaseException as error:
            if hasattr(error, "add_note"):
                error.add_note(f"by {name} number {i}, which began {data[:100]!r}")
            raise
    return n_good


# ----------------------------------------------------------------------------------------------
# Damage


AWKWARD = [0, 1, -1, 2, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
AWKWARD += [2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1]


def place(rng, data):
    """Draw a position, as often near one of the ends, where headers and footers are, as not."""
    near = rng.choice([16, 48, 1100, len(data) + 1, len(data) + 1])
    at = rng.randrange(min(near, len(data) + 1))
    return at if rng.random() < 0.7 else len(data) - at


def flip(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if data:
            data[min(place(rng, data), len(data) - 1)] = rng.choice([0, 1, 127, 128, 255, 1 << 5])
    return bytes(data)


def cut(rng, data):
    return data[: place(rng, data)]


def move(rng, data):
    """Repeat, remove or move a piece."""
    a, b = sorted((place(rng, data), place(rng, data)))
    at = place(rng, data)
    rest = data if rng.random() < 0.5 else data[:a] + data[b:]
    return rest[:at] + data[a:b] + rest[at:] if rng.random() < 0.8 else data[:a] + data[b:]


def put_number(rng, data):
    """Overwrite a whole number of 4 or 8 bytes, most often where one of a header is."""
    size = rng.choice([4, 4, 8])
    at = place(rng, data) // 4 * 4 if rng.random() < 0.8 else place(rng, data)
    number = rng.choice(AWKWARD) if rng.random() < 0.8 else rng.randrange(1000)
    return data[:at] + (number % 256**size).to_bytes(size, "little") + data[at + size :]


def put_varint(rng, data):
    at, n = place(rng, data), rng.randrange(3)
    return data[:at] + openai_files.varint(rng.choice(AWKWARD) % 2**64) + data[at + n :]


def mutate_bytes(rng, data, others):
    """Damage a file in one to three ways; at times, replace it by other bytes."""
    draw = rng.random()
    if draw < 0.05:
        return rng.randbytes(rng.choice([0, 1, 7, 8, 64, 1024, 5000]))
    if draw < 0.1:
        other = rng.choice(others)
        return data[: place(rng, data)] + other[place(rng, other) :]
    for _ in range(rng.choice([1, 1, 2, 3])):
        data = rng.choice([flip, cut, move, put_number, put_number, put_varint])(rng, data)
    return data


VALUES = [None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64, -(2**70), 10**400, int("9" * 4300)]
VALUES += [0.0, -0.0, 1.5, 1e308, float("nan"), float("inf"), "", "a", "Ġt", "F32", "gpt2", "é"]
VALUES += ["x" * 5000, "\ud800", "\0", "..", ".", "/etc/passwd", "..\\x", "a/b", [], {}, [[]]]
VALUES += [[0] * 1000, [""], ["a", "b"], {"a": 1}, {"": {}}, [None, 0], [0, -1], [0, 2**63], [1, 0]]
VALUES += [{"content": "a", "id": 0}, json.loads("[" * 200 + "]" * 200)]
TEXTS = [b"", b"null", b"[]", b"{}", b'{"a":', b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000]
TEXTS += [b"{" + b'"n_vocab": ' + b"9" * 5000 + b"}", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"\xff"]
TEXTS += [b'{"a": 1e999, "b": -1e999}', b'{"a": NaN}', b"[]" * 3, b"{" * 1000 + b"}" * 1000]
TEXTS += [b'{"' + b"x" * 30_000 + b'": 1}', b"[" + b"[]," * 5000 + b"[]]", b"\0" * 500]


def nodes(value):
    """Yield (container, key) of everything in a JSON value."""
    for key in value.keys() if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from nodes(value[key])


def mutate_json(rng, value):
    """Return a JSON value with one to three of its nodes replaced, removed, renamed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = list(nodes(value))
        if not places:
            return rng.choice(VALUES)
        inner, key = rng.choice(places[:40]) if rng.random() < 0.5 else rng.choice(places)
        draw = rng.random()
        if draw < 0.6:
            inner[key] = copy.deepcopy(rng.choice(VALUES))
        elif draw < 0.75:
            del inner[key]
        elif draw < 0.9:
            other, other_key = rng.choice(places)
            inner[key] = copy.deepcopy(other.get(other_key) if isinstance(other, dict) else 0)
        elif isinstance(inner, dict):
            inner[rng.choice(["", "a", "id", "transformer.wte.weight", "\ud800"])] = inner.pop(key)
        else:
            inner.insert(0, rng.choice(VALUES))
    return value


def mutate_json_file(rng, data, others):
    """Damage a JSON file: its value, mostly, or its text."""
    draw = rng.random()
    if draw < 0.15:
        return rng.choice(TEXTS)
    if draw < 0.3:
        return mutate_bytes(rng, data, others)
    text = json.dumps(mutate_json(rng, json.loads(data)))
    if draw < 0.4:  # the same key twice
        keys = re.findall('"[^"]*"', text) or ["1"]
        text = text.replace(", ", f", {rng.choice(keys)}: 0, ", 1)
    return text.encode()


# ----------------------------------------------------------------------------------------------
# Our own files


def model_files(config=TINY):
    """The bytes of a model file of each version: 1 (unpadded), 3, and 5 (bf16)."""
    params, files = random_params(config, np.float32), []
    start, end = config.n_vocab * config.n_embd, config.n_vocab_padded * config.n_embd
    unpadded = np.delete(params.flat, np.s_[start:end])
    bf16 = (params.flat.view("u4") >> 16).astype("<u2")
    c = config
    for version, values in ((1, unpadded), (3, params.flat), (5, bf16)):
        padded = 0 if version == 1 else c.n_vocab_padded
        file = io.BytesIO()
        header = (c.n_ctx, c.n_vocab, c.n_layer, c.n_head, c.n_embd, padded)
        llmc.write_header(file, llmc.MODEL_MAGIC, version, *header)
        files.append(file.getvalue() + values.tobytes())
    return files


def read_all(config, get):
    """Read every tensor of a model."""
    for name, shape in named_shapes(config):
        assert get(name).shape == shape and get(name).dtype == np.float32


def test_model_file_of_any_bytes(tmp_path):
    path = tmp_path / "model.bin"

    def read():
        params = llmc.load_params(path)
        assert params.flat.dtype == np.float32 and params.wte.shape[0] == params.config.n_vocab
        with llmc.open_model(path) as (config, get):
            read_all(config, get)

    small = Config(n_vocab=1, n_ctx=1, n_embd=1, n_head=1, n_layer=10)
    assert fuzz(tmp_path, path.name, model_files() + model_files(small), read)


def test_tokenizer_file_of_any_bytes(tmp_path):
    path = tmp_path / "tokenizer.bin"
    enc = encoder.train("the cat and the hat and then the mat " * 3, 270)
    enc.save(path)
    second = path.read_bytes()
    first = second[:4] + b"\1" + second[5:]

    def read():
        again = encoder.Encoder(*token_table.load_tokenizer(path))
        assert again.decode(again.encode("the cat é \0")) == "the cat é \0"

    assert fuzz(tmp_path, path.name, [first, second], read)


def test_tokens_file_of_any_bytes(tmp_path):
    path = tmp_path / "tokens.bin"
    contents = []
    for n in (0, 1, 1000):
        llmc.save_tokens(path, [np.arange(n) % 260], 260)
        contents.append(path.read_bytes())

    def read():
        tokens, n_vocab = llmc.load_tokens(path)
        assert tokens.dtype == np.uint16 and 0 <= n_vocab <= 65536

    assert fuzz(tmp_path, path.name, contents, read)


# ----------------------------------------------------------------------------------------------
# OpenAI's checkpoints


def reader(folder):
    """Return a function that reads the whole of a model's folder, which it has done once."""

    def read():
        with weights.open_model(folder) as (config, get, _):
            read_all(config, get)
            weights.open_tokenizer(folder, config)

    read()
    return read


@pytest.fixture
def openai(tmp_path):
    """A checkpoint in OpenAI's layout, and a function that reads the whole of it."""
    openai_files.write_checkpoint(tmp_path / "in", TINY)
    return tmp_path / "in", reader(tmp_path / "in")


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_openai_checkpoint_of_any_bytes(openai, name):
    folder, read = openai
    fuzz(folder, name, [(folder / name).read_bytes()], read)


def test_openai_hparams_of_any_json(openai):
    folder, read = openai
    contents = [(folder / "hparams.json").read_bytes()]
    fuzz(folder, "hparams.json", contents, read, 600, mutate=mutate_json_file)


def test_openai_index_of_any_entries_with_right_checksums(openai, monkeypatch):
    """Awkward numbers in every field, which the blocks' CRC32C alone would have kept out."""
    folder, read = openai
    monkeypatch.setattr(openai_files, "masked_crc", right_crc)
    arrays, names = openai_files.random_arrays(TINY), [name for name, _ in named_shapes(TINY)]
    n_good = 0
    for i in range(amount(300)):
        rng = random.Random(i)
        changes = {}
        for name in rng.sample(names, rng.choice([0, 1, 1, 2])):
            key = rng.choice(["dtype", "shape", "shard", "offset", "size", "crc"])
            number = rng.choice(AWKWARD) % 2**64
            shape = [rng.choice([1, 8, number]) for _ in range(rng.choice([0, 1, 3, 9, 40]))]
            changes[name] = {key: {"shape": shape, "crc": rng.randbytes(4)}.get(key, number)}
        index, _ = openai_files.bundle(arrays, per_block=rng.choice([1, 4, 99]), **changes)
        if rng.random() < 0.7:
            index = mutate_blocks(rng, index)
        (folder / "model.ckpt.index").write_bytes(index)
        n_good += assert_good_or_refused(read, folder)
    assert n_good


def right_crc(data):
    return crc32c.masked_crc32c(bytes(data)).to_bytes(4, "little")


def mutate_blocks(rng, index):
    """Damage the blocks of a table, and make their checksums right again."""
    footer = tensorflow.read_varints(index[-48:], 4)
    handles = [footer[:2], footer[2:]]
    handles += [
        tensorflow.read_varints(handle, 2)
        for _, handle in tensorflow.block_entries(tensorflow.read_block(index, *footer[2:]))
    ]
    index = bytearray(index)
    for _ in range(rng.choice([1, 1, 2])):
        offset, size = rng.choice(handles)
        block = mutate_bytes(rng, bytes(index[offset : offset + size]), [bytes(index)])
        index[offset : offset + size] = block[:size].ljust(size, b"\0")
    for offset, size in handles:
        end = offset + size + 1
        index[end : end + 4] = right_crc(index[offset:end])
    if rng.random() < 0.2:
        numbers = [rng.choice([*footer, *AWKWARD]) % 2**64 for _ in range(4)]
        index[-48:-8] = b"".join(map(openai_files.varint, numbers)).ljust(40, b"\0")[:40]
    return bytes(index)


def test_openai_index_of_long_keys_stays_in_proportion(openai, thorough):
    """Each key takes four bytes in the file and may repeat most of the one before."""
    folder, read = openai
    keys = [b"k" * 250 + i.to_bytes(4, "big") for i in range(10_000 if thorough else 2_000)]
    block = b""
    for last, key in itertools.pairwise([b"", *keys]):
        n_shared = sum(itertools.accumulate(map(operator.eq, last, key), operator.and_))
        sizes = (n_shared, len(key) - n_shared, 0)
        block += b"".join(map(openai_files.varint, sizes)) + key[n_shared:]
    block += bytes(4) + (1).to_bytes(4, "little")
    handle = openai_files.varint(0) + openai_files.varint(len(block))
    contents = block + b"\0"
    contents += right_crc(contents)
    index = openai_files.block([(b"z", handle)])
    footer = 2 * (openai_files.varint(len(contents)) + openai_files.varint(len(index)))
    contents += index + b"\0" + right_crc(index + b"\0")
    contents += footer.ljust(40, b"\0") + tensorflow.TABLE_MAGIC
    (folder / "model.ckpt.index").write_bytes(contents)
    assert len(tensorflow.read_table(contents)) == len(keys)
    assert not assert_good_or_refused(read, folder)


# ----------------------------------------------------------------------------------------------
# Hugging Face's folders


@pytest.fixture
def hugging_face(tmp_path):
    """A folder that transformers would load, and a function that reads the whole of it."""
    openai_files.write_checkpoint(tmp_path / "openai", TINY)
    weights.convert(tmp_path / "openai", tmp_path / "in", "hf")
    return tmp_path / "in", reader(tmp_path / "in")


def test_safetensors_of_any_bytes(hugging_face):
    folder, read = hugging_face
    contents = [(folder / "model.safetensors").read_bytes()]
    fuzz(folder, "model.safetensors", contents, read)


def test_safetensors_of_any_header(hugging_face):
    """The header damaged as JSON, its length right; nothing outside the file is ever read."""
    folder, read = hugging_face
    path = folder / "model.safetensors"
    good = path.read_bytes()
    n_header = int.from_bytes(good[:8], "little")

    def mutate(rng, data, others):
        text = mutate_json_file(rng, data, others)
        return len(text).to_bytes(8, "little") + text + good[8 + n_header :]

    def read_and_check():
        with open(path, "rb") as file:
            for entry in huggingface.read_safetensors(file).values():
                assert 0 <= entry.offset <= entry.offset + entry.size <= path.stat().st_size
        read()

    fuzz(folder, path.name, [good[8 : 8 + n_header]], read_and_check, 800, mutate=mutate)


def test_config_of_any_json(hugging_face):
    folder, read = hugging_face
    contents = [(folder / "config.json").read_bytes()]
    assert fuzz(folder, "config.json", contents, read, 600, mutate=mutate_json_file)


def test_safetensors_index_of_any_json(hugging_face):
    """An index names the files that hold the tensors: none but files beside it may be opened."""
    folder, read = hugging_face
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    shutil.copy(folder / "model-1.safetensors", folder.parent / "outside.safetensors")
    with open(folder / "model-1.safetensors", "rb") as file:
        names = list(huggingface.read_safetensors(file))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    name = "model.safetensors.index.json"
    (folder / name).write_text(json.dumps(index), encoding="utf-8")
    read()
    contents, missing = [json.dumps(index).encode()], (FileNotFoundError,)
    fuzz(folder, name, contents, read, 500, missing, mutate_json_file)
    outside = ["../outside.safetensors", str(folder.parent / "outside.safetensors"), "..", ".", ""]
    outside += ["..\\outside.safetensors", "a\0b.safetensors", "\ud800.safetensors", "x" * 300]
    for shard in [*outside, "./model-1.safetensors", "C:model-1.safetensors", "config.json"]:
        index["weight_map"] = dict.fromkeys(names, shard)
        (folder / name).write_text(json.dumps(index), encoding="utf-8")
        with pytest.raises(ValueError, match="weight_map"):
            read()


# ----------------------------------------------------------------------------------------------
# Token tables in JSON, and their merges


def fuzz_table(folder, name, contents, n, mutate):
    def read():
        again = encoder.Encoder(*token_table.load_tokenizer(folder))
        assert again.decode(again.encode("the cat é \0")) == "the cat é \0"

    for content in contents:
        (folder / name).write_bytes(content)
        read()
    return fuzz(folder, name, contents, read, n, (FileNotFoundError,), mutate)


@pytest.mark.parametrize(
    "name, mutate", [("encoder.json", mutate_json_file), ("vocab.bpe", mutate_bytes)]
)
def test_vocabulary_of_any_bytes(tmp_path, name, mutate):
    openai_files.write_tokenizer(tmp_path)
    fuzz_table(tmp_path, name, [(tmp_path / name).read_bytes()], 400, mutate)


def tokenizer_json(folder):
    """The content of a tokenizer.json for the table that `write_tokenizer` writes."""
    openai_files.write_tokenizer(folder)
    vocab = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    merges = ["Ġ t", "h e", "Ġt he"]
    return {
        "version": "1.0",
        "added_tokens": [{"id": 259, "content": "<|endoftext|>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "model": {"type": "BPE", "dropout": None, "merges": merges, "vocab": vocab},
    }


def test_tokenizer_json_of_any_json(tmp_path):
    (tmp_path / "x").mkdir()
    content = tokenizer_json(tmp_path / "x")
    shutil.rmtree(tmp_path / "x")
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    contents = [json.dumps(content).encode()]
    content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
    contents.append(json.dumps(content).encode())
    fuzz_table(tmp_path, "tokenizer.json", contents, 600, mutate_json_file)


def test_vocabulary_of_long_tokens_is_no_hang(tmp_path, thorough):
    """A megabyte of tokens of 255 bytes, each of which its merges take long to build."""
    letters = list(token_table.bytes_to_unicode().values())
    vocab = {letter: id for id, letter in enumerate(letters)}
    rng = random.Random(0)
    while len(vocab) < (4000 if thorough else 800):
        vocab["".join(rng.choices("ab", k=255))] = len(vocab)
    for n in range(2, 9):
        for i in range(2**n):
            vocab.setdefault(f"{i:0{n}b}".translate({48: "a", 49: "b"}), len(vocab))
    (tmp_path / "encoder.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n", encoding="utf-8")
    tracemalloc.stop()
    assert not assert_good_or_refused(lambda: token_table.load_tokenizer(tmp_path), tmp_path)


# ----------------------------------------------------------------------------------------------
# Checkpoints and logs of train.py


@pytest.fixture
def checkpoint(tmp_path):
    """The folder of a run, and a function that resumes it as far as reading goes."""
    settings = train.TrainConfig(steps=3, batch_size=1, seq_len=4, data="tokens.bin")
    config = Config(n_vocab=20, n_ctx=4, n_embd=4, n_head=1, n_layer=1)
    run = train.TrainState(train.init_params(config), settings, step=2, best_loss=2.5)
    run.optimizer.m[:], run.optimizer.v[:] = 0.5, 0.25
    train.save_checkpoint(tmp_path, run)

    def read():
        actual = train.load_checkpoint(tmp_path)
        assert type(actual.step) is int and actual.step >= 0
        for array in (actual.params.flat, actual.optimizer.m, actual.optimizer.v):
            assert array.dtype == np.float32 and array.flags.writeable
        for name, value in vars(actual.config).items():
            assert type(value) in (type(getattr(settings, name)), int, str, type(None)), name

    read()
    return tmp_path, read


def test_checkpoint_of_any_bytes(checkpoint):
    folder, read = checkpoint
    contents = [(folder / "state.npz").read_bytes()]
    fuzz(folder, "state.npz", contents, read, 600)


def npz(arrays, method=zipfile.ZIP_STORED):
    """The bytes of an .npz of {name: bytes of an .npy}, its checksums right."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def parts(folder):
    """{name: bytes} of the arrays in a checkpoint."""
    with zipfile.ZipFile(folder / "state.npz") as archive:
        return {name[: -len(".npy")]: archive.read(name) for name in archive.namelist()}


def test_checkpoint_of_any_arrays(checkpoint):
    """Every array damaged under right checksums: its header, its dtype, its shape, its length."""
    folder, read = checkpoint
    good = parts(folder)
    (folder / "state.npz").write_bytes(npz(good))
    read()
    headers = [b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }" % n for n in AWKWARD]
    headers += [b"(" * 3000, b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", b"\xff"]
    headers += [b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, ", b"[1]", b"'", b"{1: 2L"]

    def mutate(rng, data, others):
        arrays = dict(good)
        name = rng.choice([*good])
        draw = rng.random()
        if draw < 0.3:
            arrays[name] = mutate_bytes(rng, good[name], [*good.values()])
        elif draw < 0.6:
            header = rng.choice(headers).ljust(117, b" ") + b"\n"
            arrays[name] = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
            arrays[name] += good[name][128:]
        elif draw < 0.7:
            del arrays[name]
        else:
            array = np.load(io.BytesIO(good[name]))
            change = rng.choice(["<f8", "<i4", "<f2", "<c8", "?", "O", "2d", "one", "none", "long"])
            shapes = {"2d": array[None], "one": array.ravel()[:1], "none": array.ravel()[:0]}
            shapes["long"] = np.append(array, array)
            if change in shapes or name != "meta":
                array = shapes[change] if change in shapes else array.astype(change)
            arrays[name] = npy(array)
        method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
        return npz(arrays, method)

    fuzz(folder, "state.npz", [b"unused"], read, 500, mutate=mutate)


def test_checkpoint_of_any_settings(checkpoint):
    folder, read = checkpoint
    good = parts(folder)
    meta = json.loads(str(np.load(io.BytesIO(good["meta"]))))

    def mutate(rng, data, others):
        text = mutate_json_file(rng, data, others).decode("utf-8", "replace")
        return npz(good | {"meta": npy(np.array(text))})

    fuzz(folder, "state.npz", [json.dumps(meta).encode()], read, 800, mutate=mutate)


@pytest.mark.parametrize("name", ["meta", "params", "m"])
def test_checkpoint_that_unpacks_to_gigabytes_is_refused(checkpoint, name):
    folder, read = checkpoint
    array = npy(np.zeros(1, "<f4" if name != "meta" else "<U9"))
    bomb = npz(parts(folder) | {name: array + bytes(30_000_000)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    (folder / "state.npz").write_bytes(bomb)
    assert not assert_good_or_refused(read, folder)


def test_log_of_any_bytes(tmp_path):
    path = tmp_path / "log.csv"
    log = runlog.LogFile(path, 0)
    for step in range(1, 30):
        log.add(step, 2.5, 1e-3, 1.0, 100.0, *((2.25, 1.5) if step % 5 == 0 else (None, None)))
    content = path.read_bytes()

    def mutate(rng, data, others):
        if rng.random() < 0.4:
            return mutate_bytes(rng, data, others)
        lines = data.decode().split("\n")
        cells = lines[rng.randrange(len(lines))].split(",")
        values = ["", "x", "nan", "inf", "1e999", "9" * 5000, "-1", '"', '"a\n', "\0", "é", "1_0"]
        cells[rng.randrange(len(cells))] = rng.choice([*values, "x" * 200_000, ",,,", "\r", "0x1"])
        lines[rng.randrange(len(lines))] = ",".join(cells)
        return "\n".join(lines).encode()

    def read():
        for damaged in tmp_path.glob("log.damaged*"):  # else hundreds, through which each looks
            damaged.unlink()
        resumed = runlog.LogFile(path, 20)
        resumed.add(21, 2.5, 1e-3, 1.0, 100.0, None, None)
        steps = [int(row["step"]) for row in resumed.rows]
        numbers = [float(value) for row in resumed.rows for value in row.values() if value]
        assert len(numbers) >= len(steps) and max(steps) == 21

    assert fuzz(tmp_path, path.name, [content], read, 600, mutate=mutate)


# ----------------------------------------------------------------------------------------------
# Servers, and the names of what they send


class RawHandler(socketserver.BaseRequestHandler):
    """Answers every request with the same bytes, whatever they are, and ends the connection."""

    def handle(self):
        with contextlib.suppress(OSError):
            self.request.recv(65536)
            self.request.sendall(self.server.answer)


@contextlib.contextmanager
def raw_server():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), RawHandler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield server
        server.shutdown()


HEADERS = ["Content-Length: 9", "Content-Length: -1", f"Content-Length: {'9' * 5000}", ": x"]
HEADERS += ["Content-Length: 3", "Content-Length: 3, 4", "Content-Length: ٣", "Content-MD5: é"]
HEADERS += ["Content-Range: bytes 0-2/3", f"Content-Range: bytes {'9' * 5000}-1/*", "x" * 70_000]
HEADERS += ["Content-Range: x", "ETag: \0", 'ETag: "\udcff"', "Content-Encoding: gzip", "\r\nx: y"]
HEADERS += ["Transfer-Encoding: chunked", "Retry-After: x", f"Retry-After: {'9' * 5000}"]
HEADERS += [
    "Location: file:///etc/passwd",
    "Location: http://[",
    "Location: http://a..b/",
    "x: y\n",
]
HEADERS += ["Location: /" + "x" * 9000, "Location: //\udcff", "Location: http://127.0.0.1:99999/"]
HEADERS += ['Content-Disposition: attachment; filename="../../../evil"', "Content-Type: \udce9"]
HEADERS += ["Connection: keep-alive", "Set-Cookie: a=b; path=\0", "Last-Modified: \x1b[2J"]
STATUSES = ["200 OK", "206 x", "301 Moved", "302", "307 x", "404 \x1b[2J", "416 x", "429 x", "503"]
STATUSES += ["100 Continue", "999 x", "-1 x", "x", "", "0200 é", "200 " + "x" * 70_000]
BODIES = [
    b"",
    b"abc",
    b"abc" * 1000,
    b"3\r\nabc\r\n0\r\n\r\n",
    b"ffffffffffffffffff\r\nabc",
    b"\r\n",
]
BODIES += [b"-1\r\n", b"zz\r\n", b"\x1f\x8b\x08", b"3\r\nab"]


def hostile_answer(rng):
    """Return the bytes of an HTTP answer that may be wrong in every part."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.choice([0, 1, 100, 70_000]))
    lines = [f"HTTP/1.{rng.choice('1110 9')} {rng.choice(STATUSES)}"]
    lines += rng.sample(HEADERS, rng.choice([0, 1, 2, 4]))
    text = "\r\n".join(lines) + "\r\n" * rng.choice([2, 2, 2, 2, 1, 0])
    return text.encode("utf-8", "surrogateescape") + rng.choice(BODIES)


@pytest.mark.parametrize("name", ["124M", "someone/tiny"])
def test_download_from_a_server_of_any_answers(tmp_path, monkeypatch, name):
    """It fails with an error for a line, and nothing is written but in the folder of the model."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(http, "TIMEOUTS", (5, 5))
    tracemalloc.stop()
    word = "encoder.json" if name == "124M" else name
    pauses = []
    (tmp_path / "models").mkdir()
    with raw_server() as server:
        for i in range(amount(150)):
            rng = random.Random(i)
            server.answer = hostile_answer(rng)
            try:
                with time_limit():
                    monkeypatch.setenv("HF_ENDPOINT", server.url if "/" in name else "http://[")
                    hub.download(name, tmp_path / "models", server.url, pause=pauses.append)
                pytest.fail("nothing that the server sent is a model")
            except (ValueError, OSError) as error:
                assert word in str(error), (i, server.answer[:100], repr(error)[:300])
                assert str(error).isprintable() and len(str(error)) < 1000, (i, repr(error)[:300])
            assert [path.name for path in tmp_path.iterdir()] == ["models"]
            shutil.rmtree(tmp_path / "models" / name.split("/")[0], ignore_errors=True)
            assert not list((tmp_path / "models").iterdir())
    assert max(pauses) <= http.MAX_PAUSE


NAMES = ["..", "../124M", "124M/..", "/etc", "124M/../../x", "..\\124M", "124M\0", "", ".", "124m"]


@pytest.mark.parametrize("name", [*NAMES, " 124M", "124M/", "\udcff", "C:124M", "x" * 5000])
def test_download_of_any_other_name_writes_nothing(tmp_path, name):
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match="unknown model"):
        hub.download(name, tmp_path / "models", "http://127.0.0.1:1")
    with pytest.raises((FileNotFoundError, OSError)):
        hub.find_model(name, tmp_path / "models")
    assert [path.name for path in tmp_path.rglob("*")] == ["models"]


def test_state_of_a_download_of_any_json(tmp_path):
    """What is kept of an interrupted download is believed only if it is of the right form."""
    part = tmp_path / "x.part"
    state = {"size": 30, "md5": "abc", "validator": '"x"', "sha256": "0" * 64, "commit": "a"}
    http.state_path(part).write_text(json.dumps(state), encoding="utf-8")
    assert http.read_state(part)._asdict() == state

    def read():
        actual = http.read_state(part)
        for name, expected in {**dict.fromkeys(state, str), "size": int}.items():
            value = getattr(actual, name, None)
            assert value is None or type(value) is expected

    contents = [json.dumps(state).encode()]
    assert fuzz(tmp_path, http.state_path(part).name, contents, read, mutate=mutate_json_file)


A_FAR_DATE = "Fri, 31 Dec 9999 23:59:59 GMT"
NO_DELAYS = ["9" * 5000, "-3", "", "soon", "0.5", "٣", "Wed, 21 Oct 2015 07:28:00 GMT"]
NO_DELAYS += ["Fri, 99 Foo 0000", "Mon, 1 Jan 1 00:00:00 -9999", "Mon, 1 Jan 9999 00:00:00 -9999"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7", 7), (" 7 ", 7), ("9999", 60), *((text, 0) for text in NO_DELAYS), (A_FAR_DATE, 60)],
)
def test_retry_after_is_read_and_bounded(text, seconds):
    assert http.retry_after(text) == seconds
