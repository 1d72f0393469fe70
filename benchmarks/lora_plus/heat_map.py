"""A grid of losses over two learning rates as a standalone SVG: rectangles and text alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from xml.sax.saxutils import escape

Cell = tuple[float, float]  # (eta_A, eta_B), both powers of two

WIDTH, HEIGHT = 62, 34  # of a cell, in pixels
LEFT, TOP, RIGHT, BOTTOM = 96, 88, 76, 124
LEAST_WIDTH = 500  # room for title and legend
STOPS = ((8, 48, 107), (33, 113, 181), (107, 174, 214), (198, 219, 239), (247, 251, 255))
DIVERGED = "#bdbdbd"
BEST, BEST_EQUAL = "#d62728", "#ff9500"


def colour(position: float) -> tuple[str, str]:
    """Fill and text colour at 0 (best, dark) to 1 (worst, pale)."""
    place = min(max(position, 0.0), 1.0) * (len(STOPS) - 1)
    i = min(int(place), len(STOPS) - 2)
    red, green, blue = (
        round(a + (b - a) * (place - i)) for a, b in zip(STOPS[i], STOPS[i + 1], strict=True)
    )
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    return f"#{red:02x}{green:02x}{blue:02x}", "#fff" if dark else "#000"


def _text(x: float, y: float, content: str, **attributes: str) -> str:
    given = {"text-anchor": "middle", "font-size": "12", "fill": "#000"} | {
        name.replace("_", "-"): value for name, value in attributes.items()
    }
    spelt = " ".join(f'{name}="{value}"' for name, value in given.items())
    return f'<text x="{x:g}" y="{y:g}" {spelt}>{escape(content)}</text>'


def _rect(x: float, y: float, width: float, height: float, fill: str, **attributes: str) -> str:
    spelt = "".join(f' {name.replace("_", "-")}="{v}"' for name, v in attributes.items())
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} fill="{fill}"{spelt}/>'


def _frame(x: float, y: float, colour: str, width: float, inset: float = 0.0) -> str:
    """An outline of a cell, without fill."""
    stroke = {"stroke": colour, "stroke_width": f"{width:g}"}
    size = (WIDTH - 2 * inset, HEIGHT - 2 * inset)
    return _rect(x + inset, y + inset, *size, "none", **stroke)


def _exponents(rates: set[float]) -> list[int]:
    exponents = [round(math.log2(rate)) for rate in rates]
    return list(range(min(exponents), max(exponents) + 1))


def heat_map(losses: Mapping[Cell, float | None], title: str) -> str:
    """The SVG text: eta_A to the right, eta_B upward, the loss in each cell.

    Cells without an entry stay white; a loss of None has diverged and is grey. The cells of
    lambda = 1 are outlined; the best of all and the best of lambda = 1 are framed. Colours end at
    the upper quartile, so that the worst corner does not make all others look alike.
    """
    columns = _exponents({a for a, _ in losses})
    rows = _exponents({b for _, b in losses})[::-1]
    finite = {cell: loss for cell, loss in losses.items() if loss is not None}
    best = min(finite, key=finite.__getitem__, default=None)
    equal = min((c for c in finite if c[0] == c[1]), key=finite.__getitem__, default=None)
    low = min(finite.values(), default=0.0)
    quartiles = statistics.quantiles(finite.values(), n=4) if len(finite) > 1 else [low + 1.0]
    high = max(quartiles[-1], low + 1e-9)
    width = max(LEFT + len(columns) * WIDTH + RIGHT, LEAST_WIDTH)
    height = TOP + len(rows) * HEIGHT + BOTTOM

    def corner(cell: Cell) -> tuple[float, float]:
        column, row = (round(math.log2(rate)) for rate in cell)
        return LEFT + (column - columns[0]) * WIDTH, TOP + (rows[0] - row) * HEIGHT

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif">',
        _rect(0, 0, width, height, "#fff"),
        _text(16, 26, title, font_size="15", font_weight="bold", text_anchor="start"),
        *_axes(columns, rows),
    ]
    for cell, loss in losses.items():
        x, y = corner(cell)
        fill, ink = (DIVERGED, "#000") if loss is None else colour((loss - low) / (high - low))
        label = "div." if loss is None else f"{loss:.3f}"
        parts.append(_rect(x, y, WIDTH, HEIGHT, fill, stroke="#fff"))
        parts.append(_text(x + WIDTH / 2, y + HEIGHT / 2 + 4, label, fill=ink))
    parts += [_frame(*corner(cell), "#000", 1.5) for cell in losses if cell[0] == cell[1]]
    parts += [_frame(*corner(equal), BEST_EQUAL, 3, inset=3)] if equal else []
    parts += [_frame(*corner(best), BEST, 3, inset=0)] if best else []
    parts += _diagonal_names(losses, corner)
    parts += _legend(height - 52, low, high)
    return "\n".join([*parts, "</svg>", ""])


def _axes(columns: list[int], rows: list[int]) -> list[str]:
    below = TOP + len(rows) * HEIGHT
    middle_x, middle_y = LEFT + len(columns) * WIDTH / 2, TOP + len(rows) * HEIGHT / 2
    parts = [
        _text(LEFT + (i + 0.5) * WIDTH, below + 16, f"{2.0**k:.1e}", font_size="11")
        for i, k in enumerate(columns)
    ]
    parts += [
        _text(LEFT - 6, TOP + (i + 0.5) * HEIGHT + 4, f"{2.0**k:.1e}", text_anchor="end")
        for i, k in enumerate(rows)
    ]
    turned = f"rotate(-90 22 {middle_y:g})"
    parts.append(_text(middle_x, below + 36, "η_A, learning rate of A", font_size="13"))
    parts.append(_text(22, middle_y, "η_B, learning rate of B", font_size="13", transform=turned))
    return parts


def _diagonal_names(losses: Mapping[Cell, float | None], corner) -> list[str]:
    """lambda at the upper right end of every diagonal, where the next cell would stand."""
    parts = []
    for ratio in sorted({b / a for a, b in losses}):
        a, b = max(cell for cell in losses if cell[1] / cell[0] == ratio)
        x, y = corner((2 * a, 2 * b))
        parts.append(
            _text(
                x + 4,
                y + HEIGHT - 6,
                f"λ={ratio:g}",
                font_size="11",
                fill="#444",
                text_anchor="start",
            )
        )
    return parts


def _legend(y: float, low: float, high: float) -> list[str]:
    """Colour bar and marks, in two lines."""
    bar, steps = 150, 25
    parts = [_text(16, y + 12, f"{low:.3f}", text_anchor="start")]
    for i in range(steps):
        fill, _ = colour(i / (steps - 1))
        parts.append(_rect(60 + i * bar / steps, y, bar / steps + 0.5, 16, fill))
    parts.append(_rect(60, y, bar, 16, "none", stroke="#888"))
    parts.append(_text(66 + bar, y + 12, f"{high:.3f} and above", text_anchor="start"))
    parts.append(_rect(340, y, 16, 16, DIVERGED))
    parts.append(_text(362, y + 12, "diverged", text_anchor="start"))
    marks = ((16, BEST, "best"), (80, BEST_EQUAL, "best with λ = 1"), (222, "#000", "λ = 1"))
    for x, ink, label in marks:
        parts.append(_rect(x, y + 26, 15, 15, "#fff", stroke=ink, stroke_width="2.5"))
        parts.append(_text(x + 22, y + 38, label, text_anchor="start"))
    return parts
