"""Pictures of single traces: the HTML says without styles what is kept, and the map is the keep sets."""

from html.parser import HTMLParser

import numpy as np
import pytest

from kvlib.charts.sheet import looks
from kvlib.charts.traces import (
    compare_traces,
    held_map,
    importance_figure,
    keep_map_figure,
    paint_trace,
    slots_figure,
)
from kvlib.errors import ConfigError

WORDS = [f"w{i}" for i in range(8)] + ["<think>", "a&b"]
ROUNDS = {"A": [(6, [0, 1, 5]), (9, [0, 5, 8])], "B": [(7, [0, 1, 2])]}


class Tree(HTMLParser):
    """Checks that elements nest, and collects (innermost tags, text) with no style read."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.tags = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((tuple(self.open), data))

    def cells(self):
        """[{tag: words}] of each policy's text, in order."""
        cells = []
        for path, data in self.texts:
            if path[-3:] == ("tr", "td", "p"):
                cells.append({"b": [], "s": [], "u": [], "other": []})
            elif "td" in path and data.strip():
                cells[-1][path[-1] if path[-1] in "bsu" else "other"] += data.split()
        return cells


def test_paint_trace_escapes_and_counts():
    html = paint_trace(WORDS, [8, 9], "A & B")
    assert "&lt;think&gt;" in html and "A &amp; B: 2 of 10 tokens kept" in html
    Tree(html)


def test_a_view_needs_neither_script_nor_style_sheet_and_opens_the_last_round():
    tree = Tree(compare_traces(WORDS, ROUNDS, 3))
    assert not {"script", "style", "input", "label", "svg"} & {tag for tag, _ in tree.tags}
    assert not {name for _, attributes in tree.tags for name in attributes} - {"style", "open", "name"}
    steps = [attributes for tag, attributes in tree.tags if tag == "details"]
    assert ["open" in step for step in steps] == [False, False, True] and len({step["name"] for step in steps}) == 1
    summaries = [data for path, data in tree.texts if path[-1] == "summary"]
    assert summaries == [
        "after 6 tokens: A holds 3, B holds 6",
        "after 7 tokens: A holds 4, B holds 3",
        "after 9 tokens: A holds 3, B holds 5",
    ]


def test_kept_evicted_and_newer_tokens_are_told_apart_by_their_element():
    cells = Tree(compare_traces(WORDS, ROUNDS, 3)).cells()
    assert len(cells) == 6
    assert cells[2] == {"b": ["w0", "w1", "w5"], "s": ["w2", "w3", "w4"], "u": ["w6"], "other": ["‖"]}
    assert cells[3] == {"b": ["w0", "w1", "w2"], "s": ["w3", "w4", "w5", "w6"], "u": [], "other": ["‖"]}
    assert cells[1] == {"b": [], "s": [], "u": ["w0", "w1", "w2", "w3", "w4", "w5"], "other": ["‖"]}
    assert cells[4]["b"] == ["w0", "w5", "<think>"]


def test_many_rounds_are_thinned_and_two_views_do_not_close_each_other():
    rounds = {"A": [(n, [0, n - 1]) for n in range(4, 10)]}
    tree = Tree(compare_traces(WORDS, rounds, 3, most_rounds=3))
    summaries = [data for path, data in tree.texts if path[-1] == "summary"]
    assert summaries == ["after 4 tokens: A holds 2", "after 6 tokens: A holds 2", "after 9 tokens: A holds 2"]
    assert any("3 of 6 rounds" in data for _, data in tree.texts)
    names = {dict(a).get("name") for html in (compare_traces(WORDS, rounds, 3), compare_traces(WORDS, ROUNDS, 3))
             for tag, a in Tree(html).tags if tag == "details"}  # fmt: skip
    assert len(names) == 2


def test_a_trace_without_a_round_is_refused():
    with pytest.raises(ConfigError, match="no policy had a round"):
        compare_traces(WORDS, {"A": [], "B": []}, 3)
    with pytest.raises(ConfigError, match="no round evicted anything"):
        keep_map_figure([], 3, 9, "m")


def test_the_map_is_what_is_held_at_each_step():
    rounds = [(6, [0, 1, 5]), (9, [0, 5, 8])]
    held = held_map(rounds, 3, 10)
    assert held.shape == (10, 8)
    for column, seen in enumerate(range(3, 11)):
        last, kept = max([r for r in rounds if r[0] <= seen], default=(0, []))
        expected = {p for p in range(seen) if p in kept or p >= last}
        assert set(np.flatnonzero(held[:, column])) == expected


def test_keep_maps_are_drawn_for_layers_and_heads_under_a_heading():
    kept = [(6, [[[0, 1, 5], [0, 2, 5]], [[0, 3, 5], [0, 4, 5]]])]
    fig = keep_map_figure(kept, 3, 10, "Measured here: m")
    titles = [ax.get_title() for ax in fig.axes]
    assert titles == [f"layer {layer}, KV head {head}" for layer in (0, 1) for head in (0, 1)]
    assert fig.texts[0].get_text() == "Measured here: m" and "2 of 2 layers, 2 of 2 KV heads" in fig.texts[1].get_text()
    image = fig.axes[3].images[0]
    assert image.get_extent() == [2.5, 10.5, -0.5, 9.5]
    shown = np.asarray(image.get_array())
    assert shown[:, 3].tolist() == [2, 1, 1, 1, 2, 2, 0, 0, 0, 0]
    assert list(fig.axes[3].lines[0].get_ydata()) == [2.5, 2.5]
    greys = [np.dot(image.cmap(i)[:3], (0.299, 0.587, 0.114)) for i in range(3)]
    assert greys[0] - greys[1] > 0.1 and greys[1] - greys[2] > 0.4, "told apart in grey"
    shared = keep_map_figure([(6, [[[0, 1, 5]]])], 3, 10, "m")
    assert [ax.get_title() for ax in shared.axes] == ["all layers, all heads"]
    deep = keep_map_figure([(6, [[[0, 1, 5]] * 8] * 28)], 3, 10, "m")
    assert [ax.get_title() for ax in deep.axes[::2]] == [f"layer {layer}, KV head 0" for layer in (0, 9, 18, 27)]


def test_small_pictures_name_their_model_and_keep_a_policys_colour():
    slots = slots_figure({"full cache": range(9), "DynTS": range(9), "StreamingLLM": range(9)}, 5, "Tiny-0.8M")
    assert slots.texts[0].get_text().startswith("Measured here: Tiny-0.8M, policy full cache, DynTS, StreamingLLM")
    known = looks(["dynts", "streaming"])
    assert [line.get_color() for line in slots.axes[0].lines[2:]] == [look["color"] for look in known.values()]
    faced = importance_figure([1.0, 4.0], [2.0, 1.0], "Tiny-0.8M")
    assert [bar.get_height() for bar in faced.axes[0].patches] == [0.25, 1, -1, -0.5]
