"""How training scales over machines: measure it here, and predict it for a cluster.

    mpiexec -n 2 python benchmarks/scaling.py measure --model 124M --batch_size 8 --seq_len 256
    python benchmarks/scaling.py predict --model 124M 1558M --gbits 10 100 --accum 1 8

`measure` takes training steps on random tokens, as train.py would, and prints one row of a Markdown
table. `predict` prints the step time of N machines that share a batch:

    compute / N + 4 bytes x parameters x 2 (N - 1) / N / bandwidth

It is the time to add up gradients by rings, where each machine sends and receives 2 (N - 1) / N
times the buffer; the latency of the network, which small models feel, is left out.
"""

# isort: off
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpt2_support.params import Config, n_params
from gpt2_support import cli

# isort: on
import time

import numpy as np

import train

CONFIGS = {
    "stories": Config(n_vocab=4096, n_ctx=256, n_embd=216, n_head=6, n_layer=5),
    "124M": Config(),
    "355M": Config(n_embd=1024, n_head=16, n_layer=24),
    "774M": Config(n_embd=1280, n_head=20, n_layer=36),
    "1558M": Config(n_embd=1600, n_head=25, n_layer=48),
}
FLOPS = 160e9  # a second, of a training step of 124M on one machine; see docs/scaling.md
OVERLAPPED = 2 / 3  # of the computation of a step is backward, and hides what is sent meanwhile


# ----------------------------------------------------------------------------------------------
# The model


def flops_per_token(config, seq_len):
    """Return the floating-point operations of training on a token: 6 a parameter, and attention.

    Each weight is used in a product forward and two backward; the scores and the mixed values of
    half the T positions, on average, take as many again for each of their 2 L C T / 2 products.
    """
    n_weights = n_params(config) - config.n_ctx * config.n_embd
    return 6 * n_weights + 6 * config.n_layer * config.n_embd * seq_len


def communication(config, n, bandwidth):
    """Return the seconds to add up the gradients of n machines, at `bandwidth` bytes a second."""
    return 4 * n_params(config) * 2 * (n - 1) / n / bandwidth


def early_part(config):
    """Return the part of a gradient that is sent while earlier layers are computed."""
    early, _ = train.pieces(config, 2)
    sizes = [part.stop - part.start for parts in early.values() for part in parts]
    return sum(sizes) / n_params(config)


def step_time(config, n, compute, bandwidth, overlap=False):
    """Return the seconds of a step, of which one machine alone would compute for `compute`.

    With `overlap`, what is sent early costs nothing as long as the backward pass hides it: the best
    that can be hoped for.
    """
    sending = communication(config, n, bandwidth)
    hidden = min(early_part(config) * sending, OVERLAPPED * compute / n) if overlap else 0
    return compute / n + sending - hidden


def predict(args):
    """Print a table for each model: the step time of N machines on every network."""
    for model in args.model:
        print_table(CONFIGS[model], model, args)
    if args.plot:
        plot(args)


def print_table(config, model, args):
    cases = [(gbits, accum) for gbits in args.gbits for accum in args.accum]
    titles = [f"{gbits:g} Gbit/s, {accum} x" for gbits, accum in cases]
    print(
        f"\n**{model}**, machines of {args.gflops:g} GFLOP/s, steps of 1 or more x {args.windows} "
        f"windows of {args.seq_len} tokens: seconds, efficiency (with overlap)\n\n"
        f"| machines | {' | '.join(titles)} |\n|---:{'|---:' * len(cases)}|"
    )
    for n in args.machines:
        cells = []
        for gbits, accum in cases:
            compute, plain, best = times(config, n, gbits, accum, args)
            seconds = f"{plain:,.0f}" if plain >= 100 else f"{plain:.3g}"
            cells.append(f"{seconds} s, {compute / plain:.0%} ({compute / best:.0%})")
        print(f"| {n} | {' | '.join(cells)} |")


def times(config, n, gbits, accum, args):
    """Return the seconds that each of n machines computes in a step, and those of a step, without
    and with overlap."""
    n_tokens = args.windows * accum * args.seq_len
    compute = n_tokens * flops_per_token(config, args.seq_len) / (args.gflops * 1e9)
    bandwidth = gbits * 1e9 / 8
    steps = [step_time(config, n, compute, bandwidth, overlap) for overlap in (False, True)]
    return compute / n, *steps


def plot(args):
    """Draw the efficiency over the number of machines to the PNG --plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
    for model in args.model:
        for gbits in args.gbits:
            for accum in args.accum:
                found = (times(CONFIGS[model], n, gbits, accum, args) for n in args.machines)
                parts = [compute / plain for compute, plain, _ in found]
                label = f"{model}, {gbits:g} Gbit/s, accumulating {accum}"
                axes.plot(args.machines, parts, ".-", label=label)
    axes.set(xscale="log", xlabel="machines", ylabel="part of the step that computes", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.plot, bbox_inches="tight")
    plt.close(figure)


# ----------------------------------------------------------------------------------------------
# The measurement


def measure(args):
    """Take steps on all ranks, and each part of them by itself; print a row of medians."""
    with train.find_ranks() as ranks:
        run, data, team = set_up(args, ranks)
        alone = train.Team(run.params, run.settings.threads)  # computes, and sends nothing
        grads = team.grads[0]
        update = (run.params, grads, 0.0, 1, run.settings, 1.0, team.share)
        seconds = []
        for number in range(args.steps + 1):
            batches = [data.batch(number)]
            works = {
                "step": lambda b=batches: train.train_step(run, team, b),
                "gradient": lambda b=batches: alone.gradient(run.params, b),
                "sum": lambda: (ranks.start(ranks.add, grads.flat), ranks.wait()),
                "AdamW": lambda: run.optimizer.step(*update),
            }
            seconds.append([clock(ranks, work) for work in works.values()])
        medians = np.median(seconds[1:], axis=0)  # the first also fetches memory
        print_row(args, run, dict(zip(works, medians, strict=True)))


def set_up(args, ranks):
    """Return a new Run, Windows of random tokens and the Team of this rank."""
    config = CONFIGS[args.model]
    rows = args.batch_size // ranks.size
    threads = args.threads or train.choose_threads(rows, args.seq_len, config.n_embd, ranks.cores)
    if args.batch_size % ranks.size or rows % threads:
        given = f"--batch_size {args.batch_size}"
        raise ValueError(
            f"{given} is not shared equally by {ranks.size} ranks of {threads} threads"
        )
    settings = train.Settings(
        batch_size=args.batch_size, seq_len=args.seq_len, ranks=ranks.size, threads=threads
    )
    params = train.init_params(config)
    part = ranks.part(params.flat.size) if args.shard else None
    run = train.Run(params, settings, optimizer=train.AdamW(params, part))
    n_tokens = (args.steps + 2) * args.batch_size * args.seq_len
    tokens = np.random.default_rng(0).integers(0, config.n_vocab, n_tokens).astype(np.uint16)
    return run, train.Windows(tokens, settings, ranks.rank), train.Team(params, threads, ranks)


def clock(ranks, work):
    """Return the seconds of the slowest rank."""
    ranks.gather(None)
    start = time.perf_counter()
    work()
    return max(ranks.gather(time.perf_counter() - start))


def print_row(args, run, seconds):
    """Print what `measure` found, {part: seconds}, as a table of one row."""
    s, config = run.settings, run.params.config
    n_flops = s.tokens_per_step * flops_per_token(config, s.seq_len)
    sent = communication(config, s.ranks, 1) / seconds["sum"]
    cells = {
        "model": args.model,
        "ranks": s.ranks,
        "threads": s.threads,
        "shard": "yes" if args.shard else "no",
        **{part: f"{time:.3f} s" for part, time in seconds.items()},
        "tokens/s": f"{s.tokens_per_step / seconds['step']:.0f}",
        "GFLOP/s": f"{n_flops / seconds['gradient'] / 1e9:.0f}",
        "sum, GB/s": f"{sent / 1e9:.2f}",
    }
    print(f"| {' | '.join(cells)} |\n{'|---:' * len(cells)}|")
    print(f"| {' | '.join(map(str, cells.values()))} |", flush=True)


def make_parser():
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    positive = cli.positive_int
    add = commands.add_parser("measure", help="take steps here, under mpiexec or not").add_argument
    add("--model", choices=CONFIGS, default="124M", help="the shape of the model")
    add("--batch_size", type=positive, default=8, help="windows of all ranks together")
    add("--seq_len", type=positive, default=256, help="tokens a window")
    add("--threads", type=positive, help="of a rank; without it, as train.py chooses")
    add("--shard", action="store_true", help="as in train.py")
    add("--steps", type=positive, default=5, help="that count, after a first")
    add = commands.add_parser("predict", help="compute step times of clusters").add_argument
    add("--model", nargs="+", choices=CONFIGS, default=["124M", "1558M"], help="shapes")
    add("--machines", nargs="+", type=positive, default=[8, 16, 32, 64, 128, 256, 512], help="N")
    add("--gbits", nargs="+", type=float, default=[10, 100], help="of each machine's network")
    add("--accum", nargs="+", type=positive, default=[1, 8], help="batches a step")
    add("--windows", type=positive, default=512, help="of a batch, shared by all machines")
    add("--seq_len", type=positive, default=1024, help="tokens a window")
    add("--gflops", type=float, default=FLOPS / 1e9, help="of one machine, in training")
    add("--plot", type=Path, help="a PNG to draw the efficiency to; needs matplotlib")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    measure(args) if args.command == "measure" else predict(args)


if __name__ == "__main__":
    cli.run(main)
