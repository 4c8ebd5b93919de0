"""A step is fixed work on fixed tensors, so that a CUDA graph can replay it; without CUDA it is called plainly."""

import logging

import pytest
import torch
from conftest import prompts, small_policy

from kvlib.generate import Decoder, Request
from kvlib.graph import Graph
from kvlib.sampling import Sampling


class FakeCUDA:
    """Stands in for torch.cuda: a capture notes the work, a replay does it; `fails` raises inside the capture."""

    def __init__(self, fails: bool = False):
        self.fails, self.captures, self.replays = fails, 0, 0

    def CUDAGraph(self):
        return self

    def graph(self, _):
        return self

    def __enter__(self):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be")
        self.captures += 1

    def __exit__(self, *_):
        return False

    def replay(self):
        self.replays += 1


def test_off_cuda_every_call_is_the_work_itself():
    calls = []
    graph = Graph(lambda: calls.append(1) or len(calls), torch.device("cpu"))
    assert [graph(), graph(), graph()] == [1, 2, 3]


def test_on_cuda_the_first_call_is_plain_the_second_captures_and_all_later_ones_replay(monkeypatch):
    fake, calls = FakeCUDA(), []
    monkeypatch.setattr(torch, "cuda", fake)
    graph = Graph(lambda: calls.append(1) or len(calls), torch.device("cuda"))
    assert graph() == 1 and fake.captures == 0
    assert [graph(), graph()] == [2, 2], "what the capture returned"
    assert (len(calls), fake.captures, fake.replays) == (2, 1, 2)


def test_what_cannot_be_captured_is_called_plainly_and_the_reason_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(torch, "cuda", FakeCUDA(fails=True))
    calls = []
    graph = Graph(lambda: calls.append(1) or len(calls), torch.device("cuda"))
    with caplog.at_level(logging.WARNING):
        assert [graph(), graph(), graph()] == [1, 2, 3]
    assert [record.message for record in caplog.records] == [
        "decoding without a CUDA graph: operation not permitted when stream is capturing"
    ]


def tensors_of(decoder: Decoder) -> dict[str, torch.Tensor]:
    own = {name: value for name, value in vars(decoder).items() if isinstance(value, torch.Tensor) and name != "logits"}
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
def test_rounds_row_by_row_as_on_cuda_keep_what_rounds_of_all_rows_keep(qwen2, name, monkeypatch):
    def kept(by_row: bool) -> list:
        decoder = Decoder(
            qwen2, small_policy(name), 28, n_rows=3, n_prompt_max=12, max_new_tokens=60, sampling=Sampling(1.0),
            eos_ids=(), trace=True,
        )  # fmt: skip
        if by_row:
            monkeypatch.setattr(decoder, "_evict_rows", by_rows(decoder))
        for row, prompt in enumerate(prompts(3)):
            decoder.admit(row, Request(str(row), prompt, row))
        for _ in range(59):
            decoder.step()
        return [done for _, done in decoder.finished()]

    assert kept(by_row=True) == kept(by_row=False)


def by_rows(decoder: Decoder):
    """What Decoder does on CUDA: each due row in the round of its number of live slots, made once and rewritten."""
    plain = decoder._evict_rows

    def evict_rows(due):
        monkey = decoder._evict_rows
        decoder._evict_rows = plain
        for row, n_keep in zip(due.rows.tolist(), due.n_keep.tolist(), strict=True):
            decoder._evict_row(row, due.n_live, n_keep)
        decoder._evict_rows = monkey

    return evict_rows
