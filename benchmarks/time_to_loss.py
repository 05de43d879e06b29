"""Train beside nanoGPT's own program, and draw the validation loss over the time on the clock.

    python benchmarks/time_to_loss.py --nanogpt nanoGPT --json loss.json --plot loss.png

nanoGPT is a checkout of github.com/karpathy/nanoGPT, which needs PyTorch. Its program runs with the
settings that its README gives for a laptop: 4 layers, 128 channels, windows of 64 characters of
Tiny Shakespeare, 2,000 steps of 12 windows. Ours trains a model of that shape on the same text
twice: for --steps, and for as many steps as take nanoGPT's time. Rates, momentum and warm-up are
for so short a run. Both programs validate on 15,360 tokens at a time. The clock starts with
the program and counts what it does besides: its start, its validations, its files.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import run

LAPTOP = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
OURS = (
    "--n_vocab 257 --n_layer 4 --n_head 4 --n_embd 128 --n_ctx 64 --seq_len 64 --batch_size 12 "
    "--lr 0.02 --muon_lr 0.05 --momentum 0.85 --warmup 3 --eval_tokens 15361 "
    "--sample_every 1000000 --save_every 1000000"
)
NANOGPT_LOSS = """
import sys
import numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load(sys.argv[1] + "/ckpt.pt", weights_only=False)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
ids = torch.from_numpy(np.fromfile("data/shakespeare_char/val.bin", np.uint16).astype(np.int64))
losses = []
with torch.no_grad():
    for at in range(0, len(ids) - 1, 64):  # windows one after the other, as ours validates
        x, y = ids[at : at + 64][: len(ids) - 1 - at], ids[at + 1 : at + 65]
        losses.append((float(model(x[None], y[None])[1]), len(y)))
print(sum(loss * n for loss, n in losses) / sum(n for _, n in losses))
"""


def timed_losses(argv, pattern, cwd, env):
    """Run a program; return its seconds, and [(seconds, step, validation loss)] as it tells them.

    `pattern` finds step and loss in what it prints.
    """
    start, points, last = time.perf_counter(), [], b""
    with subprocess.Popen(
        argv, cwd=cwd, env=env | {"PYTHONUNBUFFERED": "1"}, bufsize=0,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        while chunk := process.stdout.read(1 << 16):
            *lines, last = re.split(rb"[\r\n]", last + chunk)
            for match in filter(None, (re.search(pattern, line) for line in lines)):
                seconds = time.perf_counter() - start
                points.append((seconds, int(match[1]), float(match[2])))
                run.note(f"{seconds:.0f} s: step {points[-1][1]}, loss {points[-1][2]}")
    if process.returncode:
        raise run.Problem(f"{argv[1]}: {last.decode(errors='replace') or process.returncode}")
    return time.perf_counter() - start, points


def train_nanogpt(checkout, python, folder, env):
    """Run nanoGPT's program; return its curve, and its loss on the whole validation text."""
    out = str(folder / "nanogpt")
    argv = [
        python,
        "train.py",
        *LAPTOP.split(),
        f"--out_dir={out}",
        "--always_save_checkpoint=True",
    ]
    seconds, points = timed_losses(argv, rb"^step (\d+): .*val loss ([\d.]+)", checkout, env)
    evaluate = run.run_process([python, "-c", NANOGPT_LOSS, out], env, checkout)
    return {"seconds": seconds, "points": points, "loss": float(evaluate.split()[-1])}


def train_ours(folder, env, steps):
    """Run our train.py; return its curve, and its loss on the whole validation text."""
    texts = ["--data", str(folder / "train.txt"), "--val_data", str(folder / "val.txt")]
    out = str(folder / f"ours-{steps}")
    argv = [sys.executable, "train.py", *texts, *OURS.split(), "--out", out, "--steps", str(steps)]
    argv += ["--eval_every", str(-(-steps // 3))]
    pattern = rb"step (\d+): validation loss ([\d.]+)"
    seconds, points = timed_losses(argv, pattern, run.ROOT, env)
    argv = [sys.executable, "train.py", "--eval_only", "--init", out, "--data", texts[3]]
    evaluate = run.run_process(argv, env)
    loss = float(re.search(r"([\d.]+) nats", evaluate)[1])
    return {"seconds": seconds, "points": points, "loss": loss, "steps": steps}


def measure(args, folder):
    """Return {who: {"seconds", "points", "loss"}} and the machine."""
    bench = run.Bench(args, folder, run.limit_threads(args.threads))
    if "pytorch" not in bench.pythons:
        raise run.Problem("nanoGPT needs PyTorch: install torch, or give --peer_python")
    env = bench.env | {"GPT2_DATASETS_DIR": str(folder / "datasets")}
    python, checkout = bench.pythons["pytorch"], args.nanogpt.resolve()
    data = checkout / "data" / "shakespeare_char"
    if args.text:
        (data / "input.txt").write_bytes(args.text.read_bytes())
    run.run_process([python, str(data / "prepare.py")], env)
    text = (data / "input.txt").read_text(encoding="utf-8")
    n = int(len(text) * 0.9)  # as nanoGPT cuts it
    (folder / "train.txt").write_text(text[:n], encoding="utf-8")
    (folder / "val.txt").write_text(text[n:], encoding="utf-8")
    runs = {"nanoGPT": train_nanogpt(checkout, python, folder, env)}
    runs["ours, few steps"] = short = train_ours(folder, env, args.steps)
    steps = round(args.steps * runs["nanoGPT"]["seconds"] / short["seconds"] * 0.98)
    runs["ours, nanoGPT's time"] = train_ours(folder, env, steps)
    return {"runs": runs, "machine": bench.describe()}


def plot(record, path):
    """Draw all curves over seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    for who, done in record["runs"].items():
        seconds, steps, losses = zip(*done["points"], strict=True)
        axes.plot(seconds, losses, "o-", ms=4, label=f"{who}: {steps[-1]:,} steps")
    axes.axhline(record["runs"]["nanoGPT"]["points"][-1][2], color="0.6", lw=1, zorder=0)
    axes.set(xlabel="seconds since the program was started", xlim=(0, None), ylim=(None, 3))
    axes.set(ylabel="validation loss, nats per character")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")
    plt.close(figure)


def table(record):
    """Return the end of each run as a Markdown table."""
    lines = ["| program | steps | seconds | loss, whole validation text |", "|---|---|---|---|"]
    for who, done in record["runs"].items():
        steps, seconds = done["points"][-1][1], done["seconds"]
        lines.append(f"| {who} | {steps:,} | {seconds:.1f} | {done['loss']:.4f} |")
    return "\n".join(lines)


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--nanogpt", type=Path, help="a checkout of nanoGPT")
    add("--text", type=Path, help="Tiny Shakespeare; without it, nanoGPT downloads it")
    add("--steps", type=int, default=500, help="of our first run; without it, 500")
    add("--threads", type=int, help="cores that everyone may use; without it, all")
    add("--peer_python", type=Path, help="an interpreter that has PyTorch, if this one has not")
    add("--json", type=Path, help="file for all that was measured")
    add("--plot", type=Path, help="file for the picture (PNG)")
    add("--from_json", type=Path, help="measure nothing: table and picture of such a file")
    args = parser.parse_args(argv)
    if not (args.from_json or args.nanogpt):
        parser.error("give --nanogpt, the folder of a checkout of nanoGPT")
    if args.nanogpt and not (args.nanogpt / "train.py").is_file():
        parser.error(f"--nanogpt {args.nanogpt}: there is no train.py in it")
    return args


def main():
    print(table(run.keep_record(parse_args(), measure, plot)))


if __name__ == "__main__":
    run.start(main)
