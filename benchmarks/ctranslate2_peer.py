"""The peer that is made for inference: CTranslate2, float32, its model converted from ours."""

import json
import time

import ctranslate2
import numpy as np

import worker
from worker import Task


def load(job):
    """Return the generator of a job's model, and its prompt."""
    folder = job.folder / f"{job.model}-ct2"
    if not folder.exists():
        converter = ctranslate2.converters.TransformersConverter(
            str(job.folder / f"{job.model}-hf")
        )
        converter.convert(str(folder))
    generator = ctranslate2.Generator(
        str(folder), compute_type="float32", inter_threads=1, intra_threads=job.threads
    )
    tokens = vocabulary(folder)
    return generator, [tokens[i] for i in worker.prompt_ids(job.n_prompt, len(tokens))]


def make_generate(job):
    """Return generate(n_samples, n_tokens, **options), which continues the job's prompt by ids."""
    generator, prompt = load(job)

    def generate(n_samples, n_tokens, **options):
        results = generator.generate_batch(
            [prompt] * n_samples,
            max_length=n_tokens,
            min_length=n_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            max_batch_size=n_samples,
            **options,
        )
        return np.transpose([result.sequences_ids[0] for result in results]).ravel().tolist()

    return generate


def decode(job):
    """Continue a prompt by n_tokens; with n_samples, so many copies of it at once."""
    generate, ids = make_generate(job), []

    def work(n_tokens=job.n_tokens):
        ids[:] = generate(job.n_samples, n_tokens)

    return Task(work, lambda: work(min(2, job.n_tokens)), lambda: ids)


def decode_late(job):
    """Continue a long prompt; only the tokens after the first one are timed."""
    generate, ids = make_generate(job), []

    def work(n_tokens=job.n_tokens + 1):
        times = []
        ids[:] = generate(1, n_tokens, callback=lambda step: times.append(time.perf_counter()))
        return times[-1] - times[0]

    return Task(work, lambda: work(2), lambda: ids)


def forward(job):
    """Compute the logits after every token of a prompt."""
    generator, prompt = load(job)
    out = {}

    def work():
        out["logits"] = np.array(generator.forward_batch([prompt]))

    return Task(work, check=lambda: out["logits"][0, -1, :8].tolist())


def vocabulary(folder):
    """Return the tokens of a converted model, by id."""
    return json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    worker.main(decode=decode, decode_late=decode_late, forward=forward)
