"""Stages that train a scalar head, that are given a reward and a critic, and that take several steps on a rollout."""

import json
from collections.abc import Callable
from textwrap import dedent

import pytest

from aligndistil.objectives.base import Role

FOUR = dedent("""\
    model: {path: m}
    data: {train: {path: d}}
    train: {batch_size: 8, micro_batch_size: 2}
    stages:
      rm:
        objective: {name: reward_model}
      dpo:
        objective: {name: dpo}
        models: {reference: m}
      distil:
        objective: {name: aligndistil}
        models: {teacher: "stage:dpo", reverse_teacher: t}
        rollout: {max_new_tokens: 4}
      ppo:
        objective: {name: ppo}
        models: {reference: m, reward: "stage:rm", critic: "stage:rm"}
        rollout: {max_new_tokens: 4, samples_per_prompt: 2, responses: 32, epochs: 2}
        train: {critic_learning_rate: 1e-5}
    """)
HEADLESS = "trains a language model, which has no scalar head; name a stage that trains one"
SCALAR = "`reward_model` trains a scalar head, not a language model; name a stage that trains one"
ONE_STEP = "takes one optimizer step on each rollout; remove the line"

Refused = Callable[..., list[str]]


def changed(old: str, new: str, text: str = FOUR) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


def place(text: str, part: str) -> str:
    """Where a part that stands in a recipe once begins."""
    assert text.count(part) == 1, part
    before = text[: text.index(part)]
    return f"r.yaml:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def test_a_policy_may_be_given_a_reward_a_critic_and_several_steps_on_a_rollout(load):
    recipe = load(FOUR)
    stage = recipe.stages["ppo"]
    assert stage.models == {Role.REFERENCE: "m", Role.REWARD: "stage:rm", Role.CRITIC: "stage:rm"}
    assert (stage.rollout.responses, stage.rollout.epochs, stage.train.critic_learning_rate) == (32, 2, 1e-5)
    assert stage.inputs == ("rm",)
    assert list(recipe.stages) == ["rm", "dpo", "distil", "ppo"]


@pytest.mark.parametrize("critic", ["stage:rm", "stage:dpo", "m"])
def test_a_critic_may_start_from_a_scalar_head_or_a_language_model(critic, load):
    stage = load(changed('critic: "stage:rm"', f'critic: "{critic}"')).stages["ppo"]
    assert stage.models[Role.CRITIC] == critic


@pytest.mark.parametrize(
    ("old", "new", "wrong", "key", "text"),
    [
        ('reward: "stage:rm"', "reward: <>", "stage:dpo", "ppo.models.reward", f"`dpo` {HEADLESS}"),
        ("reference: m, reward", "reference: <>, reward", "stage:rm", "ppo.models.reference", SCALAR),
        ('teacher: "stage:dpo"', "teacher: <>", "stage:rm", "distil.models.teacher", SCALAR),
        ("reverse_teacher: t", "reverse_teacher: <>", "stage:rm", "distil.models.reverse_teacher", SCALAR),
        (
            "models: {reference: m}",
            "models: {reference: m}\n    model: {path: <>}",
            "stage:rm",
            "dpo.model.path",
            SCALAR,
        ),
    ],
)
def test_a_stage_of_the_wrong_kind_is_refused_where_it_is_named(old, new, wrong, key, text, refused):
    recipe = changed(old, new)
    assert refused(recipe.replace("<>", wrong)) == [f"{place(recipe, '<>')}: stages.{key}: {text}"]


def test_divergences_are_not_measured_to_a_scalar_head(refused):
    lines = len(FOUR.splitlines())
    assert refused(FOUR + 'report: {kl_to: "stage:rm"}\n') == [f"r.yaml:{lines + 1}:17: report.kl_to: {SCALAR}"]


@pytest.mark.parametrize(
    ("old", "new", "at", "key", "text"),
    [
        ('critic: "stage:rm"', 'critic: "python:a:b"', '"python:a:b"', "critic",
         "only `reward` may be a Python function; name a model"),
        ("{reference: m, reward", '{reference: "python:a:b", reward', '"python:a:b"', "reference",
         "only `reward` may be a Python function; name a model"),
        ('reward: "stage:rm"', 'reward: "python:a"', '"python:a"', "reward", "write `python:MODULE:FUNCTION`"),
        ('reward: "stage:rm"', 'reward: "python:a:"', '"python:a:"', "reward", "write `python:MODULE:FUNCTION`"),
        ('reward: "stage:rm"', 'reward: "python:a:b:c"', '"python:a:b:c"', "reward", "write `python:MODULE:FUNCTION`"),
    ],
)  # fmt: skip
def test_only_a_reward_is_a_function_and_it_has_a_module(old, new, at, key, text, refused):
    recipe = changed(old, new)
    assert refused(recipe) == [f"{place(recipe, at)}: stages.ppo.models.{key}: {text}"]


def test_a_function_is_a_reward(load):
    stage = load(changed('reward: "stage:rm"', 'reward: "python:my.rewards:length"')).stages["ppo"]
    assert stage.models[Role.REWARD] == "python:my.rewards:length"


def test_a_critic_s_learning_rate_needs_a_critic(refused):
    recipe = changed(
        "    models: {reference: m}\n", "    models: {reference: m}\n    train: {critic_learning_rate: 1}\n"
    )
    at = place(recipe, "critic_learning_rate: 1}")
    assert refused(recipe) == [f"{at}: stages.dpo.train.critic_learning_rate: `dpo` trains no critic; remove the line"]


def test_a_default_that_no_stage_of_a_recipe_can_use_is_refused(refused):
    recipe = dedent("""\
        model: {path: m}
        data: {train: {path: d}}
        models: {teacher: t, reverse_teacher: r}
        train: {critic_learning_rate: 1e-5}
        rollout: {max_new_tokens: 4, responses: 128, epochs: 2}
        stages:
          a: {objective: {name: aligndistil}}
          b: {objective: {name: aligndistil, r: 5}}
        """)
    several = "no stage of this recipe takes several optimizer steps on a rollout; remove it"
    assert refused(recipe) == [
        "r.yaml:4:9: train.critic_learning_rate: no stage of this recipe trains a critic; remove it",
        f"r.yaml:5:30: rollout.responses: {several}",
        f"r.yaml:5:46: rollout.epochs: {several}",
    ]
    # A recipe that samples nothing at all gets one line that says so.
    off_policy = (
        recipe.replace("aligndistil, r: 5", "sft").replace("aligndistil", "sft").replace(", responses: 128", "")
    )
    assert [line.partition(": ")[2] for line in refused(off_policy)][-1] == (
        "rollout: no stage of this recipe samples; remove this section"
    )


def test_defaults_of_one_stage_are_left_out_of_the_others_and_the_whole_can_be_loaded_again(load):
    """A rollout that an objective does not correct for is never used twice, whoever asked for it."""
    recipe = changed(", samples_per_prompt: 2, responses: 32, epochs: 2", "")
    recipe = changed("    train: {critic_learning_rate: 1e-5}\n", "", recipe)
    recipe = changed("micro_batch_size: 2}", "micro_batch_size: 2, critic_learning_rate: 1e-5}", recipe)
    loaded = load(recipe + "rollout: {responses: 32, epochs: 2}\n")
    stages = loaded.stages
    assert [(s.rollout.responses, s.rollout.epochs) for s in (stages["distil"], stages["ppo"])] == [(None, 1), (32, 2)]
    rates = {name: stage.train.critic_learning_rate for name, stage in stages.items()}
    assert rates == {"rm": None, "dpo": None, "distil": None, "ppo": 1e-5}
    assert load(json.dumps(loaded.resolved())).resolved() == loaded.resolved()


@pytest.mark.parametrize(("field", "value"), [("responses", 32), ("epochs", 2)])
def test_several_steps_on_a_rollout_need_an_objective_that_corrects_for_it(field, value, refused):
    recipe = changed("    rollout: {max_new_tokens: 4}\n", f"    rollout: {{max_new_tokens: 4, {field}: {value}}}\n")
    at = place(recipe, f"{field}: {value}}}\n  ppo" if field == "epochs" else f"{field}: {value}}}")
    assert refused(recipe) == [f"{at}: stages.distil.rollout.{field}: `aligndistil` {ONE_STEP}"]


def test_a_rollout_divides_into_optimizer_steps(refused):
    recipe = changed("responses: 32", "responses: 20")
    at = place(recipe, "20, epochs")
    assert refused(recipe) == [f"{at}: stages.ppo.rollout.responses: 20 is not a multiple of train.batch_size, 8"]
    smaller = changed("responses: 32", "responses: 4")
    assert refused(smaller)[0].endswith("rollout.responses: 4 is not a multiple of train.batch_size, 8")


def test_a_batch_of_one_has_no_other_response(refused, load):
    recipe = "objective: {name: kto}\nmodel: {path: m}\nmodels: {reference: m}\ndata: {train: {path: d}}\n"
    text = "`kto` compares each prompt with the response of another example: write 2 or more"
    assert refused(recipe + "train: {batch_size: 1}\n") == [f"r.yaml:5:21: train.batch_size: {text}"]
    assert load(recipe + "train: {batch_size: 2}\n").stages["kto"].train.batch_size == 2


def test_what_a_policy_with_a_critic_needs_is_asked_for(refused):
    lines = refused("objective: {name: ppo}\nmodel: {path: m}\ndata: {train: {path: d}}\n")
    assert [line.split(": ")[1] for line in lines] == ["models.reference", "models.reward", "models.critic", "rollout"]
