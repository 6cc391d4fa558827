import time

import pytest
import torch

from oner_fast.train.engine import throughput
from oner_fast.train.engine.throughput import ThroughputMeter, gemm_rate, mfu


def test_gemm_rate_is_plausible_measured_once_and_leaves_no_trace():
    throughput._RATES.clear()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    start = time.perf_counter()
    rate = gemm_rate("cpu", torch.float32, threads=1)
    assert time.perf_counter() - start < 10
    assert 1e8 < rate < 1e13
    start = time.perf_counter()
    assert gemm_rate(torch.device("cpu"), torch.float32, threads=1) == rate
    assert time.perf_counter() - start < 0.01
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_measured_again_the_better_rate_stays(monkeypatch):
    rates = iter([2e9, 5e9, 3e9])
    monkeypatch.setattr(throughput, "_RATES", {})
    monkeypatch.setattr(throughput, "_gemm_rate", lambda *_: next(rates))
    found = [gemm_rate("cpu", torch.float32, threads=1, again=again) for again in (False, False, True, True, False)]
    assert found == [2e9, 2e9, 5e9, 5e9, 5e9]


def test_the_rate_is_the_operations_of_the_best_product(monkeypatch):
    times = iter([9.0, 0.001, 9.0, 0.008] + [0.1, 0.004, 0.2])
    monkeypatch.setattr(throughput, "_time", lambda left, right: next(times))
    # 256 is too quick, 512 is not; then 0.304 s of repetitions.
    assert throughput._measure(torch.device("cpu"), torch.float32) == 2.0 * 512**3 / 0.004


def test_bad_arguments():
    with pytest.raises(ValueError, match="floating-point"):
        gemm_rate("cpu", torch.int8)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        gemm_rate("cpu", torch.float32, threads=0)
    with pytest.raises(ValueError, match="must be positive"):
        mfu(1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="warmup"):
        ThroughputMeter(warmup=-1)


def test_mfu():
    assert mfu(2e12, 4.0, 1e12) == 0.5


def test_meter_counts_waiting_leaves_out_warm_up_and_pauses():
    now = [100.0]
    meter = ThroughputMeter(warmup=1, clock=lambda: now[0])

    def step(wait, work, pause=0.0):
        with meter.waiting():
            now[0] += wait
        now[0] += work
        with meter.excluded():
            now[0] += pause
        meter.step(32)

    step(50.0, 50.0)
    assert meter.read() is None and meter.total() is None
    step(1.0, 3.0, pause=7.0)
    step(1.0, 3.0)
    window = meter.read()
    assert window is not None and (window.steps, window.samples) == (2, 64)
    assert window.samples_per_second == pytest.approx(8.0)
    assert window.data_wait == pytest.approx(0.25)
    assert window.seconds_per_step == pytest.approx(4.0)
    assert meter.read() is None
    step(0.0, 2.0)
    last, whole = meter.read(), meter.total()
    assert last is not None and last.samples_per_second == pytest.approx(16.0) and last.data_wait == 0.0
    assert whole is not None and whole.samples_per_second == pytest.approx(9.6)
