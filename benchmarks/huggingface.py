"""The peer that generates: Hugging Face's transformers, with its key/value cache."""

import time

import torch
import transformers

import worker
from worker import Task


def load(job):
    """Return the model of the job, converted from ours, in float32, and the prompt (1, T)."""
    torch.set_num_threads(job.threads)
    folder = job.folder / f"{job.model}-hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # never stop
    model.generation_config.pad_token_id = 0
    prompt = worker.prompt_ids(job.n_prompt, model.config.vocab_size)
    return model, torch.tensor([prompt])


def generate(model, prompt, n_tokens, **options):
    """Return the n_tokens most probable ids after each prompt (B, T) -> (B, n_tokens)."""
    mask = torch.ones_like(prompt)
    with torch.inference_mode():
        out = model.generate(
            prompt, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False, **options
        )
    return out[:, prompt.shape[1] :]


def decode(job):
    """Continue a prompt by n_tokens; with n_samples, so many copies of it at once."""
    model, prompt = load(job)
    prompts, ids = prompt.repeat(job.n_samples, 1), []

    def work(n_tokens=job.n_tokens):
        ids[:] = generate(model, prompts, n_tokens).T.flatten().tolist()

    return Task(work, lambda: work(min(2, job.n_tokens)), lambda: ids)


class Clock:
    """A streamer, which `generate` tells of the prompt and of each token, that notes the time."""

    def __init__(self):
        self.times = []

    def put(self, ids):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def decode_late(job):
    """Continue a long prompt; only the tokens after the first one are timed."""
    model, prompt = load(job)
    ids = []

    def work(n_tokens=job.n_tokens + 1):
        clock = Clock()
        ids[:] = generate(model, prompt, n_tokens, streamer=clock)[0].tolist()
        _, first, *_, last = clock.times
        return last - first

    return Task(work, lambda: work(2), lambda: ids)


def forward(job):
    """Compute the logits after every token of a prompt."""
    model, prompt = load(job)
    out = []

    def work():
        with torch.inference_mode():
            out[:] = model(prompt).logits[0, -1, :8].tolist()

    return Task(work, check=lambda: out)


def startup(job):
    """Generate one token after "x", tokenizer and all."""
    torch.set_num_threads(job.threads)
    folder = job.folder / f"{job.model}-hf"

    def work():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = generate(model, tokenizer("x", return_tensors="pt").input_ids, 1)
        print(tokenizer.decode(ids[0]))

    return Task(work)


def convert(job):
    """Read a model and write it anew."""

    def work():
        folder = job.folder / f"{job.model}-hf"
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.save_pretrained(job.folder / "copied-hf")

    return Task(work)


if __name__ == "__main__":
    worker.main(
        decode=decode, decode_late=decode_late, forward=forward, startup=startup, convert=convert
    )
