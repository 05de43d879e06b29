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
from gpt2_support.data_parallel import fastest, proc_counts
from gpt2_support.distributed import ProcessGroup, init_process_group

# isort: on
import copy
import time

import numpy as np

import gpt2
import train

CONFIGS = {
    "stories": Config(n_vocab=4096, n_ctx=256, n_embd=216, n_head=6, n_layer=5),
    "124M": Config(),
    "355M": Config(n_embd=1024, n_head=16, n_layer=24),
    "774M": Config(n_embd=1280, n_head=20, n_layer=36),
    "1558M": Config(n_embd=1600, n_head=25, n_layer=48),
}
FLOPS = 160e9  # a second, of a training step of 124M on one machine; see docs/scaling.md


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


def step_time(config, n, compute, bandwidth):
    """Return the seconds of a step on n machines; one machine alone computes for `compute`."""
    return compute / n + communication(config, n, bandwidth)


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
        f"windows of {args.seq_len} tokens: seconds, efficiency\n\n"
        f"| machines | {' | '.join(titles)} |\n|---:{'|---:' * len(cases)}|"
    )
    for n in args.machines:
        cells = []
        for gbits, accum in cases:
            compute, step = predict_step(config, n, gbits, accum, args)
            seconds = f"{step:,.0f}" if step >= 100 else f"{step:.3g}"
            cells.append(f"{seconds} s, {compute / step:.0%}")
        print(f"| {n} | {' | '.join(cells)} |")


def predict_step(config, n, gbits, accum, args):
    """Return the seconds that each of n machines computes in a step, and those of the step."""
    n_tokens = args.windows * accum * args.seq_len
    compute = n_tokens * flops_per_token(config, args.seq_len) / (args.gflops * 1e9)
    return compute / n, step_time(config, n, compute, gbits * 1e9 / 8)


def plot(args):
    """Draw the efficiency over the number of machines to the PNG --plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
    for model in args.model:
        for gbits in args.gbits:
            for accum in args.accum:
                steps = (predict_step(CONFIGS[model], n, gbits, accum, args) for n in args.machines)
                efficiencies = [compute / step for compute, step in steps]
                label = f"{model}, {gbits:g} Gbit/s, accumulating {accum}"
                axes.plot(args.machines, efficiencies, ".-", label=label)
    axes.set(xscale="log", xlabel="machines", ylabel="part of the step that computes", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.plot, bbox_inches="tight")
    plt.close(figure)


# ----------------------------------------------------------------------------------------------
# The measurement


def measure(args):
    """Take steps on all ranks, and each part of them by itself; print a row of medians."""
    with init_process_group() as group:
        state, loader, workers = set_up(args, group)
        params, config, grads = state.params, state.config, workers.grads
        workers.time_batch(params, loader.batch(0))  # which also starts the processes
        alone = copy.copy(workers)
        alone.group = ProcessGroup()  # to which nothing is sent
        update = (params, grads, 0.0, 1, config, 1.0, workers.parallel)
        seconds = []
        for step in range(args.steps + 1):
            batches = loader.batches(step)
            works = {
                "step": lambda b=batches: train.train_step(state, b, workers),
                "gradient": lambda b=batches: alone.loss_and_grads(params, b),
                "sum": lambda: group.all_reduce(grads.flat),
                "AdamW": lambda: state.optimizer.step(*update),
            }
            seconds.append([clock(group, work) for work in works.values()])
        medians = np.median(seconds[1:], axis=0)  # the first also fetches memory
        print_row(args, state, dict(zip(works, medians, strict=True)))


def set_up(args, group):
    """Return a new run, a loader of random tokens, and the processes of this rank."""
    model = CONFIGS[args.model]
    n_rows = args.batch_size // group.size
    if args.batch_size % group.size or n_rows % (args.threads or 1):
        raise ValueError(
            f"--batch_size {args.batch_size} is not shared equally by {group.size} ranks of "
            f"{args.threads or 1} processes"
        )
    config = train.TrainConfig(batch_size=args.batch_size, seq_len=args.seq_len, ranks=group.size)
    params = train.init_params(model)
    shard = group.shard(params.flat.size) if args.shard else None
    state = train.TrainState(params, config, optimizer=train.AdamW(params, shard))
    n_tokens = (args.steps + 2) * args.batch_size * args.seq_len
    tokens = np.random.default_rng(0).integers(0, model.n_vocab, n_tokens).astype(np.uint16)
    loader, counts = train.DataLoader(tokens, config, group.rank), [args.threads]
    if not args.threads:
        counts = proc_counts(n_rows, args.seq_len, model.n_embd, group.n_cores)
    workers, _ = fastest(gpt2.loss_and_grads, params, loader.batch(0), counts, group)
    config.threads, state.params = workers.n_procs, workers.params
    return state, loader, workers


def clock(group, work):
    """Return the seconds of the slowest rank."""
    group.all_gather(None)
    start = time.perf_counter()
    work()
    return max(group.all_gather(time.perf_counter() - start))


def print_row(args, state, seconds):
    """Print what `measure` measured, {part: seconds}, as a table of one row."""
    c, model = state.config, state.params.config
    n_flops = c.tokens_per_step * flops_per_token(model, c.seq_len)
    sent = communication(model, c.ranks, 1) / seconds["sum"]
    cells = {
        "model": args.model,
        "ranks": c.ranks,
        "threads": c.threads,
        "shard": "yes" if args.shard else "no",
        **{part: f"{time:.3f} s" for part, time in seconds.items()},
        "tokens/s": f"{c.tokens_per_step / seconds['step']:.0f}",
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
