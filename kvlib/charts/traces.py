"""What a notebook shows of single traces: text with kept and evicted tokens told apart, and small pictures."""

import hashlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from html import escape

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from kvlib.charts.sheet import BLUE, GREY, INK, ORANGE, banner, caveat_of, looks, sheet, style
from kvlib.errors import ConfigError

MOST_LAYERS, MOST_HEADS = 4, 2
"""Panels of a keep map."""
KEPT = "background:#cfe3f5;color:#000;font-weight:600"
EVICTED = "color:#666;text-decoration:line-through"
NEWER = "background:#fdebd3;color:#000;text-decoration:underline"
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


def held_by_kind(traces: Mapping[str, tuple[Sequence[str], Collection[int]]], n_prompt: int) -> pd.DataFrame:
    """How many tokens of a kind are still in the cache, by policy: the prompt's, both halves of what was written, and
    in the older half the values that a chain states as found (`so k 0`).

    traces: by policy, (words, positions kept) as `paint_trace` takes them.
    """
    rows = {}
    for policy, (words, kept) in traces.items():
        middle = (n_prompt + len(words)) // 2
        kinds = {
            "the question": range(n_prompt),
            "the older half of what it wrote": range(n_prompt, middle),
            "values found in that half": [
                i for i in range(n_prompt, middle) if words[i].strip().isdigit() and words[i - 2].strip() == "so"
            ],
            "the newer half": range(middle, len(words)),
        }
        rows[policy] = {kind: f"{len(set(kept).intersection(of))} of {len(of)}" for kind, of in kinds.items()}
    return pd.DataFrame(rows)


def compare_traces(
    words: Sequence[str],
    rounds: Mapping[str, Sequence[tuple[int, Collection[int]]]],
    n_prompt: int,
    most_rounds: int = 12,
) -> str:
    """HTML of one trace under several policies side by side, to be stepped through round by round.

    words[i]: the token at position i. rounds: by policy, (tokens seen, positions kept) of each round at one layer and
    KV head, in order, as Completion.kept gives them. n_prompt: tokens of the prompt, whose end is marked ‖.
    At most most_rounds rounds are shown, evenly chosen, the last one open.

    Every step is a <details> element that needs neither script nor style sheet. Kept tokens are <b> on blue, evicted
    ones <s> in grey, and those that came since the policy's last round <u> on orange: where a viewer strips styles,
    the elements still tell them apart. Raises ConfigError if there is no round.
    """
    if not any(rounds.values()):
        raise ConfigError("no policy had a round on this trace; use a smaller KV budget, and decode with trace=True")
    steps = sorted({seen for several in rounds.values() for seen, _ in several})
    chosen = _evenly(len(steps), most_rounds)
    # Details of one name close each other, where a viewer leaves them the name; each view has its own.
    name = "kv" + hashlib.sha256(repr((words, list(rounds), steps)).encode()).hexdigest()[:8]
    parts = [
        f'<p style="{CAPTION}">One trace under {escape(" and ".join(rounds))}: {len(chosen)} of {len(steps)} rounds</p>'
        f'<p><b style="{KEPT}">kept</b> · <s style="{EVICTED}">evicted</s> · '
        f'<u style="{NEWER}">newer than the last round</u> · ‖ end of the prompt</p>'
    ]
    for i in chosen:
        cells, counts = [], []
        for policy, several in rounds.items():
            last, kept = max(((r for r in several if r[0] <= steps[i])), default=(0, ()), key=lambda r: r[0])
            kept = set(kept)
            states = ["b" if p in kept else "s" if p < last else "u" for p in range(steps[i])]
            counts.append(f"{policy} holds {states.count('b') + states.count('u')}")
            cells.append(
                f'<td style="vertical-align:top;text-align:left;width:{100 // len(rounds)}%">'
                f'<p>{escape(policy)}</p><div style="{BOX}">{_runs(words, states, n_prompt)}</div></td>'
            )
        summary = escape(f"after {steps[i]} tokens: {', '.join(counts)}")
        parts.append(
            f'<details name="{name}"{" open" if i == chosen[-1] else ""}><summary>{summary}</summary>'
            f'<table style="width:100%;table-layout:fixed"><tr>{"".join(cells)}</tr></table></details>'
        )
    return f"<div>{''.join(parts)}</div>"


def _runs(words: Sequence[str], states: Sequence[str], n_prompt: int) -> str:
    """The words in one element per run of equal states, ‖ after the prompt."""
    looks = {"b": KEPT, "s": EVICTED, "u": NEWER}
    html = []
    for (in_prompt, tag), run in itertools.groupby(range(len(states)), key=lambda p: (p < n_prompt, states[p])):
        positions = list(run)
        if not in_prompt and positions[0] == n_prompt:
            html.append("‖")
        html.append(f'<{tag} style="{looks[tag]}">{escape(" ".join(words[p] for p in positions))}</{tag}>')
    return " ".join(html)


def _evenly(n: int, most: int) -> list[int]:
    """At most so many of range(n), the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(most, n))})


def held_map(rounds: Sequence[tuple[int, Collection[int]]], n_prompt: int, n_seen: int) -> np.ndarray:
    """Bool `[n_seen, n_seen - n_prompt + 1]`: whether position p (row) is held with n_prompt + j tokens (column) seen.

    rounds: (tokens seen, positions kept) of one layer and KV head, in order.
    """
    held = np.tri(n_seen, dtype=bool).T[:, n_prompt - 1 :]
    for seen, kept in rounds:
        if seen <= n_seen:
            gone = np.ones(seen, dtype=bool)
            gone[list(kept)] = False
            held[:seen, seen - n_prompt :][gone] = False
    return held


def keep_map_figure(
    kept: Sequence[tuple[int, Sequence[Sequence[Sequence[int]]]]], n_prompt: int, n_seen: int, heading: str
) -> Figure:
    """Which positions (upwards) are held at each step (rightwards), as small multiples of layers and KV heads.

    kept: Completion.kept. n_seen: tokens of prompt and output. heading: whose trace, as sheet.banner says it. At most
    MOST_LAYERS layers, evenly chosen, by MOST_HEADS heads are drawn. Held is dark, evicted light, what was not yet
    written white; so the picture reads in grey. Raises ConfigError if there was no round.
    """
    if not kept:
        raise ConfigError("no round evicted anything; use a smaller KV budget, and decode with trace=True")
    n_layers, n_heads = len(kept[0][1]), len(kept[0][1][0])
    layers = _evenly(n_layers, MOST_LAYERS)
    heads = range(min(MOST_HEADS, n_heads))
    note = f"Held: dark; evicted: light; dashed: end of the prompt. {len(layers)} of {n_layers} layers"
    notes = [f"{note}, {len(heads)} of {n_heads} KV heads." if n_layers > 1 else f"{note[: note.index('.')]}."]
    written = held_map([], n_prompt, n_seen)
    with style():
        fig, axes = sheet(heading, notes, len(layers) * len(heads), (2.9, 1.9), (0.7, 0.1, 0.35, 0.5), len(heads))
        for ax, (layer, head) in zip(axes, itertools.product(layers, heads), strict=True):
            held = held_map([(seen, sets[layer][head]) for seen, sets in kept], n_prompt, n_seen)
            # Cell (p, j) is centred on position p at n_prompt + j tokens.
            extent = (n_prompt - 0.5, n_seen + 0.5, -0.5, n_seen - 0.5)
            colors = ListedColormap(["white", "#D5D5D5", "#0B3C5D"])
            ax.imshow(written.astype(int) + held, colors, vmin=0, vmax=2, origin="lower", aspect="auto",
                      interpolation="nearest", extent=extent)  # fmt: skip
            ax.axhline(n_prompt - 0.5, color=ORANGE, linewidth=1.3, linestyle="--")
            name = {1: "all layers"}.get(n_layers, f"layer {layer}"), {1: "all heads"}.get(n_heads, f"KV head {head}")
            ax.set_title(", ".join(name), size=10, color=INK)
            ax.set_xlabel("tokens seen", size=9.5)
            ax.set_ylabel("position", size=9.5)
    return fig


def slots_figure(held: Mapping[str, Sequence[int]], kv_budget: int, model: str) -> Figure:
    """Slots held per KV head against tokens written, one line per decoded output, and the budget as a level."""
    with style():
        heading = banner("slots held per KV head", model, policy=", ".join(held))
        fig, (ax,) = sheet(heading, caveat_of(model), 1, (7, 2.5), (0.8, 0.2, 0.2, 0.6))
        ax.axhline(kv_budget, color=GREY, linestyle=":", linewidth=1.2, label=f"KV budget {kv_budget}")
        for (name, slots), look in zip(held.items(), looks(list(held)).values(), strict=True):
            ax.plot(range(1, len(slots) + 1), slots, color=look["color"], linestyle=look["linestyle"], label=name)
        ax.set(xlabel="tokens written", ylabel="slots held per KV head", ylim=(0, None))
        ax.spines["right"].set_visible(False)
        ax.legend(frameon=False, loc="upper left")
    return fig


def importance_figure(attention: Sequence[float], predicted: Sequence[float], model: str) -> Figure:
    """Along one trace: the attention each thinking token will get from the answer, and the predictor's score for it.

    Both are scaled to their maximum; the prediction points down, so that bars of one token face each other.
    """
    place = range(len(attention))
    with style():
        heading = banner("attention from the answer, and the score that predicted it", model, policy="DynTS")
        fig, (ax,) = sheet(heading, caveat_of(model), 1, (8, 2.5), (0.8, 0.2, 0.2, 0.6))
        up, down = ([value / max(values) for value in values] for values in (attention, predicted))
        ax.bar(place, up, 1.0, color=BLUE, label="attention from the answer")
        ax.bar(place, [-v for v in down], 1.0, color=ORANGE, hatch="//", label="predicted when written")
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set(xlabel="thinking token", ylabel="share of the largest", yticks=(-1, 0, 1), yticklabels=("1", "0", "1"))
        ax.spines["right"].set_visible(False)
        ax.legend(frameon=False, loc="upper right", ncols=2)
    return fig
