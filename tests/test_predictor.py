"""Labels are the attention they claim to be; a head learns from them; its quality measure is the textbook one."""

import pytest
import torch

from kvlib.errors import ConfigError
from kvlib.predictor import (
    HeldOut,
    ImportanceHead,
    Trace,
    evaluate_head,
    features_and_labels,
    load_predictor,
    save_predictor,
    train_head,
)


def test_labels_equal_the_eager_attention_of_the_answer(any_model):
    ids = tuple(torch.randint(0, 64, (30,), generator=torch.Generator().manual_seed(3)).tolist())
    trace = Trace(ids, n_prompt=6, answer_at=22)
    features, labels = features_and_labels(any_model, trace)
    any_model.set_attn_implementation("eager")
    out = any_model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    any_model.set_attn_implementation("kvlib")
    attention = torch.stack(out.attentions)[:, 0, :, 22:]
    torch.testing.assert_close(labels.double(), attention.mean((0, 1, 2))[6:21], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(features.double(), out.hidden_states[-1][0, 6:21], rtol=1e-5, atol=1e-6)


def test_a_head_learns_what_can_be_learned_and_is_reproducible():
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(16, generator=generator)
    data = []
    for _ in range(30):
        features = torch.randn(60, 16, generator=generator)
        data.append((features, torch.exp(features @ direction)))
    head = train_head(data[:-5], n_epochs=60, batch_size=256)
    learned = evaluate_head(head, data[-5:])
    assert learned.spearman > 0.8
    assert learned.top20_recall > 0.6
    again = train_head(data[:-5], n_epochs=60, batch_size=256)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))


def test_quality_is_rank_correlation_and_recall_of_the_top_fifth():
    class Given(torch.nn.Module):
        def forward(self, x):
            return x[..., 0]

    labels = torch.arange(10.0)
    assert evaluate_head(Given(), [(labels[:, None], labels)]) == HeldOut(1, pytest.approx(1.0), 1.0)
    assert evaluate_head(Given(), [(-labels[:, None], labels)]) == HeldOut(1, pytest.approx(-1.0), 0.0)


def test_a_saved_head_comes_back_and_damage_is_named(tmp_path):
    head, path = ImportanceHead(8), tmp_path / "head.safetensors"
    save_predictor(head, path, HeldOut(7, 0.5, 0.6), "abc")
    loaded, held_out = load_predictor(path, "abc")
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), head(x))
    assert held_out == HeldOut(7, 0.5, 0.6)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"head.safetensors could not be loaded .* `make predictor`"):
        load_predictor(path)
