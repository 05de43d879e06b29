"""Tests of gpt2_support/runlog.py: log.csv, the progress line and loss.png."""

import io

import pytest

import train
from gpt2_support import runlog

FIGURES = (2.5, 1e-3, 1.0, 100.0)  # loss, lr, grad_norm, tokens_per_second


def test_log_drops_the_rows_after_the_step_it_resumes_from(tmp_path):
    path = tmp_path / "log.csv"
    log = runlog.LogFile(path, 0)
    for step in range(1, 6):
        log.add(step, *FIGURES, 2.25 if step == 2 else None, None)
    with open(path, "a", encoding="utf-8") as file:
        file.write("6,2.")  # killed in the middle of a row
    log = runlog.LogFile(path, 3)
    log.add(4, 1.5, *FIGURES[1:], None, None)
    rows = [*runlog.iterate_log(path)]
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["loss"] for row in rows] == ["2.5", "2.5", "2.5", "1.5"]
    assert rows == log.rows
    assert rows[1]["val_loss"] == "2.25" and rows[2]["val_loss"] == ""
    assert [*runlog.iterate_log(tmp_path / "none.csv")] == []


def test_run_log_writes_rows_a_progress_line_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with runlog.RunLog(tmp_path, 0, 2) as log:
        log.add(1, *FIGURES)
        log.add(2, *FIGURES, 2.25, 1.5)
        log.write("a note")
    out, err = capsys.readouterr()
    assert out == "" and "a note\n" in err
    assert "2/2" in err and "loss 2.500 lr 1.0e-03 norm 1.00 100 tok/s" in err
    assert [row["val_loss"] for row in runlog.iterate_log(tmp_path / "log.csv")] == ["", "2.25"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
def test_run_log_without_rows_draws_without_a_warning(tmp_path):
    pytest.importorskip("matplotlib")
    runlog.plot_log([], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_run_log_escapes_what_a_terminal_would_obey(capsys, monkeypatch):
    with runlog.RunLog(None, 0, 1) as log:
        log.write("\x1b[2J")
        monkeypatch.setattr(runlog.sys.stderr, "isatty", lambda: True)
        log.write("\x1b[31m")
    err = capsys.readouterr().err
    assert "\x1b[2J" in err and "\\x1b[31m" in err and "\x1b[31m" not in err


def test_run_log_without_a_folder_writes_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with runlog.RunLog(None, 0, 1) as log:
        log.add(1, *FIGURES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["begun anew", "zeros of a power cut", "a folder", "foreign"])
def test_damaged_log_is_set_aside_and_the_run_goes_on(trained, call, damage):
    path = trained / "log.csv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        texts = {
            "begun anew": "".join(lines[3:]),
            "zeros of a power cut": "".join(lines[:3]) + "\0" * 50 + "\n" + lines[4],
            "foreign": "date,weight\n2026-11-24,70\n",
        }
        path.write_text(texts[damage], encoding="utf-8")
        before = path.read_bytes()
    (trained / "log.damaged.csv").write_text("an older one")
    done = call(train, "--resume", "--out", trained, "--steps", 8)
    assert done.returncode == 0, done.stderr
    kept = ["1", "2"] if damage == "zeros of a power cut" else []
    assert f"it is now log.damaged1.csv; the new log keeps its first {len(kept)}" in done.stderr
    assert [row["step"] for row in runlog.iterate_log(path)] == [*kept, "7", "8"]
    assert (trained / "log.damaged.csv").read_text() == "an older one"
    if damage != "a folder":
        assert (trained / "log.damaged1.csv").read_bytes() == before


def test_run_log_escapes_control_characters_of_a_sample_on_a_terminal(monkeypatch):
    for is_terminal, expected in ((True, r"a\x1b[2J"), (False, "a\x1b[2J")):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda is_terminal=is_terminal: is_terminal)
        with runlog.RunLog(None, 0, 1) as log:
            log.write("a\x1b[2J", file=stream)
        assert stream.getvalue() == f"{expected}\n"
