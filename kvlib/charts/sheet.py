"""The sheet that every chart is drawn on, in inches; how it is shown and saved; how each policy looks."""

import io
import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kvlib.files import write_atomically

BLUE, ORANGE, INK, GREY = "#0072B2", "#D55E00", "#222222", "#8A8A8A"
ORANGE_TEXT = "#B84A00"  # the line's orange is too pale for text
NAVY, PALE, YELLOW = "#20344A", "#E4E4E4", "#FFD84D"

STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so every machine draws the same glyphs
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 10,
    "legend.fontsize": 9.5,
    "hatch.linewidth": 0.8,
    "svg.hashsalt": "kvlib",
}

PROMPT = "+prompt"
FULL = "full cache"
COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
NULLS = {"random": "x", "recency": "+", "window": "+", "random-shared": "1"}
"""Policies that score nothing, what a scorer has to beat: grey and dashed, each with its marker."""
POLICIES = [
    "dynts", "triattention-per-layer", "triattention-union", "expected", "lagkv", "golden", "rkv", "snapkv",
    "knorm", "h2o", "tova", "keydiff", "gkv", "lazy", "raas", "rpc", "caote", "vase", "cur", "triattention",
    "trimkv", "sepllm", "streaming", "streaming-reindexed", "observed", "snapkv-paper", "snapkv-vase", "morphkv",
    "rkv-0.5", "caote-snapkv", "cur-resample", "expected-16", "expected-8", "dynts-published", "rpc-qwen2",
]  # fmt: skip
"""Their order gives each its colour and marker, in every figure; one that is not here, such as one's own, is in ink."""
TITLES = {
    "dynts": "DynTS", "snapkv": "SnapKV", "rkv": "R-KV", "h2o": "H2O", "tova": "TOVA", "gkv": "G-KV",
    "lazy": "LazyEviction", "raas": "RaaS", "rpc": "RPC", "vase": "VaSE", "triattention": "TriAttention",
    "trimkv": "TRIM-KV", "streaming": "StreamingLLM", "dynts-published": "DynTS as published",
}  # fmt: skip
OWN_MARKERS = ("*", "d", "H", "8")

TINY_CAVEAT = "A tiny model on made-up problems: demonstrates the mechanism, says nothing about R1-Qwen."


def style():
    """The context in which every chart is drawn and saved."""
    # From matplotlib's defaults, so that a user's matplotlibrc cannot change a chart.
    return matplotlib.style.context(["default", STYLE])


def caveat_of(model: str) -> list[str]:
    """The sentence under a model's charts, by its title: what it cannot stand for."""
    return [TINY_CAVEAT] if model.casefold().startswith("tiny") else []


def banner(what: str, model: str, datasets: Sequence[str] = (), policy: str = "") -> str:
    """The heading of a measured chart: whose numbers, on what."""
    on = f" on {', '.join(datasets)}" if len(datasets) else ""
    return f"Measured here: {model}{on}{f', policy {policy}' if policy else ''}: {what}"


def sheet(
    heading: str, notes: Sequence[str], n: int, panel: tuple[float, float], margins: tuple[float, float, float, float],
    columns: int = 2, edge: float = 0.0, marks: Sequence[str] = (), band: str = NAVY,
) -> tuple[Figure, list]:  # fmt: skip
    """A heading band, n axes in rows of `columns`, and wrapped notes at the foot: (figure, axes).

    Sizes in inches: panel is (width, height) of one axes, margins its (left, right, above, below), edge the room right
    of all of them, for a legend. marks: what a reader must not overlook, in yellow under the heading.
    """
    (wide, tall), (left, right, above, below) = panel, margins
    columns = max(1, min(columns, n))
    width = max(8.0, columns * (left + wide + right) + edge)
    wide = (width - edge) / columns - left - right
    rows = -(-n // columns)
    notes = [note.replace(" %", "\xa0%") for note in notes]
    lines = [line.replace("\xa0", " ") for note in notes for line in textwrap.wrap(note, int(width * 12.6))]
    strips = [(textwrap.wrap(text, int(width * 10.4)), face) for text, face in
              [(heading, band), *((mark, YELLOW) for mark in marks)]]  # fmt: skip
    heights = [0.14 + 0.2 * len(text) for text, _ in strips]
    foot = 0.2 + 0.2 * len(lines)
    height = sum(heights) + rows * (above + tall + below) + foot
    fig = Figure(figsize=(width, height), dpi=100, facecolor="white")
    top = height
    for (text, face), strip in zip(strips, heights, strict=True):
        top -= strip
        fig.add_artist(Rectangle((0, top / height), 1, strip / height, transform=fig.transFigure, color=face, lw=0))
        fig.text(0.15 / width, (top + strip / 2) / height, "\n".join(text), color="white" if face == NAVY else "black",
                 weight="bold", size=11, va="center_baseline", linespacing=1.25)  # fmt: skip
    fig.text(0.15 / width, 0.1 / height, "\n".join(lines), color=INK, size=10, va="bottom", linespacing=1.35)
    axes = []
    for i in range(n):
        row, column = divmod(i, columns)
        x, y = column * (left + wide + right) + left, top - (row + 1) * (above + tall + below) + below
        axes.append(fig.add_axes((x / width, y / height, wide / width, tall / height)))
    return fig, axes


def legend(fig: Figure, axes: Sequence, edge: float, order: Sequence[str] = (), **options) -> None:
    """One legend for all axes in the room right of them, `edge` inches wide. order: labels that come first."""
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    labels = [label for label in dict.fromkeys([*order, *handles]) if label in handles]
    corner = (1 - (edge - 0.1) / fig.get_size_inches()[0], axes[0].get_position().y1)
    fig.legend([handles[label] for label in labels], labels, loc="upper left", bbox_to_anchor=corner, frameon=False,
               borderaxespad=0, **options)  # fmt: skip


def budget_places(budgets):
    """(x of each budget, axis label). Uneven budgets become equal steps: to scale, their bars would overlap."""
    even = len({b - a for a, b in itertools.pairwise(budgets)}) <= 1
    return (budgets, "KV Budget") if even else (list(range(len(budgets))), "KV Budget (not to scale)")


def looks(labels: Sequence[str]) -> dict[str, dict]:
    """{label: line properties}: a policy has one colour and marker in all figures, with the prompt protected or not.

    labels: names or titles. Where both are drawn, the unprotected one is dashed. Nulls are grey and dashed.
    """
    found, own = {}, 0
    by_title = {title.casefold(): name for name, title in TITLES.items()}
    for label in labels:
        arm = label.partition(" (n = ")[0]
        name = arm.casefold().removesuffix(PROMPT)
        name = by_title.get(name, name)
        dashes = (0, (5, 1.5)) if f"{arm}{PROMPT}" in labels else "-"
        look = {"linewidth": 1.7, "markersize": 7, "markeredgewidth": 0.8, "markeredgecolor": "white"}
        look["linestyle"] = dashes
        if label == FULL:
            look = {"color": INK, "linestyle": (0, (4, 2.5)), "linewidth": 1.3}
        elif name in NULLS:
            look |= {"color": GREY, "linestyle": "--", "marker": NULLS[name], "markeredgecolor": GREY}
        elif name in POLICIES:
            i = POLICIES.index(name)
            look |= {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        else:
            look |= {"color": INK, "marker": OWN_MARKERS[own % len(OWN_MARKERS)]}
            own += 1
        found[label] = look
    return found


def policy_title(name: str) -> str:
    return TITLES.get(name, name.capitalize() if name in NULLS else name)


def save(fig: Figure | None, stem: Path | str, table: pd.DataFrame | None = None) -> list[Path]:
    """Write fig, if any, as <stem>.png (150 dpi) and <stem>.svg, its table as <stem>.csv; return the paths.

    The same figure gives the same bytes. A file is replaced whole or not at all.
    Raises OSError naming the folder if it cannot be written.
    """
    stem, files = Path(stem), []
    with style():
        for suffix, metadata in [(".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})] * bool(fig):
            buffer = io.BytesIO()
            fig.savefig(buffer, format=suffix[1:], dpi=150, metadata=metadata)
            files.append((stem.with_name(stem.name + suffix), buffer.getvalue()))
    if table is not None:
        files.append((stem.with_name(stem.name + ".csv"), table.to_csv(index=False).encode()))
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for path, data in files:
            write_atomically(path, data)
    except OSError as error:
        raise type(error)(f"cannot write charts to {stem.parent} ({error}); make that folder writable") from error
    return [path for path, _ in files]


def show(fig: Figure | None, table: pd.DataFrame | None = None, stem: Path | str = "") -> None:
    """Display a figure in a notebook and its table beneath, whole; with a stem, save both."""
    from IPython.display import HTML, display

    if fig is not None:
        with style():
            display(fig)
    if table is not None:
        rows = table.to_html(index=False, border=0, max_rows=None, max_cols=None)
        display(HTML(f'<div style="max-height:32em;overflow:auto">{rows}</div>'))
    if stem:
        save(fig, stem, table)
