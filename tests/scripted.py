"""A small vocabulary, and models for the tests of the command line: one knows a text by heart."""

import numpy as np

import encoder
from gpt2_support.formats import llmc, token_table
from gpt2_support.params import Config, Params

EOT = 259
TOKENS = [*(bytes([byte]) for byte in range(256)), b" t", b"he", b" the", b"<|endoftext|>"]
ENC = encoder.Encoder(TOKENS, EOT)


def save_model(folder, params, tokens=TOKENS, eot=EOT):
    folder.mkdir(parents=True, exist_ok=True)
    llmc.save_params(folder / "model.bin", params)
    token_table.save_tokenizer(folder / "tokenizer.bin", tokens, eot)
    return folder


def script_model(folder, script, n_ctx=64):
    """Write a model that knows a text by heart: after position t comes token t + 1 of the script.

    The branches add nothing, and the position's embedding, which is that of the token to come,
    outweighs the token's own.
    """
    params = Params(Config(len(TOKENS), n_ctx, 64, 2, 1))
    wte = np.random.default_rng(2).standard_normal((len(TOKENS), 64))
    wte -= wte.mean(-1, keepdims=True)
    params.wte[:] = 10 * wte / np.linalg.norm(wte, axis=-1, keepdims=True)
    ids = [*ENC.encode(script), EOT]
    params.wpe[: len(ids) - 1] = 100 * params.wte[ids[1:]]
    params.ln_f.g[:] = 1
    return save_model(folder, params)
