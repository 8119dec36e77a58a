"""The pictures, read from the figure object, and the command that draws curves."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from rich.console import Console

from aligndistil.cli import main
from aligndistil.errors import UserError
from aligndistil.report import (
    ComparedWith,
    Comparison,
    ModelResult,
    pictures,
    plot_runs,
    save_figure,
)
from aligndistil.report.curves import Curve
from aligndistil.report.figures import COLOURS, GROUND, INK, MUTED, Panel, curve_panel, draw, looks
from aligndistil.report.logs import Log

REWARD = "reward/token_mean"


def curve(label: str, values: list[list[float]], x: list[list[float]] | None = None) -> Curve:
    steps = np.arange(1.0, len(values[0]) + 1)
    at = np.tile(steps, (len(values), 1)) if x is None else np.array(x, dtype=float)
    return Curve(label, steps, at, np.array(values, dtype=float))


def rising(label: str, height: float, points: int = 48) -> Curve:
    return curve(label, [[height * step / points for step in range(points)]])


def panel(curves: list[Curve], metric: str = REWARD, x: str = "step", drawn: list[Curve] | None = None) -> Panel:
    return curve_panel(curves, drawn or curves, metric, x)


def figure_of(curves: list[Curve], metric: str = REWARD, x: str = "step", caption: str = "") -> Figure:
    return draw([panel(curves, metric, x)], [one.label for one in curves], caption)


def line(figure: Figure, label: str, axes: int = 0) -> Line2D:
    (found,) = [one for one in figure.axes[axes].lines if one.get_label() == label]
    return found


def points(one: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in one.get_xydata()]


def legend(figure: Figure) -> list[str]:
    found = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return [text.get_text() for one in found for text in one.get_texts()]


def caption(figure: Figure) -> str:
    return " ".join(figure.get_supxlabel().split())


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


# ---- panels and lines


def test_a_known_series_has_the_right_points():
    figure = figure_of([curve("a", [[0.1, 0.4, 0.2]]), curve("b", [[1.0, 2.0, 3.0]])])
    assert points(line(figure, "a")) == [(1, 0.1), (2, 0.4), (3, 0.2)]
    assert points(line(figure, "b")) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    axes = figure.axes[0]
    assert axes.get_xlabel() == "optimizer steps"
    assert axes.get_ylabel().split() == ["token-averaged", "reward", "(nats", "per", "token)"]
    assert axes.get_title(loc="left") == "Reward of the policy's samples"


def test_smoothing_is_drawn_over_the_values_of_one_seed():
    raw = [curve("a", [[0.0, 3.0, 6.0, 0.0]])]
    figure = draw([panel(raw, drawn=[raw[0].smoothed(1)])], ["a"])
    assert points(line(figure, "a")) == [(1, 1.5), (2, 3.0), (3, 3.0), (4, 3.0)]
    (faint,) = [one for one in figure.axes[0].lines if one.get_alpha() == 0.3]
    assert points(faint) == [(1, 0.0), (2, 3.0), (3, 6.0), (4, 0.0)]


def test_seeds_are_a_mean_line_in_a_band_of_one_standard_error():
    figure = figure_of([curve("a", [[1.0, 4.0], [2.0, 4.0], [6.0, 7.0]])])
    assert points(line(figure, "a")) == [(1, 3.0), (2, 5.0)]
    (band,) = [c for c in figure.axes[0].collections if isinstance(c, FillBetweenPolyCollection)]
    (path,) = band.get_paths()
    at_one = {round(float(y), 9) for x, y in path.vertices if x == 1}
    assert at_one == {round(3 - (7 / 3) ** 0.5, 9), round(3 + (7 / 3) ** 0.5, 9)}


def test_of_many_lines_each_has_a_bar_at_its_end_instead_of_a_band():
    figure = figure_of([curve(f"{i}", [[1.0 + i, 4.0], [2.0 + i, 6.0]]) for i in range(6)])
    assert not [c for c in figure.axes[0].collections if isinstance(c, FillBetweenPolyCollection)]
    assert len(figure.axes[0].containers) == 6
    ((_, _, (bar,)), *_) = figure.axes[0].containers
    assert bar.get_segments()[0].tolist() == [[2.0, 4.0], [2.0, 6.0]]  # 5, the error of 4 and 6 being 1


def test_against_a_metric_a_method_is_a_path_with_each_seed_behind_it():
    seeds = curve("a", [[0.0, 1.0], [0.0, 3.0]], x=[[1.0, 4.0], [1.0, 8.0]])
    figure = figure_of([seeds], "gold_reward", "kl/policy_teacher")
    assert points(line(figure, "a")) == [(1.0, 0.0), (6.0, 2.0)]
    assert [points(one) for one in figure.axes[0].lines if one.get_alpha() == 0.3] == [
        [(1.0, 0.0), (4.0, 1.0)],
        [(1.0, 0.0), (8.0, 3.0)],
    ]
    assert not figure.axes[0].collections  # a band along a path would cross itself
    assert figure.axes[0].get_title(loc="left") == "Gold reward by KL to the teacher"
    assert figure.axes[0].get_xlim()[0] == 0.0  # a KL is never less


def test_the_legend_of_one_panel_is_sorted_by_the_last_value_and_that_of_several_by_method():
    curves = [rising("low", 1.0), rising("high", 3.0), rising("middle", 2.0)]
    assert legend(figure_of(curves)) == ["high", "middle", "low"]
    three = draw([panel(curves)] * 3, ["low", "high", "middle"])
    assert legend(three) == ["low", "high", "middle"]
    assert len(three.axes) == 4  # the legend stands where a fourth panel would be: none is empty


@pytest.mark.parametrize("panels", [1, 2, 3, 4, 5, 6])
def test_nothing_lies_on_anything_else(panels):
    curves = [rising(f"a method with a long name, {i}", 1 + 0.001 * i) for i in range(9)]
    figure = draw([panel(curves)] * panels, [one.label for one in curves], "A caption. " * 30)
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes if axes.axison]
    boxes += [one.get_window_extent() for one in figure.legends]
    boxes.append(
        figure.findobj(lambda one: isinstance(one, Text) and one.get_text().startswith("A caption"))[
            0
        ].get_window_extent()
    )
    spare = [axes.get_legend().get_window_extent() for axes in figure.axes if axes.get_legend()]
    boxes += spare
    for i, box in enumerate(boxes):
        assert min(box.x0, box.y0) >= -1
        assert max(box.x1 - figure.bbox.x1, box.y1 - figure.bbox.y1) <= 1
        assert not [other for other in boxes[:i] if box.padded(-1).overlaps(other.padded(-1))]


def test_a_name_is_not_read_as_a_formula():
    figure = figure_of([rising("$r_5$ and $r_15$", 1.0)], caption="$x$ and $y_$")
    assert not any(text.get_parse_math() for text in figure.findobj(Text))
    figure.draw_without_rendering()


# ---- reading it anywhere


def contrast(one: str, other: str) -> float:
    """Ratio of the relative luminances of two colours, as WCAG 2.1 defines it."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_lines_and_words_stand_out_from_an_opaque_ground():
    figure = figure_of([rising(f"{i}", 1.0 + i) for i in range(9)])
    assert figure.get_facecolor() == figure.axes[0].get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert all(contrast(colour, GROUND) >= 3 for colour in COLOURS)
    assert min(contrast(INK, GROUND), contrast(MUTED, GROUND)) >= 4.5
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)


def test_in_grey_print_fourteen_methods_differ_in_dashes_or_marks():
    methods = [f"{i}" for i in range(14)]
    found = list(looks(dict(zip(methods, methods, strict=True)), methods).values())
    assert len({(look["marker"], look["mfc"] == GROUND) for look in found}) == 14
    assert len({str(look["ls"]) for look in found[:7]}) == 7
    assert len({(look["color"], str(look["ls"])) for look in found}) == 14


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_curves_give_the_same_file(tmp_path, suffix):
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in files:
        save_figure(figure_of([rising("a", 1.0), curve("b", [[0.0, 1.0], [1.0, 1.0]])]), path)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert b"CreationDate" not in files[0].read_bytes()
    assert b"dc:date" not in files[0].read_bytes()


def test_text_in_an_svg_is_text(tmp_path):
    save_figure(figure_of([rising("my_method", 1.0)], caption="What it shows."), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for words in (">my_method<", ">optimizer steps<", ">Reward of the policy's samples<", ">What it shows.<"):
        assert words in text


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.jpg must end in \.png, \.svg or \.pdf"):
        save_figure(Figure(), tmp_path / "a.jpg")


def test_drawing_leaves_no_warning_and_no_global_state(tmp_path):
    code = (
        "import warnings; warnings.simplefilter('error'); import sys; from pathlib import Path; import numpy as np\n"
        "from aligndistil.report import save_figure\n"
        "from aligndistil.report.curves import Curve\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from aligndistil.report.figures import curve_panel, draw\n"
        "one = [Curve('a', np.arange(3.0), np.ones((2, 3)), np.ones((2, 3)))]\n"
        "save_figure(draw([curve_panel(one, one, 'loss', 'step')] * 3, ['a'], 'x'), Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "one.png")], check=True)
    assert (tmp_path / "one.png").exists()


# ---- of a comparison


def log_of(lines: list[dict[str, Any]]) -> dict[str, Log]:
    return {"": Log(Path("a"), "run", "stage", "", Path("run"), lines)}


def at(step: int, split: str = "train", **metrics: float) -> dict[str, Any]:
    return {"step": float(step), "split": split, **{name.replace("__", "/"): value for name, value in metrics.items()}}


ON = log_of(
    [at(s, reward__token_mean=s / 100, gold_reward=s / 90, completions__mean_length=30.0) for s in range(1, 41)]
)
OFF = log_of(
    [at(s, rewards__margins=s / 10, reward__token_mean=0.1) for s in range(1, 41)]
    + [at(s, "eval", gold_reward=s / 100, kl_initial=s / 10.0, rewards__margins=0.1) for s in (0, 20, 40)]
)
MODELS = Comparison(
    results=[
        ModelResult(name="initial", objective="", metrics={"gold_reward": 0.0, "kl_initial": 0.0}),
        ModelResult(
            name="dpo",
            objective="dpo",
            method="DPO",
            setting="1 epoch",
            metrics={"gold_reward": 0.3, "kl_initial": 1.0},
        ),
        ModelResult(
            name="dpo_3",
            objective="dpo",
            method="DPO",
            setting="3 epochs",
            metrics={"gold_reward": 0.4, "kl_initial": 2.0},
        ),
        ModelResult(
            name="on",
            objective="aligndistil",
            method="AlignDistil",
            metrics={"gold_reward": 0.5, "kl_initial": 3.0},
            errors={"gold_reward": 0.1, "kl_initial": 0.2},
        ),
    ]
)


def test_convergence_has_a_panel_for_each_metric_and_a_line_for_each_method_that_knows_it():
    figure = pictures(MODELS, {"dpo": OFF, "on": ON})["convergence.png"]
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.axison]
    assert titles == [
        "Gold reward",
        "KL to the initial model",
        "Length of the policy's samples",
        "Reward of the policy's samples",
        "Reward margin of the pairs",
    ]
    gold = {one.get_label(): points(one) for one in figure.axes[0].lines if not one.get_label().startswith("_")}
    assert gold["DPO, 1 epoch"] == [(0, 0.0), (20, 0.2), (40, 0.4)]  # of evaluations: it samples nothing itself
    assert len(gold["AlignDistil"]) == 40
    reward = next(axes for axes in figure.axes if axes.get_title(loc="left") == "Reward of the policy's samples")
    drawn = {one.get_label() for one in reward.lines if not one.get_label().startswith("_")}
    assert drawn == {"AlignDistil"}  # that of given responses does not depend on the policy
    assert "convergence.png" not in pictures(MODELS, {"dpo": log_of([at(1, loss=1.0)])})


def test_a_method_has_one_colour_in_all_pictures_of_a_report():
    figures = list(pictures(MODELS, {"dpo": OFF, "on": ON}).values())
    assert len(figures) == 5
    colours: dict[str, set[str]] = {}
    for figure in figures:
        found = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
        for one in found:
            for text, handle in zip(one.get_texts(), one.get_lines(), strict=True):
                method = re.split(r"[:,]", text.get_text())[0]
                colours.setdefault(method, set()).add(handle.get_color())
    assert {method: len(of) for method, of in colours.items()} == dict.fromkeys(colours, 1)
    assert len({next(iter(of)) for of in colours.values()}) == len(colours)


def test_the_frontier_joins_the_models_of_one_method_and_has_their_errors():
    figure = pictures(MODELS, {})["frontier.png"]
    (axes,) = figure.axes
    assert sorted(legend(figure)) == ["AlignDistil", "DPO: 1 epoch / 3 epochs", "initial"]
    assert [points(one) for one in axes.lines if len(one.get_xydata()) == 2] == [[(1.0, 0.3), (2.0, 0.4)]]
    ((_, _, bars),) = axes.containers[-1:]
    assert [bar.get_segments()[0].tolist() for bar in bars] == [[[2.8, 0.5], [3.2, 0.5]], [[3.0, 0.4], [3.0, 0.6]]]
    assert "standard errors, over prompts (one training)" in caption(figure)
    assert not any(line.get_marker() == "*" for line in axes.lines if points(line)[0] == (3.0, 0.5))
    assert [points(line) for line in axes.lines if line.get_marker() == "*"] == [[(0.0, 0.0)]]  # the initial model


def test_scores_of_reward_models_that_differ_are_not_drawn_on_one_axis():
    rows = [row.model_copy(update={"metrics": {"reward_score": 1.0, "kl_initial": 1.0}}) for row in MODELS.results]
    same = Comparison(results=rows, reward=ComparedWith(name="scorer"))
    assert "frontier.png" in pictures(same, {})
    unlike = Comparison(results=rows, reward=ComparedWith(name="scorer", same_in_all_runs=False))
    assert pictures(unlike, {}) == {}


def test_lines_of_evaluations_are_marked_in_convergence_and_lines_of_training_are_not():
    figure = pictures(MODELS, {"dpo": OFF, "on": ON})["convergence.png"]
    marks = {one.get_label(): one.get_marker() for one in figure.axes[0].lines if not one.get_label().startswith("_")}
    assert marks["AlignDistil"] == "None"
    assert marks["DPO, 1 epoch"] != "None"


def test_trainings_of_one_method_share_a_colour_and_differ_in_dashes():
    figure = pictures(MODELS, {"dpo": OFF, "dpo_3": OFF})["reward-over-kl.png"]
    (one, three) = (handle for handle in figure.legends[0].get_lines() if handle.get_label().startswith("DPO"))
    assert one.get_color() == three.get_color()
    assert str(one._unscaled_dash_pattern) != str(three._unscaled_dash_pattern)


def test_without_two_models_of_one_reward_there_is_no_frontier():
    alone = Comparison(results=[MODELS.results[1]])
    assert pictures(alone, {}) == {}


def test_reward_over_kl_is_of_each_methods_own_steps():
    figure = pictures(MODELS, {"dpo": OFF})["reward-over-kl.png"]
    assert points(line(figure, "DPO, 1 epoch")) == [(0.0, 0.0), (2.0, 0.2), (4.0, 0.4)]
    assert figure.axes[0].get_xlabel() == "KL to the initial model (nats per response)"


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
    assert (plot.metric, plot.x, plot.crossing) == (REWARD, "kl/policy_teacher", None)
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


def test_a_threshold_is_marked_where_it_is_reached_and_stands_in_the_caption(tmp_path):
    fast, slow = [0.05 * step for step in range(24)], [0.025 * step for step in range(24)]
    run = run_of(tmp_path / "run", {"fast": fast, "slow": slow})
    plot = plot_runs([run], smooth=False, threshold=0.5, out=tmp_path / "a.svg")
    marked = [points(one)[0] for one in plot.figure.axes[0].lines if one.get_markerfacecolor() == GROUND]
    assert marked == [(11.0, 0.5), (21.0, 0.5)]
    assert caption(plot.figure).endswith("Steps to reach 0.5 (as asked): fast 11 (1.0x); slow 21 (1.9x).")
    assert "moving averages over 3 steps" in caption(plot_runs([run], window=3, out=tmp_path / "b.svg").figure)


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
    assert plot_runs([run], out=out).crossing is not None
    assert plot_runs([f"one={run / 'a'}"], out=out).crossing is None
    assert plot_runs([run], "completions/mean_length", out=out).crossing is None
    assert plot_runs([run], "kl/policy_teacher", threshold=3.0, out=out).crossing is not None
