r"""Strict equality: exact for numbers and blind to spelling, where math-verify alone is not, and on drawn numbers."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.tasks.equality import Comparer

# gold | answers that are it | answers that are not
PAIRS = r"""
1/2^{99} | 2^{-99} ; \frac{1}{2^{99}} | 1/2^{98} ; \frac{1}{2^{98}} ; 0
\frac{2^{205}+1}{3 \cdot 2^{206}} | \frac{1}{6}+\frac{1}{3 \cdot 2^{206}} | \frac{1}{3 \cdot 2^{206}} ; \frac{1}{6}
\frac{1}{3} | 0.\overline{3} ; 0.\bar3 ; .\dot{3} ; 0.(3) ; ⅓ ; 1 / 3 ; \frac26 | 0.33333333333333 ; 0.\overline{4}
0.1 | 0.100000000000000000000 ; \frac1{10} ; 1 \times 10^{-1} ; 1.0e-1 ; +.1 | 0.1000000000000000000000001 ; 1.0e-2
10^{-400} | 10^{-399}/10 | 10^{-401} ; 0
(1,\frac{1}{2^{99}}) | (1, 2^{-99}) | (1,\frac{1}{2^{98}})
\{1,10^{-400}\} | \{10^{-400}, 1\} | \{1,10^{-401}\}
\frac{x}{2^{99}} | 2^{-99}x | \frac{x}{2^{98}}
\pi | π ; \frac{2\pi}{2} | 3.14159265 ; 3.14159265358979 ; \frac{22}{7}
(1,\pi) | (1, π) | (1,3.14159265)
\sqrt{2} | √2 ; 2^{0.5} ; √{2} ; \frac{2}{\sqrt{2}} | √3 ; 1.41421356237 ; 2
\sqrt{2^{400}+1} | (2^{400}+1)^{1/2} | 2^{200}
\sqrt{x+1} | √(x+1) | √(x-1)
2 | ∛8 ; \sqrt{4} ; 2.0 ; +2 ; 02 | ∛9 ; 2.0000000001
\frac{5}{4} | 1 1/4 ; 1\ 1/4 ; 1\frac{1}{4} ; 1¼ ; 1.25 ; 125\% | 1 1/3 ; 11/4 ; -1 1/4
-\frac{3}{2} | -1½ ; -1 1/2 ; −1.5 ; -1\frac12 | 1½ ; -½
(\frac{5}{4},2) | (1 1/4, 2) ; (1.25, 2) | (2, 1 1/4)
\frac{1125}{4} | 1 125/4 ; 281 1/4 | 1 124/4
\frac{\pi}{2} | ½π ; 0.5\pi ; π/2 | ⅓π
33\frac{1}{3}\% | \frac{100}{3}\% ; \frac{1}{3} ; 33.\overline{3}\% | \frac{1}{3}\% ; 34\%
x^2 | x² | x³ ; 2x ; x_2
10^5 | 10⁵ ; 100000 ; 100,000 ; 100 000 ; 1.0e5 | 10⁴ ; 1e5
27 | 0.27e2 ; 2.7E1 ; 2.7 \times 10^1 ; 27, ; 27\text{ cm}^2 ; 27 \text{ m/s} | 0.27e3 ; Infinity ; 2 7
[1,2) | 1 \le x < 2 ; 1 ≤ x < 2 ; x \in [1,2) ; [1.0, 2) | 1 \le x \le 2 ; [1,2] ; 1 \le x < 3 ; 1 < x < 2
1 \le x < 2 | [1,2) | [1,2] ; (1,2)
[3,\infty) | x \ge 3 ; 3 \le x ; [3,∞) | x > 3 ; x \le 3
(-\infty,1)\cup(2,\infty) | x<1 \text{ or } x>2 | x<1 ; x<1 \text{ or } x>3
\infty | Infinity ; ∞ ; \text{infinity} ; inf | -∞ ; -Infinity ; 27 ; -\infty
4210_5 | 4210_{5} ; 4210 | 4210_6 ; 421_5 ; 555
4210 | 4210_5 ; 4,210 ; 4210_{10} | 42105 ; 4210.5
0.25 | 25\% ; \frac{25}{100} | 26\% ; 2.5\%
25 | 25\% ; 25 percent ; 2500\% | 250\% ; 0.25
12.5\% | 0.125 ; \frac{1}{8} ; 12.50\% | 1250\% ; 125
\begin{pmatrix}1\\2^{-99}\end{pmatrix} | \begin{bmatrix}1.0\\2^{-99}\end{bmatrix} | \begin{pmatrix}1\\0\end{pmatrix}
(2,1.5) | 2, 1.5 ; (2,\frac32) | 1.5, 2
\{1,2\} | \left\{2, 1.0\right\} ; 1, 2 | \{1,3\} ; 1
\pm 2 | ±2 ; 2, -2 | 2 ; -2
\text{even} | even ; \textbf{even} | \text{odd}
Yes, no | \text{Yes, no} | \text{no, Yes}
-3.5 | \text{-3.5} ; \mathrm{-3.5} ; \text{-7/2} | \text{3.5}
90^{\circ} | 90° ; 90 degrees ; 90 | \frac{\pi}{2} ; 91°
3+4i | 4i+3 | 3-4i
(x-1)^2 | x²−2x+1 | x²+2x+1
"""
ROWS = [[side.strip().split(" ; ") for side in line.split(" | ")] for line in PAIRS.strip().splitlines()]


@pytest.fixture(scope="module")
def comparer():
    comparer = Comparer(cpu_seconds=5)
    yield comparer
    comparer.close()


def test_an_answer_is_right_in_every_spelling_and_a_neighbour_is_wrong(comparer):
    faults = [
        (gold, answer, wanted)
        for (gold,), equal, unequal in ROWS
        for answers, wanted in ((equal, True), (unequal, False))
        for answer in answers
        if comparer.strictly(gold, answer) is not wanted
    ]
    assert not faults


def decimal(value: Fraction) -> str | None:
    """A number as a decimal, where it ends."""
    digits = next((n for n in range(40) if (value * 10**n).denominator == 1), None)
    if digits is None:
        return None
    text = f"{abs(value * 10**digits).numerator:0{digits + 1}d}"
    return ("-" if value < 0 else "") + (f"{text[:-digits]}.{text[-digits:]}" if digits else text)


def recurring(value: Fraction) -> str | None:
    """A number whose decimals repeat from the point on."""
    again = next((n for n in range(1, 20) if (10**n - 1) % value.denominator == 0), None)
    if again is None or value.denominator == 1:
        return None
    whole, rest = divmod(abs(value), 1)
    return f"{'-' * (value < 0)}{whole}.\\overline{{{int(rest * (10**again - 1)):0{again}d}}}"


def mixed(value: Fraction) -> str | None:
    whole, rest = divmod(abs(value), 1)
    return f"{'-' * (value < 0)}{whole} {rest.numerator}/{rest.denominator}" if whole and rest else None


def grouped(value: Fraction) -> str | None:
    return f"{value.numerator:,}" if value.denominator == 1 else None


def scientific(value: Fraction) -> str | None:
    text = decimal(value * 1000)
    return f"{text}e-3" if text and "." in text else f"{text}.0e-3" if text else None


SPELLINGS = {
    "frac": lambda v: f"{'-' * (v < 0)}\\frac{{{abs(v.numerator)}}}{{{v.denominator}}}",
    "unreduced": lambda v: f"{'-' * (v < 0)}\\dfrac{{{6 * abs(v.numerator)}}}{{{6 * v.denominator}}}",
    "slash": lambda v: f"{v.numerator}/{v.denominator}",
    "decimal": decimal, "recurring": recurring, "mixed": mixed, "grouped": grouped, "scientific": scientific,
    "percent": lambda v: decimal(100 * v) and f"{decimal(100 * v)}\\%",
}  # fmt: skip
NUMBERS = st.builds(Fraction, st.integers(-(10**9), 10**9), st.sampled_from([1, 1, 2, 3, 7, 9, 11, 40, 99, 125, 1000]))


@settings(max_examples=150, deadline=None)
@given(
    NUMBERS, st.one_of(st.just(Fraction(0)), NUMBERS, st.integers(1, 60).map(lambda n: Fraction(1, 10**n))), st.data()
)
def test_two_spellings_are_equal_exactly_if_the_numbers_are(comparer, value, apart, data):
    spelled = [
        data.draw(st.sampled_from([text for spell in SPELLINGS.values() if (text := spell(number))]))
        for number in (value, value + apart)
    ]
    percent = [text.endswith("%") for text in spelled]
    hundredfold = percent[0] != percent[1] and (value == 100 * (value + apart) or 100 * value == value + apart)
    if not hundredfold:  # 25 % for 25 is right, a decision of docs/DATA.md
        assert comparer.strictly(*spelled) is (apart == 0), spelled
