"""A step is fixed work on fixed tensors, so that a CUDA graph can replay it; without CUDA it is called plainly."""

import logging
from contextlib import contextmanager

import pytest
import torch
from conftest import decode, prompts, small_policy
from hypothesis import given
from hypothesis import strategies as st

from kvlib.engine.decoder import Decoder, Request, graph_sizes
from kvlib.engine.graph import Graph, Pool
from kvlib.engine.sampling import Sampling


class FakeCUDA:
    """Stands in for torch.cuda: a capture does the work, a replay is counted; `ends` raises where a capture ends."""

    def __init__(self, ends: Exception | None = None):
        self.ends, self.captures, self.replays, self.streams, self.pools = ends, 0, 0, 0, 0
        self.captured_into = []

    def CUDAGraph(self):
        return self

    def graph_pool_handle(self):
        self.pools += 1
        return self.pools

    def current_stream(self):
        return None

    @contextmanager
    def stream(self, _):
        try:
            yield
        finally:
            self.streams += 1

    @contextmanager
    def graph(self, _, pool):
        """As torch: what ends a capture also ends, with an error of its own, one whose work failed."""
        self.captured_into.append(pool)
        try:
            yield
        except RuntimeError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from None
        if self.ends:
            raise self.ends
        self.captures += 1

    def replay(self):
        self.replays += 1


def test_off_cuda_every_call_is_the_work_itself():
    calls = []
    graph = Graph("step", calls.append, torch.device("cpu"))
    for i in range(3):
        graph(i)
    assert calls == [0, 1, 2]


def test_on_cuda_the_first_call_is_plain_the_second_captures_and_replays_and_so_do_all_later_ones(monkeypatch):
    fake, calls = FakeCUDA(), []
    monkeypatch.setattr(torch, "cuda", fake)
    graph = Graph("step", calls.append, torch.device("cuda"))
    graph(0)
    assert (calls, fake.captures, fake.replays) == ([0], 0, 0)
    graph(1)
    graph(2)
    assert (calls, fake.captures, fake.replays) == ([0, 1], 1, 2), "a capture does nothing, so it is replayed at once"


def test_what_cannot_be_captured_is_called_plainly_on_the_stream_that_was_current(monkeypatch, caplog):
    fake = FakeCUDA(RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be"))
    monkeypatch.setattr(torch, "cuda", fake)
    calls = []
    graph = Graph("a round of 1", calls.append, torch.device("cuda"))
    with caplog.at_level(logging.WARNING):
        for i in range(4):
            graph(i)
    assert calls == [0, 1, 1, 2, 3], "the work of the failed capture never ran on the device, so it is done again"
    assert fake.streams == 1 and fake.replays == 0
    assert [record.message for record in caplog.records] == [
        "a round of 1 runs without a CUDA graph: RuntimeError: operation not permitted when stream is capturing"
    ]
    assert graph.reason == "RuntimeError: operation not permitted when stream is capturing"


def test_the_reason_is_what_the_work_failed_with_and_not_what_the_capture_ended_with(monkeypatch, caplog):
    fake, calls = FakeCUDA(), []
    monkeypatch.setattr(torch, "cuda", fake)

    def work():
        calls.append(None)
        if len(calls) == 2:
            raise NotImplementedError("torch.unique synchronises")

    class RealGraph(FakeCUDA):
        @contextmanager
        def graph(self, _, pool):
            try:
                yield
            finally:  # as torch.cuda.graph: __exit__ ends the capture, whatever happened inside
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(torch, "cuda", RealGraph())
    graph = Graph("forward", work, torch.device("cuda"))
    graph()
    graph()
    assert graph.reason == "NotImplementedError: torch.unique synchronises"
    assert "torch.unique" in caplog.text and "previous error" not in caplog.text


def test_after_a_failed_capture_others_have_a_pool_of_their_own(monkeypatch):
    fake = FakeCUDA()
    monkeypatch.setattr(torch, "cuda", fake)
    pool = Pool()
    graphs = [Graph(name, lambda: None, torch.device("cuda"), pool) for name in "abc"]
    for graph in graphs:
        graph()
    graphs[0]()
    fake.ends = RuntimeError("no")
    graphs[1]()
    fake.ends = None
    graphs[2]()
    assert fake.captured_into == [1, 1, 2], "a shared one, and a fresh one after the failure"
    assert (graphs[0].reason, graphs[1].reason, graphs[2].reason) == ("", "RuntimeError: no", "")


def test_a_capture_that_lacks_memory_is_no_reason_to_go_on_slowly(monkeypatch):
    monkeypatch.setattr(torch, "cuda", FakeCUDA(torch.OutOfMemoryError("CUDA out of memory")))
    graph = Graph("step", lambda: None, torch.device("cuda"))
    graph()
    with pytest.raises(torch.OutOfMemoryError):
        graph()


def tensors_of(decoder: Decoder) -> dict[str, torch.Tensor]:
    own = {name: value for name, value in vars(decoder).items() if isinstance(value, torch.Tensor)}
    cache = {name: value for name, value in vars(decoder.cache).items() if isinstance(value, torch.Tensor)}
    return {**own, **cache, **decoder.cache.state}


@pytest.mark.parametrize("name", ["window", "h2o", "rkv", "dynts"])
def test_a_thousand_steps_leave_every_tensor_where_it_was(qwen2, name):
    decoder = Decoder(
        qwen2,
        small_policy(name),
        28,
        n_rows=2,
        n_prompt_max=12,
        max_new_tokens=1001,
        sampling=Sampling(1.0),
        eos_ids=(),
    )
    for row, prompt in enumerate(prompts(2)):
        decoder.admit(row, Request(str(row), prompt, row))
    before = {name: tensor.data_ptr() for name, tensor in tensors_of(decoder).items()}
    held = decoder.cache.nbytes()
    for _ in range(1000):
        decoder.step()
    assert {name: tensor.data_ptr() for name, tensor in tensors_of(decoder).items()} == before
    assert decoder.cache.nbytes() == held and decoder.finite


@pytest.mark.parametrize("name", ["window", "h2o", "rkv", "triattention", "dynts"])
def test_rounds_as_on_cuda_keep_what_rounds_of_all_due_rows_keep(qwen2, name):
    """There, one row or all of them have a round from a description made once and rewritten."""

    class AsOnCUDA(Decoder):
        def _evict(self, due, n_live):
            self.device = torch.device("cuda")
            super()._evict(due, n_live)
            self.device = torch.device("cpu")

        def _packed(self, due, n_keep):
            self.device = torch.device("cpu")
            return super()._packed(due, n_keep)

    def kept(kind: type[Decoder], lengths: list[int]) -> list:
        decoder = kind(
            qwen2, small_policy(name), 28, n_rows=3, n_prompt_max=12, max_new_tokens=60, sampling=Sampling(1.0),
            eos_ids=(), trace=True,
        )  # fmt: skip
        for row, n in enumerate(lengths):
            decoder.admit(row, Request(str(row), prompts(3)[1][:n], row))
        for _ in range(59):
            decoder.step()
        if kind is AsOnCUDA:
            assert (3 if len(set(lengths)) == 1 else 1) in decoder.round_graphs, "the graph that was used"
        return [done for _, done in decoder.finished()]

    for lengths in ([9, 9, 9], [6, 9, 10]):
        assert kept(AsOnCUDA, lengths) == kept(Decoder, lengths)


@given(st.data())
def test_whatever_is_due_is_all_rows_or_parts_of_powers_of_two(data):
    n_rows = data.draw(st.integers(1, 200))
    n_due = data.draw(st.integers(1, n_rows))
    parts = graph_sizes(n_due, n_rows)
    assert [row for part in parts for row in range(n_rows)[part]] == list(range(n_due))
    sizes = [part.stop - part.start for part in parts]
    assert sizes == [n_rows] if n_due == n_rows else all(size & (size - 1) == 0 for size in sizes)
    assert len(set(sizes)) == len(sizes), "as few as there can be"


@pytest.mark.parametrize("name", ["h2o", "rkv", "expected", "dynts", "streaming-reindexed"])
def test_a_round_in_slices_keeps_what_a_whole_one_keeps(qwen2, name, monkeypatch):
    def kept() -> list:
        requests = [Request(str(row), prompts(5)[1][:9], row) for row in range(5)]
        return list(decode(qwen2, small_policy(name), 28, requests, 5, 40, 1.0, trace=True).values())

    whole = kept()
    monkeypatch.setattr("kvlib.engine.decoder.ROUND_BYTES", 2 * 4 * 3 * 2 * 29 * 4)  # of two rows
    assert kept() == whole and any(completion.rounds for completion in whole)
