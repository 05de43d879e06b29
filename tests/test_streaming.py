"""streaming.py: text as it is made, stop strings, the columns of --explain."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import ENC, EOT, TOKENS

import encoder
from gpt2_support import streaming


def stream_text(ids, stops=(), enc=ENC):
    """Feed ids as the CLI does; return the texts that came, joined, and whether a stop was met."""
    stream, out = streaming.TextStream(enc, stops), ""
    for id in ids:
        out += stream.feed(id)
        if stream.done:
            return out, True
    return out + stream.flush(), False


def test_stream_shows_text_as_it_is_made():
    stream = streaming.TextStream(ENC)
    assert [stream.feed(id) for id in ENC.encode("a the b")] == ["a", " the", " ", "b"]
    assert not stream.done
    assert stream.flush() == ""
    assert stream.done


def test_stream_holds_back_incomplete_characters():
    stream = streaming.TextStream(ENC)
    texts = [stream.feed(byte) for byte in "é€😀".encode()]
    assert texts == ["", "é", "", "", "€", "", "", "", "😀"]
    assert stream.feed(0xC3) == ""
    assert stream.flush() == "\ufffd"


def test_stream_ends_at_end_of_text_with_what_was_held():
    stream = streaming.TextStream(ENC, ["abc"])
    assert [stream.feed(id) for id in b"xab"] == ["x", "", ""]
    assert stream.feed(EOT) == "ab"
    assert stream.done


def test_stream_without_end_of_text_id_decodes_every_token():
    assert stream_text([65, EOT], enc=encoder.Encoder(TOKENS)) == ("A<|endoftext|>", False)


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("one\ntwo", ["\n"], "one"),
        ("say the end", ["the"], "say "),  # within the token " the"
        ("say the end", [" the end"], "say"),  # over several tokens
        ("aab", ["ab"], "a"),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("abcabd", ["abd", "bca"], "a"),
        ("no stop", ["xyz"], "no stop"),
        ("almos", ["most", "lmost"], "almos"),
        ("x", ["x"], ""),
        ("é€", ["€"], "é"),
        ("abcd", ["abcd", "bc"], "a"),  # bc is whole before abcd is
        (" the", [" the", "h"], " t"),  # also if both come in one token
        ("abcd", ["bcd", "abcd"], ""),  # whole at once: the one that begins first
    ],
)
def test_stream_ends_before_a_stop_text(text, stops, expected):
    assert stream_text(ENC.encode(text), stops) == (expected, expected != text)


TEXTS = st.text("abé€", max_size=12)


@pytest.mark.thorough
def test_stream_result_does_not_depend_on_the_tokens():
    @given(TEXTS, st.lists(st.text("abé", min_size=1, max_size=4)), st.data())
    def check(text, stops, data):
        starts = []  # of the stops that are whole first
        for end in range(len(text) + 1):
            starts = starts or [text.index(stop) for stop in stops if stop in text[:end]]
        expected = text[: min(starts)] if starts else text
        raw = text.encode()
        cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)))))
        parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        enc = encoder.Encoder([*parts, b"<|endoftext|>"], len(parts))
        assert stream_text(range(len(parts)), stops, enc) == (expected, bool(starts))

    check()


def test_stream_shows_whatever_can_be_no_stop():
    @given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=4))
    def check(text, stop):
        stream, out = streaming.TextStream(ENC, [stop]), ""
        for n, byte in enumerate(text.encode(), 1):
            out += stream.feed(byte)
            if stream.done:
                return
            held = text[len(out) : n]
            assert stop.startswith(held)
            longer = [text[i:n] for i in range(len(out)) if stop.startswith(text[i:n])]
            assert not longer

    check()


@pytest.mark.parametrize(
    "text, stop, n",
    [("", "ab", 0), ("xa", "ab", 1), ("ab", "ab", 2), ("aba", "aba", 3), ("xy", "ab", 0)],
)
def test_overlap_is_the_longest_end_that_begins_the_stop(text, stop, n):
    assert streaming.overlap(text, stop) == n


@pytest.mark.parametrize(
    "token, text",
    [
        (b" cat", "' cat'     "),
        (b"\n\t", r"'\n\t'     "),
        (b"it's", '"it\'s"     '),
        (b"\xe2\x82", r"b'\xe2\x82'"),
        (b"\xe2\x82\xff", r"b'\xe2\x82…"),
        ("é".encode(), "'é'        "),
        ("中文".encode(), "'中文'     "),
        ("中文中文中".encode(), "'中文中文… "),
        (b"exactly 9", "'exactly 9'"),
        (b"exactly 10", "'exactly 1…"),
        (b"<|endoftext|>", "'<|endofte…"),
        (b"\x1b[2J", r"'\x1b[2J'  "),
    ],
)
def test_show_token_is_unambiguous_and_fills_its_column(token, text):
    enc = encoder.Encoder([token, b"<|endoftext|>"], eot=1)
    assert streaming.token_column(enc, 0) == text
    assert streaming.display_width(text) == 11
    assert streaming.token_column(enc, 1) == "end of text"


def test_show_percent_rounds_to_neither_0_nor_100():
    shown = {
        0.0: "0.0%",
        1e-9: "<0.1%",
        4.9e-4: "<0.1%",
        6e-4: "0.1%",
        0.5: "50.0%",
        0.999: "99.9%",
    }
    shown |= {0.9996: ">99.9%", 1 - 1e-9: ">99.9%", 1.0: "100.0%"}
    assert {p: streaming.percent(p) for p in shown} == shown
