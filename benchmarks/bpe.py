"""The peers that tokenize: tiktoken encodes, Hugging Face's tokenizers learns vocabularies."""

import hashlib

import numpy as np

import worker
from gpt2_support.formats import token_table
from worker import Task


def read_text(job, name="text.txt"):
    return (job.folder / name).read_text(encoding="utf-8")


def make_encoding(job):
    """Return tiktoken's Encoding of our token table, with its own split pattern of GPT-2."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    tokens, eot = token_table.load_tokenizer(job.folder / job.model)
    ranks = {token: id for id, token in enumerate(tokens) if id != eot}
    special = {token_table.EOT_TEXT: eot}
    return tiktoken.Encoding(
        "ours", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
    )


def encode(job):
    """Encode a text, on one thread."""
    encoding, text, state = make_encoding(job), read_text(job), {}

    def work():
        state["ids"] = encoding.encode_ordinary(text)

    def check():
        ids = np.array(state["ids"], np.uint16)
        return [len(ids), hashlib.sha256(ids.tobytes()).hexdigest()]

    return Task(work, check=check)


def encode_file(job):
    """Encode a text file to a file of ids, on one thread."""

    def work():
        text = read_text(job, "file.txt")
        ids = make_encoding(job).encode_to_numpy(text, disallowed_special=())
        ids.astype(np.uint16).tofile(job.folder / "tiktoken.bin")

    return Task(work)


def train_bpe(job):
    """Learn a vocabulary from a text, on all cores."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    documents = read_text(job).split(token_table.EOT_TEXT)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def work():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = split
        options = {"special_tokens": [token_table.EOT_TEXT], "initial_alphabet": split.alphabet()}
        trainer = trainers.BpeTrainer(vocab_size=job.n_vocab, show_progress=False, **options)
        tokenizer.train_from_iterator(documents, trainer)

    return Task(work, warm=lambda: None)


if __name__ == "__main__":
    worker.main(encode=encode, encode_file=encode_file, train_bpe=train_bpe)
