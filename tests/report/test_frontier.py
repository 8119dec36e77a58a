"""frontier.png, read from the figure object."""

from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text

from aligndistil.report import Comparison, ModelResult
from aligndistil.report.frontier import draw_frontier, frontier_figure


def comparison(points: list[tuple[float, float]], spread: float = 0.0) -> Comparison:
    """Models of these (KL to the initial model, gold reward), each of two seeds if they are spread."""
    rows = []
    for i, (kl, reward) in enumerate(points):
        metrics = {"kl_initial": kl, "gold_reward": reward}
        seeds: dict[str, Any] = {"per_seed": {"seed-0": metrics, "seed-1": metrics}} if spread else {}
        deviation = dict.fromkeys(metrics, spread) if spread else {}
        rows.append(ModelResult(name=f"model_{i}", objective="dpo", metrics=metrics, spread=deviation, **seeds))
    return Comparison(kl_to="dpo", results=rows)


def drawn(of: Comparison) -> Figure:
    figure = frontier_figure(of)
    assert figure is not None
    return figure


def points(figure: Figure) -> list[Line2D]:
    return [line for line in figure.axes[0].lines if str(line.get_label()).startswith("model_")]


def names(figure: Figure) -> list[Annotation]:
    return [text for text in figure.axes[0].texts if isinstance(text, Annotation)]


CLUSTER = [(0.0, -0.04)] + [(3.0 + 0.15 * i, 0.32 + 0.01 * (i % 4)) for i in range(15)]


def test_no_name_lies_on_a_point_and_every_point_is_above_every_name():
    figure = drawn(comparison(CLUSTER, spread=0.05))
    axes = figure.axes[0]
    figure.draw_without_rendering()
    at = [axes.transData.transform(line.get_xydata()[0]) for line in points(figure)]
    assert len(at) == len(names(figure)) == len(CLUSTER)
    for text in names(figure):
        assert not any(Text.get_window_extent(text).contains(*point) for point in at)
        assert text.get_zorder() < min(line.get_zorder() for line in points(figure))


def test_sixteen_models_have_sixteen_looks_without_their_colours_and_see_through_ones_are_on_top():
    lines = points(drawn(comparison(CLUSTER)))
    see_through = [line.get_markerfacecolor() == "none" or line.get_fillstyle() != "full" for line in lines]
    looks = {(line.get_marker(), line.get_fillstyle(), line.get_markerfacecolor() == "none") for line in lines}
    assert len(looks) == len(CLUSTER)
    assert see_through == [False] * 7 + [True] * 9
    filled = [line.get_zorder() for line, through in zip(lines, see_through, strict=True) if not through]
    assert max(filled) < min(line.get_zorder() for line, through in zip(lines, see_through, strict=True) if through)


@pytest.mark.parametrize(("lowest", "zero"), [(0.0, True), (0.5, True), (-0.1, False)])
def test_the_axis_begins_at_zero_unless_a_kl_was_measured_below(lowest, zero):
    figure = drawn(comparison([(lowest, 0.0), (4.0, 1.0)], spread=1.0))
    left, _ = figure.axes[0].get_xlim()
    assert (left == 0.0) if zero else (left < lowest)
    assert not points(figure)[0].get_clip_on()  # a point on the edge is whole


def test_crosses_are_said_to_be_of_seeds():
    assert "one standard deviation over 2 seeds" in drawn(comparison(CLUSTER[:3], spread=0.1)).get_supxlabel()
    assert drawn(comparison(CLUSTER[:3])).get_supxlabel() == ""


def test_the_same_numbers_give_the_same_file_and_one_point_gives_none(tmp_path):
    files = [draw_frontier(comparison(CLUSTER, spread=0.05), tmp_path / name) for name in ("a.png", "b.png")]
    assert files[0] is not None
    assert files[1] is not None
    assert files[0].read_bytes() == files[1].read_bytes()
    assert draw_frontier(comparison(CLUSTER[:1]), tmp_path / "c.png") is None
    assert not (tmp_path / "c.png").exists()
