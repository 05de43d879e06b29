"""pictures.py: a text coloured by its loss, a table of candidates, attention, a heat map."""

import re

import numpy as np
import pytest
from helpers import normal

import encoder
from gpt2_support import pictures

TOKENS = [b"a", b" <b>", b"\n", b"\xe2", b" $x$", b"<|endoftext|>"]
ENC = encoder.Encoder(TOKENS, 5)


def shown(html):
    """The text of a page, without its tags."""
    return re.sub("<[^>]*>", "", html._repr_html_())


def test_token_strip_colours_tokens_by_their_bits():
    strip = pictures.token_strip(ENC, [5, 0, 1, 2, 4], np.log([1, 2, 1024, 4096]))
    shades = re.findall(r"background: rgba\(213, 94, 0, ([\d.]+)\)", strip._repr_html_())
    assert [float(shade) for shade in shades] == [0, 0, 0.085, 0.85, 0.85]
    assert shown(strip) == "&lt;|endoftext|&gt;a &lt;b&gt;↵ $x$"
    assert "&#x27; &lt;b&gt;&#x27;: 1.00 bits" in strip._repr_html_()
    assert "mathjax_ignore" in strip._repr_html_()
    assert repr(strip) == r"end of text 0.0  'a' 0.0  ' <b>' 1.0  '\n' 10.0  ' $x$' 12.0"


def test_token_strip_of_other_numbers_has_two_colours():
    strip = pictures.token_strip(ENC, [0, 3], [-2.0, 1.0], label="gradient")
    assert re.findall(r"rgba\([^)]*\)", strip._repr_html_()) == [
        "rgba(0, 114, 178, 0.85)", "rgba(213, 94, 0, 0.425)",
    ]  # fmt: skip
    assert r"b&#x27;\xe2&#x27;: 1.00 gradient" in strip._repr_html_()
    assert "0.0)" in pictures.token_strip(ENC, [0], [0.0], label="nothing")._repr_html_()


def test_token_strip_refuses_another_number_of_losses():
    with pytest.raises(ValueError, match="3 losses for 2 tokens"):
        pictures.token_strip(ENC, [0, 1], [1, 2, 3])


def test_candidates_are_the_most_probable_tokens():
    logits = np.log([[0.1, 0.6, 0.3], [0.5, 0.25, 0.25]])
    table = pictures.candidates(ENC, logits, 2)
    assert repr(table) == "' <b>' 60.0%  '\\n' 30.0%\n'a' 50.0%  ' <b>' 25.0%"
    assert table._repr_html_().count("<tr>") == 2 and table._repr_html_().count("<td") == 4
    assert "&#x27; &lt;b&gt;&#x27; 60.0%" in table._repr_html_()
    assert repr(pictures.candidates(ENC, logits[0], 1)) == "' <b>' 60.0%"


def test_candidates_are_tokens_of_the_tokenizer():
    logits = np.zeros(len(ENC.tokens) + 2)
    logits[-1], logits[1] = 2, 1  # a model may have more ids
    assert repr(pictures.candidates(ENC, logits, 1)).startswith("' <b>' ")


def drawn(figure):
    """The arrays of a figure's images, and its tick labels, after it has been drawn."""
    figure.canvas.draw()
    axes = [ax for ax in figure.axes if ax.images]
    labels = [[tick.get_text() for tick in ax.get_xticklabels()] for ax in axes]
    return [np.asarray(ax.images[0].get_array()) for ax in axes], labels


def test_attention_draws_every_head():
    pytest.importorskip("matplotlib")
    att = abs(normal(4, 2, 3))
    arrays, labels = drawn(pictures.attention(att, ["a", "$b$", "c"]))
    np.testing.assert_array_equal(arrays, att)
    assert labels == [["a", "$b$", "c"]] * 4
    arrays, _ = drawn(pictures.attention(att[0]))
    np.testing.assert_array_equal(arrays, att[:1])
    with pytest.raises(ValueError, match=r"\(3,\)"):
        pictures.attention(np.ones(3))


def test_heat_map_is_white_at_zero():
    pytest.importorskip("matplotlib")
    values = np.array([[1.0, -3.0], [np.nan, 0.0]])
    figure = pictures.heat_map(values, ["h0", "h1"], ["x", "y"], "$x$")
    arrays, labels = drawn(figure)
    np.testing.assert_array_equal(arrays, [values])
    assert figure.axes[0].images[0].get_clim() == (-3, 3)
    assert labels[0] == ["x", "y"] and figure.axes[0].get_title() == "$x$"
    drawn(pictures.heat_map(np.zeros((1, 1))))
    with pytest.raises(ValueError, match="two dimensions"):
        pictures.heat_map(np.ones(3))
