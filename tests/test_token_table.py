"""Token tables in every format: what is read, what is refused, and the merges behind the ids."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import EOT, TEXT, examples, naive_bpe

import encoder
from gpt2_support.formats import token_table


@pytest.fixture(scope="module")
def enc():
    """A small tokenizer, learned from TEXT."""
    return encoder.train(TEXT, 400)


def save_json(
    folder, tokens, merges, names=("vocab.json", "merges.txt"), version="#version: 0.2\n"
):
    """Write a table as OpenAI and Hugging Face do; return the path of the vocabulary."""
    alphabet = token_table.bytes_to_unicode()
    texts = ["".join(alphabet[byte] for byte in token) for token in tokens]
    folder.mkdir(exist_ok=True)
    vocab = json.dumps({text: id for id, text in enumerate(texts)})
    (folder / names[0]).write_bytes(vocab.encode())
    lines = [" ".join("".join(alphabet[b] for b in part) for part in pair) for pair in merges]
    (folder / names[1]).write_bytes((version + "\n".join(lines) + "\n").encode())
    return folder / names[0]


def hugging_face(tokens, eot, merges, lists=False):
    """The content of a tokenizer.json."""
    alphabet = token_table.bytes_to_unicode()
    text = {token: "".join(alphabet[byte] for byte in token) for token in tokens}
    pairs = [[text[left], text[right]] for left, right in merges]
    added = [{"id": eot, "content": EOT, "special": True}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": added if eot is not None else [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"add_prefix_space": True},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": "",
            "vocab": {text[token]: id for id, token in enumerate(tokens)},
            "merges": pairs if lists else [" ".join(pair) for pair in pairs],
        },
    }


@pytest.fixture
def table(enc):
    return enc.tokens, enc.eot, token_table.recover_merges(enc.tokens, enc.eot)


def test_alphabet_is_gpt2s():
    alphabet = token_table.bytes_to_unicode()
    assert len(set(alphabet.values())) == len(alphabet) == 256
    assert alphabet[ord(" ")] == "Ġ" and alphabet[ord("\n")] == "Ċ" and alphabet[0] == "Ā"
    assert alphabet[0x7F] == "ġ" and alphabet[0xA0] == "ł" and alphabet[0xAD] == "Ń"
    assert all(alphabet[byte] == chr(byte) for byte in b"!a~\xa1\xff")


def test_recovered_merges_make_the_tokens(table):
    tokens, _, merges = table
    assert [left + right for left, right in merges] == tokens[256:-1]
    assert merges[:2] == [naive_first_pair(tokens, 256), naive_first_pair(tokens, 257)]


def naive_first_pair(tokens, id):
    lower = {token: i for i, token in enumerate(tokens[:id])}
    return tuple(tokens[i] for i in naive_bpe(tokens[id], lower))


def test_save_and_load_tokenizer(enc, tmp_path):
    enc.save(tmp_path / "tokenizer.bin")
    again = encoder.load(tmp_path / "tokenizer.bin")
    assert (again.tokens, again.eot, again.n_vocab) == (enc.tokens, enc.eot, 400)
    encoder.Encoder(enc.tokens[:-1]).save(tmp_path / "tokenizer.bin")
    assert token_table.load_tokenizer(tmp_path) == (enc.tokens[:-1], None)


@pytest.mark.parametrize("has_eot", [True, False])
def test_tokenizer_bin_version_1_knows_end_of_text_by_name(enc, tmp_path, has_eot):
    tokens = enc.tokens if has_eot else enc.tokens[:-1]
    path = tmp_path / "old.bin"
    body = b"".join(bytes([len(token)]) + token for token in tokens)
    path.write_bytes(struct.pack("<256i", 20240328, 1, len(tokens), *[0] * 253) + body)
    assert token_table.load_tokenizer(path) == (tokens, 399 if has_eot else None)


def test_end_of_text_is_no_merge_even_if_its_parts_are_tokens(enc, tmp_path):
    first = encoder.Encoder([b"zq", *enc.tokens[:-1]], eot=0)
    first.save(tmp_path / "tokenizer.bin")
    assert token_table.load_tokenizer(tmp_path) == (first.tokens, 0)
    last = [*enc.tokens[:-1], b"zq"]
    assert token_table.recover_merges(last, None) == [
        *token_table.recover_merges(last, 399),
        (b"z", b"q"),
    ]


@pytest.mark.parametrize(
    "cut, added, count",
    [(-1, b"", 400), (-14, b"", 400), (None, b"\x02", 400), (None, b"\x01\xff", 400)]
    + [(None, b"", count) for count in (399, 401, -1, 2**31 - 1)],
)
def test_tokenizer_bin_of_another_size_is_refused(enc, tmp_path, cut, added, count):
    path = tmp_path / "tokenizer.bin"
    enc.save(path)
    content = bytearray(path.read_bytes()[:cut] + added)
    content[8:12] = struct.pack("<i", count)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"header counts {count} tokens, found (399|40)"):
        token_table.load_tokenizer(path)


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
@pytest.mark.parametrize("version", ["#version: 0.2\n", "", "#version: 0.2\r\n"])
def test_vocabulary_and_merges_load(table, tmp_path, names, version):
    path = save_json(tmp_path, table[0], table[2], names, version)
    if "\r" in version:
        merges = path.with_name(names[1])
        merges.write_bytes(merges.read_bytes().replace(b"\r", b"").replace(b"\n", b"\r\n"))
    assert token_table.load_tokenizer(path) == token_table.load_tokenizer(tmp_path) == table[:2]


@pytest.mark.parametrize("lists", [True, False])
def test_hugging_face_tokenizer_loads(table, tmp_path, lists):
    data = hugging_face(*table, lists)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert token_table.load_tokenizer(tmp_path) == table[:2]
    del data["model"]["type"], data["model"]["dropout"], data["post_processor"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert token_table.load_tokenizer(tmp_path / "tokenizer.json") == table[:2]


def test_hugging_face_special_tokens_may_come_first_and_be_many(enc, tmp_path):
    special = [EOT, "<s>", "<pad>", "two words", "日本"]
    tokens = [text.encode() for text in special] + enc.tokens[:-1]
    data = hugging_face(tokens[5:], None, token_table.recover_merges(enc.tokens, enc.eot))
    vocab = {text: id + 5 for text, id in data["model"]["vocab"].items()}
    data["model"]["vocab"] = vocab | {EOT: 0, "<s>": 1, "<pad>": 2, "two words": 3}
    data["added_tokens"] = [{"id": id, "content": text} for id, text in enumerate(special)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    loaded = encoder.load(tmp_path)
    assert (loaded.tokens, loaded.eot) == (tokens, 0)
    assert loaded.encode(TEXT) == [id + 5 for id in enc.encode(TEXT)]


def test_folder_prefers_tokenizer_bin_then_whole_pairs(enc, table, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(hugging_face(*table)), encoding="utf-8")
    save_json(tmp_path, table[0], table[2])
    (tmp_path / "merges.txt").unlink()
    assert token_table.find_tokenizer(tmp_path).name == "tokenizer.json"
    save_json(tmp_path, table[0], table[2], ("encoder.json", "vocab.bpe"))
    assert token_table.find_tokenizer(tmp_path).name == "encoder.json"
    save_json(tmp_path, table[0], table[2])
    assert token_table.find_tokenizer(tmp_path).name == "vocab.json"
    enc.save(tmp_path / "tokenizer.bin")
    assert token_table.find_tokenizer(tmp_path).name == "tokenizer.bin"


@pytest.mark.parametrize(
    "where, value",
    [
        ("normalizer", {"type": "NFC"}),
        ("pre_tokenizer", None),
        ("pre_tokenizer.type", "Whitespace"),
        ("pre_tokenizer.add_prefix_space", True),
        ("pre_tokenizer.use_regex", False),
        ("post_processor.type", "TemplateProcessing"),
        ("model.type", "WordPiece"),
        ("model.dropout", 0.1),
        ("model.continuing_subword_prefix", "##"),
        ("model.end_of_word_suffix", "</w>"),
        ("model.ignore_merges", True),
        ("model.vocab", None),
        ("model.vocab", ["a"]),
        ("model.merges", None),
        ("model.merges", "a b"),
        ("model.merges", ["a"]),
        ("model.merges", ["a b c"]),
        ("model.merges", [["a", 1]]),
        ("model.merges", [7]),
        ("added_tokens", 7),
        ("added_tokens", [7]),
        ("added_tokens", [{"id": 1}]),
        ("added_tokens", [{"id": "x", "content": EOT}]),
        ("added_tokens", [{"id": 5, "content": 5}]),
        ("added_tokens", [{"id": 5, "content": []}]),
    ],
)
def test_hugging_face_tokenizer_of_another_kind_is_refused(table, tmp_path, where, value):
    data = hugging_face(*table)
    *folders, name = where.split(".")
    node = data
    for folder in folders:
        node = node[folder]
    node[name] = value
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    named = {"merges": "merge", "added_tokens": "added_tokens|endoftext"}.get(name, name)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*({named})") as error:
        token_table.load_tokenizer(path)
    assert "\n" not in str(error.value)


def test_ids_that_are_not_in_merge_order_are_refused(table, tmp_path):
    tokens, eot, merges = table
    swapped = [*tokens]
    first = next(i for i, token in enumerate(tokens[256:-1], 256) if len(token) > 2)
    swapped[256], swapped[first] = swapped[first], swapped[256]
    path = save_json(tmp_path, swapped, merges)
    with pytest.raises(ValueError, match=r"vocab\.json: .*order of the merges"):
        token_table.load_tokenizer(path)
    token_table.save_tokenizer(tmp_path / "tokenizer.bin", swapped, eot)
    with pytest.raises(ValueError, match=r"tokenizer\.bin: .*order of the merges"):
        token_table.load_tokenizer(tmp_path)


def test_merges_that_are_not_the_ids_are_refused(table, tmp_path):
    tokens, _, merges = table
    for wrong in (merges[:-1], merges[::-1], [*merges, merges[0]], [*merges, (b"q", b"z")]):
        with pytest.raises(ValueError, match=r"merge \d+ is .* would be"):
            token_table.load_tokenizer(save_json(tmp_path, tokens, wrong))


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda tokens: tokens[1:], "no token for byte 33"),
        (lambda tokens: [*tokens, tokens[300]], "is both token"),
        (lambda tokens: [*tokens, b""], "has 0 bytes"),
        (lambda tokens: tokens[:399], "end-of-text id 399"),
    ],
)
def test_incomplete_tables_are_refused(enc, tmp_path, change, problem):
    token_table.save_tokenizer(tmp_path / "tokenizer.bin", change(enc.tokens), 399)
    with pytest.raises(ValueError, match=rf"tokenizer\.bin: .*{problem}"):
        token_table.load_tokenizer(tmp_path)


@pytest.mark.parametrize("id", [5.0, True, "5", None, [5], -1, 4, 400, 10**30])
def test_vocabulary_with_bad_ids_is_refused(table, tmp_path, id):
    path = save_json(tmp_path, table[0], table[2])
    data = json.loads(path.read_text(encoding="utf-8"))
    data["&"] = id  # was 5
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.json: token b'.*' has id"):
        token_table.load_tokenizer(path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"a b": 0}', b'{"\\ud800": 0}']
)
def test_json_that_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "merges.txt").write_text("", encoding="utf-8")
    for name in ("vocab.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            token_table.load_tokenizer(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff", b"a\n", b"a b c\n", b"\xc3\xa9 \xe4\xbd\xa0\n"])
def test_merges_that_are_no_pairs_are_refused(table, tmp_path, content):
    path = save_json(tmp_path, table[0], table[2])
    path.with_name("merges.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"merges\.txt|vocab\.json"):
        token_table.load_tokenizer(path)


def test_missing_tokenizers_are_named(table, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.bin"):
        token_table.load_tokenizer(tmp_path / "nothing.bin")
    with pytest.raises(FileNotFoundError, match=r"no token table in this folder"):
        token_table.load_tokenizer(tmp_path)
    save_json(tmp_path, table[0], table[2])
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"merges\.txt: not found, and vocab\.json"):
        token_table.load_tokenizer(tmp_path / "vocab.json")
    with pytest.raises(FileNotFoundError, match="999M"):
        encoder.load("999M", models_dir=tmp_path)


def test_load_finds_models_by_name(enc, tmp_path):
    enc.save(tmp_path / "mine" / "tokenizer.bin")
    enc.save(tmp_path / "124M" / "tokenizer.bin")
    assert encoder.load("mine", models_dir=tmp_path).tokens == enc.tokens
    assert encoder.load("gpt2", models_dir=tmp_path).tokens == enc.tokens
    assert encoder.load(tmp_path / "mine").tokens == enc.tokens


@given(st.data())
@examples(3)
def test_damaged_tokenizer_bin_is_a_table_or_a_value_error(tmp_path_factory, enc, data):
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    token_table.save_tokenizer(path, enc.tokens, enc.eot)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([None, -1, -2, 0, 4, 1023, 1024, 1500]))]
    path.write_bytes(content + data.draw(st.sampled_from([b"", b"\0", b"\1a"])))
    try:
        tokens, eot = token_table.load_tokenizer(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        again = encoder.Encoder(tokens, eot)
        assert again.decode(again.encode(TEXT, allow_special=True)) == TEXT


# ----------------------------------------------------------------------------------------------
# GPT-2's own table


def test_gpt2_table_is_the_same_in_every_format(shared):
    gpt2 = encoder.load(shared("gpt2/gpt2_tokenizer.bin"))
    assert encoder.load(shared("gpt2/encoder.json")).tokens == gpt2.tokens
    assert (gpt2.n_vocab, gpt2.eot) == (50257, 50256)
    assert gpt2.tokens[:256] == [bytes([byte]) for byte in token_table.bytes_to_unicode()]


@pytest.mark.thorough
def test_gpt2_merges_are_recovered_from_its_ids(shared):
    lines = shared("gpt2/vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    merges = [tuple(token_table.token_bytes("", part) for part in line.split()) for line in lines]
    assert len(merges) == 50000
    tokens, eot = token_table.load_tokenizer(shared("gpt2/gpt2_tokenizer.bin"))
    assert token_table.recover_merges(tokens, eot) == merges
