"""Text as it is made: samples written, stop strings, the table of --explain."""

from __future__ import annotations

import shutil
import time
import unicodedata
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpt2_support import blas
from gpt2_support.messages import info, write

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    import argparse
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Protocol, TypeAlias, runtime_checkable

    from numpy import ndarray

    @runtime_checkable
    class Decoder(Protocol):
        """Decodes ids one at a time, as encoder.StreamDecoder does."""

        def feed(self, id: int) -> str: ...
        def flush(self) -> str: ...

    @runtime_checkable
    class Encoder(Protocol):
        """What is needed of an encoder.Encoder."""

        tokens: list[bytes]
        eot: int | None

        def stream(self) -> Decoder: ...

    Probs: TypeAlias = Callable[[ndarray], tuple[ndarray, ndarray]]  # logits -> ids, probabilities


class TextStream:
    """Turns ids into text that can be shown at once, until end-of-text or a stop string.

    It holds back bytes that are not yet a whole character, and text that may still become one of
    `stops`. `feed(id)` and `flush()` return the text that is ready; `done` is True at the end.
    """

    def __init__(self, enc: Encoder, stops: Sequence[str] = ()) -> None:
        self.eot, self.stops, self.done = enc.eot, stops, False
        self.decoder, self.held = enc.stream(), ""

    def feed(self, id: int) -> str:
        """Return the text, possibly none, that is ready after one more id."""
        if self.done or id == self.eot:
            return self.flush()
        return self._release(self.decoder.feed(id))

    def flush(self) -> str:
        """Return the text that was held back; there will be no more."""
        text = "" if self.done else self._release(self.decoder.flush()) + self.held
        self.held, self.done = "", True
        return text

    def _release(self, text: str) -> str:
        self.held += text
        starts = [(stop, self.held.find(stop)) for stop in self.stops]
        ends = [(start + len(stop), start) for stop, start in starts if start >= 0]
        if ends:  # the stop string that ends first, however the text came in tokens
            text, self.held, self.done = self.held[: min(ends)[1]], "", True
            return text
        n_held = max((overlap(self.held, stop) for stop in self.stops), default=0)
        ready = len(self.held) - n_held
        text, self.held = self.held[:ready], self.held[ready:]
        return text


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    lengths = range(min(len(text), len(stop)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


class Step(NamedTuple):
    """What a token adds to each sample: text, and the lines of --explain."""

    texts: list[str]
    lines: list[list[str]]


def stream(
    steps: Iterable[tuple[list[int], list[ndarray]]],
    enc: Encoder,
    n_samples: int,
    stops: Sequence[str],
    probs: Probs | None,
    timestamps: list[float],
) -> Iterator[Step]:
    """Yield a Step for each token of n_samples samples, and one for the text held back.

    `steps` yields ids and logits, as gpt2.decode does. `probs`, for --explain, maps logits to ids
    and their probabilities. `timestamps` receives the time of the start and of each token.
    """
    streams = [TextStream(enc, stops) for _ in range(n_samples)]
    timestamps.append(time.perf_counter())
    for ids, logits in steps:
        lines: list[list[str]] = [[] for _ in streams]
        for b, text in enumerate(streams):
            if probs and not text.done:
                lines[b].append(explain(enc, ids[b], *probs(logits[b])))
        if all(id == enc.eot for id in ids):
            yield Step([""] * n_samples, lines)
            break
        timestamps.append(time.perf_counter())
        yield Step([text.feed(id) for text, id in zip(streams, ids, strict=True)], lines)
        if all(text.done for text in streams):
            return
    yield Step([text.flush() for text in streams], [[] for _ in streams])


def write_samples(
    steps: Iterable[tuple[list[int], list[ndarray]]],
    enc: Encoder,
    args: argparse.Namespace,
    probs: Probs | None,
    n_prompt: int,
) -> str:
    """Write samples to standard output, and what --explain and --stats ask for to standard error.

    A single sample is written as it is made, after the line that explains each token. Several are
    written one after another at the end. Ctrl-C ends them early, and the program unless it is
    interactive. Returns the text of the first sample.
    """
    n, header = args.n_samples, "drawn              | most probable"
    header += " at temperature 1" * (not args.temperature)
    lines: list[list[str]] = [[header] if probs else [] for _ in range(n)]
    texts: list[list[str]] = [[] for _ in range(n)]
    live = n == 1 and not probs
    timestamps: list[float] = []
    try:
        for step in stream(steps, enc, n, args.stop, probs, timestamps):
            for b in range(n):
                texts[b].append(step.texts[b])
                lines[b] += step.lines[b]
            if live:
                write(step.texts[0], end="")
            elif n == 1:
                print_lines(lines[0])
    except KeyboardInterrupt:
        if not args.interactive:
            raise
    finally:  # after Ctrl-C, what is there
        if texts[0]:
            write_rest([""] if live else ["".join(text) for text in texts], lines)
    if args.stats:
        print_stats(n_prompt, n, timestamps)
    return "".join(texts[0])


def write_rest(texts: list[str], lines: list[list[str]]) -> None:
    """Write what is not yet written of each sample: lines of --explain, then its text."""
    for b, text in enumerate(texts):
        if len(texts) > 1:
            info(f"--- sample {b + 1} of {len(texts)} ---")
        print_lines(lines[b])
        write(text)


def explain(enc: Encoder, id: int, ids: ndarray, probs: ndarray) -> str:
    """Return a line: the id drawn, its probability, then the most probable of `ids`.

    The line is as long as the terminal is wide.
    """
    n_shown = max(1, (shutil.get_terminal_size().columns - 19) // 20)
    order = [*np.flatnonzero(ids == id), *np.argsort(-probs, kind="stable")[:n_shown]]
    drawn, *others = (
        f"{token_column(enc, int(ids[i]))} {percent(float(probs[i])):>6}" for i in order
    )
    return f"{drawn} | {'  '.join(others)}"


def token_column(enc: Encoder, id: int, width: int = 11) -> str:
    """Return what `token_text` does, filled or cut to `width` columns of a terminal."""
    text = token_text(enc, id)
    while display_width(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text + " " * (width - display_width(text))


def token_text(enc: Encoder, id: int) -> str:
    r"""Return a token as Python would write it: ' cat', '\n', b'\xe2' for a part of a character."""
    try:
        text = repr(enc.tokens[id].decode())
    except UnicodeDecodeError:
        text = repr(enc.tokens[id])
    return "end of text" if id == enc.eot else text


def display_width(text: str) -> int:
    """Return the width of a text in a terminal, where a Chinese character takes two columns."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def percent(p: float) -> str:
    """Return a probability in percent; 0% and 100% only if it is that exactly."""
    if 0 < p < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= p < 1 else f"{p:.1%}"


def print_lines(lines: list[str]) -> None:
    """Write lines to standard error, and forget them."""
    for line in lines:
        info(line)
    lines.clear()


def print_stats(n_prompt: int, n_samples: int, timestamps: list[float]) -> None:
    """Report the speed of reading the prompt and of the tokens after the first one."""
    if len(timestamps) < 2:
        info("no token was generated")
        return
    prefill, decode = timestamps[1] - timestamps[0], timestamps[-1] - timestamps[1]
    n = (len(timestamps) - 2) * n_samples
    text = f"prefill: {n_prompt} tokens in {prefill:.3f} s, {n_prompt / prefill:.1f} tokens/s"
    if n:
        text += f"; decode: {n} tokens in {decode:.3f} s, {n / decode:.1f} tokens/s"
    info(text)
    info(f"BLAS: {blas.kernels()} kernels, threads: {blas.get_threads()}")
