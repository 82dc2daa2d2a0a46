"""Requests to end: noted whatever the program was doing, honoured where it may stop."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from left_bench.core import interrupt

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows interrupts in its own way")


class Thing:
    """Something that a weak reference can be taken of."""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_request_in_a_callback_is_not_lost(name):
    number = getattr(signal, name)
    thing = Thing()
    watched = weakref.ref(thing, lambda _: signal.raise_signal(number))
    reached = []
    with pytest.raises(KeyboardInterrupt) as caught, interrupt.noted():
        del thing  # Python prints what a callback raises, and goes on
        reached.append(watched())
        interrupt.check()
        reached.append("beyond the check")
    assert reached == [None]
    assert caught.value.args == (number,)


def test_a_request_that_others_swallow_is_asked_for_again():
    with pytest.raises(KeyboardInterrupt), interrupt.noted():
        signal.raise_signal(signal.SIGINT)
        with contextlib.suppress(BaseException):
            interrupt.check()
        interrupt.check()
        pytest.fail("went on")


def test_the_end_of_the_block_is_interrupted_whatever_came_of_it():
    with pytest.raises(KeyboardInterrupt), interrupt.noted():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupt.noted():
        signal.raise_signal(signal.SIGINT)
        raise EOFError("the fork server had the Ctrl-C as well")
    interrupt.check()  # nothing is left of it


def test_what_comes_to_no_safe_place_is_interrupted_all_the_same(monkeypatch):
    monkeypatch.setattr(interrupt, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(interrupt, "_REPEAT_SECONDS", 0.2)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupt.noted():
        signal.raise_signal(signal.SIGTERM)
        with contextlib.suppress(BaseException):
            time.sleep(30)
        time.sleep(30)  # swallowed once: again
    assert 0.25 < time.monotonic() - begun < 10


def test_a_request_that_is_passed_on_twice_is_one():
    with pytest.raises(KeyboardInterrupt), interrupt.noted():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        interrupt.check()


def test_a_second_request_ends_at_once():
    program = """
import time
from left_bench.core import interrupt
with interrupt.noted():
    print("on", flush=True)
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        time.sleep(0.7)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT


def test_what_is_ignored_stays_ignored_and_handlers_are_put_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with interrupt.noted():
            signal.raise_signal(signal.SIGHUP)
            interrupt.check()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_it_just_runs():
    done = []

    def run() -> None:
        with interrupt.noted():
            interrupt.check()
            done.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [True]


@pytest.mark.skipif(sys.platform != "linux", reason="forks and process groups")
def test_a_launch_ends_well_whenever_it_is_told_to(tmp_path):
    """From the first moment of a sweep to its last: the usual words and exit code, within seconds, nothing left."""
    program = Path(__file__).with_name("interrupted_launches.py")
    done = subprocess.run(
        [sys.executable, str(program), "20", "0", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    untouched, *struck = map(json.loads, done.stdout.splitlines())
    assert untouched["code"] == 0, (untouched, done.stderr)
    assert untouched["records"] == 3
    assert len(struck) == 20, done.stderr
    ended_before = 0
    for launch in struck:
        if launch["code"] == 0 and launch["records"] == 3:  # it was done before the signal
            ended_before += 1
            continue
        assert launch["code"] == 128 + launch["signal"], launch
        assert "the same command goes on" in launch["err"], launch
        assert "Traceback" not in launch["err"], launch
        assert "Exception ignored" not in launch["err"], launch
        assert launch["seconds"] < 8, launch
        assert launch["workers_left"] == 0, launch
        assert launch["half_written"] == [], launch
    assert ended_before <= 6
