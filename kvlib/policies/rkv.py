"""R-KV: importance minus redundancy (arXiv 2505.24133)."""

from dataclasses import dataclass

from kvlib.kernels.redundancy import redundancy
from kvlib.policies.base import Part
from kvlib.policies.observe import keep_window
from kvlib.policies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class RKV(SnapKV):
    """Keep by `mix_lambda * importance - (1 - mix_lambda) * redundancy`, and the newest n_recent tokens.

    Equation 5 of the paper; defaults of Zefan-Cai/R-KV (rkv/compression/r1_kv.py, README): lambda 0.1,
    window 8, kernel 7, threshold 0.5, a round every 128 tokens.
    """

    mix_lambda: Part = 0.1
    threshold: float | None = 0.5

    def score(self, view, state):
        repeated = redundancy(view.keys, self.threshold)[..., : -self.n_obs]
        mixed = self.mix_lambda * self.importance(view) - (1 - self.mix_lambda) * repeated
        return keep_window(mixed, self.n_obs), state
