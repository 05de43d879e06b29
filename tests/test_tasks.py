"""Tests of gpt2_support/tasks.py: items read, written as requests, and counted."""

import json
import math

import numpy as np
import pytest
from task_items import hellaswag_items, lambada_items, write_items

import encoder
from gpt2_support import tasks
from gpt2_support.scoring import Score

BYTES = encoder.Encoder([*(bytes([i]) for i in range(256)), b"<|endoftext|>"], eot=256)


def text(ids):
    return BYTES.decode(ids)


def request(item, way=None):
    if way is None:
        return tasks.lambada_request(item, BYTES.encode, BYTES.eot)
    return tasks.hellaswag_request(item, way, BYTES.encode, BYTES.eot)


def score(*nats, best=()):
    return Score(np.array(nats, np.float32), np.array([i in best for i in range(len(nats))]))


HELLASWAG = {
    "ind": 3, "activity_label": "Playing catch", "ctx_a": "[header] How to [title] Play.  Now",
    "ctx_b": "the DOG", "ctx": "[header] How to play. the DOG",
    "endings": [" runs  away [step] now.", "a", "bcd", "ef"], "label": 2,
}  # fmt: skip


# --- requests -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passage", "context", "ending"),
    [
        ("one two three", "one two", " three"),
        ("one two ", "one two", " "),
        ("one  two", "one", "  two"),
        ("one\ntwo", "<|endoftext|>", " one\ntwo"),
        ("one", "<|endoftext|>", " one"),
    ],
)
def test_lambada_asks_for_what_follows_the_last_space(passage, context, ending):
    ids, (word,) = request({"text": passage})
    assert (text(ids), text(word)) == (context, ending)


def test_hellaswag_is_written_as_in_the_harness():
    """By its doc_to_text: label, ctx_a, ctx_b of which only the first letter is a capital."""
    ids, endings = request(HELLASWAG, "harness")
    assert text(ids) == "Playing catch: How to. Play. Now The dog"
    assert [text(e) for e in endings] == [" runs away now.", " a", " bcd", " ef"]


def test_hellaswag_is_written_as_in_llmc():
    ids, endings = request(HELLASWAG, "llm.c")
    assert text(ids) == "[header] How to play. the DOG"
    assert [text(e) for e in endings] == [f" {ending}" for ending in HELLASWAG["endings"]]


def test_space_at_the_end_of_a_context_belongs_to_the_ending():
    item = HELLASWAG | {"ctx_b": "", "ctx_a": "Go [x]"}
    ids, endings = request(item, "harness")
    assert text(ids) == "Playing catch: Go" and text(endings[1]) == "  a"


def test_ending_has_the_ids_of_both_together_without_those_of_the_context():
    """Also where the two do not meet between two tokens of the whole."""
    enc = encoder.Encoder([*BYTES.tokens[:256], b" b", b"\n ", b"<|endoftext|>"], eot=258)
    assert tasks.encode_pair(enc.encode, "a", " b") == ([97], [256])
    assert tasks.encode_pair(enc.encode, "a ", " b") == ([97], [32, 256])


# --- figures ------------------------------------------------------------------------------------


def test_lambada_counts_whole_words_last_tokens_and_perplexity():
    words = [score(1, 2, best=[0, 1]), score(3, best=[]), score(1, 1, best=[1])]
    acc, last, perplexity = tasks.lambada_figures([[word] for word in words])
    assert (acc.value, last.value) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert perplexity.value == pytest.approx(math.exp(8 / 3))
    assert acc.stderr == pytest.approx(np.std([1, 0, 0], ddof=1) / math.sqrt(3))
    nats = np.std([3, 3, 2], ddof=1) / math.sqrt(3)
    assert perplexity.stderr == pytest.approx(math.exp(8 / 3) * nats)


def test_hellaswag_counts_by_the_whole_and_by_the_length_in_two_ways():
    items = [{"endings": ["ab", "a long ending"], "label": label} for label in (0, 1)]
    endings = [score(1, 1), score(2, 2, 1)]  # in all 2 and 5, a token 1 and 5/3
    acc, norm = tasks.hellaswag_figures(items, [endings] * 2, "harness")
    assert (acc.name, norm.name) == ("acc, harness", "acc_norm, harness")
    assert (acc.value, norm.value) == (0.5, 0.5)
    for label, values in ((0, (1, 0)), (1, (0, 1))):  # characters: 2 / 2 and 5 / 13
        acc, norm = tasks.hellaswag_figures(items[label : label + 1], [endings], "harness")
        assert (acc.value, norm.value) == values and math.isnan(acc.stderr)
    acc, norm = tasks.hellaswag_figures(items[:1], [endings], "llm.c")
    assert (acc.value, norm.value) == (1, 1)


def test_length_in_the_harness_is_that_of_the_detokenized_ending():
    items = [{"endings": ["ab [step] [substeps] [title]", "abcdefghij"], "label": 1}]
    _, norm = tasks.hellaswag_figures(items, [[score(3), score(3)]], "harness")
    assert norm.value == 1  # with its brackets the other would be longer


def test_published_figures_are_known_by_model():
    assert tasks.published("hellaswag", "acc_norm, harness", "124M")[0] == 0.3114
    value, source = tasks.published("lambada", "acc, last token", "1558M")
    assert value == 0.6324 and "Radford" in source
    assert tasks.published("lambada", "acc", "models/mine") == (None, "")
    assert tasks.published("hellaswag", "acc, llm.c", "355M") == (None, "")


# --- files --------------------------------------------------------------------------------------


def test_items_are_read_up_to_the_limit(tmp_path):
    lambada, hellaswag = write_items(tmp_path, 9)
    assert tasks.load_items(lambada) == ("lambada", lambada_items(9))
    assert tasks.load_items(hellaswag, 4) == ("hellaswag", hellaswag_items(9)[:4])


def test_label_may_be_written_as_a_text(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(HELLASWAG | {"label": "3"}) + "\n\n", encoding="utf-8")
    (item,) = tasks.load_items(path)[1]
    assert item["label"] == 3


def test_items_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(HELLASWAG) + "\n", encoding="utf-8-sig")
    assert tasks.load_items(path) == ("hellaswag", [HELLASWAG])


GOOD = json.dumps(HELLASWAG)
DAMAGED = {
    "empty": ("", "has no items, expected one of lambada or hellaswag a line"),
    "no JSON": ("{", "line 1: "),
    "array": ("[1]", r"line 1: found \[1\], expected an item of lambada \(text\) or hellaswag"),
    "other": ('{"a": 1}', "line 1: found {'a': 1}, expected an item of"),
    "number": ('{"text": 1}', "line 1: text is 1, expected a text"),
    "later": ('{"text": "a b"}\n3', "line 2: found 3, expected an item of lambada"),
    "mixed": (f'{GOOD}\n{{"text": "a"}}', "line 2: ctx_a is None, expected a text"),
    "endings": (
        json.dumps(HELLASWAG | {"endings": ["a"]}),
        "line 1: endings are .* expected two texts or more",
    ),
    "ending": (
        json.dumps(HELLASWAG | {"endings": ["a", 2]}),
        "line 1: endings are .* expected two texts or more",
    ),
    "label": (json.dumps(HELLASWAG | {"label": 4}), "line 1: label is 4, expected 0 to 3"),
    "no label": (json.dumps(HELLASWAG | {"label": ""}), "line 1: label is , expected a number"),
    "nested": ("[" * 100_000, "line 1: "),
    "Latin-1": ("\udce9", "line 1: 'utf-8' codec can't decode byte 0xe9"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_items_are_refused_with_the_line(tmp_path, case):
    contents, message = DAMAGED[case]
    path = tmp_path / "items.jsonl"
    path.write_bytes(contents.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"items\.jsonl: {message}"):
        tasks.load_items(path)
