"""A trial at load: does a model decode through kvlib as it does alone?"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from kvlib.engine.attention import evaluating, text_config
from kvlib.engine.general import GeneralModel, in_a_sentence
from kvlib.errors import ConfigError
from kvlib.policies import Full

LENGTHS = (9, 5)
N_NEW = 3


@torch.inference_mode()
def probe(model: nn.Module) -> None:
    """Raise ConfigError unless two rows of unequal length decode greedily as the model decodes each alone.

    Alone it has its own attention and a DynamicCache. Logits may differ by rounding, of which mixtures of experts make
    more: by a hundredth of their spread, by a third in bfloat16. What decodes wrongly differs by about all of it.
    """
    n_slots = max(LENGTHS) + N_NEW
    step = GeneralModel(model, Full(), len(LENGTHS), n_slots, n_slots)
    device = step.cache.keys.device
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(step.vocab_size // 2, (n,), generator=draw).to(device) for n in LENGTHS]
    with in_a_sentence(step.family), evaluating(model):
        alone = torch.stack([_alone(model, prompt) for prompt in prompts], 1)
        together = _together(step, prompts, alone.argmax(-1))
    allowed = max(0.01, 42 * torch.finfo(alone.dtype).eps)
    error = ((together - alone).float().std(-1) / alone.float().std(-1)).max().item()
    if not error <= allowed:
        raise ConfigError(
            f"{step.family} decodes in another way through kvlib than alone: logits differ by {error:.2g} of "
            f"their spread, {allowed:.2g} is allowed; use another model"
        )


def _alone(model: nn.Module, prompt: Tensor) -> Tensor:
    """Logits `[N_NEW, V]` after the prompt and each greedy token, by the model's own attention."""
    cache, ids, made = DynamicCache(config=text_config(model)), prompt[None], []
    for _ in range(N_NEW):
        made.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1])
        ids = made[-1].argmax(-1).view(1, 1)
    return torch.stack(made)


def _together(step: GeneralModel, prompts: list[Tensor], tokens: Tensor) -> Tensor:
    """Logits `[N_NEW, B, V]` where the rows step side by side through tokens `[N_NEW, B]`, slots in reverse order."""
    cache = step.cache
    made = [torch.stack([step.prefill(row, prompt)[1] for row, prompt in enumerate(prompts)])]
    for row, n in enumerate(LENGTHS):
        for held in (cache.keys, cache.values, cache.positions):
            held[:, row, :, :n] = held[:, row, :, :n].flip(2)
    for token in tokens[:-1]:
        made.append(step.step(token, cache.lengths.clone(), int(cache.lengths.max()) + 1)[1])
        cache.lengths += 1
    return torch.stack(made)
