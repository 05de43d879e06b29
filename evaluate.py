"""How well a model predicts: a text, LAMBADA, HellaSwag, each token of a sentence.

    from evaluate import Request, evaluate, score

    result = evaluate(params, tokens, token_lengths(enc), seq_len=1024, stride=512)
    print(result)                             # nats per token, perplexity, bits per byte
    ((first, second),) = score(gpt2, params, [Request(context, [ending, other])])
    first.nats.sum() < second.nats.sum()      # the first ending is the likelier one

Texts. `evaluate`, which train.py validates with, reads a text in `Windows` and returns an
`Evaluation`. Multiple choice. `score` returns a `Score` for each ending of each `Request`,
`load_items` reads a file of LAMBADA or HellaSwag.

The modules `evaluation`, `scoring` and `tasks` of gpt2_support define these. The command line is
`python evaluate.py --help`; installed it is `gpt2-evaluate`, and there is no module of this name,
which is that of a package of Hugging Face.
"""

from functools import partial

import encoder
import gpt2
from gpt2_support.datasets import token_lengths
from gpt2_support.evaluation import Evaluation, Windows
from gpt2_support.evaluation_cli import run_evaluation
from gpt2_support.scoring import Request, Score, score
from gpt2_support.tasks import load_items
from train import evaluate, evaluate_command

main = partial(run_evaluation, gpt2, encoder)

__all__ = [
    "Evaluation",
    "Request",
    "Score",
    "Windows",
    "evaluate",
    "load_items",
    "main",
    "score",
    "token_lengths",
]

if __name__ == "__main__":
    evaluate_command()
