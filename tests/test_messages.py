"""messages.py: messages that end no program, text that a terminal may have."""

import errno
import io
import sys

import pytest

from gpt2_support import messages


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Full(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


CONTROLS = "a\x00\x1b[2J\r\x7f\x9b1m\u202eb\tc\né€😀"
ESCAPED = r"a\x00\x1b[2J\r\x7f\x9b1m\u202eb" + "\tc\né€😀"


@pytest.mark.parametrize("name, show", [("stdout", messages.write), ("stderr", messages.info)])
def test_control_characters_are_escaped_on_a_terminal_alone(name, show, monkeypatch):
    for stream, expected in ((Terminal(), ESCAPED), (io.StringIO(), CONTROLS)):
        monkeypatch.setattr(sys, name, stream)
        show(CONTROLS)
        show(CONTROLS, end="")
        assert stream.getvalue() == f"{expected}\n{expected}"


def test_info_of_a_closed_standard_error_does_not_go_to_standard_output(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    messages.info("lost")
    assert capsys.readouterr().out == ""


def test_info_that_cannot_be_printed_is_no_error(monkeypatch):
    closed = Terminal()
    closed.close()
    for stream in (Full(), closed):
        monkeypatch.setattr(sys, "stderr", stream)
        messages.info("lost")


def test_write_names_the_stream_that_failed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="No space left on device: 'standard output'"):
        messages.write("text")
    monkeypatch.setattr(sys, "stdout", None)
    messages.write("text")  # closed: nobody wants it
