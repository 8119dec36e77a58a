"""What a rollout may sample with: only what the objective's use of the samples allows."""

import pytest

from aligndistil import objectives
from aligndistil.objectives.base import OnPolicy

CHANGES = [("temperature: 0.7", "temperature"), ("temperature: 2", "temperature"), ("top_p: 0.9", "top_p")]
ON_POLICY = {name: cls for name, cls in objectives.registry().items() if cls.on_policy is not OnPolicy.NEVER}


def recipe_of(name, rollout):
    roles = [role for role in objectives.registry()[name].example().needs if role != "policy"]
    models = "".join(f"{role}: m, " for role in roles)
    stage = f"objective: {{name: {name}}}\nmodel: {{path: m}}\nmodels: {{{models}}}\ndata: {{train: {{path: d}}}}\n"
    return stage + rollout


@pytest.mark.parametrize("name", ON_POLICY)
def test_the_policy_itself_may_always_be_sampled(name, load):
    stage = load(recipe_of(name, "rollout: {temperature: 1, top_p: 1.0}\n")).stages[name]
    assert stage.objective.trained_at(stage.rollout.temperature) == 1


@pytest.mark.parametrize(("change", "field"), CHANGES)
@pytest.mark.parametrize("name", ["reinforce", "bandit"])
def test_an_estimator_that_averages_over_the_policy_refuses_other_samples(name, change, field, refused):
    """Which is what an objective needs that says nothing of its samples, as these two."""
    (line,) = refused(recipe_of(name, f"rollout: {{{change}}}\n"))
    assert line.startswith(f"r.yaml:5:{13 + len(field)}: rollout.{field}: `{name}` learns from samples of")
    assert line.endswith(": write 1")


@pytest.mark.parametrize("name", ["ppo", "rto"])
def test_ppo_and_rto_train_the_policy_that_samples(name, load, refused):
    stage = load(recipe_of(name, "rollout: {temperature: 0.7}\n")).stages[name]
    assert stage.objective.trained_at(stage.rollout.temperature) == 0.7
    (line,) = refused(recipe_of(name, "rollout: {temperature: 0.7, top_p: 0.9}\n"))
    assert "rollout.top_p: " in line
    assert "what this cuts off has a probability in its loss: write 1" in line


def test_aligndistil_only_visits_other_texts(load):
    stage = load(recipe_of("aligndistil", "rollout: {temperature: 0.7, top_p: 0.9}\n")).stages["aligndistil"]
    assert stage.objective.trained_at(stage.rollout.temperature) == 1


def test_samples_of_a_default_that_one_stage_needs_otherwise_are_refused_there(refused):
    text = recipe_of("reinforce", "rollout: {temperature: 0.7}\n") + "stages: {a: {}, b: {rollout: {temperature: 1}}}\n"
    (line,) = refused(text)
    assert "`reinforce` learns" in line
