"""The pictures of curves, read from the figure object, and the command that draws them."""

import io
import json
import re
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from rich.console import Console

from aligndistil.cli import main
from aligndistil.errors import UserError
from aligndistil.report import Curve, curve_figure, plot_runs, save_figure, steps_to
from aligndistil.report.curves import default_reach
from aligndistil.report.labels import spread
from aligndistil.report.palette import GROUND, INK, MUTED, contrast, looks

REWARD = "reward/token_mean"


def curve(label: str, values: list[list[float]], x: list[list[float]] | None = None) -> Curve:
    steps = np.arange(1.0, len(values[0]) + 1)
    at = np.tile(steps, (len(values), 1)) if x is None else np.array(x, dtype=float)
    return Curve(label, steps, at, np.array(values, dtype=float))


def rising(label: str, height: float, points: int = 48) -> Curve:
    return curve(label, [[height * step / points for step in range(points)]])


def line(figure: Figure, label: str) -> Line2D:
    (found,) = [one for one in figure.axes[0].lines if one.get_label() == label]
    return found


def points(one: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in one.get_xydata()]


def names(figure: Figure) -> list[Annotation]:
    return [text for text in figure.axes[0].texts if isinstance(text, Annotation)]


def caption(figure: Figure) -> str:
    return " ".join(figure.texts[0].get_text().split())


def run_of(folder: Path, values: dict[str, list[float]], seeds: int = 0) -> Path:
    """A run folder of stages that sample, or several under seed-*, each seed 0.1 above the last."""
    for seed in range(max(seeds, 1)):
        for stage, rewards in values.items():
            path = folder / (f"seed-{seed}" if seeds else "") / stage / "metrics.jsonl"
            path.parent.mkdir(parents=True)
            lines = [
                {
                    "step": step,
                    "split": "train",
                    REWARD: reward + 0.1 * seed,
                    "kl/policy_teacher": 2.0 * step,
                    "completions/mean_length": 20.0,
                }
                for step, reward in enumerate(rewards, start=1)
            ]
            path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


# ---- points


def test_a_known_series_has_the_right_points():
    figure = curve_figure([curve("a", [[0.1, 0.4, 0.2]]), curve("b", [[1.0, 2.0, 3.0]])], REWARD)
    assert points(line(figure, "a")) == [(1, 0.1), (2, 0.4), (3, 0.2)]
    assert points(line(figure, "b")) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    axes = figure.axes[0]
    assert axes.get_xlabel() == "optimizer steps"
    assert axes.get_ylabel() == "token-averaged reward (nats a token)"
    assert axes.get_title(loc="left") == "Reward of the policy's samples"


def test_smoothing_is_drawn_over_the_values_of_one_seed():
    figure = curve_figure([curve("a", [[0.0, 3.0, 6.0, 0.0]])], "loss", reach=1)
    assert points(line(figure, "a")) == [(1, 1.5), (2, 3.0), (3, 3.0), (4, 3.0)]
    assert points(line(figure, "_values")) == [(1, 0.0), (2, 3.0), (3, 6.0), (4, 0.0)]
    assert "Smoothed: mean over 1 steps on either side." in caption(figure)


def test_seeds_are_a_mean_line_in_a_band_of_one_sample_standard_deviation():
    figure = curve_figure([curve("a", [[1.0, 4.0], [2.0, 4.0], [6.0, 7.0]])], REWARD)
    assert points(line(figure, "a")) == [(1, 3.0), (2, 5.0)]
    (band,) = [c for c in figure.axes[0].collections if isinstance(c, FillBetweenPolyCollection)]
    (path,) = band.get_paths()
    at_one = {round(float(y), 9) for x, y in path.vertices if x == 1}
    assert at_one == {round(3 - 7**0.5, 9), round(3 + 7**0.5, 9)}
    assert "mean over 3 seeds; band: one standard deviation over the seeds on either side" in caption(figure)


def test_different_numbers_of_seeds_are_said_for_each_method():
    figure = curve_figure([curve("a", [[1.0, 4.0], [2.0, 4.0]]), curve("b", [[1.0, 1.0]])], REWARD)
    assert "mean over 2 (a) or 1 (b) seeds" in caption(figure)
    many = [curve(f"a method of two seeds, {i}", [[1.0, 4.0], [2.0, 4.0]]) for i in range(9)]
    assert "mean over 2 (9 curves) or 1 (b) seeds" in caption(curve_figure([*many, curve("b", [[1.0, 1.0]])], REWARD))


def test_the_caption_says_who_is_smoothed_over_what_and_who_is_not():
    every = [rising(label, 1.0, points=94) for label in ("a", "b")]
    fourth = Curve("c", np.arange(1.0, 94, 4), np.arange(1.0, 94, 4)[None], np.zeros((1, 24)))
    begun = curve("d", [[0.0, 1.0]])
    figure = curve_figure([*every, fourth, begun], REWARD, reach=default_reach([*every, fourth, begun]))
    assert "Smoothed: mean over 3 steps on either side (4: c). Not smoothed, too few points: d." in caption(figure)
    assert len([one for one in figure.axes[0].lines if one.get_label() == "_values"]) == 3
    assert points(line(figure, "d")) == [(1, 0.0), (2, 1.0)]
    without = curve_figure([*every, fourth, begun], REWARD)
    assert "moothed" not in caption(without)
    some = [curve(f"begun number {i:02}", [[0.0, 1.0]]) for i in range(20)]
    assert re.search(
        r"begun number 05(, begun number 0\d)* and \d+ more\.",
        caption(curve_figure([*every, *some], "a", reach=default_reach([*every, *some]))),
    )


def test_against_a_metric_a_method_is_a_path_with_a_cross_at_its_end():
    seeds = curve("a", [[0.0, 1.0], [0.0, 3.0]], x=[[1.0, 4.0], [1.0, 8.0]])
    figure = curve_figure([seeds], "gold_reward", "kl/policy_teacher")
    assert points(line(figure, "a")) == [(1.0, 0.0), (6.0, 2.0)]
    (cross,) = figure.axes[0].containers
    (_, _, (across, up)) = cross
    # Seeds end at KL 4 and 8, rewards 1 and 3: deviations 8 ** 0.5 and 2 ** 0.5 from (6, 2).
    assert across.get_segments()[0].tolist() == [[6 - 8**0.5, 2.0], [6 + 8**0.5, 2.0]]
    assert up.get_segments()[0].tolist() == [[6.0, 2 - 2**0.5], [6.0, 2 + 2**0.5]]
    assert figure.axes[0].get_xlabel() == "KL (nats a response)"
    assert "gold_reward against kl/policy_teacher." in caption(figure)
    assert figure.axes[0].get_xlim()[0] == 0.0  # a KL is never less


def test_a_threshold_is_marked_where_it_is_reached_and_stands_in_the_caption():
    curves = [rising("fast", 2.0), rising("slow", 1.0)]
    threshold = steps_to(curves, 0.5)
    figure = curve_figure(curves, REWARD, threshold=threshold)
    assert {y for _, y in points(line(figure, "_threshold"))} == {0.5}
    # 2 * 12 / 48 and 1 * 24 / 48, the first point being step 1.
    marked = [points(one) for one in figure.axes[0].lines if one.get_label() == "_reached"]
    assert marked == [[(13.0, 0.5)], [(25.0, 0.5)]]
    assert caption(figure).endswith("Steps to reach 0.5 (as asked): fast 13 (1.0x); slow 25 (1.9x).")
    seeds = [curve("seeds", [[0.0, 1.0, 2.0], [0.0, 0.0, 4.0]])]
    counted = "Counted on the mean line; a comparison's table has the mean of each seed's own."
    assert caption(curve_figure(seeds, REWARD, threshold=steps_to(seeds, 1.0))).endswith(f"seeds 3 (1.0x). {counted}")


# ---- names at the ends


def box(text: Annotation) -> Bbox:
    """Of the words alone: an annotation's own extent takes in the line to what it names."""
    return Text.get_window_extent(text)


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    figure.draw_without_rendering()
    pairs = combinations(names(figure), 2)
    return [(one.get_text(), other.get_text()) for one, other in pairs if box(one).overlaps(box(other))]


def test_names_of_lines_that_end_together_do_not_overlap_and_stay_on_the_page():
    curves = [rising(f"method number {i}", 1 + 0.001 * i) for i in range(9)]
    figure = curve_figure(curves, REWARD)
    assert [text.get_text() for text in names(figure)] == [one.label for one in curves]
    assert overlaps(figure) == []
    for text in names(figure):
        assert box(text).x0 > figure.axes[0].get_window_extent().x1
        assert box(text).x1 <= figure.bbox.x1


def test_a_column_of_many_names_fits_beside_the_axes_and_no_line_of_it_hides_the_data():
    curves = [rising(f"method number {i}", 1 + 0.001 * i) for i in range(40)]
    figure, few = curve_figure(curves, REWARD), curve_figure(curves[:3], REWARD)
    assert figure.get_figheight() > few.get_figheight()
    assert overlaps(figure) == []
    frame = figure.axes[0].get_window_extent()
    for text in names(figure):
        assert frame.y0 <= box(text).y0
        assert box(text).y1 <= frame.y1
        assert box(text).x1 <= figure.bbox.x1
        assert text.arrow_patch is None
    pieces = [one for one in figure.axes[0].lines if one.get_label() == "_sample"]
    drawn = [line(figure, one.label) for one in curves]
    for of in (Line2D.get_color, lambda one: str(one._unscaled_dash_pattern)):
        assert [of(one) for one in pieces] == [of(one) for one in drawn]
    assert all(text.arrow_patch is not None for text in names(few))


def test_a_name_is_not_tied_across_the_data_to_a_line_that_has_just_begun():
    figure = curve_figure([rising("done", 1.0), curve("begun", [[0.0, 1.0]])], REWARD)
    assert [text.arrow_patch for text in names(figure)] == [None, None]


def test_names_at_the_ends_of_paths_do_not_overlap():
    ends = [(4.0, 1.0), (4.01, 1.0), (4.0, 1.01), (3.99, 0.99), (4.02, 1.02)]
    curves = [curve(f"method {i}", [[0.0, y]], x=[[0.0, x]]) for i, (x, y) in enumerate(ends)]
    assert overlaps(curve_figure(curves, "gold_reward", "kl/policy_teacher")) == []


def test_a_name_is_not_read_as_a_formula():
    figure = curve_figure([rising("$r_5$ and $r_15$", 1.0)], REWARD)
    assert not names(figure)[0].get_parse_math()
    figure.draw_without_rendering()


def test_spreading_moves_as_little_as_it_can():
    assert spread([5.0, 1.0], 1, 0, 10) == [5.0, 1.0]
    assert spread([5.0, 5.0], 2, 0, 10) == [4.0, 6.0]
    assert spread([0.0, 0.5, 9.9], 1, 0, 10) == [0.0, 1.0, 9.9]
    assert spread([10.0, 10.0, 10.0], 1, 0, 10) == [8.0, 9.0, 10.0]
    assert spread([], 1, 0, 10) == []
    random = np.random.default_rng(0)
    for _ in range(50):
        wanted = random.uniform(0, 100, size=12).tolist()
        moved = spread(wanted, 5, 0, 100)
        assert all(b - a >= 5 - 1e-9 for a, b in pairwise(sorted(moved)))
        assert min(moved) >= 0
        assert max(moved) <= 100 + 1e-9
        assert np.argsort(moved, kind="stable").tolist() == np.argsort(wanted, kind="stable").tolist()


# ---- reading it anywhere


def test_lines_and_words_stand_out_from_an_opaque_ground():
    figure = curve_figure([rising(f"{i}", 1.0 + i) for i in range(9)], REWARD)
    assert figure.get_facecolor() == figure.axes[0].get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert all(contrast(look.line, GROUND) >= 3 and contrast(look.text, GROUND) >= 4.5 for look in looks(9))
    assert min(contrast(INK, GROUND), contrast(MUTED, GROUND)) >= 4.5
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)


def test_in_grey_print_each_of_49_methods_differs_in_colour_and_dashes_and_seven_in_dashes_alone():
    assert len({(look.line, str(look.dashes)) for look in looks(49)}) == 49
    assert len({str(look.dashes) for look in looks(7)}) == len({look.marker for look in looks(7)}) == 7


def test_in_grey_print_42_markers_differ_and_those_of_one_colour_in_their_fill_too():
    assert len({(look.marker, look.fill) for look in looks(42)}) == 42
    assert {look.fill for look in looks(7)} == {"full"}
    assert {look.fill for look in looks(14)[7:]} == {"none"}
    first, eighth = looks(8)[0], looks(8)[7]
    assert first.line == eighth.line
    assert first.marker != eighth.marker
    assert eighth.dot(7)["mfc"] == "none"


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_curves_give_the_same_file(tmp_path, suffix):
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in files:
        save_figure(curve_figure([rising("a", 1.0), curve("b", [[0.0, 1.0], [1.0, 1.0]])], REWARD), path)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert b"CreationDate" not in files[0].read_bytes()
    assert b"dc:date" not in files[0].read_bytes()


def test_text_in_an_svg_is_text(tmp_path):
    save_figure(curve_figure([rising("my_method", 1.0)], REWARD), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for words in (">my_method<", ">optimizer steps<", ">Reward of the policy's samples<", ">reward/token_mean."):
        assert words in text


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.jpg must end in \.png, \.svg or \.pdf"):
        save_figure(Figure(), tmp_path / "a.jpg")


# ---- the command


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Call the command line in an empty folder; gives (exit code, stdout, stderr)."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aligndistil", "plot", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_command_draws_prints_ratios_and_says_where_the_picture_is(command, tmp_path):
    fast, slow = [min(0.1 * step, 2.0) for step in range(24)], [0.04 * step for step in range(24)]
    run = run_of(tmp_path / "out", {"fast": fast, "slow": slow}, seeds=3)
    code, out, err = command(run, "--smooth", "--window", 0)
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    # The means run 0.1 above seed 0: 90 % of the way from 0.1 to 1.02, where the slower ends, is 0.928.
    assert "Steps to reach 0.928 (90 % of the way" in words
    assert "fast 10 1.0x 11, 10, 9" in words
    assert "slow 22 2.2x never, 22, 20" in words
    assert out.strip().endswith("reward-token_mean.png")
    assert Path("reward-token_mean.png").read_bytes()[:4] == b"\x89PNG"


def test_the_frontier_says_which_reward_and_which_kl(command, tmp_path):
    run = run_of(tmp_path / "run", {"a": [0.1, 0.2, 0.3]})
    assert command(run, "--x", "kl")[1].strip() == "reward-token_mean-against-kl-policy_teacher.png"
    plot = plot_runs([run], x="kl", smooth=False, out=tmp_path / "a.pdf")
    assert (plot.metric, plot.x, plot.threshold) == (REWARD, "kl/policy_teacher", None)
    assert points(line(plot.figure, "a")) == [(2.0, 0.1), (4.0, 0.2), (6.0, 0.3)]
    assert "reward/token_mean against kl/policy_teacher." in caption(plot.figure)


def test_a_wrong_suffix_a_wrong_metric_and_a_missing_run_are_one_sentence_and_exit_code_2(command, tmp_path):
    run = run_of(tmp_path / "run", {"a": [0.1]})
    for arguments, words in (
        ((run, "--out", "a.jpeg"), "--out: a.jpeg must end in .png, .svg or .pdf"),
        (
            (run, "--metric", "reward/tokenmean"),
            "did you mean `reward/token_mean`? The metrics are `reward/token_mean`",
        ),
        ((tmp_path / "no",), "there is no such file or folder"),
        ((f"a={run / 'a'}", f"b={run / 'a'}"), "run/a was given twice"),
        ((run, "--threshold", "nan"), "--threshold: nan is no value that a curve can reach: give a finite number"),
        ((run, "--threshold=-inf"), "--threshold: -inf is no value"),
    ):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1
    assert not list(Path().iterdir())


def test_notes_and_names_are_printed_as_they_are(tmp_path):
    run = run_of(tmp_path / "run", {"a": [0.1, 0.2]})
    (tmp_path / "[b]").mkdir()
    (tmp_path / "[b]" / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 1.0}\n')
    plot = plot_runs([run, tmp_path / "[b]"], out=tmp_path / "a.svg")
    console = Console(file=io.StringIO(), width=300)
    for text in plot.report():
        console.print(text)
    assert isinstance(console.file, io.StringIO)
    assert f"note: {tmp_path}/[b] has no `reward/token_mean`: it is left out" in console.file.getvalue()


def test_only_metrics_that_training_raises_get_a_threshold_unasked(tmp_path):
    run = run_of(tmp_path / "run", {"a": [0.1, 0.2], "b": [0.1, 0.3]})
    out = tmp_path / "a.svg"
    assert plot_runs([run], out=out).threshold is not None
    assert plot_runs([f"one={run / 'a'}"], out=out).threshold is None
    assert plot_runs([run], "completions/mean_length", out=out).threshold is None
    assert plot_runs([run], "kl/policy_teacher", threshold=3.0, out=out).threshold is not None
