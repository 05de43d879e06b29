"""What lm-evaluation-harness, and a plain scorer in PyTorch, make of items: prints JSON.

    python tests/harness.py HF_FOLDER lambada.jsonl hellaswag.jsonl

A process of its own, away from our evaluate.py: the harness imports a package of that name.
The tasks are the harness's own, of the names lambada_openai and hellaswag, on local files.
"""

import contextlib
import json
import os
import sys
import time

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.hellaswag import utils as hellaswag
from transformers import AutoTokenizer, GPT2LMHeadModel

COMMON = {"dataset_path": "json", "num_fewshot": 0}
LAMBADA = {  # as lm_eval/tasks/lambada/lambada_openai.yaml
    "task": "lambada_local",
    "output_type": "loglikelihood",
    "test_split": "test",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
HELLASWAG = {  # as lm_eval/tasks/hellaswag/hellaswag.yaml
    "task": "hellaswag_local",
    "output_type": "multiple_choice",
    "test_split": "test",
    "process_docs": hellaswag.process_docs,
    "doc_to_text": "{{query}}",
    "doc_to_target": "{{label}}",
    "doc_to_choice": "choices",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}


class TimedLM(HFLM):
    """The harness's model, which tells how long it took to tokenize and score."""

    def loglikelihood(self, *args, **kwargs):
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            return super().loglikelihood(*args, **kwargs)
        finally:
            self.seconds = time.perf_counter() - start
            self.cpu_seconds = time.process_time() - cpu_start


def run_harness(model, tokenizer, lambada, hellaswag):
    """Return the figures and, for each item, [[log-likelihood, is greedy], ...] of its endings."""
    lm = TimedLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu")
    out = {}
    for config, path in ((LAMBADA, lambada), (HELLASWAG, hellaswag)):
        task = config | COMMON | {"dataset_kwargs": {"data_files": {"test": path}}}
        done = simple_evaluate(lm, tasks=[task], task_manager=TaskManager(), bootstrap_iters=100)
        name = config["task"]
        samples = sorted(done["samples"][name], key=lambda sample: sample["doc_id"])
        out[name.removesuffix("_local")] = {
            "figures": {key: x for key, x in done["results"][name].items() if "," in key},
            "scores": [[list(r) for r in sample["filtered_resps"]] for sample in samples],
            "seconds": lm.seconds,
            "cpu_seconds": lm.cpu_seconds,
        }
    return out


@torch.no_grad()
def run_llmc(model, tokenizer, path):
    """Return, for each item, [[log-likelihood, tokens], ...] of its endings in llm.c's way."""
    with open(path, encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    scores = []
    for item in items:
        context = tokenizer(item["ctx"]).input_ids
        scores.append([])
        for ending in item["endings"]:
            ids = torch.tensor(tokenizer(" " + ending).input_ids)
            row = torch.tensor([context + ids.tolist()])[:, -model.config.n_positions - 1 :]
            log_probs = model(row[:, :-1]).logits[0].double().log_softmax(-1)[-len(ids) :]
            total = log_probs.gather(1, ids[:, None]).sum()
            scores[-1].append([float(total), len(ids)])
    return scores


def main(folder, lambada, hellaswag):
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with contextlib.redirect_stdout(sys.stderr):
        out = run_harness(model, tokenizer, lambada, hellaswag)
        out["llm.c"] = run_llmc(model, tokenizer, hellaswag)
    json.dump(out, sys.stdout, default=float)


if __name__ == "__main__":
    main(*sys.argv[1:])
