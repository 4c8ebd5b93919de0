"""The general step decodes families of transformers as `generate` does, also what is left after an eviction."""

import pytest
import torch
from families import CORE, FAMILIES, random_family
from transformers.cache_utils import DynamicCache

from kvlib.engine.general import GeneralModel
from kvlib.policies import make_policy

PROMPTS = [tuple(torch.randint(64, (n,), generator=torch.Generator().manual_seed(n)).tolist()) for n in (5, 12)]
N_NEW = 14
EVICT_AFTER = 6
ROUNDED = {"glm4_moe", "mimo_v2_flash", "gemma2", "vaultgemma", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "dots1"}
ROUNDED |= {"solar_open", "olmo_hybrid"}
"""Families with a step in float32 inside: a router, a soft cap, a norm."""

MIXED = {"diffllama"}
"""Families whose heads mix what is cached by head, so that they share a keep set."""


def gone(model, layer: int, head: int) -> int:
    """The position that is evicted: another one in each layer and head."""
    return 1 + (layer + head * (model.config.model_type not in MIXED)) % 4


@torch.inference_mode()
def together(model, evict_after: int | None) -> tuple[torch.Tensor, GeneralModel]:
    """Logits `[B, N_NEW, V]` of greedy decoding, the rows side by side."""
    n = max(map(len, PROMPTS)) + N_NEW
    share = "layer" if model.config.model_type in MIXED else "head"
    step = GeneralModel(model, make_policy("random", share=share), len(PROMPTS), n, n)
    cache = step.cache
    made = [torch.stack([step.prefill(row, torch.tensor(prompt))[1] for row, prompt in enumerate(PROMPTS)])]
    for i in range(1, N_NEW):
        made.append(step.step(made[-1].argmax(-1), cache.lengths + (i > (evict_after or N_NEW)), n)[1])
        cache.lengths += 1
        if i == evict_after:
            layers = torch.arange(cache.shape.n_layers)[:, None, None]
            heads = torch.arange(cache.shape.slot_map[2])[:, None]
            for row, n_live in enumerate(cache.lengths.tolist()):
                live = cache.positions[:, row, :, :n_live]
                keep = (live != gone(model, layers, heads))[:, None]
                cache.keep(torch.tensor([row]), keep, torch.tensor([n_live - 1]))
    return torch.stack(made, 1), step


@torch.inference_mode()
def cut_by_hand(model, prompt: tuple[int, ...], evicted: dict[int, int]) -> torch.Tensor:
    """Logits `[N_NEW, V]` with a DynamicCache, out of which one position per head is cut; positions stay."""
    cache, ids, positions, made = DynamicCache(config=model.config), torch.tensor([prompt]), None, []
    positions = torch.arange(len(prompt))[None]
    for i in range(N_NEW):
        made.append(model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[0, -1])
        ids, positions = made[-1].argmax(-1).view(1, 1), positions[:, -1:] + 1
        for module, layer in evicted.items() if i == EVICT_AFTER else ():
            held = cache.layers[module]
            for name in ("keys", "values"):
                heads = getattr(held, name).unbind(1)
                gaps = [gone(model, layer, head) for head in range(len(heads))]
                cut = [torch.cat([x[:, :i], x[:, i + 1 :]], 1) for i, x in zip(gaps, heads, strict=True)]
                setattr(held, name, torch.stack(cut, 1))
    return torch.stack(made)


@pytest.mark.parametrize(
    "name", [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_decodes_as_generate_and_evicted_as_a_cache_cut_by_hand(name):
    model = random_family(name)
    options = {"max_new_tokens": N_NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    alone = [
        model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
        for prompt in PROMPTS
    ]
    logits, step = together(model, None)
    for row, (prompt, own) in enumerate(zip(PROMPTS, alone, strict=True)):
        assert logits[row].argmax(-1).tolist() == own.sequences[0, len(prompt) :].tolist()
        torch.testing.assert_close(logits[row].float(), torch.cat(own.logits), rtol=1e-5, atol=1e-5)
    evicted, _ = together(model, EVICT_AFTER)
    for row, prompt in enumerate(PROMPTS):
        expected = cut_by_hand(model, prompt, step.evicted)
        assert evicted[row].argmax(-1).tolist() == expected.argmax(-1).tolist()
        torch.testing.assert_close(evicted[row], expected, rtol=0, atol=1e-5 if name in ROUNDED else 1e-11)
    assert (evicted - logits)[:, EVICT_AFTER + 1 :].abs().amax() > 1e-4, "what was evicted did not matter"
