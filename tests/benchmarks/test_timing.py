"""Statistics, floors and graphs of the benchmark harness."""

import contextlib

import pytest
import torch
from harness import measure, problem, timing

CPU = torch.device("cpu")


def test_percentiles_are_numpys():
    values = torch.randn(37, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        expected = torch.quantile(values, share).item()
        assert timing.percentile(values.tolist(), share) == pytest.approx(expected, abs=1e-12)
    assert timing.percentile([3.0], 0.2) == 3.0
    times = timing.summary([5.0, 1.0, 3.0, 2.0, 4.0], 7, "graph")
    assert (times.p20, times.p50, times.p80, times.repeats, times.calls) == (1.8, 3.0, 4.2, 5, 7)


def test_alternatives_take_turns():
    order = []
    timed = [timing.Timed(lambda i=i: order.append(i), 1, "host clock", 1.0) for i in range(3)]
    times = timing.take_turns(timed, CPU, seconds=0.0, least=20)
    assert order == [0, 1, 2] * 20
    assert [t.repeats for t in times] == [20] * 3
    assert all(0 < t.p20 <= t.p50 <= t.p80 for t in times)


def test_repeats_fit_the_time():
    slow = [timing.Timed(lambda: None, 4, "graph", 1e3)]  # 4 ms a turn
    assert timing.take_turns(slow, CPU, seconds=0.12)[0].repeats == 30
    assert timing.take_turns(slow, CPU, seconds=10.0)[0].repeats == 60


def test_floors_are_the_issues():
    """n = 4096, T = 8192, bf16 at 3030 GB/s and 779 TFLOP/s: 45 and 113 µs for 64 blocks, 177 for 4."""
    n, tokens = 4096, 8192
    many = problem.Cost.linear(tokens, n, n, 2 * 64 * 64 * 64)
    forward, by = many.floor_us("forward", 2, 3030, 779)
    assert by == "memory"
    assert forward == pytest.approx((2 * n * tokens + many.params) * 2 / 3030e9 * 1e6)
    assert round(forward) == 45
    both, _ = many.floor_us("forward+backward", 2, 3030, 779)
    assert both == pytest.approx((5 * n * tokens + 3 * many.params) * 2 / 3030e9 * 1e6)
    assert 111 <= both <= 113
    few, by = problem.Cost.linear(tokens, n, n, 2 * 4 * 1024 * 1024).floor_us("forward", 2, 3030, 779)
    assert by == "arithmetic"
    assert few == pytest.approx(2 * tokens * 2 * 4 * 1024 * 1024 / 779e12 * 1e6)
    assert 176 <= few <= 177
    transform = problem.Cost.transform(tokens, n, 0)
    assert transform.moved("forward+backward", 2) == 2 * transform.moved("forward", 2) == 8 * n * tokens


def test_operands_leave_the_cache():
    cache = 50 * 2**20
    assert measure.set_count(10 * cache, cache) == 1
    assert measure.set_count(cache // 2, cache) == 4
    assert measure.set_count(1, cache) == measure.MOST_SETS
    assert measure.set_count(1, 0) == 1


class FakeCuda:
    """Stands in for torch.cuda: a clock that calls move on, graphs that count what they captured."""

    now, capturing, fails = 0.0, None, False

    class Stream:
        def wait_stream(self, other):
            pass

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = FakeCuda.now

        def elapsed_time(self, end):
            return end.at - self.at

    class CUDAGraph:
        def __init__(self):
            self.calls = []

        def replay(self):
            FakeCuda.now += 1e-3 * 20 * len(self.calls)  # milliseconds

    @staticmethod
    @contextlib.contextmanager
    def graph(graph, stream):
        if FakeCuda.fails:
            raise RuntimeError("operation not permitted")
        FakeCuda.capturing = graph
        yield
        FakeCuda.capturing = None

    @staticmethod
    def call(i):
        if FakeCuda.capturing:
            FakeCuda.capturing.calls.append(i)
        else:
            FakeCuda.now += 1e-3 * 50
        return torch.empty(0)


@pytest.fixture
def fake_cuda(monkeypatch):
    timing._side_stream.cache_clear()
    for name in ("Stream", "Event", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(FakeCuda, name))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", FakeCuda.Stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(FakeCuda, "fails", False)
    yield
    timing._side_stream.cache_clear()


def test_graphs_hold_enough_calls_and_go_round_the_operands(fake_cuda):
    device = torch.device("cuda")
    timed = timing.prepare(FakeCuda.call, 3, device)
    assert timed.run.__self__.calls == [i % 3 for i in range(13)]  # 13 calls of 20 us last 250 us
    assert (timed.calls, timed.timer) == (13, "graph")
    (times,) = timing.take_turns([timed], device, 0.0)
    assert times.p50 == pytest.approx(20.0)
    assert timing.prepare(FakeCuda.call, 40, device).calls == 40


def test_calls_that_cannot_be_captured_are_timed_plainly(fake_cuda, monkeypatch):
    monkeypatch.setattr(FakeCuda, "fails", True)
    timed = timing.prepare(FakeCuda.call, 2, torch.device("cuda"))
    assert timed.timer == "events, capture failed: RuntimeError"
    (times,) = timing.take_turns([timed], torch.device("cuda"), 0.0)
    assert times.p50 == pytest.approx(50.0)
    assert times.calls == 5
