"""Draw how the cost grows: of a token over the context, of a training step over the model's size.

    python benchmarks/growth.py --json growth.json --plot growth.png

Ours and PyTorch's (Hugging Face's for tokens), by the programs that run.py also starts. A peer
that is not installed is left out. 355M takes 10 GB of memory; --models chooses.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import run
from items import Shape

SHAPES = {
    "names": Shape(257, 16, 16, 4, 1),
    "recipe": Shape(257, 64, 128, 4, 4),
    "stories": Shape(4096, 256, 216, 6, 5),
    "124M": Shape(50257, 1024, 768, 12, 12),
    "355M": Shape(50257, 1024, 1024, 16, 24),
}
CONTEXTS = (1, 128, 256, 512, 768, 1000)
N_TOKENS = 16  # that are timed after each context
STEP_TOKENS = 256  # in the batch of a training step
MAKE = """
import json, shutil, sys
from pathlib import Path
import train
from gpt2_support import weights
from gpt2_support.formats import llmc
from gpt2_support.params import Config
folder, models, stories = json.loads(sys.argv[1])
for name, shape in models.items():
    llmc.save_params(Path(folder, name, "model.bin"), train.init_params(Config(**shape)))
for name in {"124M"} & set(models):  # the tokens of the peer come from this; any table will do
    shutil.copyfile(stories, Path(folder, name, "tokenizer.bin"))
    weights.convert(Path(folder, name), Path(folder, name + "-hf"), "hf")
"""


def measure(args, folder):
    """Return {"token": {who: {context: s}}, "step": {who: {parameters: s}}}."""
    bench = run.Bench(args, folder, run.limit_threads(args.threads))
    models = {name: vars(SHAPES[name]) for name in args.models}
    stories = str(run.ROOT / "models" / "stories" / "tokenizer.bin")
    make = json.dumps([str(folder), models, stories])
    run.run_process([sys.executable, "-c", MAKE, make], bench.env)
    token = {who: {} for who in ("ours", "huggingface") if who in bench.pythons}
    for context in CONTEXTS if "124M" in models else ():
        job = {"work": "decode_late", "n_prompt": context, "n_tokens": N_TOKENS, "model": "124M"}
        for who in token:
            token[who][context] = time_job(bench, who, job, context) / N_TOKENS
    step = {who: {} for who in ("ours", "pytorch") if who in bench.pythons}
    for name in args.models:
        T = min(64, SHAPES[name].n_ctx)
        job = {"work": "step", "model": name, "B": STEP_TOKENS // T, "T": T}
        for who in step:
            step[who][SHAPES[name].n_params] = time_job(bench, who, job, name)
    return {"token": token, "step": step, "machine": bench.describe()}


def time_job(bench, who, job, what):
    """Return the median seconds of a party for a job, and tell them."""
    measured = run.run_json(bench.start(who, job | {"seconds": bench.args.seconds}), bench.env)
    seconds = median(measured["seconds"])
    run.note(f"{job['work']} {what}: {run.PARTIES[who].label} {seconds:.4g} s")
    return seconds


def plot(record, path):
    """Draw both growths, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), dpi=120, layout="constrained")
    for axes, key, scale in ((left, "token", 1e3), (right, "step", 1)):
        for who, points in record[key].items():
            x, y = [int(at) for at in points], [scale * seconds for seconds in points.values()]
            axes.plot(x, y, "o-", label=run.PARTIES[who].label)
        axes.set_ylim(bottom=0) if key == "token" else axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    left.set(xlabel="tokens in the context, 124M", ylabel="ms a token")
    right.set(xlabel="parameters", ylabel=f"s a training step of {STEP_TOKENS} tokens")
    figure.savefig(path, format="png", bbox_inches="tight")
    plt.close(figure)


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=[*SHAPES], default=[*SHAPES], help="without it, all")
    add("--seconds", type=float, default=2.0, help="to measure each point at least")
    add("--threads", type=int, help="cores that everyone may use; without it, all")
    add("--peer_python", type=Path, help="an interpreter that has peers which this one lacks")
    add("--json", type=Path, help="file for all that was measured")
    add("--plot", type=Path, help="file for the picture (PNG)")
    add("--from_json", type=Path, help="measure nothing: the picture of such a file")
    return parser.parse_args(argv)


def main():
    record = run.keep_record(parse_args(), measure, plot)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    run.start(main)
