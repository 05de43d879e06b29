"""Measure GPT-2 in NumPy against its peers, and against what the machine can do.

    python benchmarks/run.py                       # everything
    python benchmarks/run.py --items a startup --json result.json --plot result.png

Every work item (items.py) is done by us and by each peer that is installed, in turns, several
times, each time in a new process that times itself (worker.py), or is timed whole. The table goes
to standard output as Markdown, progress to standard error. This program imports nothing of what it
measures: neither its memory nor its environment shall count.
"""

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import items
import report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHARED = ROOT.parent / "shared" / "data"

# ----------------------------------------------------------------------------------------------
# Who takes part


@dataclass(frozen=True)
class Party:
    """Someone who does the work items, by a program of this folder."""

    label: str
    script: str
    needs: tuple = ()  # packages, besides our own
    options: dict = field(default_factory=dict)  # added to each job
    at_most: int = 1000  # repeats, where waiting for more would not pay
    is_quick: bool = True  # whether --quick measures it


PARTIES = {
    "ours": Party("ours", "ours.py"),
    "huggingface": Party("Hugging Face", "huggingface.py", ("torch", "transformers")),
    "ctranslate2": Party("CTranslate2", "ctranslate2_peer.py", ("ctranslate2", "transformers")),
    "pytorch": Party("PyTorch", "pytorch.py", ("torch",), {"compiled": False}),
    "compiled": Party("PyTorch, compiled", "pytorch.py", ("torch",), {"compiled": True}, 3, False),
    "tiktoken": Party("tiktoken", "bpe.py", ("tiktoken",)),
    "tokenizers": Party("HF tokenizers", "bpe.py", ("tokenizers",)),
    "naive": Party("naive NumPy", "naive.py", (), {}, 2, False),
}
PACKAGES = sorted({package for party in PARTIES.values() for package in party.needs})
FIND_VERSIONS = """
import importlib.metadata, json, sys
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(versions))
"""


def find_peers(interpreters):
    """Return ({party: interpreter}, {package: version}) of who can take part."""
    pythons, known_versions = {}, {}
    for python in interpreters:
        try:
            versions = run_json([python, "-c", FIND_VERSIONS, *PACKAGES])
        except OSError as error:
            raise Problem(f"{python}: {error.strerror}") from None
        for name, party in PARTIES.items():
            if name not in pythons and set(party.needs) <= set(versions):
                pythons[name] = python if party.needs else sys.executable
        known_versions = versions | known_versions
    return pythons, known_versions


# ----------------------------------------------------------------------------------------------
# Running the programs


class Problem(Exception):
    """What went wrong, in one line."""


def run_process(argv, env=None, cwd=ROOT):
    """Run a program, by default from our folder; return its standard output, or raise Problem."""
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, encoding="utf-8")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Problem(lines[-1])
    return done.stdout


def run_json(argv, env=None):
    """Run a program; return what the last line of its standard output says."""
    return json.loads(run_process(argv, env).strip().splitlines()[-1])


class Bench:
    """A run of the suite: who takes part, where the material is, and how it is measured."""

    def __init__(self, args, folder, threads, avx2=False):
        self.args, self.folder, self.threads = args, folder, threads
        interpreters = [str(args.peer_python)] if args.peer_python else []
        self.pythons, self.versions = find_peers([*interpreters, sys.executable])
        self.env = make_env(folder, threads if args.threads else None, avx2)

    def start(self, who, job):
        """Return the command that makes a party do a job."""
        party = PARTIES[who]
        job = job | party.options | {"folder": str(self.folder), "threads": self.threads}
        return [self.pythons[who], str(HERE / party.script), json.dumps(job)]

    def measure(self, item, who, first):
        """Return what one process of a party, or several in a row, took for an item."""
        if item.command is None:
            job = item.job | {"seconds": self.args.seconds}
            return run_json(self.start(who, job), self.env)
        command = self.start(who, item.job | {"once": True})
        if who == "ours":
            command = [sys.executable, *(part.format(folder=self.folder) for part in item.command)]
        if first:
            run_process(command, self.env)  # the files are in memory from here on
        times = []
        while not times or sum(times) < self.args.seconds:
            start = time.perf_counter()
            run_process(command, self.env)
            times.append(time.perf_counter() - start)
        return {"seconds": times, "peak_bytes": None, "check": []}

    def prepare(self, chosen):
        """Make the material; return what was taken for it."""
        job = {"folder": str(self.folder), "data": str(SHARED), "sizes": self.args.sizes.upper()}
        job["items"] = [item.name for item in chosen]
        script = str(HERE / "prepare.py")
        return run_json([sys.executable, script, json.dumps(job)], self.env)

    def describe(self):
        """Return {name: value} of the machine and of the versions of everyone."""
        facts = {"CPU": cpu_name(), "cores": os.cpu_count(), "memory": memory_size()}
        facts["system"] = platform.platform()
        facts["load before"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else "?"
        facts |= run_json(self.start("ours", {"work": "machine", "once": True}), self.env)
        if "pytorch" in self.pythons:
            try:
                command = self.start("pytorch", {"work": "machine", "once": True})
                facts |= run_json(command, self.env)
            except Problem as problem:
                facts["PyTorch"] = f"failed: {problem}"
        absent = {name: f"not installed: pip install {name}" for name in PACKAGES}
        return facts | absent | self.versions


AVX2 = {  # what OpenBLAS, NumPy, PyTorch, MKL, oneDNN and CTranslate2 read
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR AVX512_SKX AVX512F",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "CT2_FORCE_CPU_ISA": "AVX2",
}


def make_env(folder, threads, avx2=False):
    """Return the environment of everyone: no network, no others' caches, and threads if told.

    With `avx2`, everyone does without AVX-512, except tokenizers, which have little use for it.
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | (AVX2 if avx2 else {})
    env["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    if threads:
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        env |= dict.fromkeys(names, str(threads))
    return env


def cpu_name():
    """Return the name of the processor, as well as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_size():
    """Return the size of the machine's memory in words."""
    try:
        n_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "unknown"
    return f"{n_bytes / 2**30:.1f} GiB"


# ----------------------------------------------------------------------------------------------
# The run


def new_record(bench, chosen):
    """Return the record of a run in which nothing has been measured yet."""
    args = bench.args
    settings = {"threads": bench.threads, "repeats": args.repeats, "sizes": args.sizes}
    settings |= {"seconds a repeat, at least": args.seconds}
    settings |= {"AVX-512": "switched off"} if args.avx2 else {}
    record = {"machine": bench.describe(), "settings": settings, "taken": bench.prepare(chosen)}
    record["labels"] = {name: party.label for name, party in PARTIES.items()}
    record["items"] = []
    for item in chosen:
        entry = asdict(item)
        if isinstance(item.amount, str):
            entry["amount"] = os.path.getsize(bench.folder / item.amount) / 1e6
        parties = ("ours", *item.peers)
        entry["results"] = {who: new_result(bench, who) for who in parties}
        record["items"].append(entry)
    return record


def new_result(bench, who):
    """Return the result of a party that has none yet, and its problem if it cannot have any."""
    problem = ""
    if bench.args.quick and not PARTIES[who].is_quick:
        problem = "slow: --quick leaves it out"
    elif who not in bench.pythons:
        lacking = [name for name in PARTIES[who].needs if name not in bench.versions]
        problem = f"not installed: pip install {' '.join(lacking or PARTIES[who].needs)}"
    return {"seconds": [], "peak_bytes": [], "check": [], "problem": problem}


def measure_all(bench, chosen, record):
    """Fill the record: everyone in turns, item by item, and all of that several times."""
    for repeat in range(bench.args.repeats):
        for item, entry in zip(chosen, record["items"], strict=True):
            for who, result in entry["results"].items():
                if result["problem"] or repeat >= PARTIES[who].at_most:
                    continue
                note(f"repeat {repeat + 1} of {bench.args.repeats}: {item.name}: ", end="")
                add_result(bench, item, entry, who, repeat == 0)


def add_result(bench, item, entry, who, first):
    """Measure an item once more for a party, and tell how it went."""
    result = entry["results"][who]
    try:
        measured = bench.measure(item, who, first)
    except Problem as problem:
        result["problem"] = f"failed: {problem}"
        note(f"{PARTIES[who].label} {result['problem']}")
        return
    result["seconds"] += measured["seconds"]
    result["peak_bytes"] += [measured["peak_bytes"]] if measured["peak_bytes"] else []
    result["check"] = measured["check"]
    best = max if item.unit not in ("s", "ms") else min
    figure = best(report.figures(entry, measured["seconds"]))
    note(f"{PARTIES[who].label} {report.significant(figure)} {item.unit}")


def note(message, end="\n"):
    print(message, file=sys.stderr, end=end, flush=True)


def keep_record(args, measure, plot):
    """Return what measure(args, a new folder) finds, or the record in the file of --from_json.

    It is written to --json, and drawn by plot(record, path) to --plot, where these are given.
    """
    if args.from_json:
        record = json.loads(args.from_json.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory(prefix="gpt2-bench-") as folder:
            record = measure(args, Path(folder))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(record, args.plot)
    return record


def start(main):
    """Call the main function of a program; a problem ends it with one line, Ctrl-C with 130."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (Problem, OSError, ValueError, ImportError, subprocess.SubprocessError) as problem:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {problem}")


# ----------------------------------------------------------------------------------------------
# The command line


def parse_args(argv=None):
    """Parse the command line; exit with status 2 and one line for a bad argument."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--items", nargs="+", metavar="ITEM", help="names or letters, of which --list tells; "
        "without it, all; the limits are always measured")  # fmt: skip
    add("--list", action="store_true", help="list the items and go")
    add("--repeats", type=int, help="turns of everyone; without it 5, or 1 with --quick")
    add("--seconds", type=float, help="to measure in each turn at least; without it 2, or 0.2")
    add("--quick", action="store_true", help="a coarse look: one short turn, half of the items, "
        "no slow peers")  # fmt: skip
    add("--threads", type=int, help="cores that everyone may use; without it, all")
    add("--avx2", action="store_true", help="let everyone do without AVX-512, as on a CPU that "
        "lacks it")  # fmt: skip
    add("--peer_python", type=Path, help="an interpreter that has peers which this one lacks")
    add("--json", type=Path, help="file for all that was measured")
    add("--plot", type=Path, help="file for a bar chart (PNG)")
    add("--from_json", type=Path, nargs="+", metavar="FILE", help="measure nothing: table and plot "
        "of such a file; of several, or of a folder, a table with a column for each")  # fmt: skip
    add("--sizes", choices=["full", "tiny"], default="full", help="tiny is to test the suite")
    args = parser.parse_args(argv)
    args.repeats = (1 if args.quick else 5) if args.repeats is None else args.repeats
    args.seconds = (0.2 if args.quick else 2.0) if args.seconds is None else args.seconds
    args.chosen = choose_items(parser, args)
    for name, low in (("repeats", 1), ("seconds", 0), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and not low <= value < 1e6:
            parser.error(f"argument --{name}: {value} is not {low} or more")
    check_outputs(parser, args)  # now, not when all the time has been spent
    return args


def compares(args):
    """Tell whether the command is to put several results side by side."""
    return bool(args.from_json) and (len(args.from_json) > 1 or args.from_json[0].is_dir())


def check_outputs(parser, args):
    """Exit with status 2 if a file that is asked for could not be made."""
    if compares(args) and (args.json or args.plot):
        parser.error("argument --from_json: several files make a table only")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path and not path.absolute().parent.is_dir():
            parser.error(f"argument --{name}: {path.parent}: no such folder")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("argument --plot: not installed: pip install matplotlib")


def choose_items(parser, args):
    """Return the Items that --items asks for, by name or letter, and those of the limits."""
    everything = items.make_items(getattr(items, args.sizes.upper()))
    known = {name for item in everything for name in (item.name, item.letter)}
    for name in args.items or []:
        if name not in known:
            parser.error(f"argument --items: {name!r} is none of {', '.join(sorted(known))}")
    if args.quick and not args.items:
        return [item for item in everything if item.is_quick]
    chosen = {"limit", *(args.items or known)}
    return [item for item in everything if chosen & {item.name, item.letter}]


def run(args):
    """Measure, in a folder that is gone afterwards; return the record, of what there is by then."""
    threads = limit_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="gpt2-bench-") as folder:
        bench = Bench(args, Path(folder), threads, args.avx2)
        note("preparing ...")
        start = time.monotonic()
        record = new_record(bench, args.chosen)
        try:
            measure_all(bench, args.chosen, record)
        except KeyboardInterrupt:
            note("\nstopped: this is what there is")
        record["settings"]["minutes"] = round((time.monotonic() - start) / 60, 1)
    return record


def read_record(path):
    """Return the record that --json wrote; raises ValueError if it is something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("machine", "settings", "taken", "labels", "items")}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a file that --json of this program wrote") from None


def limit_threads(n_threads):
    """Keep this process and all that it starts to `n_threads` cores; return how many there are."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux: the programs are only told
        return n_threads or os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))
    if n_threads:
        os.sched_setaffinity(0, cores[:n_threads])
    return min(n_threads or len(cores), len(cores))


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the folder is removed
    args = parse_args()
    if args.list:
        print("\n".join(f"{item.letter:5} {item.name:16} {item.title}" for item in args.chosen))
        return
    if compares(args):
        paths = [p for path in args.from_json for p in sorted(path.glob("*.json")) or [path]]
        print(report.compare_machines({path.stem: read_record(path) for path in paths}))
        return
    record = read_record(args.from_json[0]) if args.from_json else run(args)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(report.make_report(record))
    if args.plot:
        report.plot(record, args.plot)
    if any(item["results"]["ours"]["problem"] for item in record["items"]):
        sys.exit("run.py: error: some of our own work failed: see the table")


if __name__ == "__main__":
    start(main)
