"""Tests of gpt2_support/interrupts.py; what a run does with a signal is in test_train.py."""

import signal

import pytest

from gpt2_support import interrupts


def test_second_ctrl_c_does_not_wait_for_the_step(monkeypatch, capsys):
    now = [5.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGINT)
    with interrupts.deferred_interrupts() as interrupted:
        assert not interrupted()
        for _ in range(2):  # the second is only the first one's echo
            signal.raise_signal(signal.SIGINT)
            assert interrupted()
        now[0] = 6.5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err.count("stopping after this step (again: at once, unsaved)") == 1


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_stops_a_run_unless_a_shell_has_it_ignored(name):
    if not hasattr(signal, name):
        pytest.skip("Windows has no SIGHUP")
    number = getattr(signal, name)
    for handler, expected in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        before = signal.signal(number, handler)
        try:
            with interrupts.deferred_interrupts() as interrupted:
                signal.raise_signal(number)
                assert interrupted() == expected
            assert signal.getsignal(number) == handler
        finally:
            signal.signal(number, before)
