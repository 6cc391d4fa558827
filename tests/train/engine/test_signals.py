import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from oner_fast.train.engine.distributed import World
from oner_fast.train.engine.signals import STOPPING, exit_status, stop_on_signals


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """Give SIGINT and SIGHUP their usual meaning; nohup and a shell's background jobs ignore them."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("name", STOPPING)
def test_the_first_signal_only_requests_a_stop(name, capfd):
    before = [signal.getsignal(signal.Signals[each]) for each in STOPPING]
    with stop_on_signals() as stop:
        assert stop.requested is None and stop.agree(ALONE) is None
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.requested == name == stop.agree(ALONE)
        for other in STOPPING[1:]:
            os.kill(os.getpid(), signal.Signals[other])
        assert stop.requested == name
    assert [signal.getsignal(signal.Signals[each]) for each in STOPPING] == before
    assert ("Ctrl-C again stops at once" in capfd.readouterr().err) == (name == "SIGINT")


def test_the_exit_status_is_that_of_a_shell():
    assert [exit_status(name) for name in STOPPING] == [130, 143, 129, 138]


def test_a_run_under_nohup_ignores_the_end_of_its_session():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_ctrl_c_interrupts_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_forked_children_leave_ctrl_c_to_the_parent_and_obey_sigterm():
    code = (
        "import os, signal, time\n"
        "from oner_fast.train.engine.signals import STOPPING, exit_status, stop_on_signals\n"
        "with stop_on_signals() as stop:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        for other in 2 * [signal.SIGINT] + [signal.SIGHUP, signal.SIGUSR1]:\n"
        "            os.kill(os.getpid(), other)\n"
        "        os.kill(os.getpid(), signal.SIGTERM); time.sleep(30); os._exit(3)\n"
        "    _, status = os.waitpid(child, 0)\n"
        "print(os.WTERMSIG(status), stop.requested)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("15 None\n", "")


def test_outside_the_main_thread_a_warning_says_that_signals_are_not_handled(caplog):
    seen = []

    def work():
        with stop_on_signals() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None] and "not in the main thread" in caplog.text
