"""What a notebook shows of single traces: text with kept and evicted tokens told apart, and two small pictures."""

from collections.abc import Collection, Mapping, Sequence
from html import escape

from matplotlib.figure import Figure

from kvlib.figures import BLUE, GREY, INK, ORANGE

KEPT = "background:#cfe3f5;color:#000;font-weight:600"
EVICTED = "color:#666;text-decoration:line-through"
CAPTION = "margin:.4em 0;font-weight:600"
BOX = (
    "font-family:monospace;line-height:1.9;max-width:70em;border:1px solid #ccc;padding:.6em;background:#fff;color:#000"
)


def paint_trace(words: Sequence[str], kept: Collection[int], caption: str) -> str:
    """HTML of the tokens seen so far: words[i] is the token at position i; kept: the positions still in the cache.

    Kept tokens stand bold on blue, evicted ones are grey and struck through, so colour is not the only sign.
    """
    kept = set(kept)
    spans = (f'<span style="{KEPT if i in kept else EVICTED}">{escape(word)}</span>' for i, word in enumerate(words))
    counts = f"{len(kept)} of {len(words)} tokens kept"
    return f'<p style="{CAPTION}">{escape(caption)}: {counts}</p><div style="{BOX}">{" ".join(spans)}</div>'


def slots_figure(held: Mapping[str, Sequence[int]], kv_budget: int) -> Figure:
    """Slots held per KV head against tokens written, one line per decoded output, and the budget as a level."""
    fig = Figure(figsize=(8, 3.2), layout="constrained")
    ax = fig.add_subplot()
    ax.axhline(kv_budget, color=GREY, linestyle=":", linewidth=1.2)
    ax.annotate(
        f"KV budget {kv_budget}",
        (1, kv_budget),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color=INK,
    )
    for (name, slots), color, style in zip(held.items(), (INK, BLUE, ORANGE), ("-", "-", "--"), strict=False):
        ax.plot(range(1, len(slots) + 1), slots, style, color=color, label=name)
    ax.set(xlabel="tokens written", ylabel="slots held per KV head", ylim=(0, None))
    ax.legend(frameon=False, loc="lower right")
    return fig


def importance_figure(attention: Sequence[float], predicted: Sequence[float]) -> Figure:
    """Along one trace: the attention each thinking token will get from the answer, and the predictor's score for it.

    Both are scaled to their maximum; the prediction points down, so that bars of one token face each other.
    """
    fig = Figure(figsize=(9, 3.2), layout="constrained")
    ax = fig.add_subplot()
    position = range(len(attention))
    ax.bar(
        position, [value / max(attention) for value in attention], 1.0, color=BLUE, label="attention from the answer"
    )
    ax.bar(
        position,
        [-value / max(predicted) for value in predicted],
        1.0,
        color=ORANGE,
        hatch="//",
        label="predicted when written",
    )
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set(xlabel="thinking token", ylabel="share of the largest", yticks=(-1, 0, 1), yticklabels=("1", "0", "1"))
    ax.legend(frameon=False, loc="upper right", ncols=2)
    return fig
