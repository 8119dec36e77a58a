def test_stages_come_after_those_they_use(load, three_stages):
    recipe = load(three_stages)
    assert list(recipe.stages) == ["dpo", "reverse_dpo", "aligndistil"]
    assert recipe.stages["aligndistil"].inputs == ("dpo", "reverse_dpo")
    assert recipe.stages["dpo"].inputs == ()


def test_file_order_is_kept_where_nothing_else_decides(load):
    stages = "".join(f"  {name}: {{}}\n" for name in "cab")
    recipe = load(f"objective: {{name: sft}}\nmodel: {{path: m}}\ndata: {{train: {{path: d}}}}\nstages:\n{stages}")
    assert list(recipe.stages) == ["c", "a", "b"]


def test_a_stage_may_start_from_another_and_be_compared_with_it(load):
    text = """\
        data: {train: {path: d}}
        stages:
          dpo: {objective: {name: dpo}, model: {path: "stage:sft"}, models: {reference: "stage:sft"}}
          sft: {objective: {name: sft}, model: {path: m}}
        """
    recipe = load(text)
    assert list(recipe.stages) == ["sft", "dpo"]
    assert recipe.stages["dpo"].inputs == ("sft",)


def test_an_unknown_stage_is_refused_with_the_nearest(refused, three_stages):
    assert refused(three_stages.replace("stage:reverse_dpo", "stage:revers_dpo")) == [
        "r.yaml:8:53: stages.aligndistil.models.reverse_teacher: no stage is named `revers_dpo`; "
        "did you mean `reverse_dpo`? The stages are `aligndistil`, `dpo` and `reverse_dpo`"
    ]


def test_a_reference_in_a_recipe_of_one_stage_is_refused(refused, sft):
    assert refused(sft.replace("path: m", 'path: "stage:base"')) == [
        "r.yaml:2:15: model.path: no stage is named `base`; the stages are `sft`"
    ]


def test_a_circle_is_refused_where_it_starts(refused):
    text = """\
        data: {train: {path: d}}
        objective: {name: sft}
        stages:
          last: {model: {path: "stage:a"}}
          a: {model: {path: "stage:c"}}
          b: {model: {path: "stage:a"}}
          c: {model: {path: "stage:b"}}
        """
    assert refused(text) == [
        "r.yaml:5:21: stages.a.model.path: the stages wait for each other in a circle: a -> c -> b -> a"
    ]


def test_a_stage_that_waits_for_itself_is_a_circle(refused, three_stages):
    assert refused(three_stages, "stages.dpo.model.path=stage:dpo") == [
        "--set: stages.dpo.model.path: the stages wait for each other in a circle: dpo -> dpo"
    ]


def test_a_default_role_that_is_dropped_makes_no_edge(load, three_stages):
    text = three_stages.replace("{reference: builtin:tiny}", '{reference: "stage:sft"}')
    text = text.replace("stages:\n", "stages:\n  sft: {objective: {name: sft}}\n")
    recipe = load(text)
    assert recipe.stages["sft"].inputs == ()
    assert recipe.stages["dpo"].inputs == ("sft",)


def test_a_row_of_the_report_is_a_stage_s(refused, three_stages):
    assert refused(three_stages + "report: {rows: {dp: {method: DPO}}}\n")[0].startswith(
        "r.yaml:12:17: report.rows.dp: no stage has this name; did you mean `dpo`? The stages are"
    )


def test_a_column_s_old_name_is_answered_with_the_new_one(refused, three_stages):
    assert refused(three_stages + "report: {columns: [kl, length_mean]}\n") == [
        "r.yaml:12:24: report.columns.1: `length_mean` is called `completions/mean_length` now, as in the training log"
    ]


def test_the_report_may_name_a_stage_that_exists(refused, three_stages):
    assert refused(three_stages + 'report: {kl_to: "stage:dp"}\n') == [
        "r.yaml:12:17: report.kl_to: no stage is named `dp`; did you mean `dpo`? "
        "The stages are `aligndistil`, `dpo` and `reverse_dpo`"
    ]


def test_names_of_stages_are_names_of_folders(refused):
    text = (
        "objective: {name: sft}\nmodel: {path: m}\ndata: {train: {path: d}}\nstages:\n  a b: {}\n  report: {}\n  c: 1\n"
    )
    rule = (
        "a stage's name is its folder's: letters, digits, `_` and `-`, starting with a letter, and not `report`, "
        "`initial` or `seed-0`, at most 200 characters"
    )
    assert refused(text) == [
        f"r.yaml:5:3: stages.a b: {rule}",
        f"r.yaml:6:3: stages.report: {rule}",
        "r.yaml:7:6: stages.c: must be a mapping of sections",
    ]


def test_a_recipe_without_stages_says_what_it_needs(refused):
    assert refused("model: {path: m}\n") == [
        "r.yaml:1:1: a recipe needs `stages`, or one `objective` at the top; `aligndistil recipes ls` lists examples"
    ]
    assert refused("stages: {}\n") == [
        "r.yaml:1:1: stages: must be a mapping from names to stages, with at least one that is not null"
    ]
