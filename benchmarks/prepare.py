"""Make what the work items need in a folder: a model of random weights, texts, other formats.

    python prepare.py '{"folder": ..., "data": ..., "sizes": "FULL", "items": [...]}'

Nothing is downloaded. The text is TinyStories where the reference data is present, and otherwise
made up; so are the names, and the tokenizer is then the bundled model's. Prints, as JSON, what was
taken.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import encoder
import items
import train
from gpt2_support import corpus, weights
from gpt2_support.formats import crc32c, llmc, token_table
from gpt2_support.params import Config

ROOT = Path(__file__).resolve().parent.parent


def main():
    job = json.loads(sys.argv[1])
    folder, data, sizes = Path(job["folder"]), Path(job["data"]), getattr(items, job["sizes"])
    taken = {"tokenizer": make_models(folder, data, sizes)}
    if "convert_openai" in job["items"]:
        make_openai(folder)
    if any(item.letter == "g" and item.name in job["items"] for item in items.make_items(sizes)):
        taken["text"] = make_texts(folder, data, sizes)
    if "names" in job["items"]:
        taken["names"] = make_names(folder, data)
    if {"recipe", "recipe_step"} & set(job["items"]):
        taken["recipe"] = make_recipe(folder, data, sizes)
    print(json.dumps(taken))


def make_models(folder, data, sizes):
    """Write `gpt2` and `stories`, of random weights, and for Hugging Face `gpt2-hf`, `stories-hf`.

    Their shapes stay as they are, so that figures of all versions can be compared.
    """
    bundled = ROOT / "models" / "stories" / "tokenizer.bin"
    tables = [ROOT / "models" / "124M" / "tokenizer.bin", data / "gpt2" / "gpt2_tokenizer.bin"]
    tables = [path for path in tables if path.exists() and sizes.gpt2.n_vocab == 50257]
    for name, table in (("gpt2", (tables or [bundled])[0]), ("stories", bundled)):
        params = train.init_params(Config(**vars(getattr(sizes, name))))
        for key, array in params.named.items():
            if key.startswith("model/h") and key.endswith("/w"):
                array *= 4  # with weights as small as at the start a model repeats one token
        llmc.save_params(folder / name / "model.bin", params)
        shutil.copyfile(table, folder / name / "tokenizer.bin")
        weights.convert(folder / name, folder / f"{name}-hf", "hf")
    return "GPT-2's" if tables else "the bundled model's, of 4,096 tokens"


def make_openai(folder):
    """Write `openai`, the model as OpenAI's own code saves it, with the writer of our tests."""
    sys.path.append(str(ROOT / "tests"))
    import openai_files

    def masked_crc(data):  # theirs takes the definition at its word, a byte at a time
        return crc32c.masked_crc32c(data).to_bytes(4, "little")

    params = llmc.load_params(folder / "gpt2")
    arrays = {
        name: array.T[None] if name.endswith("/w") else array
        for name, array in params.named.items()
    }
    openai_files.masked_crc = masked_crc
    openai_files.write_checkpoint(folder / "openai", params.config, arrays)
    for name in ("encoder.json", "vocab.bpe"):  # those of another, tiny vocabulary
        (folder / "openai" / name).unlink()


def make_texts(folder, data, sizes):
    """Write `text.txt`, and `file.txt`, which repeats it without <|endoftext|>."""
    path = data / "text" / "tinystories_train.txt"
    if path.exists():
        text, kind = path.read_text(encoding="utf-8")[: sizes.text_bytes], "TinyStories"
    else:
        text, kind = make_up_text(sizes.text_bytes), "made up: syllables, with Zipf's frequencies"
    (folder / "text.txt").write_text(text, encoding="utf-8", newline="\n")
    plain = text.replace(token_table.EOT_TEXT, "")
    n_copies = -(-sizes.file_bytes // len(plain))
    (folder / "file.txt").write_text(plain * n_copies, encoding="utf-8", newline="\n")
    n_bytes = len(text.encode())
    return f"{kind}, {n_bytes / 1e6:.1f} MB; for encode_file {n_copies} times that"


def make_up_text(n_bytes, n_words=20_000):
    """Return about n_bytes of text that resembles English: few words often, many rarely."""
    rng = random.Random(0)
    syllables = [a + b + c for a in "bdfghklmnprstw" for b in "aeiou" for c in ("", "n", "r", "st")]
    words = ["".join(rng.choices(syllables, k=1 + i * 4 // n_words)) for i in range(n_words)]
    weights = [1 / (i + 2) for i in range(n_words)]
    paragraphs, size = [], 0
    while size < n_bytes:
        sentence = rng.choices(words, weights, k=rng.randint(4, 15))
        end = rng.choices([". ", "! ", '." ', f".\n{token_table.EOT_TEXT}\n"], [80, 8, 8, 4])[0]
        paragraphs.append(" ".join(sentence).capitalize() + end)
        size += len(paragraphs[-1])
    return "".join(paragraphs)


def make_names(folder, data):
    """Write `names.bin`, tokens of a vocabulary of bytes."""
    path = data / "text" / "names.txt"
    kind = "makemore's"
    if not path.exists():
        path, kind = folder / "names.txt", "made up"
        rng = random.Random(0)
        names = [
            "".join(rng.choice("bdklmnrst") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))
            for _ in range(30_000)
        ]
        path.write_text("\n".join(names), encoding="utf-8")
    enc = encoder.train("", 257)
    corpus.encode_files(enc, [path], folder / "names.bin", docs="lines")
    return kind


def make_recipe(folder, data, sizes):
    """Write `recipe`, the start of a model, and `recipe.bin`, a text as bytes."""
    params = train.init_params(Config(**vars(sizes.recipe)))
    llmc.save_params(folder / "recipe" / "model.bin", params)
    path, kind = data / "text" / "tinyshakespeare.txt", "Tiny Shakespeare"
    if not path.exists():
        path, kind = folder / "recipe.txt", "made up"
        path.write_text(make_up_text(1_000_000), encoding="utf-8")
    enc = encoder.train("", 257)
    corpus.encode_files(enc, [path], folder / "recipe.bin", docs="file")
    return kind


if __name__ == "__main__":
    main()
