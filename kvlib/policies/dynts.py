"""DynTS: a learned head scores each token once, when it is made (arXiv 2601.18383)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvlib.policies.base import Policy, Share, SomePart

IMPORTANCE = "importance"


class ImportanceHead(nn.Module):
    """d -> 2d -> d/2 -> 1 with softplus between and after, no biases (section 3.2); trained by `kvlib.train`."""

    def __init__(self, d: int):
        super().__init__()
        self.d = d
        self.layers = nn.Sequential(
            nn.Linear(d, 2 * d, bias=False),
            nn.Softplus(),
            nn.Linear(2 * d, d // 2, bias=False),
            nn.Softplus(),
            nn.Linear(d // 2, 1, bias=False),
            nn.Softplus(),
        )

    @property
    def shape(self) -> dict[str, str]:
        """What `of` must know besides the tensors."""
        return {"d": str(self.d)}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> "ImportanceHead":
        head = cls(int(metadata["d"]))
        head.load_state_dict(tensors)
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., d]` -> `[...]`."""
        return self.layers(hidden.to(self.layers[0].weight.dtype))[..., 0]


@dataclass(frozen=True, kw_only=True)
class DynTS(Policy):
    """Keep the prompt, the newest n_recent tokens and, of the tokens between, the share `ratio` predicted to matter.

    One keep set for all layers and heads. Tokens from `</think>` on are never outranked. The share is taken of what
    the prompt leaves: keep = P + W + int(ratio * (kv_budget - P - W)). With prompt_in_share=True it is as published
    (Robin930/DynTS, inference/dynts.py): keep = W + int(ratio * (kv_budget + 1 - W)), the prompt ranks highest but
    uses up the share and is cut when it exceeds it. Published for R1-Qwen: n_recent 2000, ratio 0.4.

    buffer, if given, sets keep = kv_budget - buffer instead.
    predictor: importance `[B]` from the last hidden state `[B, d]` (after the final norm); or the path of its file;
    None: the file beside the model's weights.
    """

    n_recent: int = 2000
    ratio: SomePart = 0.4
    protect_prompt: bool = True
    buffer: int | None = None
    share: Share = "model"
    prompt_in_share: bool = False
    predictor: Callable[[Tensor], Tensor] | str | None = None
    state_names = (IMPORTANCE,)
    needs = ("predictor",)
    reads_heads = False

    def keep(self, kv_budget: int, n_prompt: int, n_seen: int) -> int:
        if self.buffer is not None:
            return kv_budget - self.buffer
        n_recent = min(self.n_recent, kv_budget)
        if self.prompt_in_share:
            return n_recent + int(self.ratio * (kv_budget + 1 - n_recent))
        return n_prompt + n_recent + int(self.ratio * max(0, kv_budget - n_prompt - n_recent))

    def creation_score(self, hidden, token_ids, answering):
        return {IMPORTANCE: self.predictor(hidden).float().masked_fill(answering, torch.inf)}

    def score(self, view, state):
        return state[IMPORTANCE].masked_fill(view.is_prompt, torch.inf), state
