"""Made-up items of LAMBADA and of HellaSwag, with all that the real ones have to trip over.

from task_items import write_items

lambada, hellaswag = write_items(folder, n=40)
"""

import json

import numpy as np

NAMES = ["Lily", "Tom", "the dog", "Mom", "a big bear", "Ana's cat", "3 birds", "Renée"]
VERBS = ["saw", "played with", "wanted", "found", "did not like", "ran to", "hugged"]
THINGS = ["the ball", "a red box", "her toy", "the park", "an apple", "some sand", "it all"]
LAST = ["happy", "girl", "girl", "Lily", "unbelievably", "café", "Dodgson", "it."]
LABELS = ["Removing ice from car", "Playing catch", "Family Life", "Education and Communications"]


def sentence(rng):
    """Return a made-up sentence, without the point at its end."""
    words = [rng.choice(words) for words in (NAMES, VERBS, THINGS)]
    return " ".join(map(str, words))


def passage(rng, n):
    """Return n made-up sentences."""
    return " ".join(f"{sentence(rng)}." for _ in range(n))


def lambada_items(n, seed=0, longest=50):
    """Return n items: one of a word, some of spaces and line ends, long ones, easy ones."""
    rng = np.random.default_rng(seed)
    texts = [
        f"{passage(rng, int(rng.integers(1, longest if i % 8 == 6 else 9)))} {sentence(rng)} "
        + ("and" if i % 3 else "every day. One day, there was a little")
        + f" {rng.choice(LAST)}"
        for i in range(n)
    ]
    texts[:5] = ["hello", f"{texts[1]} ", texts[2].replace(". ", ".\n"), texts[3] + "'s",
                 texts[4].replace(" ", "  ")]  # fmt: skip
    return [{"text": text} for text in texts[:n]]


def hellaswag_items(n, seed=0, longest=40):
    """Return n items; some have brackets, double spaces, no ctx_b, capitals; some are long."""
    rng = np.random.default_rng(seed)
    items = []
    for i in range(n):
        a = passage(rng, int(rng.integers(1, longest if i % 8 == 6 else 4)))
        b = str(rng.choice(NAMES))
        endings = [f"{rng.choice(VERBS)} {passage(rng, int(rng.integers(1, 3)))}" for _ in range(4)]
        if i % 4 == 0:
            a, b = f"[header] How to play [title] {a} [step] {a}", ""
            endings = [f"{e} [substeps] {e} [title]  Again." for e in endings]
        if i % 4 == 1:
            b = b.upper()
            endings[1] = f" {endings[1]} "
        items.append({
            "ind": i, "activity_label": str(rng.choice(LABELS)), "ctx_a": a, "ctx_b": b,
            "ctx": f"{a} {b}".strip(), "endings": endings, "label": int(rng.integers(4)),
        })  # fmt: skip
    return items


def write_items(folder, n, **others):
    """Write n items of each to files of JSON lines; return their paths."""
    paths = []
    for name, items in (("lambada", lambada_items), ("hellaswag", hellaswag_items)):
        paths.append(folder / f"{name}.jsonl")
        lines = [json.dumps(item, ensure_ascii=False) for item in items(n, **others)]
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths
