"""OpenAI's checkpoints: right ones are read exactly, damaged ones refused by name."""

import contextlib
import json

import numpy as np
import openai_files
import pytest
from helpers import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import assert_equal, refusal

from gpt2_support import files, weights
from gpt2_support.formats import llmc, tensorflow, token_table


@pytest.mark.thorough
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


NAME = "model/h1/mlp/c_fc/w"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": 1}, "compressed (snappy)"),
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


def test_openai_index_with_any_changed_byte_is_refused(tmp_path, thorough):
    openai_files.write_checkpoint(tmp_path / "in")
    path = tmp_path / "in" / "model.ckpt.index"
    good = path.read_bytes()
    padding = range(len(good[:-8].rstrip(b"\0")), len(good) - 8)  # says nothing
    for at in sorted(set(range(len(good))) - set(padding))[:: 1 if thorough else 11]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(files.DamagedFile, match=r"model\.ckpt\.index: "):
            tensorflow.open_bundle(path).__enter__()


def test_openai_index_cut_anywhere_is_refused(tmp_path):
    openai_files.write_checkpoint(tmp_path / "in")
    path = tmp_path / "in" / "model.ckpt.index"
    good = path.read_bytes()
    for size in range(0, len(good), 7):
        path.write_bytes(good[:size])
        with pytest.raises(files.DamagedFile):
            tensorflow.open_bundle(path).__enter__()


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


@settings(max_examples=3 * settings().max_examples)
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
        lambda: tensorflow.parse_tensor(None, data),
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


def test_a_block_of_an_index_may_be_empty():
    assert list(tensorflow.block_entries(bytes(4) + b"\x01\0\0\0")) == []  # one restart, no entry
    with pytest.raises(ValueError, match="a block of 8 bytes cannot hold 2 restarts"):
        list(tensorflow.block_entries(bytes(4) + b"\x02\0\0\0"))
