"""llm.c's model and tokens files."""

import os

import numpy as np
import pytest
from helpers import TINY, random_params
from model_files import write_bin

from gpt2_support.formats import llmc, stored_tensor, token_table
from gpt2_support.params import Config, Params


def test_model_file_round_trip_is_exact(tmp_path):
    params = random_params(TINY, np.float32)
    llmc.save_params(tmp_path / "model.bin", params)
    loaded = llmc.load_params(tmp_path)
    assert loaded.config == TINY
    assert loaded.flat.tobytes() == params.flat.tobytes()
    assert not loaded.flat.flags.writeable


def test_model_file_of_llmc_is_saved_byte_for_byte(shared, tmp_path):
    path = shared("golden/llmc_tiny.bin")
    llmc.save_params(tmp_path / "model.bin", llmc.load_params(path))
    assert (tmp_path / "model.bin").read_bytes() == path.read_bytes()


def test_model_file_version_1_has_no_padding(tmp_path):
    params = random_params(TINY, np.float32)
    start, end = TINY.n_vocab * TINY.n_embd, TINY.n_vocab_padded * TINY.n_embd
    write_bin(tmp_path / "model.bin", 1, TINY, np.delete(params.flat, np.s_[start:end]), padded=0)
    loaded = llmc.load_params(tmp_path)
    assert np.array_equal(loaded.flat, params.flat)
    assert not loaded.flat.flags.writeable and not loaded.wte.flags.writeable


def test_model_file_version_5_is_bf16(tmp_path):
    params = random_params(TINY, np.float32)
    bits = params.flat.view("u4") >> 16 << 16  # float32 values that bf16 holds exactly
    write_bin(tmp_path / "model.bin", 5, TINY, (bits >> 16).astype("<u2"))
    loaded = llmc.load_params(tmp_path)
    assert loaded.flat.dtype == np.float32
    assert np.array_equal(loaded.flat.view("u4"), bits)
    assert not loaded.flat.flags.writeable and not loaded.wte.flags.writeable


@pytest.mark.parametrize(
    "value, expected",
    [
        (0x3F800000, 0x3F80),  # 1
        (0x3F807FFF, 0x3F80),  # below the middle
        (0x3F808000, 0x3F80),  # the middle goes to the even one, down
        (0x3F818000, 0x3F82),  # and up
        (0x3F808001, 0x3F81),  # above the middle
        (0xBF808001, 0xBF81),  # of negative numbers too
        (0x00000000, 0x0000),
        (0x80000000, 0x8000),
        (0x00018000, 0x0002),  # numbers below the normal ones
        (0x3FFFFFFF, 0x4000),  # into the next power of 2
        (0x7F7FFFFF, 0x7F80),  # the largest becomes infinite
        (0x7F800000, 0x7F80),
        (0xFF800000, 0xFF80),
    ],
)
def test_bf16_is_rounded_to_nearest_even(value, expected):
    values = np.array([value], np.uint32).view(np.float32)
    assert stored_tensor.float32_to_bf16(values).tolist() == [expected]


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF])
def test_bf16_of_nan_is_nan(bits):
    written = stored_tensor.float32_to_bf16(np.array([bits], np.uint32).view(np.float32))
    assert np.isnan(stored_tensor.bf16_to_float32(written)).all()


def test_bf16_is_the_nearest_of_all(tmp_path):
    """Against a search among all positive bf16 numbers; they are in the order of their bits."""
    params = random_params(TINY, np.float32)
    with open(tmp_path / "model.bin", "wb") as file:
        llmc.write_model(file, TINY, params.named.__getitem__, "bf16")
    loaded = llmc.load_params(tmp_path).flat
    grid = stored_tensor.bf16_to_float32(np.arange(0x7F80, dtype=np.uint16)).astype(float)
    x = np.abs(params.flat.astype(float))
    above = np.searchsorted(grid, x)
    below = np.maximum(above - 1, 0)
    nearest = np.where(x - grid[below] < grid[above] - x, grid[below], grid[above])
    np.testing.assert_array_equal(loaded, np.sign(params.flat) * nearest)
    assert os.path.getsize(tmp_path / "model.bin") == 1024 + 2 * params.flat.size


def test_model_file_of_float64_parameters_is_float32(tmp_path):
    params = random_params(TINY, np.float32)
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
    llmc.save_params(tmp_path / "model.bin", random_params(TINY, np.float32))
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
        llmc.save_tokens(path, [np.zeros(1, int).view(Many)], 300)
    assert path.read_bytes() == b"good"
    assert os.listdir(tmp_path) == ["it.bin"]


REFUSED = {  # chunks, n_vocab, the error
    "negative": ([[-1]], 300, "token id -1 is outside the vocabulary of 300"),
    "n_vocab": ([[0, 299], [5, 300]], 300, "token id 300 is outside the vocabulary of 300"),
    "16 bits": ([np.array([65536])], 0, "token id 65536 is outside the vocabulary of 65536"),
    "floats": ([[1.7]], 300, r"ids must be whole numbers of shape \(N,\), found .*dtype float64"),
    "2-D": ([np.zeros((2, 3), int)], 300, r"shape \(N,\), found shape \(2, 3\), dtype int"),
    "ragged": ([[[1], [2, 3]]], 300, "found rows of different lengths"),
    "huge": ([[2**70]], 300, "found shape .*dtype object"),
    "one id": ([1, 2], 300, r"found shape \(\), dtype int"),
    "negative n_vocab": ([[1]], -5, "n_vocab = -5: expected a whole number of 0 or more and"),
    "float n_vocab": ([[1]], 300.0, "n_vocab = 300.0: expected a whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tokens_file_refuses_what_is_no_id(tmp_path, case):
    chunks, n_vocab, message = REFUSED[case]
    (tmp_path / "data.bin").write_bytes(b"good")
    with pytest.raises(ValueError, match=message):
        llmc.save_tokens(tmp_path / "data.bin", chunks, n_vocab)
    assert (tmp_path / "data.bin").read_bytes() == b"good"
    assert os.listdir(tmp_path) == ["data.bin"]


def test_tokens_file_of_llmc_records_no_vocabulary(tmp_path):
    llmc.save_tokens(tmp_path / "data.bin", [[1, 2, 3]], 0)  # llm.c leaves the field zero
    tokens, n_vocab = llmc.load_tokens(tmp_path / "data.bin")
    assert (tokens.tolist(), n_vocab) == ([1, 2, 3], 0)


def replaced(path, other, monkeypatch):
    """Replace a file by another when its header has been read, before its size is looked at."""

    def replace(*args):
        os.replace(other, path)
        monkeypatch.undo()
        llmc.check_size(*args)

    monkeypatch.setattr(llmc, "check_size", replace)


@pytest.mark.parametrize("small", [0, llmc.SMALL])  # mapped, and in memory
def test_model_that_is_replaced_while_it_is_loaded_is_the_first(tmp_path, monkeypatch, small):
    monkeypatch.setattr(llmc, "SMALL", small)
    first = random_params(TINY, np.float32)
    llmc.save_params(tmp_path / "model.bin", first)
    llmc.save_params(tmp_path / "other", random_params(TINY, np.float32, seed=1))
    path = tmp_path / "model.bin"
    with monkeypatch.context() as patch:
        replaced(path, tmp_path / "other", patch)
        loaded = llmc.load_params(path)
    assert not (tmp_path / "other").exists()
    assert loaded.flat.tobytes() == first.flat.tobytes()


@pytest.mark.parametrize("small", [0, llmc.SMALL])
def test_tokens_that_are_replaced_while_they_are_loaded_are_the_first(tmp_path, monkeypatch, small):
    llmc.save_tokens(tmp_path / "data.bin", [[1, 2]], 10)
    llmc.save_tokens(tmp_path / "other", [[3, 4, 5]], 20)
    with monkeypatch.context() as patch:
        patch.setattr(llmc, "SMALL", small)
        replaced(tmp_path / "data.bin", tmp_path / "other", patch)
        tokens, n_vocab = llmc.load_tokens(tmp_path / "data.bin")
    assert (tokens.tolist(), n_vocab) == ([1, 2], 10)


def test_tokenizer_that_is_replaced_while_it_is_loaded_is_the_first(tmp_path, monkeypatch):
    table = [bytes([i]) for i in range(256)]
    token_table.save_tokenizer(tmp_path / "tokenizer.bin", table, None)
    token_table.save_tokenizer(tmp_path / "other", table[::-1], None)

    def read_header(*args):
        header = llmc.read_header(*args)
        os.replace(tmp_path / "other", tmp_path / "tokenizer.bin")
        return header

    monkeypatch.setattr(token_table, "read_header", read_header)
    assert token_table.load_tokenizer(tmp_path)[0] == table


def test_small_files_shortened_after_they_were_loaded_do_no_harm(tmp_path):
    """Where a mapped file is shortened in place, reading it ends the process."""
    params = random_params(TINY, np.float32)
    llmc.save_params(tmp_path / "model.bin", params)
    llmc.save_tokens(tmp_path / "data.bin", [range(5000)], 5000)
    loaded, (tokens, _) = llmc.load_params(tmp_path), llmc.load_tokens(tmp_path / "data.bin")
    for name in ("model.bin", "data.bin"):
        os.truncate(tmp_path / name, 1024)
    assert loaded.flat.tobytes() == params.flat.tobytes()
    assert tokens.tolist() == list(range(5000))
    assert not loaded.flat.flags.writeable and not tokens.flags.writeable
