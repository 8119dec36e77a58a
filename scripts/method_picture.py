"""Draw docs/method-light.svg and docs/method-dark.svg: how AlignDistil makes the teacher of one token.

python scripts/method_picture.py

The models' logits are made up; every other number is computed from them by the package's own functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from aligndistil.maths import total_variation
from aligndistil.objectives.aligndistil import AlignDistil, adaptive_alpha, extrapolated_logps

OBJECTIVE = AlignDistil.model_validate({"r": 5})
WIDTH, HEIGHT = 830, 524
"""In CSS pixels of a page that shows the picture at its own size, as all lengths and text sizes below."""
CONTEXT, MODELS, TEACHER, POLICY = 18, 160, 398, 636
"""Left edges of the four columns."""
TOKEN, NUMBER, BAR, SCALE = 46, 81, 87, 125
"""From a left edge to where tokens and numbers end and bars begin; the length of a bar of probability 1."""
DPO, REVERSE, TAUGHT, LEARNT = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
"""Okabe and Ito's colours, which are told apart with every common colour blindness."""
THEMES = {"light": ("#1f2328", "#59636e", "#d1d9e0"), "dark": ("#f0f6fc", "#9198a1", "#3d444d")}
"""Text, lesser text and frames; the ground is the page's."""
STYLE = {"mathtext.fontset": "dejavusans", "hatch.linewidth": 1.2, "svg.fonttype": "path", "svg.hashsalt": "method"}

Logits = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
"""Of the DPO model, the reverse DPO model and the policy, over a small vocabulary; its first tokens are drawn."""
AGREE = (2.0, 1.0, 0.4, 0.1, -0.7, -0.9), (1.9, 1.0, 0.4, 0.2, -0.7, -0.9), (1.3, 1.4, 0.9, 0.1, -0.3, -0.3)
DIFFER = (1.3, 1.2, 0.8, 0.3, -0.4, -0.6), (0.1, 0.7, 0.9, 1.2, 0.0, -0.3), (0.8, 0.9, 1.0, 0.7, -0.2, -0.2)
AGREE_WORDS = "Where the models agree", "is nearly the DPO model", "The film", "was is has feels"
DIFFER_WORDS = "Where they differ", "goes far beyond the DPO model", "The film was", "moving good long dull"
BARS = {"DPO": (MODELS, DPO), "reverse DPO": (MODELS + 58, REVERSE), "teacher": (TEACHER, TAUGHT)}
BARS |= {"policy": (POLICY, LEARNT)}
MARKS = {"DPO, as in 2": (TEACHER + 84, DPO), "teacher, as in 3": (POLICY + 72, TAUGHT)}
TEXTS = (
    (CONTEXT, 17, 14, "1  Context"),
    (MODELS, 17, 14, "2  Two frozen models"),
    (TEACHER, 17, 14, "3  Teacher of the token"),
    (POLICY, 17, 14, "4  Policy"),
    (MODELS, 444, 14.5, r"TVD$_t$ = ½ $\Sigma_v\,|p_{\mathrm{DPO}} - p_{\mathrm{reverse}}|$"),
    (MODELS, 468, 14.5, r"$\alpha_t = r\,$TVD$_t + \epsilon$"),
    (TEACHER, 444, 14.5, r"teacher = softmax$(z_{\mathrm{DPO}} + \alpha_t(z_{\mathrm{DPO}} - z_{\mathrm{reverse}}))$"),
    (TEACHER, 468, 14.5, r"loss of the token = $\beta_t$ KL(policy ‖ teacher),   $\beta_t = \beta_0\,/\,\alpha_t$"),
)
NOTE = f"""\
z: logits, p: probabilities; the sum and the KL are over the whole vocabulary. Reverse DPO: chosen and rejected swapped.
Numbers: from made-up logits, with r = {OBJECTIVE.r:g}, ε = {OBJECTIVE.eps:g} and β₀ = {OBJECTIVE.beta0:g}."""


class Picture:
    """Axes in pixels, y downwards, and the shapes that recur."""

    def __init__(self, ink: str, quiet: str, frame: str) -> None:
        self.ink, self.quiet, self.frame = ink, quiet, frame
        self.figure = Figure(figsize=(WIDTH / 96, HEIGHT / 96))
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, words: str, size: float = 11.5, color: str = "", **look: Any) -> None:
        self.axes.text(x, y, words, fontsize=size * 0.75, color=color or self.ink, va="center", **look)

    def arrow(self, start: float, end: float, y: float, width: float, color: str) -> None:
        look = {"arrowstyle": "-|>", "color": color, "lw": width, "mutation_scale": 7 * width}
        self.axes.annotate("", (end, y), (start, y), arrowprops=look | {"shrinkA": 0, "shrinkB": 0})

    def box(self, x: float, y: float, width: float, height: float, color: str) -> None:
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=6", fc="none", ec=color))

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Reverse DPO's are hatched, to be told from DPO's without colour."""
        fill, hatch = ("none", "/////") if color == REVERSE else (color, None)
        self.axes.add_patch(Rectangle((x, y - height / 2), width, height, ec=color, fc=fill, hatch=hatch))

    def mark(self, x: float, y: float, reach: float, color: str) -> None:
        self.axes.plot((x, x), (y - reach, y + reach), color=color, lw=2.2, solid_capstyle="butt")


def draw_frame(picture: Picture) -> None:
    for x, y, size, words in TEXTS:
        picture.text(x, y, words, size, weight="bold" if size == 14 else "normal")
    for words, (x, color) in BARS.items():
        picture.bar(x, 40, 12, 9, color)
        picture.text(x + 18, 40, words, color=picture.quiet)
    for words, (x, color) in MARKS.items():
        picture.mark(x, 40, 7, color)
        picture.text(x + 8, 40, words, color=picture.quiet)
    picture.text(CONTEXT, 502, NOTE, color=picture.quiet, linespacing=1.35)


def draw_position(picture: Picture, top: float, words: tuple[str, str, str, str], logits: Logits) -> None:
    title, result, response, tokens = words
    dpo, reverse, policy = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    tvd = total_variation(dpo, reverse)
    alpha = adaptive_alpha(tvd=tvd, r=OBJECTIVE.r, eps=OBJECTIVE.eps)
    teacher = extrapolated_logps(teacher_logps=dpo, other_logps=reverse, alpha=alpha, contrastive=True)

    picture.box(4, top, WIDTH - 8, 174, picture.frame)
    picture.text(CONTEXT, top + 18, title, 12.5, weight="bold")
    weight = rf"$\alpha_t$ = {OBJECTIVE.r:g} × {tvd:.2f} + {OBJECTIVE.eps:g} = {alpha:.2f}"
    picture.text(212, top + 18, rf"TVD$_t$ = {tvd:.2f},   {weight}:   the teacher {result}", 12.5)
    for label, down, height, inside in (
        ("prompt", 52, 42, "Write a review\nof a film."),
        ("response so far", 120, 28, f"{response} ▁▁"),
    ):
        picture.text(CONTEXT, top + down - 9, label, color=picture.quiet)
        picture.box(CONTEXT, top + down, 118, height, picture.quiet)
        picture.text(CONTEXT + 9, top + down + height / 2, inside, linespacing=1.25)
    for x, above, below in (
        (TEACHER - 31, rf"$\alpha_t$ = {alpha:.2f}", "extrapolate"),
        (POLICY - 31, "KL", rf"$\beta_t$ = {OBJECTIVE.beta0 / alpha:.2f}"),
    ):
        picture.arrow(x - 26, x + 26, top + 94, 1.8, picture.quiet)
        picture.text(x, top + 80, above, ha="center")
        picture.text(x, top + 108, below, ha="center")

    for row, token in enumerate(tokens.split()):
        y = top + 50.5 + 29 * row
        for left in (MODELS, TEACHER, POLICY):
            picture.text(left + TOKEN, y, token, ha="right")
        p_dpo, p_reverse, p_teacher, p_policy = (logps[row].exp().item() for logps in (dpo, reverse, teacher, policy))
        for left, offset, height, color, share in (
            (MODELS, -6.5, 9, DPO, p_dpo),
            (MODELS, 6.5, 9, REVERSE, p_reverse),
            (TEACHER, 0.0, 14, TAUGHT, p_teacher),
            (POLICY, 0.0, 14, LEARNT, p_policy),
        ):
            picture.bar(left + BAR, y + offset, share * SCALE, height, color)
            picture.text(left + NUMBER, y + offset, f"{share:.0%}", ha="right")
        picture.mark(TEACHER + BAR + p_dpo * SCALE, y, 11, DPO)
        picture.mark(POLICY + BAR + p_teacher * SCALE, y, 11, TAUGHT)
        if abs(p_teacher - p_policy) > 0.08:
            picture.arrow(POLICY + BAR + p_policy * SCALE, POLICY + BAR + p_teacher * SCALE, y, 1.2, picture.ink)
    for left in (MODELS, TEACHER, POLICY):
        picture.text(left + TOKEN - 8, top + 162, "⋮", color=picture.quiet)


def draw(folder: Path) -> list[Path]:
    """Both pictures, the same bytes every time."""
    paths = []
    for name, colors in THEMES.items():
        with matplotlib.style.context(["default", STYLE]):
            picture = Picture(*colors)
            draw_frame(picture)
            draw_position(picture, 58, AGREE_WORDS, AGREE)
            draw_position(picture, 242, DIFFER_WORDS, DIFFER)
            paths.append(folder / f"method-{name}.svg")
            metadata = {"Title": "How AlignDistil makes the teacher of one token", "Creator": None, "Date": None}
            picture.figure.savefig(paths[-1], transparent=True, metadata=metadata)
    return paths


if __name__ == "__main__":
    for path in draw(Path(__file__).parents[1] / "docs"):
        print(path)
