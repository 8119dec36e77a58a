"""What DeepSpeed is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndistil import recipe
from aligndistil.engine.config import check_deepspeed, deepspeed_config, frozen_config, import_deepspeed, user_config
from aligndistil.errors import MissingError, UserError
from aligndistil.recipe import OWNED_DEEPSPEED_KEYS

TRAIN = recipe.Train(batch_size=32, micro_batch_size=4, max_grad_norm=0.5)


def config_of(dtype: torch.dtype = torch.float32, **engine: Any) -> dict[str, Any]:
    return deepspeed_config(recipe.Engine.model_validate(engine), TRAIN, accumulation=8, dtype=dtype)


def test_the_recipe_decides_batch_clipping_stage_and_precision() -> None:
    config = config_of(torch.bfloat16, zero_stage=3)
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 8
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["stage"] == 3
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config_of()["bf16"] == {"enabled": False}


@pytest.mark.parametrize(("stage", "dtype", "found"), [(0, "float32", 0), (0, "bfloat16", 1), (2, "bfloat16", 2)])
def test_gradients_are_never_added_up_in_bfloat16(stage: int, dtype: str, found: int) -> None:
    assert config_of(getattr(torch, dtype), zero_stage=stage)["zero_optimization"]["stage"] == found


def test_offloading_names_what_is_kept_in_cpu_memory() -> None:
    cpu = {"device": "cpu"}
    assert config_of(zero_stage=2, offload="optimizer")["zero_optimization"] == {"stage": 2, "offload_optimizer": cpu}
    both = config_of(zero_stage=3, offload="parameters")["zero_optimization"]
    assert both == {"stage": 3, "offload_optimizer": cpu, "offload_param": cpu}
    settings = recipe.Engine(zero_stage=3, offload="parameters")
    assert frozen_config(settings, torch.bfloat16)["zero_optimization"] == {"stage": 3, "offload_param": cpu}


def test_more_configuration_is_merged_over_ours_and_not_in_place_of_it(tmp_path: Path) -> None:
    more = {"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(more))
    for given in (more, str(file)):
        config = config_of(zero_stage=2, deepspeed=given)
        assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7}
        assert config["wall_clock_breakdown"] is True
        assert config["gradient_clipping"] == 0.5


@pytest.mark.parametrize("key", OWNED_DEEPSPEED_KEYS)
def test_a_file_may_not_set_what_the_recipe_decides(key: str, tmp_path: Path) -> None:
    section, _, field = key.partition(".")
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({section: {field: 1} if field else 1}))
    owner = OWNED_DEEPSPEED_KEYS[key]
    with pytest.raises(UserError, match=rf"deepspeed.json sets {key}, which the recipe decides; set {owner} instead"):
        config_of(deepspeed=str(file))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, r"cannot read .*absent.json \(No such file or directory\); give a JSON file"),
        ('{"a": 1,}', r"absent.json:1:9: not JSON"),
        ("[1]", r"holds no JSON object"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text: str | None, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "absent.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=sentence):
        config_of(deepspeed=str(file))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"zero_optimization": 3}', "zero_optimization must be an object, not 3"),
        (b'{"zero_optimization": "stage"}', "zero_optimization must be an object, not 'stage'"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b'{"train_batch_size": 3}', "sets train_batch_size, which the recipe decides; set train.batch_size instead"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        user_config(recipe.Engine(deepspeed=str(path)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zero_optimization": {"overlap_comm": True}}, ""),
        ({"activation_checkpointing": {"partition_activations": True}, "steps_per_print": 7}, ""),
        ({"flops_profiler": {"enabled": False}, "tensorboard": {"enabled": False}}, ""),
        ({"wall_clock_brekdown": True}, "knows no `wall_clock_brekdown`.* did you mean `wall_clock_breakdown`"),
        ({"activation_checkpointing": {"partition": 1}}, "knows no `activation_checkpointing.partition`"),
        ({"zero_optimization": {"overlap_com": True}}, "does not take zero_optimization.*: overlap_com: Extra inputs"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "reduce_bucket_size: Input should be greater than 0"),
        ({"zero_optimization": "fast"}, 'does not take zero_optimization: "fast"'),
        ({"activation_checkpointing": 3}, "does not take activation_checkpointing: 3"),
        ({"communication_data_type": "fp17"}, "does not take communication_data_type"),
        ({"wall_clock_breakdown": "maybe"}, "does not take wall_clock_breakdown"),
        ({"prescale_gradients": "maybe"}, 'prescale_gradients must be true or false, not "maybe"'),
        ({"steps_per_print": 0}, "steps_per_print must be a number above 0, not 0"),
        ({"gradient_predivide_factor": "x"}, "gradient_predivide_factor must be a number above 0"),
        ({"amp": {"enabled": True}}, "does not take amp"),
    ],
)
def test_what_deepspeed_would_overlook_or_stumble_on_is_refused(
    given: dict[str, Any], said: str, recipe_file: Callable[..., Path]
) -> None:
    content = {"objective": {"name": "sft"}, "model": {"path": "m"}, "data": {"train": {"path": "d"}}}
    (stage,) = recipe.load_recipe(recipe_file({**content, "engine": {"deepspeed": given}})).stages.values()
    if not said:
        check_deepspeed(stage, torch.float32)
        return
    with pytest.raises(UserError, match=said) as caught:
        check_deepspeed(stage, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"aio": {}, "aio": {}}', "`aio` is given twice"),
        ('{"gradient_predivide_factor": NaN}', "NaN is no number"),
        ("[" * 100_000, "recursion"),
        ('{"steps_per_print": ' + "9" * 5000 + "}", "5000 digits"),
    ],
)
def test_json_that_cannot_be_meant_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=said):
        user_config(recipe.Engine(deepspeed=str(tmp_path / "ds.json")))


def test_a_mapping_in_quotes_is_no_path() -> None:
    with pytest.raises(UserError, match="without quotes"):
        user_config(recipe.Engine(deepspeed='{"aio": {}}'))


def test_a_missing_deepspeed_is_not_the_users_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingError, match="pip install deepspeed"):
        import_deepspeed()
