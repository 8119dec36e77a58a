"""Colours and line styles that are told apart by the colour-blind, in grey print, and on a white ground anywhere."""

from __future__ import annotations

from typing import Any, NamedTuple

# Okabe and Ito's colours, told apart with every common colour blindness; the yellow is too light for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = (
    "solid",
    (0, (5, 1.6)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (9, 2)),
    (0, (3, 1.2, 1.2, 1.2, 1.2, 1.2)),
    (0, (2.5, 2.5)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FILLS = ("full", "none", "left", "top", "right", "bottom")
"""How much of a marker is filled, in matplotlib's words: the first seven wholly, the next seven not at all."""
GROUND = "#FFFFFF"
"""The background is opaque: dark text and colours chosen for white stay legible on a dark page."""
INK = "#262626"
MUTED = "#595959"
LINE_CONTRAST, TEXT_CONTRAST = 3.0, 4.5
"""What WCAG 2.1 asks of graphics (1.4.11) and of text (1.4.3)."""


class Look(NamedTuple):
    """How one method is drawn."""

    line: str
    text: str
    dashes: Any
    marker: str
    fill: str

    def dot(self, size: float, ground: str = "none") -> dict[str, Any]:
        """How matplotlib draws the marker; `ground` is the colour of what is not filled, by default see-through."""
        full, hollow = self.fill == "full", self.fill == "none"
        return {
            "marker": self.marker,
            "ms": size + (1 if self.marker in "PX" else 0),  # these have less of an area
            "color": self.line,
            "fillstyle": "full" if hollow else self.fill,
            "mfc": ground if hollow else self.line,
            "mfcalt": ground,
            "mec": GROUND if full else self.line,
            "mew": 0.8 if full else 1.2,
        }


def looks(number: int) -> list[Look]:
    """One a method. After seven the colours come again with other dashes, another marker and another fill of it."""
    n = len(COLOURS)
    return [
        Look(
            line=darkened(COLOURS[i % n], LINE_CONTRAST),
            text=darkened(COLOURS[i % n], TEXT_CONTRAST),
            dashes=DASHES[(i + i // n) % n],
            marker=MARKERS[(i + i // n) % n],
            fill=FILLS[i // n % len(FILLS)],
        )
        for i in range(number)
    ]


def darkened(colour: str, ratio: float) -> str:
    """The same hue, only as much darker as a contrast of `ratio` with the ground needs."""
    scale = 1.0
    while contrast(shade := _scaled(colour, scale), GROUND) < ratio:
        scale -= 0.01
    return shade


def contrast(one: str, other: str) -> float:
    """Ratio of the relative luminances of two #RRGGBB colours, 1 to 21, as WCAG 2.1 defines it."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _scaled(colour: str, scale: float) -> str:
    return "#" + "".join(f"{round(channel * scale):02X}" for channel in _channels(colour))


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _channels(colour))]
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
