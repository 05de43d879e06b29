"""Tests of benchmarks/: that it runs, on tiny shapes, and reports what it found; never how fast."""

import json
import os
import platform
import re
import sys
import time
from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import TINY

import encoder
import gpt2
import growth
import items
import naive
import prepare
import report
import run as suite
import time_to_loss
import train
import worker
from gpt2_support import blas
from gpt2_support.formats import llmc, token_table
from gpt2_support.params import Config, Params


def absent(party):
    return replace(party, needs=("no-such-package",))


@pytest.fixture
def alone(monkeypatch):
    """No peer is installed but the naive one, and whatever PyTorch is asked for fails."""
    parties = {name: absent(party) for name, party in suite.PARTIES.items()}
    for name in ("ours", "naive"):
        parties[name] = suite.PARTIES[name]
    parties["pytorch"] = suite.Party("PyTorch", "naive.py")  # which knows no training
    monkeypatch.setattr(suite, "PARTIES", parties)


def measure(*flags):
    """Run the suite in this process, on tiny shapes; return its record."""
    flags = ["--sizes", "tiny", "--seconds", "0", *map(str, flags)]
    return suite.run(suite.parse_args(flags))


def entry_of(record, name):
    return next(entry for entry in record["items"] if entry["name"] == name)


def make_entry(**changes):
    """An item as a record has it, with the results of us and one peer."""
    result = {"peak_bytes": [], "check": [], "problem": ""}
    entry = {
        "letter": "a", "name": "walk", "title": "a walk", "unit": "s", "amount": 1, "phases": [],
        "memory": False, "job": {},
        "results": {
            "ours": result | {"seconds": [1.0, 4.0, 2.0]},
            "pytorch": result | {"seconds": [5.0, 6.0, 7.0]},
        },
    }  # fmt: skip
    return entry | changes


def make_record(*entries):
    labels = {"ours": "ours", "pytorch": "PyTorch"}
    parts = {"machine": {"CPU": "abacus"}, "settings": {"repeats": 3}, "taken": {}}
    return {**parts, "labels": labels, "items": list(entries)}


def limit_entry(name, resource, per_run, seconds):
    entry = make_entry(letter="limit", name=name, title=name, phases=[{resource: per_run}])
    entry["results"] = {"ours": entry["results"]["ours"] | {"seconds": [seconds]}}
    return entry


# --- the naive peer -----------------------------------------------------------------------------


def test_naive_forward_agrees():
    params = train.init_params(TINY)
    params.flat[: params.wte.size] *= 20  # logits of about 1
    tokens = worker.prompt_ids(8, TINY.n_vocab)
    logits = naive.forward(tokens, naive.convert(params), TINY.n_head)
    expected = gpt2.forward(params, tokens)
    assert logits.dtype == np.float32  # it does not lose by slipping into float64
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert logits.argmax(-1).tolist() == expected.argmax(-1).tolist()


def test_naive_generation_agrees():
    params = train.init_params(TINY, seed=1)
    for name, array in params.named.items():
        if name.endswith("/w"):
            array *= 20  # so that it does not say one token for ever
    prompt = worker.prompt_ids(3, TINY.n_vocab)
    expected = list(gpt2.generate(params, prompt, 5, eot=None))
    assert len(set(expected)) > 1
    assert naive.generate(prompt, naive.convert(params), TINY.n_head, 5) == expected


# --- the least work -----------------------------------------------------------------------------


def test_parameters_and_matrices_are_the_models():
    shape = items.Shape(*vars(TINY).values())
    named = Params(TINY).named
    assert shape.n_params == sum(array.size for array in named.values())
    matrices = [array.shape for name, array in named.items() if name.endswith(("/w", "/wte"))]
    assert sorted(shape.matrices) == sorted(matrices)
    assert shape.weight_bytes() == 4 * sum(rows * columns for rows, columns in matrices)


@pytest.mark.parametrize("past", [0, 3])
def test_flops_are_those_of_every_product(past):
    shape, T, B = items.Shape(*vars(TINY).values()), 4, 2
    total = 0
    for position in range(past, past + T):
        for rows, columns in shape.matrices:
            total += 2 * rows * columns
        for _ in range(shape.n_layer * shape.n_head):
            seen, D = position + 1, shape.n_embd // shape.n_head
            total += 2 * seen * D + 2 * seen * D  # q k^T, att v
    assert shape.flops(T, past, B) == B * total
    one_logit = B * total - B * (T - 1) * 2 * shape.n_vocab * shape.n_embd
    assert shape.flops(T, past, B, n_logits=1) == one_logit


def test_decoding_reads_the_weights_once_a_token():
    shape = items.Shape(*vars(TINY).values())
    first, then = items.decoding_phases(shape, n_prompt=3, n_tokens=4, B=2)
    assert first["bytes"] == shape.weight_bytes()
    kv = 2 * 4 * shape.n_embd * shape.n_layer  # keys and values of a token, float32
    assert then["bytes"] == 3 * shape.weight_bytes() + 2 * kv * (4 + 5 + 6)
    assert then["flops"] == sum(shape.flops(1, past, 2) for past in (3, 4, 5))


def test_limit_adds_phases_and_takes_what_is_slowest_in_each():
    limits = {"flops": 10.0, "bytes": 2.0}
    phases = [{"flops": 20, "bytes": 20}, {"bytes": 1}]
    assert report.limit_seconds(phases, limits) == 10 + 0.5
    assert report.limit_seconds([{"disk": 1}], limits) is None
    assert report.limit_seconds([], limits) is None


def test_names_of_items_are_unique():
    for sizes in (items.FULL, items.TINY):
        names = [item.name for item in items.make_items(sizes)]
        assert len(names) == len(set(names))
        letters = {item.letter for item in items.make_items(sizes)}
        assert letters == {*"abcdefghik", "limit"}  # j, memory, is measured along with others


# --- timing -------------------------------------------------------------------------------------


def test_measure_leaves_out_the_warm_up():
    calls = []

    def work():
        calls.append("work")
        time.sleep(0.002)

    seconds = worker.measure(worker.Task(work, lambda: calls.append("warm")), 0.005)
    assert calls == ["warm"] + ["work"] * len(seconds)
    assert sum(seconds[:-1]) < 0.005 <= sum(seconds)


def test_measure_counts_what_the_work_says():
    assert worker.measure(worker.Task(lambda: 7.0), 10.0) == [7.0, 7.0]
    assert len(worker.measure(worker.Task(lambda: 0.5), 0)) == 1


def test_after_first_starts_at_the_first_token():
    def tokens():
        time.sleep(0.2)  # the prompt
        yield 1
        time.sleep(0.01)
        yield 2

    out = []
    assert 0.01 <= worker.after_first(tokens(), out) < 0.2
    assert out == [1, 2]


# --- the table ----------------------------------------------------------------------------------


def test_table_has_median_spread_ratio_and_limit():
    entry = make_entry(phases=[{"flops": 30}])
    table = report.make_table(make_record(limit_entry("sgemm", "flops", 100, 5.0), entry))
    assert "| a | a walk | ours | 2.00 s | 1.00 to 4.00 (3) |  | 75% |  |" in table
    assert "|  |  | PyTorch | 6.00 s | 5.00 to 7.00 (3) | 3.00 x | 25% |  |" in table


def test_rates_are_amounts_a_second():
    table = report.make_table(make_record(make_entry(unit="tokens/s", amount=40)))
    assert "| ours | 20.0 tokens/s | 10.0 to 40.0 (3) |" in table
    assert "| PyTorch | 6.67 tokens/s | 5.71 to 8.00 (3) | 3.00 x |" in table


def test_memory_has_rows_of_its_own():
    entry = make_entry(memory=True)
    entry["results"]["ours"]["peak_bytes"] = [100_000_000, 300_000_000, 200_000_000]
    entry["results"]["pytorch"]["peak_bytes"] = [500_000_000]
    table = report.make_table(make_record(entry))
    assert "| j | peak memory: a walk | ours | 200 MB | 100 to 300 (3) |" in table
    assert "| PyTorch | 500 MB | 500 to 500 (1) | 2.50 x |" in table


def test_limit_is_the_median_of_whoever_was_fastest():
    entry = limit_entry("matvec", "bytes", 100, 5.0)
    entry["results"]["pytorch"] = entry["results"]["ours"] | {"seconds": [8.0, 1.0, 4.0]}
    assert report.find_limits(make_record(entry)) == {"bytes": 25.0}


@pytest.mark.parametrize(
    ("ours", "theirs", "tolerance", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], None, "yes"),
        ([1, 2, 3], [1, 5, 3], None, "NO: the first 1 of 3"),
        ([2.0, 1.0], [2.0, 1.001], None, "yes, to 0.0005"),
        ([2.0, 1.0], [2.0, 1.02], None, "NO, to 0.01"),
        ([2.0, 1.0], [2.0, 1.02], 0.1, "yes, to 0.01"),
        ([1.0], [float("nan")], None, "NO, to nan"),
        ([], [1], None, ""),
    ],
)
def test_results_are_compared(ours, theirs, tolerance, expected):
    entry = make_entry(job={"tolerance": tolerance} if tolerance else {})
    entry["results"]["ours"]["check"] = ours
    entry["results"]["pytorch"]["check"] = theirs
    assert report.compare(entry, "pytorch") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.01234, "0.0123"), (9.996, "10.00"), (78.25, "78.2"), (12345.6, "12,346")],
)
def test_significant_digits(value, expected):
    assert report.significant(value) == expected


def test_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(make_record(make_entry()), tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


# --- whole runs, tiny ---------------------------------------------------------------------------


@pytest.mark.thorough
def test_every_item_of_ours_runs_where_no_peer_is(alone, uncounted):
    record = measure("--repeats", 1)
    names = [item.name for item in items.make_items(items.TINY)]
    assert [entry["name"] for entry in record["items"]] == names
    for entry in record["items"]:
        result = entry["results"]["ours"]
        assert result["problem"] == "", entry["name"]
        assert len(result["seconds"]) >= 1
        assert all(seconds > 0 for seconds in result["seconds"])
        for who in set(entry["results"]) - {"ours", "naive", "pytorch"}:
            missing = entry["results"][who]
            assert missing["problem"] == "not installed: pip install no-such-package"
            assert missing["seconds"] == []
    assert set(report.find_limits(record)) == {"flops", "bytes", "stream", "disk"}
    table = report.make_report(record)
    assert "| Hugging Face | - |" in table
    assert "not installed: pip install no-such-package" in table


@pytest.mark.thorough
def test_figures_are_those_of_the_processes(alone, uncounted, monkeypatch, capsys):
    answers, run_json = [], suite.run_json

    def record_answer(argv, env=None):
        answer = run_json(argv, env)
        if "seconds" in answer:
            answers.append((json.loads(argv[-1])["work"], argv[1], answer["seconds"]))
        return answer

    monkeypatch.setattr(suite, "run_json", record_answer)
    record = measure("--repeats", 2, "--items", "decode_6", "adamw")
    turns = [script.rsplit("/", 1)[-1] for work, script, _ in answers if work == "decode"]
    assert turns == ["ours.py", "naive.py"] * 2  # alternating
    results = entry_of(record, "decode_6")["results"]
    for who in ("ours", "naive"):
        script = suite.PARTIES[who].script
        seconds = [s for work, path, measured in answers if work == "decode" and script in path
                   for s in measured]  # fmt: skip
        assert results[who]["seconds"] == seconds
        row = f"{report.significant(6 / median(seconds))} tokens/s"
        assert row in report.make_table(record)
    assert report.compare(entry_of(record, "decode_6"), "naive") == "yes"

    failed = entry_of(record, "adamw")["results"]["pytorch"]  # reported, and not asked again
    assert failed["problem"] == "failed: KeyError: 'adamw'"
    assert failed["seconds"] == []
    assert capsys.readouterr().err.count("adamw: PyTorch failed") == 1
    assert "| PyTorch | - |  |  |  | failed: KeyError: 'adamw' |" in report.make_table(record)


@pytest.mark.thorough
def test_interrupted_run_keeps_what_there_is(alone, monkeypatch):
    add_result = suite.add_result

    def interrupt(bench, item, entry, who, first):
        if item.name == "matvec":
            raise KeyboardInterrupt
        add_result(bench, item, entry, who, first)

    monkeypatch.setattr(suite, "add_result", interrupt)
    record = measure("--items", "adamw")
    assert entry_of(record, "sgemm")["results"]["ours"]["seconds"]
    assert "AdamW alone" in report.make_report(record)


@pytest.mark.thorough
def test_tiktoken_gives_our_ids():
    pytest.importorskip("tiktoken")
    record = measure("--repeats", 1, "--items", "encode_cold")
    entry = entry_of(record, "encode_cold")
    assert entry["amount"] == pytest.approx(items.TINY.text_bytes / 1e6, rel=0.01)
    assert report.compare(entry, "tiktoken") == "yes"


def test_torch_peers_agree():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    record = measure("--repeats", 1, "--items", "decode_6", "forward_64", "step_2x8", "b")
    for name, who in (
        ("decode_6", "huggingface"),
        ("decode_at_40", "huggingface"),
        ("forward_64", "huggingface"),
        ("step_2x8", "pytorch"),
    ):
        assert report.compare(entry_of(record, name), who).startswith("yes"), name


def test_made_up_text_serves_without_reference_data(tmp_path):
    taken = prepare.make_texts(tmp_path, tmp_path / "none", items.TINY)
    assert taken.startswith("made up")
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")
    assert items.TINY.text_bytes <= len(text) < 2 * items.TINY.text_bytes
    assert 100 < len(set(text.split())) < len(text.split()) / 2
    assert token_table.EOT_TEXT in text
    plain = (tmp_path / "file.txt").read_text(encoding="utf-8")
    assert token_table.EOT_TEXT not in plain
    assert len(plain) >= items.TINY.file_bytes
    assert encoder.train(text, 260).n_vocab == 260


def test_made_up_names_serve_without_reference_data(tmp_path):
    assert prepare.make_names(tmp_path, tmp_path / "none") == "made up"
    tokens, n_vocab = llmc.load_tokens(tmp_path / "names.bin")
    assert n_vocab == 257
    assert (tokens == 256).sum() == 30_000


# --- the command line ---------------------------------------------------------------------------


def test_command_writes_json_that_gives_the_same_table(run, tmp_path):
    flags = ("--sizes", "tiny", "--seconds", 0, "--repeats", 1, "--items", "prefill_32")
    path = tmp_path / "result.json"
    first = run("benchmarks/run.py", *flags, "--threads", 1, "--avx2", "--json", path)
    assert first.returncode == 0, first.stderr
    assert "| threads | 1 |" in first.stdout and "| AVX-512 | switched off |" in first.stdout
    if platform.machine() == "x86_64" and blas.kernels() != "unknown":
        assert "| BLAS kernels | Haswell |" in first.stdout
    assert re.search(r"\| d \| prefill of 32 in `generate` \| ours \| [\d.]+ s \|", first.stdout)
    again = run("benchmarks/run.py", "--from_json", path)
    assert again.stdout == first.stdout
    other = tmp_path / "other.json"
    other.write_bytes(path.read_bytes())
    both = run("benchmarks/run.py", "--from_json", path, other)
    assert "| | result | other |" in both.stdout
    assert re.search(r"\| prefill of 32 in `generate` \| ([\d.]+ s[^|]*) \| \1 \|", both.stdout)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--items", "nonsense"], "'nonsense' is none of"),
        (["--repeats", "0"], "0 is not 1 or more"),
        (["--threads", "0"], "0 is not 1 or more"),
        (["--seconds", "-1"], "-1.0 is not 0 or more"),
        (["--seconds", "nan"], "nan is not 0 or more"),
        (["--sizes", "huge"], "invalid choice"),
        (["--json", "nowhere/result.json"], "nowhere: no such folder"),
        (["--from_json", "a.json", "b.json", "--json", "c.json"], "several files make a table"),
    ],
)
def test_bad_flag_is_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as exit:
        suite.parse_args(flags)
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


def test_missing_files_are_one_line(run, tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}", encoding="utf-8")
    for flags, words in (
        (["--from_json", other], "not a file that --json of this program wrote"),
        (["--from_json", tmp_path / "none.json"], "No such file"),
        (["--peer_python", tmp_path / "python", "--sizes", "tiny"], "No such file"),
    ):
        done = run("benchmarks/run.py", *flags)
        assert done.returncode == 1
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_list_names_every_item(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "--list"])
    monkeypatch.setattr(suite.signal, "signal", lambda *_: None)
    suite.main()
    listed = capsys.readouterr().out
    for item in items.make_items(items.FULL):
        assert item.name in listed


def test_threads_that_are_tried_fit_the_cores_and_the_batch(monkeypatch):
    sys.modules.pop("ours", None)
    import ours

    tried = []

    def fastest(loss_and_grads, params, batch, counts):
        tried.append(counts)
        return SimpleNamespace(n_procs=counts[-1], params=params), 1.0

    monkeypatch.setattr(ours, "fastest", fastest)
    for n_cores, counts in ((1, [1]), (4, [1, 2, 3])):
        job = SimpleNamespace(B=6, T=1024, threads=n_cores)
        params = SimpleNamespace(config=Config())
        state = SimpleNamespace(params=params, config=ours.settings(job, params.config))
        assert ours.choose_workers(job, state, None).n_procs == state.config.threads == counts[-1]
        assert tried.pop() == counts


def test_results_that_are_kept_make_a_table():
    paths = sorted((suite.HERE / "results").glob("*.json"))
    table = report.compare_machines({path.stem: suite.read_record(path) for path in paths})
    assert "| BLAS kernels | " in table
    assert re.search(r"\| decode, 40 tokens after 10 \| [\d.]+ tokens/s, \d+%; ", table)


def test_growth_is_drawn_from_its_json(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    times = {"ours": {"1": 0.02, "1000": 0.03}, "huggingface": {"1": 0.04, "1000": 0.05}}
    record = {"token": times, "step": {"ours": {"10000": 0.1, "1000000": 1.0}}}
    path, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    path.write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr(
        sys, "argv", ["growth.py", "--from_json", str(path), "--plot", str(picture)]
    )
    growth.main()
    assert json.loads(capsys.readouterr().out) == record
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_growth_measures_steps_of_models(run):
    done = run("benchmarks/growth.py", "--models", "names", "--seconds", 0, "--threads", 1)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    (seconds,) = record["step"]["ours"].values()
    assert 0 < seconds < 60
    assert record["token"]["ours"] == {}


def test_time_to_loss_is_drawn_from_its_json(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    points = [[5.0, 250, 2.5], [72.0, 2000, 1.886]]
    record = {"runs": {"nanoGPT": {"seconds": 73.0, "points": points, "loss": 1.8812}}}
    path, picture = tmp_path / "loss.json", tmp_path / "loss.png"
    path.write_text(json.dumps(record), encoding="utf-8")
    argv = ["time_to_loss.py", "--from_json", str(path), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", argv)
    time_to_loss.main()
    assert "| nanoGPT | 2,000 | 73.0 | 1.8812 |" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_timed_losses_stamps_what_a_program_tells(tmp_path):
    program = """
import sys, time
print("step 0: train loss 4.1, val loss 4.2")
sys.stderr.write("a bar\\r"); time.sleep(0.3); print("step 250: train loss 2.1, val loss 2.25")
"""
    pattern = rb"^step (\d+): .*val loss ([\d.]+)"
    argv = [sys.executable, "-c", program]
    seconds, points = time_to_loss.timed_losses(argv, pattern, tmp_path, dict(os.environ))
    assert [point[1:] for point in points] == [(0, 4.2), (250, 2.25)]
    assert points[1][0] - points[0][0] > 0.25
    assert seconds >= points[1][0]
    with pytest.raises(suite.Problem, match="-c: 1"):
        time_to_loss.timed_losses([sys.executable, "-c", "exit(1)"], pattern, tmp_path, {})


def test_our_run_is_timed_to_its_loss(tmp_path):
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text("a line of a play\n" * 200, encoding="utf-8")
    env = os.environ | {"GPT2_DATASETS_DIR": str(tmp_path / "datasets")}
    done = time_to_loss.train_ours(tmp_path, env, steps=2)
    assert [step for _, step, _ in done["points"]] == [1, 2]
    assert 0 < done["points"][0][0] < done["points"][1][0] < done["seconds"]
    assert done["loss"] == pytest.approx(done["points"][1][2], abs=1e-4)  # all of the text is used
