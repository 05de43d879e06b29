"""Files into arrays and back: parameters, .bin files, checkpoints, safetensors, downloads."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import openai_files
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_support import blas, files, http, hub, weights
from gpt2_support.formats import crc32c, huggingface, llmc, tensorflow, token_table
from gpt2_support.params import Config, Params, n_params, tensors

TINY = Config(n_vocab=openai_files.N_VOCAB, n_ctx=8, n_embd=8, n_head=2, n_layer=2)


def random_params(config=TINY, seed=0):
    params = Params(config)
    rng = np.random.default_rng(seed)
    for array in params.named.values():
        array[:] = rng.standard_normal(array.shape)
    return params


def assert_equal(params, arrays):
    """Every parameter equals the array of OpenAI's checkpoint, bit for bit."""
    assert params.named.keys() == arrays.keys()
    for name, array in arrays.items():
        array = array[0].T if array.ndim == 3 else array
        assert np.array_equal(params.named[name].view("u4"), array.view("u4")), name


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ----------------------------------------------------------------------------------------------
# NumPy's BLAS

ZEN_5 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
flags\t\t: fpu avx2 avx512f avx512dq avx512cd avx512bw avx512vl avx512_bf16

processor\t: 1
"""


@pytest.mark.parametrize(
    "change, setting, chosen",
    [
        (("", ""), None, "SKYLAKEX"),
        (("", ""), "Haswell", "Haswell"),  # the user's own choice stays
        (("", ""), "", ""),
        (("family\t: 26", "family\t: 25"), None, None),  # Zen 4, which OpenBLAS knows
        (("AuthenticAMD", "GenuineIntel"), None, None),
        (("avx512vl", ""), None, None),
        ((ZEN_5, "no such lines"), None, None),
        ((ZEN_5, ""), None, None),
    ],
)
def test_blas_kernels_are_chosen_for_a_cpu_that_openblas_does_not_know(
    tmp_path, monkeypatch, change, setting, chosen
):
    (tmp_path / "cpuinfo").write_text(ZEN_5.replace(*change))
    monkeypatch.setenv("OPENBLAS_CORETYPE", "")  # so that it is put back after the test
    monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", "26")
    monkeypatch.delenv("OPENBLAS_CORETYPE")
    if setting is not None:
        monkeypatch.setenv("OPENBLAS_CORETYPE", setting)
    blas.configure_openblas(tmp_path / "cpuinfo")
    assert os.environ.get("OPENBLAS_CORETYPE") == setting  # NumPy is loaded: too late
    monkeypatch.delitem(sys.modules, "numpy")
    blas.configure_openblas(tmp_path / "none")
    assert os.environ.get("OPENBLAS_CORETYPE") == setting
    blas.configure_openblas(tmp_path / "cpuinfo")
    assert os.environ.get("OPENBLAS_CORETYPE") == chosen
    assert os.environ["OPENBLAS_THREAD_TIMEOUT"] == "26"
    monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT")
    blas.configure_openblas(tmp_path / "cpuinfo")
    assert os.environ["OPENBLAS_THREAD_TIMEOUT"] == "20"


@pytest.mark.parametrize("module", ["utils", "encoder", "gpt2", "train"])
def test_module_configures_openblas_before_it_loads_numpy(module):
    code = f"""
import sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "numpy":
            print("configure_openblas" in vars(sys.modules.get("gpt2_support.blas", sys)))
sys.meta_path.insert(0, Finder)
import {module}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_threads_serve_a_forked_process_too():
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    code = """
import os, threading
from gpt2_support import blas
blas.get_threads, blas.set_threads = lambda: 3, lambda n: None
def parts():
    found, all_here = [], threading.Barrier(3, timeout=20)
    def function(part):
        all_here.wait()
        found.append((part.start, part.stop))
    blas.parallel_for(function, 7, work=1 << 40)
    return sorted(found)
assert parts() == [(0, 2), (2, 4), (4, 7)]
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os._exit(parts() != [(0, 2), (2, 4), (4, 7)])
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_an_error_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(blas, "get_threads", lambda: 3)
    monkeypatch.setattr(blas, "set_threads", lambda n: None)

    def function(part):
        if part.stop == 7:
            raise KeyError(part.start)

    with pytest.raises(KeyError, match="4"):
        blas.parallel_for(function, 7, work=1 << 40)


def test_one_blas_thread_is_for_the_block_only():
    before = blas.get_threads()
    with pytest.raises(KeyError), blas.one_thread(then=before):
        assert blas.get_threads() == 1
        raise KeyError
    assert blas.get_threads() == before


def test_another_blas_has_one_thread_and_unknown_kernels(monkeypatch):
    monkeypatch.setattr(blas, "openblas", lambda function: None)
    assert blas.get_threads() == 1
    with blas.one_thread(then=2):
        assert blas.get_threads() == 1
    assert blas.kernels() == "unknown"


# ----------------------------------------------------------------------------------------------
# Parameters


def test_config_default_is_124m():
    config = Config()
    assert sum(np.prod(shape) for _, shape in tensors(config)) == 124439808
    assert llmc.HEADER_BYTES + 4 * n_params(config) == 497904640


@pytest.mark.parametrize(
    "values", [{"n_head": 5}, {"n_layer": 0}, {"n_ctx": 1.5}, {"n_vocab": "x"}, {"n_head": True}]
)
def test_config_refuses_bad_values(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Config(**values)


def test_params_views_cover_the_buffer_once():
    params = Params(TINY)
    for array in params.named.values():
        array += 1
    padding = (TINY.n_vocab_padded - TINY.n_vocab) * TINY.n_embd
    assert params.flat.sum() == len(params.flat) - padding
    assert set(params.flat) == {0, 1}


def test_params_attributes_are_the_named_arrays():
    params = random_params()
    assert params.h[1].attn.c_attn.w is params.named["model/h1/attn/c_attn/w"]
    assert params.h[1].attn.c_attn.w.shape == (24, 8)
    assert params.ln_f.g is params.named["model/ln_f/g"]
    assert params.wte.shape == (260, 8)


def test_tensors_are_the_named_arrays_in_file_order():
    params = Params(TINY)
    shapes = dict(tensors(TINY))
    assert shapes == {name: array.shape for name, array in params.named.items()}
    starts = [params.named[name].__array_interface__["data"][0] for name in shapes]
    assert starts == sorted(starts)


def test_params_refuses_a_buffer_of_another_length():
    with pytest.raises(ValueError, match="needs"):
        Params(TINY, np.zeros(n_params(TINY) + 1, np.float32))


# ----------------------------------------------------------------------------------------------
# Writing safely


def test_atomic_write_replaces_only_at_a_good_end(tmp_path):
    path = tmp_path / "folder" / "file"
    with files.atomic_write(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(RuntimeError), files.atomic_write(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert contents(tmp_path / "folder") == {"file": b"old"}


def test_atomic_write_names_the_file_when_the_disk_is_full(tmp_path):
    full = pytest.raises(OSError, match=r"No space.*model\.bin")
    with full, files.atomic_write(tmp_path / "model.bin"):
        raise OSError(28, "No space left on device")
    assert contents(tmp_path) == {}


# ----------------------------------------------------------------------------------------------
# Model .bin files


def write_bin(path, version, config, values, padded=None, magic=llmc.MODEL_MAGIC):
    c = config
    sizes = [c.n_ctx, c.n_vocab, c.n_layer, c.n_head, c.n_embd]
    with open(path, "wb") as file:
        llmc.write_header(
            file, magic, version, *sizes, c.n_vocab_padded if padded is None else padded
        )
        file.write(values.tobytes())


def test_model_file_round_trip_is_exact(tmp_path):
    params = random_params()
    llmc.save_params(tmp_path / "model.bin", params)
    loaded = llmc.load_params(tmp_path)
    assert loaded.config == TINY
    assert loaded.flat.tobytes() == params.flat.tobytes()
    assert not loaded.flat.flags.writeable  # memory-mapped


def test_model_file_of_llmc_is_saved_byte_for_byte(shared, tmp_path):
    path = shared("golden/llmc_tiny.bin")
    llmc.save_params(tmp_path / "model.bin", llmc.load_params(path))
    assert (tmp_path / "model.bin").read_bytes() == path.read_bytes()


def test_model_file_version_1_has_no_padding(tmp_path):
    params = random_params()
    start, end = TINY.n_vocab * TINY.n_embd, TINY.n_vocab_padded * TINY.n_embd
    write_bin(tmp_path / "model.bin", 1, TINY, np.delete(params.flat, np.s_[start:end]), padded=0)
    assert np.array_equal(llmc.load_params(tmp_path).flat, params.flat)


def test_model_file_version_5_is_bf16(tmp_path):
    params = random_params()
    bits = params.flat.view("u4") >> 16 << 16  # float32 values that bf16 holds exactly
    write_bin(tmp_path / "model.bin", 5, TINY, (bits >> 16).astype("<u2"))
    loaded = llmc.load_params(tmp_path)
    assert loaded.flat.dtype == np.float32
    assert np.array_equal(loaded.flat.view("u4"), bits)


def test_model_file_of_float64_parameters_is_float32(tmp_path):
    params = random_params()
    llmc.save_params(tmp_path / "model.bin", Params(TINY, params.flat.astype(np.float64)))
    assert np.array_equal(llmc.load_params(tmp_path).flat, params.flat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": llmc.TOKENS_MAGIC}, "found a tokens file"),
        ({"magic": 7}, "magic number 7"),
        ({"version": 2}, "version 2"),
        ({"padded": 260}, "padded to 260, expected 384"),
        ({"config": Config(n_layer=1)}, "takes"),
        ({"config": Config(n_layer=2**31 - 1)}, "takes"),
    ],
)
def test_model_file_with_a_wrong_header_is_refused(tmp_path, change, message):
    values = {"version": 3, "config": TINY, "values": Params(TINY).flat, **change}
    write_bin(tmp_path / "model.bin", **values)
    with pytest.raises(ValueError, match=message):
        llmc.load_params(tmp_path)


@pytest.mark.parametrize("size", [0, 1023, 1024, -4, 4])
def test_model_file_of_another_size_is_refused(tmp_path, size):
    llmc.save_params(tmp_path / "model.bin", random_params())
    data = (tmp_path / "model.bin").read_bytes()
    data = data[:size] if size < 1025 and size != 4 else data + bytes(4)
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.bin: \d+ bytes"):
        llmc.load_params(tmp_path)


def test_model_file_header_of_no_gpt2_is_refused(tmp_path):
    with open(tmp_path / "model.bin", "wb") as file:
        llmc.write_header(file, llmc.MODEL_MAGIC, 3, 8, 260, 2, 0, 8, 384)
    with pytest.raises(ValueError, match="n_head = 0"):
        llmc.load_params(tmp_path)


# ----------------------------------------------------------------------------------------------
# Tokens .bin files


def test_tokens_file_round_trip(tmp_path):
    chunks = [np.array([1, 2, 65535]), np.array([], np.int64), np.array([7])]
    assert llmc.save_tokens(tmp_path / "data.bin", chunks, 65536) == 4
    tokens, n_vocab = llmc.load_tokens(tmp_path / "data.bin")
    assert tokens.tolist() == [1, 2, 65535, 7]
    assert tokens.dtype == np.uint16
    assert n_vocab == 65536


def test_tokens_file_may_be_empty(tmp_path):
    llmc.save_tokens(tmp_path / "data.bin", [], 50257)
    tokens, n_vocab = llmc.load_tokens(tmp_path / "data.bin")
    assert (len(tokens), n_vocab) == (0, 50257)


def test_tokens_file_of_another_size_is_refused(tmp_path):
    llmc.save_tokens(tmp_path / "data.bin", [[1, 2]], 10)
    (tmp_path / "data.bin").write_bytes((tmp_path / "data.bin").read_bytes() + b"x")
    with pytest.raises(ValueError, match="1029 bytes, but a tokens file of 2 tokens takes 1028"):
        llmc.load_tokens(tmp_path / "data.bin")


def test_tokens_file_refuses_a_vocabulary_beyond_16_bits(tmp_path):
    with pytest.raises(ValueError, match="65537"):
        llmc.save_tokens(tmp_path / "data.bin", [], 65537)


# ----------------------------------------------------------------------------------------------
# CRC32C

RFC_3720 = {  # appendix B.4
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(range(31, -1, -1)): 0x113FDB5C,
    b"123456789": 0xE3069283,
    b"": 0,
}


@pytest.mark.parametrize("data", RFC_3720)
def test_crc32c_of_rfc_3720(data):
    assert crc32c.crc32c(data) == RFC_3720[data]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 285, 286, 287, 290, 291, 580, 581, 4001, 10000])
def test_crc32c_equals_the_definition(n):
    data = np.random.default_rng(n).bytes(n)
    assert crc32c.crc32c(data) == openai_files.slow_crc32c(data)


def test_crc32c_of_several_chunks_equals_table_lookup():
    data = np.random.default_rng(0).integers(0, 256, (1 << 20) + 12345, dtype=np.uint8)
    expected = int.from_bytes(openai_files.masked_crc(data), "little")
    assert crc32c.masked_crc32c(data) == expected
    assert crc32c.masked_crc32c(data[: 1 << 20].view("<f4").reshape(512, 512)) != expected


def test_crc32c_leaves_its_input_alone():
    data = np.arange(2000, dtype=np.float32)
    crc32c.crc32c(data)
    assert np.array_equal(data, np.arange(2000))


# ----------------------------------------------------------------------------------------------
# TensorFlow checkpoints


def test_openai_checkpoint_of_tensorflow_converts_exactly(shared, tmp_path):
    folder = shared("openai_tiny")
    weights.convert(folder, tmp_path)
    params = llmc.load_params(tmp_path)
    data, arrays = np.fromfile(folder / "model.ckpt.data-00000-of-00001", "<f4"), {}
    for name in sorted(params.named):  # TensorFlow lays the tensors down in order of their names
        shape = params.named[name].shape
        shape = (1, *shape[::-1]) if name.endswith("/w") else shape
        arrays[name] = data[: np.prod(shape)].reshape(shape)
        data = data[np.prod(shape) :]
    assert len(data) == 0
    assert_equal(params, arrays)
    table = shared("gpt2/gpt2_tokenizer.bin").read_bytes()
    assert (tmp_path / "tokenizer.bin").read_bytes() == table


@pytest.mark.parametrize("per_block", [1, 4, 1000])
def test_openai_checkpoint_of_any_block_size_converts(tmp_path, per_block):
    config, arrays = openai_files.write_checkpoint(tmp_path / "in", per_block=per_block)
    weights.convert(tmp_path / "in", tmp_path / "out")
    params = llmc.load_params(tmp_path / "out")
    assert params.config == config
    assert_equal(params, arrays)
    assert token_table.load_tokenizer(tmp_path / "out")[0][258] == b" the"


def test_openai_checkpoint_of_another_name_converts(tmp_path):
    _, arrays = openai_files.write_checkpoint(tmp_path / "in")
    for path in list((tmp_path / "in").glob("model.ckpt.*")):
        path.rename(path.with_name(path.name.replace("model.ckpt", "model-1000")))
    weights.convert(tmp_path / "in", tmp_path / "out")
    assert_equal(llmc.load_params(tmp_path / "out"), arrays)


def refusal(source, target):
    """Convert, which must fail; return the error. Nothing may be left in the target."""
    with pytest.raises(ValueError) as caught:
        weights.convert(source, target)
    assert not target.exists() or contents(target) == {}
    return str(caught.value)


NAME = "model/h1/mlp/c_fc/w"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": 1}, "compressed (snappy)"),
        ({"header": openai_files.field(1, 2)}, "a bundle of 2 shards, endianness 0"),
        ({"header": openai_files.field(1, 1) + openai_files.field(2, 1)}, "endianness 1"),
        ({NAME: {"crc": b"abcd"}}, f"wrong CRC of tensor {NAME}"),
        ({NAME: {"dtype": b"1"}}, "protobuf field 1 is of the wrong kind"),
        ({NAME: {"dtype": 2}}, f"tensor {NAME} has dtype 2"),
        ({NAME: {"shape": (8, 32)}}, f"tensor {NAME} has shape (8, 32), expected (1, 8, 32)"),
        ({NAME: {"shape": (1, 32, 8)}}, f"tensor {NAME} has shape (1, 32, 8)"),
        ({NAME: {"shape": (2**63, 8)}}, f"tensor {NAME}: 1024 bytes"),
        ({NAME: {"shape": (1,) * 9}}, "an entry of 9 dimensions in shard 0"),
        ({NAME: {"shard": 1}}, "shard 1"),
        ({NAME: {"offset": 0}}, "overlaps"),
        ({NAME: {"offset": 2**64 - 1}}, "but the index describes"),
        ({NAME: {"size": 4}}, f"tensor {NAME}: 4 bytes"),
    ],
)
def test_openai_checkpoint_with_a_fault_is_refused_by_name(tmp_path, options, message):
    openai_files.write_checkpoint(tmp_path / "in", **options)
    assert message in refusal(tmp_path / "in", tmp_path / "out")


def test_openai_checkpoint_with_a_missing_or_extra_tensor_is_refused(tmp_path):
    arrays = openai_files.random_arrays(TINY)
    openai_files.write_checkpoint(tmp_path / "more", arrays=arrays | {"model/x": np.zeros(1, "f4")})
    assert "unexpected tensor model/x" in refusal(tmp_path / "more", tmp_path / "out")
    del arrays[NAME]
    openai_files.write_checkpoint(tmp_path / "less", arrays=arrays)
    assert f"tensor {NAME} is missing" in refusal(tmp_path / "less", tmp_path / "out")


@pytest.mark.parametrize("change", [-4, 4])
def test_openai_data_file_of_another_size_is_refused(tmp_path, change):
    openai_files.write_checkpoint(tmp_path / "in")
    path = tmp_path / "in" / "model.ckpt.data-00000-of-00001"
    data = path.read_bytes() + bytes(4)
    path.write_bytes(data[: len(data) - 4 + change])
    size = len(data) - 4
    expected = f"{path.name}: {size + change} bytes, but the index describes {size}"
    assert expected in refusal(tmp_path / "in", tmp_path / "out")


def test_openai_data_file_with_any_changed_byte_is_refused(tmp_path):
    openai_files.write_checkpoint(tmp_path / "in")
    path = tmp_path / "in" / "model.ckpt.data-00000-of-00001"
    good = path.read_bytes()
    for at in range(0, len(good), 997):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert "wrong CRC of tensor" in refusal(tmp_path / "in", tmp_path / "out")


def test_openai_index_with_any_changed_byte_is_refused(tmp_path):
    openai_files.write_checkpoint(tmp_path / "in")
    path = tmp_path / "in" / "model.ckpt.index"
    good = path.read_bytes()
    padding = range(len(good[:-8].rstrip(b"\0")), len(good) - 8)  # says nothing
    for at in set(range(len(good))) - set(padding):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(files.DamagedFile, match=r"model\.ckpt\.index: "):
            tensorflow.read_bundle(path)


def test_openai_index_cut_anywhere_is_refused(tmp_path):
    openai_files.write_checkpoint(tmp_path / "in")
    path = tmp_path / "in" / "model.ckpt.index"
    good = path.read_bytes()
    for size in range(0, len(good), 7):
        path.write_bytes(good[:size])
        with pytest.raises(files.DamagedFile):
            tensorflow.read_bundle(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ("[" * 100000, "not JSON"),
        ('{"n_vocab": 260}', "n_ctx is missing"),
        (json.dumps(vars(TINY) | {"n_head": 3}), "n_embd = 8 is not a multiple of n_head = 3"),
        (json.dumps(vars(TINY) | {"n_layer": 10**9}), "tensor model/h2/ln_1/g is missing"),
        (json.dumps(vars(TINY) | {"n_layer": 2**31}), "n_layer = 2147483648 is not a positive"),
        (json.dumps(vars(TINY) | {"n_layer": 1}), "unexpected tensor model/h1/attn/c_attn/b"),
        (
            json.dumps(vars(TINY) | {"n_ctx": 9}),
            "tensor model/wpe has shape (8, 8), expected (9, 8)",
        ),
    ],
)
def test_openai_hparams_that_do_not_fit_are_refused(tmp_path, text, message):
    openai_files.write_checkpoint(tmp_path / "in")
    (tmp_path / "in" / "hparams.json").write_text(text, encoding="utf-8")
    assert message in refusal(tmp_path / "in", tmp_path / "out")


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300), st.binary(max_size=30))
def test_table_of_any_bytes_gives_an_object_or_value_error(data, footer):
    """Blocks of any contents under a right CRC, which a flipped bit alone would not get past."""
    good = data + b"\0" + openai_files.masked_crc(data + b"\0")
    handle = openai_files.varint(0) + openai_files.varint(len(data))
    for handles in (handle + handle, footer):
        table = good + handles.ljust(40, b"\0")[:40] + tensorflow.TABLE_MAGIC
        for text in (table, data):
            with contextlib.suppress(ValueError):
                assert isinstance(tensorflow.read_table(text), dict)
    for read in (
        lambda: list(tensorflow.block_entries(data)),
        lambda: tensorflow.bundle_entry(None, data),
    ):
        with contextlib.suppress(ValueError):
            read()


def test_block_entry_and_protobuf_field_beyond_their_end_are_refused():
    block = openai_files.block([(b"key", b"value")])
    assert list(tensorflow.block_entries(block)) == [(b"key", b"value")]
    with pytest.raises(ValueError, match="does not fit"):
        list(tensorflow.block_entries(block[:2] + b"\x06" + block[3:]))
    field = openai_files.field(7, b"value")
    assert list(tensorflow.protobuf_fields(field)) == [(7, b"value")]
    with pytest.raises(ValueError, match="does not fit"):
        list(tensorflow.protobuf_fields(field[:-1]))


def table_of(blocks, handles):
    """Return a table of blocks, one after another, whose index holds `handles` (offset, size)."""
    data = b""
    for contents in blocks:
        data += contents + b"\0" + openai_files.masked_crc(contents + b"\0")
    handles = [b"".join(map(openai_files.varint, handle)) for handle in handles]
    index = openai_files.block([(bytes([i]), handle) for i, handle in enumerate(handles)])
    footer = 2 * (openai_files.varint(len(data)) + openai_files.varint(len(index)))
    data += index + b"\0" + openai_files.masked_crc(index + b"\0")
    return data + footer.ljust(40, b"\0") + tensorflow.TABLE_MAGIC


def test_table_refuses_blocks_that_overlap_and_keys_that_do_not_rise():
    block = openai_files.block([(b"a", b"1"), (b"b", b"2")])
    good = table_of([block], [(0, len(block))])
    assert tensorflow.read_table(good) == {b"a": b"1", b"b": b"2"}
    with pytest.raises(ValueError, match="overlaps"):
        tensorflow.read_table(table_of([block], [(0, len(block))] * 2))
    with pytest.raises(ValueError, match="rising"):
        tensorflow.read_table(
            table_of([block] * 2, [(0, len(block)), (len(block) + 5, len(block))])
        )


# ----------------------------------------------------------------------------------------------
# Hugging Face

HF_CONFIG = {"vocab_size": 260, "n_positions": 8, "n_embd": 8, "n_head": 2, "n_layer": 2}


def hf_arrays(prefix="transformer."):
    """Return {name: array} as transformers saves TINY: weights (in, out)."""
    arrays = {}
    for name, array in openai_files.random_arrays(TINY).items():
        name = name.replace("model/h", "h.").replace("model/", "").replace("/", ".")
        for leaf, full in ((".w", ".weight"), (".g", ".weight"), (".b", ".bias")):
            name = name[: -len(leaf)] + full if name.endswith(leaf) else name
        name += ".weight" if name in ("wte", "wpe") else ""
        arrays[prefix + name] = array[0] if array.ndim == 3 else array
    return arrays


def write_safetensors(path, arrays, **changes):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        dtype = {"float32": "F32", "float16": "F16", "uint16": "BF16", "uint8": "U8"}[
            str(array.dtype)
        ]
        start, data = len(data), data + array.tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, len(data)]}
        header[name] |= changes.get(name, {})
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_hf(folder, arrays=None, config=(), **changes):
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(HF_CONFIG | dict(config))
    (folder / "config.json").write_text(text, encoding="utf-8")
    write_safetensors(folder / "model.safetensors", arrays or hf_arrays(), **changes)


def test_hf_folder_of_transformers_and_back_is_exact(shared, tmp_path):
    folder = shared("hf_tiny")
    weights.convert(folder, tmp_path / "ours")
    weights.convert(tmp_path / "ours", tmp_path / "hf", to="hf")
    weights.convert(tmp_path / "hf", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "ours")
    exported = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert exported == (folder / "model.safetensors").read_bytes()


def test_hf_export_with_tokenizer_and_back_is_exact(tmp_path):
    openai_files.write_checkpoint(tmp_path / "in")
    weights.convert(tmp_path / "in", tmp_path / "ours")
    weights.convert(tmp_path / "ours", tmp_path / "hf", to="hf")
    weights.convert(tmp_path / "hf", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "ours")
    config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == 259
    merges = (tmp_path / "hf" / "merges.txt").read_text(encoding="utf-8")
    assert merges == "#version: 0.2\nĠ t\nh e\nĠt he\n"


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_hf_names_and_buffers_are_understood(tmp_path, prefix):
    arrays = hf_arrays(prefix)
    arrays[f"{prefix}h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.uint8)
    arrays[f"{prefix}h.1.attn.masked_bias"] = np.zeros((), np.float32)
    arrays["lm_head.weight"] = arrays[f"{prefix}wte.weight"].copy()
    write_hf(tmp_path / "in", arrays)
    weights.convert(tmp_path / "in", tmp_path / "out")
    assert_equal(llmc.load_params(tmp_path / "out"), openai_files.random_arrays(TINY))


def test_hf_f16_and_bf16_become_float32(tmp_path):
    arrays = hf_arrays()
    half = {name: array.astype(np.float16) for name, array in arrays.items()}
    write_hf(tmp_path / "f16", half)
    brain = {name: (array.view("u4") >> 16).astype("<u2") for name, array in arrays.items()}
    write_hf(tmp_path / "bf16", brain)
    name, ours = "transformer.h.1.mlp.c_fc.weight", "model/h1/mlp/c_fc/w"
    for kind, expected in [
        ("f16", half[name].astype("f4")),
        ("bf16", (arrays[name].view("u4") >> 16 << 16).view("f4")),
    ]:
        weights.convert(tmp_path / kind, tmp_path / f"{kind}_out")
        found = llmc.load_params(tmp_path / f"{kind}_out").named[ours]
        assert np.array_equal(found, expected.T)


def test_hf_shards_are_read(tmp_path):
    arrays = hf_arrays()
    write_hf(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    shards = {name: names[i % 2] for i, name in enumerate(arrays)}
    for shard in names:
        part = {name: array for name, array in arrays.items() if shards[name] == shard}
        write_safetensors(tmp_path / "in" / shard, part)
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    weights.convert(tmp_path / "in", tmp_path / "out")
    assert_equal(llmc.load_params(tmp_path / "out"), openai_files.random_arrays(TINY))
    write_hf(tmp_path / "in")  # now there is a whole file, too, and the index is of no account
    index.write_text("{}", encoding="utf-8")
    weights.convert(tmp_path / "in", tmp_path / "out")
    assert_equal(llmc.load_params(tmp_path / "out"), openai_files.random_arrays(TINY))
    (tmp_path / "in" / "model.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": {"x": "../" + names[0]}}), encoding="utf-8")
    assert "weight_map" in refusal(tmp_path / "in", tmp_path / "out2")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 48),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("activation_function", ["gelu_new"]),
    ],
)
def test_hf_config_of_another_model_is_refused_by_name(tmp_path, name, value):
    write_hf(tmp_path / "in", config={name: value})
    assert f"{name} = {value!r}" in refusal(tmp_path / "in", tmp_path / "out")


def test_hf_config_that_means_the_same_is_accepted(tmp_path):
    same = {"activation_function": "gelu_pytorch_tanh", "n_inner": 32}
    write_hf(tmp_path / "in", config={**same, "reorder_and_upcast_attn": True})
    weights.convert(tmp_path / "in", tmp_path / "out")


def test_hf_config_defaults_are_those_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert huggingface.read_hf_config(tmp_path / "config.json") == Config(50257, 1024, 768, 12, 12)


def changed(name, array):
    arrays = hf_arrays()
    arrays[name] = array
    return arrays


FC = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("arrays", "changes", "message"),
    [
        (changed("lm_head.weight", np.ones((260, 8), "f4")), {}, "an untied head"),
        (changed("lm_head.weight", np.ones((260, 9), "f4")), {}, "lm_head.weight has shape"),
        (changed("score.weight", np.ones(1, "f4")), {}, "unexpected tensor score.weight"),
        (changed("wte.weight", np.ones((260, 8), "f4")), {}, "tensor wte.weight is there twice"),
        (
            changed(FC, np.ones((32, 8), "f4")),
            {},
            "c_fc.weight has shape (32, 8), expected (8, 32)",
        ),
        (changed(FC, np.ones((8, 32), "u1")), {}, "c_fc.weight has dtype U8"),
        (None, {FC: {"data_offsets": [0, 1024]}}, "begins at byte"),
        (None, {FC: {"data_offsets": [0, 4]}}, "4 bytes for (8, 32)"),
        (None, {FC: {"data_offsets": [-4, 1020]}}, "bytes -4 to 1020"),
        (None, {FC: {"data_offsets": [8]}}, "no proper"),
        (None, {FC: {"data_offsets": [1.5, 2.5]}}, "no proper"),
        (None, {FC: {"shape": [8, "x"]}}, "no proper"),
        (None, {FC: {"shape": [1] * 500}}, "no proper"),
        (None, {FC: {"dtype": None}}, "no proper"),
    ],
)
def test_hf_tensors_with_a_fault_are_refused_by_name(tmp_path, arrays, changes, message):
    write_hf(tmp_path / "in", arrays, **changes)
    assert message in refusal(tmp_path / "in", tmp_path / "out")


def test_hf_missing_tensor_is_refused(tmp_path):
    arrays = hf_arrays()
    del arrays["transformer.h.0.ln_2.bias"]
    write_hf(tmp_path / "in", arrays)
    assert "tensor h.0.ln_2.bias is missing" in refusal(tmp_path / "in", tmp_path / "out")


def test_safetensors_cut_or_extended_anywhere_is_refused(tmp_path):
    write_hf(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    good = path.read_bytes()
    for data in [good[:n] for n in range(0, len(good), 499)] + [good + b"x", b"\xff" * 100]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"model\.safetensors: "):
            huggingface.read_safetensors(path)


@settings(deadline=None, max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]), inner
            )
        ),
    )
)
def test_safetensors_of_any_header_give_an_object_or_value_error(tmp_path_factory, header):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    for value in (
        header,
        {"x": header},
        {"x": {"dtype": "F32", "shape": [], "data_offsets": header}},
    ):
        text = json.dumps(value).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with contextlib.suppress(ValueError):
            assert isinstance(huggingface.read_safetensors(path), dict)


# ----------------------------------------------------------------------------------------------
# convert


def test_convert_says_when_there_is_no_tokenizer(tmp_path, capsys):
    write_hf(tmp_path / "in")
    weights.convert(tmp_path / "in", tmp_path / "out")
    assert "no tokenizer there" in capsys.readouterr().err
    assert list(contents(tmp_path / "out")) == ["model.bin"]


@pytest.mark.parametrize("version", [1, 3, 5])
def test_convert_accepts_a_model_file_of_every_version(tmp_path, version):
    params = random_params()
    params.flat.view("u4")[:] &= 0xFFFF0000  # what bf16 holds exactly
    start, end = TINY.n_vocab * TINY.n_embd, TINY.n_vocab_padded * TINY.n_embd
    values = {1: np.delete(params.flat, np.s_[start:end]), 3: params.flat}.get(version)
    values = (params.flat.view("u4") >> 16).astype("<u2") if version == 5 else values
    openai_files.write_tokenizer(tmp_path)
    write_bin(tmp_path / "model.bin", version, TINY, values)
    weights.convert(tmp_path / "model.bin", tmp_path / "out")
    assert llmc.load_params(tmp_path / "out").flat.tobytes() == params.flat.tobytes()
    assert len(token_table.load_tokenizer(tmp_path / "out")[0]) == 260


@pytest.mark.parametrize("to", ["bin", "hf"])
def test_convert_onto_itself_is_refused_and_harmless(tmp_path, to):
    llmc.save_params(tmp_path / "model.bin", random_params())
    before = contents(tmp_path)
    for source in (tmp_path, tmp_path / "model.bin"):
        with pytest.raises(ValueError, match="is the source itself"):
            weights.convert(source, tmp_path / "x" / "..", to)
    assert contents(tmp_path) == before


def test_convert_keeps_the_old_target_when_the_source_is_bad(tmp_path):
    openai_files.write_checkpoint(tmp_path / "good")
    openai_files.write_checkpoint(tmp_path / "bad", **{"model/wte": {"crc": b"abcd"}})
    weights.convert(tmp_path / "good", tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="wrong CRC of tensor model/wte"):
        weights.convert(tmp_path / "bad", tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_convert_does_not_mix_two_models_files(tmp_path):
    openai_files.write_checkpoint(tmp_path / "with")
    write_hf(tmp_path / "without")
    for to, name in (("bin", "tokenizer.bin"), ("hf", "vocab.json")):
        weights.convert(tmp_path / "with", tmp_path / to, to)
        before = contents(tmp_path / to)
        with pytest.raises(ValueError, match=f"{name} would be left from another model"):
            weights.convert(tmp_path / "without", tmp_path / to, to)
        assert contents(tmp_path / to) == before


def test_convert_compares_tokenizer_and_model(tmp_path, capsys):
    small = Config(n_vocab=259, n_ctx=8, n_embd=8, n_head=2, n_layer=1)
    openai_files.write_checkpoint(tmp_path / "small", small)
    assert "260 tokens exceed the model's 259" in refusal(tmp_path / "small", tmp_path / "out")
    large = Config(n_vocab=300, n_ctx=8, n_embd=8, n_head=2, n_layer=1)
    openai_files.write_checkpoint(tmp_path / "large", large)
    weights.convert(tmp_path / "large", tmp_path / "out")
    assert "260 tokens, fewer than the model's 300" in capsys.readouterr().err


def test_convert_of_something_else_says_what_was_found(tmp_path):
    (tmp_path / "in").mkdir()
    assert "found nothing; expected model.bin" in refusal(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "notes.txt").touch()
    assert "found notes.txt" in refusal(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "pytorch_model.bin").touch()
    assert "safetensors" in refusal(tmp_path / "in", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        weights.convert(tmp_path / "absent", tmp_path / "out")


def test_convert_to_a_file_is_refused(tmp_path):
    write_hf(tmp_path / "in")
    (tmp_path / "file").touch()
    for name in ("file", "model.bin"):
        with pytest.raises(ValueError, match="give a folder"):
            weights.convert(tmp_path / "in", tmp_path / name)


def test_convert_command_writes_nothing_to_standard_output(run, tmp_path):
    openai_files.write_checkpoint(tmp_path / "in")
    done = run("utils.py", "convert", tmp_path / "in", tmp_path / "out", "--to", "hf")
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["convert", "absent", "out"], 1, "utils.py: error: absent: no such folder"),
        (["convert", "x"], 2, "required: TARGET"),
        (["convert", "x", "y", "--to", "z"], 2, "invalid choice: 'z'"),
        (["download", "../124M"], 2, "invalid choice"),
        ([], 2, "required: COMMAND"),
    ],
)
def test_command_with_an_error_says_it_on_one_line(run, args, status, message):
    done = run("utils.py", *args)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ----------------------------------------------------------------------------------------------
# download


DATA = "model.ckpt.data-00000-of-00001"
RESULT = ["model.bin", "tokenizer.bin"]
SITE = Config(n_vocab=openai_files.N_VOCAB, n_ctx=2048, n_embd=16, n_head=2, n_layer=2)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server of a small model as 124M, whose token files are the expected ones."""
    openai_files.write_checkpoint(tmp_path / "site" / "124M", SITE)
    for name in hub.TOKENIZER_SHA256:
        digest = files.file_hash(tmp_path / "site" / "124M" / name, "sha256").hexdigest()
        monkeypatch.setitem(hub.TOKENIZER_SHA256, name, digest)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with openai_files.serve(tmp_path / "site") as server:
        yield server


@pytest.fixture
def fetch(site, tmp_path):
    """`fetch()` downloads 124M from the site; the pauses it would make go to `fetch.pauses`."""

    def fetch(name="124M", **kwargs):
        kwargs = {"base_url": site.url, "pause": fetch.pauses.append, **kwargs}
        return hub.download(name, tmp_path / "models", **kwargs)

    fetch.pauses, fetch.folder = [], tmp_path / "models" / "124M"
    return fetch


def assert_fetched(folder):
    assert sorted(path.name for path in folder.iterdir()) == RESULT
    assert_equal(llmc.load_params(folder), openai_files.random_arrays(SITE))


def test_download_converts_and_cleans_up(fetch, site, capsys):
    assert fetch() == fetch.folder
    assert_fetched(fetch.folder)
    assert [name for name, *_ in site.log] == list(hub.OPENAI_FILES)
    err = capsys.readouterr().err
    assert "hparams.json: not the file known for this model" in err
    assert "encoder.json: not the file" not in err
    assert f"{DATA}: 100%" in err
    assert fetch.pauses == []


def test_download_again_finds_the_work_done(fetch, site, capsys):
    fetch()
    site.log.clear()
    fetch("gpt2")
    assert site.log == []
    assert "already downloaded" in capsys.readouterr().err


def test_download_keeps_openais_files_when_asked(fetch):
    fetch(keep=True)
    kept = fetch.folder / "openai"
    assert sorted(path.name for path in kept.iterdir()) == sorted(hub.OPENAI_FILES)
    assert sorted(path.name for path in fetch.folder.iterdir()) == [RESULT[0], "openai", RESULT[1]]


def test_download_replaces_a_damaged_model(fetch, capsys):
    fetch()
    (fetch.folder / "model.bin").write_bytes(b"x" * 2000)
    fetch()
    assert_fetched(fetch.folder)
    assert "downloading the model again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "faults",
    [
        ["drop"],
        ["drop"] * 6,  # each brings something, so that it goes on
        [500, 500],
        [503, 429, "drop", 500],
        ["drop", "no range"],
        ["corrupt"],
        ["drop", 416],
        ["drop", "wrong part"],
        ["drop", "short part", "short part"],
    ],
)
@pytest.mark.parametrize("etag", [True, False])
def test_download_recovers(fetch, site, faults, etag):
    site.etag = etag
    site.faults[DATA] = list(faults)
    fetch()
    assert_fetched(fetch.folder)
    assert site.faults[DATA] == []
    assert len(fetch.pauses) == len(faults) - faults.count("no range")


def test_download_goes_on_where_it_stopped(fetch, site):
    site.faults[DATA] = ["drop", "drop"]
    fetch()
    ranges = [asked for name, asked, _ in site.log if name == DATA]
    starts = [int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) for asked in ranges[1:]]
    assert ranges[0] is None
    assert 0 < starts[0] <= 20_000 < starts[1] <= 40_000  # whole chunks of what had arrived


def test_download_waits_longer_after_every_failure(fetch, site):
    site.faults["hparams.json"] = [500, 502, 503, 429]
    fetch()
    assert fetch.pauses == [1, 2, 4, 8]


def test_download_gives_up_in_the_end(fetch, site):
    site.faults["hparams.json"] = [500] * 5
    with pytest.raises(ConnectionError, match=r"hparams\.json: HTTP status 500 .*Run this again"):
        fetch()
    assert not (fetch.folder / "model.bin").exists()
    site.log.clear()
    fetch()
    assert [name for name, *_ in site.log] == list(hub.OPENAI_FILES[2:])
    assert_fetched(fetch.folder)


@pytest.mark.parametrize(
    ("config", "etag"),
    [(SITE, True), (TINY, True), (TINY, False)],  # the same size, and one beyond which we ask
)
def test_download_of_a_file_that_changed_starts_over(fetch, site, config, etag):
    site.md5, site.etag = False, etag
    site.faults[DATA] = ["drop", *[500] * 5]
    with pytest.raises(ConnectionError):
        fetch()
    arrays = openai_files.random_arrays(config, seed=1)
    openai_files.write_checkpoint(site.root / "124M", config, arrays)
    for name in ("hparams.json", "model.ckpt.index"):
        (fetch.folder / ".download" / name).unlink()
    fetch()  # half of each would fail the CRC
    assert_equal(llmc.load_params(fetch.folder), arrays)


@pytest.mark.parametrize("fault", [403, 404, 410])
def test_download_does_not_repeat_what_is_refused(fetch, site, fault):
    site.faults["hparams.json"] = [fault]
    with pytest.raises(OSError, match=rf"/124M/hparams\.json: HTTP status {fault}") as caught:
        fetch()
    assert not isinstance(caught.value, ConnectionError)
    assert fetch.pauses == []


@pytest.mark.parametrize("fault", ["page", "hidden page", "gzip"])
@pytest.mark.parametrize("name", ["encoder.json", DATA])
def test_download_refuses_what_is_not_the_file(fetch, site, name, fault):
    site.faults[name] = [fault]
    with pytest.raises(ValueError, match=rf"{name}: the server sent (a page|the file encoded)"):
        fetch()
    assert not (fetch.folder / ".download" / name).exists()
    assert not (fetch.folder / "model.bin").exists()
    fetch()
    assert_fetched(fetch.folder)


@pytest.mark.parametrize("name", ["hparams.json", "model.ckpt.index", DATA])
@pytest.mark.parametrize("fault", ["truncated", "altered"])
def test_download_of_a_damaged_file_says_so_and_recovers_when_repeated(fetch, site, name, fault):
    site.faults[name] = [fault]
    with pytest.raises(ValueError, match="run this again") as caught:
        fetch()
    assert name in str(caught.value) or name == "hparams.json"
    assert not (fetch.folder / "model.bin").exists()
    fetch()
    assert_fetched(fetch.folder)


def test_download_without_md5_finds_a_damaged_file_by_its_crc(fetch, site):
    site.md5 = False
    site.faults[DATA] = ["corrupt"]
    with pytest.raises(ValueError, match="wrong CRC of tensor"):
        fetch()
    fetch()
    assert_fetched(fetch.folder)


@pytest.mark.parametrize("fault", ["corrupt", "altered"])
def test_download_refuses_other_token_tables(fetch, site, fault):
    site.md5 = False
    site.faults["encoder.json"] = [fault] * 5
    with pytest.raises(ValueError, match=r"encoder\.json: .* SHA-256"):
        fetch()
    assert list(contents(fetch.folder / ".download")) == ["encoder.json.part.json"]


def test_download_stopped_and_repeated_goes_on(fetch, site):
    def stop(seconds):
        raise KeyboardInterrupt

    site.faults[DATA] = ["drop"]
    with pytest.raises(KeyboardInterrupt):
        fetch(pause=stop)
    assert not (fetch.folder / "model.bin").exists()
    fetch()
    assert site.log[-1][1].startswith("bytes=")
    assert_fetched(fetch.folder)


def test_download_stopped_before_a_rename_asks_for_nothing_again(fetch, site, monkeypatch):
    monkeypatch.setattr(http, "check_hashes", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fetch()
    monkeypatch.undo()
    monkeypatch.setattr(hub, "TOKENIZER_SHA256", {})
    site.log.clear()
    fetch()
    assert [name for name, *_ in site.log] == list(hub.OPENAI_FILES[1:])


def test_download_stopped_while_cleaning_up_is_cleaned_up(fetch, capsys):
    fetch()
    (fetch.folder / ".download").mkdir()
    (fetch.folder / ".download" / DATA).touch()
    fetch()
    assert_fetched(fetch.folder)


def test_download_stopped_while_converting_is_cleaned_up(fetch):
    fetch.folder.mkdir(parents=True)
    (fetch.folder / "model.bin.1.tmp").write_bytes(b"half")
    fetch()
    assert_fetched(fetch.folder)


def test_download_twice_at_once_fetches_once(fetch, site, capsys):
    site.faults[DATA] = ["drop"]
    entered, finished = threading.Event(), threading.Event()

    def wait(seconds):
        entered.set()
        assert finished.wait(10)

    first = threading.Thread(target=fetch, kwargs={"pause": wait})
    second = threading.Thread(target=fetch)
    first.start()
    assert entered.wait(10)
    second.start()
    time.sleep(0.1)
    assert second.is_alive()
    finished.set()
    first.join(10)
    second.join(10)
    assert len(site.log) == len(hub.OPENAI_FILES) + 1
    assert "waiting for another download" in capsys.readouterr().err
    assert_fetched(fetch.folder)


def test_download_without_a_network_fails_at_once(fetch):
    with pytest.raises(ConnectionError, match=r"encoder\.json: .*refused.*--base_url"):
        fetch(base_url="http://127.0.0.1:1")
    assert fetch.pauses == [1]


def test_download_goes_through_a_proxy(fetch, site, monkeypatch):
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", site.url)
    fetch(base_url="http://models.invalid")
    assert_fetched(fetch.folder)


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1/x", "http://", "http://[::1"])
def test_download_from_a_bad_address_is_refused(fetch, url):
    with pytest.raises(ValueError, match="not an address to download from"):
        fetch(base_url=url)


@pytest.mark.parametrize("name", ["../124M", "125M", "", "/tmp/124M"])
def test_download_refuses_an_unknown_name(fetch, name):
    with pytest.raises(ValueError, match="unknown model"):
        fetch(name)


def test_names_of_every_model_are_known():
    known = ["117M", "124M", "gpt2", "345M", "gpt2-medium", "774M", "gpt2-large", "gpt2-xl"]
    names = [hub.resolve_name(name) for name in known]
    assert names == ["124M"] * 3 + ["355M"] * 2 + ["774M"] * 2 + ["1558M"]


def test_download_into_a_file_fails_on_one_line(site, run, tmp_path):
    (tmp_path / "file").touch()
    args = ["download", "124M", "--base_url", site.url, "--models_dir", tmp_path / "file"]
    done = run("utils.py", *args)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "file" in done.stderr


def test_download_command_as_a_user_walks_it(shared, run, tmp_path):
    (tmp_path / "site").mkdir()
    shutil.copytree(shared("openai_tiny"), tmp_path / "site" / "124M")
    with openai_files.serve(tmp_path / "site") as server:
        server.faults[DATA] = ["drop"]
        env = {**os.environ, "GPT2_BASE_URL": server.url, "NO_PROXY": "127.0.0.1"}
        args = ("utils.py", "download", "gpt2", "--models_dir", tmp_path / "models")
        first, second = run(*args, env=env), run(*args, env=env)
    assert (first.returncode, first.stdout) == (0, ""), first.stderr
    assert (second.returncode, second.stdout) == (0, "")
    assert "already downloaded" in second.stderr
    folder = tmp_path / "models" / "124M"
    assert sorted(path.name for path in folder.iterdir()) == RESULT
    assert llmc.load_params(folder).config.n_embd == 16


@pytest.mark.skipif(os.name == "nt", reason="needs a signal that cannot be caught")
def test_download_killed_outright_goes_on(site, fetch):
    site.faults["encoder.json"] = ["hang"]
    code = "import sys; from gpt2_support import hub; hub.download('124M', sys.argv[1])"
    env = {**os.environ, "GPT2_BASE_URL": site.url, "NO_PROXY": "127.0.0.1"}
    argv = [sys.executable, "-c", code, str(fetch.folder.parent)]
    process = subprocess.Popen(argv, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    part = fetch.folder / ".download" / "encoder.json.part"
    for _ in range(1000):
        if part.exists():
            break
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert part.exists()
    fetch()
    assert_fetched(fetch.folder)


def test_what_a_file_cannot_hold_is_refused_and_leaves_the_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "it.bin"
    path.write_bytes(b"good")
    with pytest.raises(ValueError, match=r"a token of 256 bytes exceeds the 255 that .*it\.bin"):
        token_table.save_tokenizer(path, [b"a", b"b" * 256], None)
    with pytest.raises(ValueError, match="16-bit ids, 65536 at most"):
        llmc.save_tokens(path, [], 65537)
    with pytest.raises(ValueError, match=r"an array of shape \(2,\), expected \(3,\)"):
        llmc.write_array(None, np.zeros(2), (3,))

    class Many(np.ndarray):
        def __len__(self):
            return 2**31

    with pytest.raises(ValueError, match="2147483648 tokens exceed"):
        llmc.save_tokens(path, [np.zeros(1).view(Many)], 300)
    assert path.read_bytes() == b"good"
    assert os.listdir(tmp_path) == ["it.bin"]


def test_a_block_of_an_index_may_be_empty():
    assert list(tensorflow.block_entries(bytes(4) + b"\x01\0\0\0")) == []  # one restart, no entry
    with pytest.raises(ValueError, match="a block of 8 bytes cannot hold 2 restarts"):
        list(tensorflow.block_entries(bytes(4) + b"\x02\0\0\0"))
