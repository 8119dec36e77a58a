"""comparison.tex: what fits on a page, and what its caption has to say then."""

import re

from aligndistil.report import Comparison, ModelResult, RewardResult
from aligndistil.report.columns import COLUMNS
from aligndistil.report.latex import BETWEEN, ROOM, latex_tables

ALL = {column.metric: 0.5 for column in COLUMNS}


def comparison(metrics: dict[str, float], **more: object) -> Comparison:
    rows = [
        ModelResult(name=name, objective="aligndistil", metrics=metrics, spread=metrics, per_seed={"a": {}, "b": {}})
        for name in ("aligndistil_static", "dpo")
    ]
    return Comparison.model_validate({"kl_to": "dpo", "reward": "reward_model", "results": rows, **more})


def tabulars(text: str) -> list[list[list[str]]]:
    """The rows of each tabular as cells, headings included."""
    found = re.findall(r"\\begin\{tabular\}\{[lr]+\}(.*?)\\end\{tabular\}", text, flags=re.DOTALL)
    return [[row.split(" & ") for row in re.findall(r"^    (.*) \\\\$", table, flags=re.MULTILINE)] for table in found]


def test_headings_are_short_and_the_caption_has_the_long_ones():
    text = latex_tables(comparison({"gold_reward": 0.5, "kl": 1.0, "truncated_fraction": 0.5, "length_mean": 20.0}))
    ((head, *_),) = tabulars(text)
    assert head == ["model", "objective", "gold reward", "KL", "length", "truncated"]
    caption = text[text.index(r"\caption") :]
    assert caption.startswith(r"\caption{Headings in full: KL to dpo (nats a sequence), mean length (tokens). ")


def test_what_is_too_wide_for_a_page_continues_below_with_the_models_again():
    text = latex_tables(comparison(ALL))
    tables = tabulars(text)
    assert len(tables) == 2
    assert [[row[0] for row in table[-2:]] for table in tables] == [[r"aligndistil\_static", "dpo"]] * 2
    heads = [" ".join(filter(None, parts)) for table in tables for parts in zip(*table[:-2], strict=True)]
    main = [column.short.replace("-\n", "").replace("\n", " ") for column in COLUMNS if column.rank < 99]
    assert [head for head in heads if head not in ("model", "objective")] == main
    printed = str.maketrans("", "", "$\\")
    for table in tables:
        widths = [max(len(row[i].replace("pm", "±").translate(printed)) for row in table) for i in range(len(table[0]))]
        assert sum(widths) + BETWEEN * len(widths) <= ROOM


def test_one_label_and_one_caption_stand_for_all_parts():
    text = latex_tables(comparison(ALL))
    assert text.count(r"\caption{") == text.count(r"\label{tab:comparison}") == text.count(r"\begin{table}") == 1


def test_what_is_too_high_for_a_page_continues_on_another_with_the_same_number():
    few = comparison(ALL)
    many = few.model_copy(update={"results": few.results * 20})
    text = latex_tables(many)
    assert [len(table) - len(tabulars(latex_tables(few))[i]) for i, table in enumerate(tabulars(text))] == [38, 38]
    assert text.count(r"\label{tab:comparison}") == 1
    first, second = text.split(r"\end{table}")[:2]
    assert r"\addtocounter" not in first
    assert second.index(r"\end{tabular}}") < second.index("  \\addtocounter{table}{-1}\n  \\caption{Continued.}")


def test_the_packages_are_named_and_only_what_is_too_wide_is_made_smaller():
    text = latex_tables(comparison({"gold_reward": 0.5}))
    assert text.startswith("% Needs \\usepackage{booktabs} and \\usepackage{graphicx}.\n")
    (width,) = re.findall(r"\\resizebox\{(.*)\}\{!\}\{%\n", text)
    assert width == r"\ifdim\width>\linewidth\linewidth\else\width\fi"
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_headings_of_rewards_are_broken_after_their_comma_and_escaped():
    rewards = [
        RewardResult(name=name, kind="implicit", right={"train": ["1100"], "eval": ["1010"]}) for name in ("a_1", "b")
    ]
    text = latex_tables(comparison({"gold_reward": 0.5}, rewards=rewards))
    _, *tables = tabulars(text)
    heads = [" / ".join(filter(None, parts)) for table in tables for parts in zip(*table[:-2], strict=True)]
    assert r"training / pairs (\%)" in heads
    assert "difference, / held-out pairs" in heads
    assert r"a\_1" in {row[0] for row in tables[0]}
