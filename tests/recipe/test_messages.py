"""The whole sentence that each mistake gets."""

import pytest

from aligndistil.errors import UserError
from aligndistil.objectives import registry
from aligndistil.recipe.other_tools import FIELDS, PREFIXES, REMARKS
from aligndistil.recipe.sections import Header, Source, sections
from aligndistil.recipe.yaml_positions import parse_yaml


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("train: {learning_rat: 1}", "4:9: train.learning_rat: unknown key; did you mean `learning_rate`?"),
        ("train: {learning-rate: 1}", "4:9: train.learning-rate: unknown key; did you mean `learning_rate`?"),
        ("train: {beta: 1}", "4:9: train.beta: unknown key; `beta` belongs to `objective.beta`"),
        ("learning_rate: 1", "4:1: learning_rate: unknown key; `learning_rate` belongs to `train.learning_rate`"),
        (
            "train: {max_new_tokens: 1}",
            "4:9: train.max_new_tokens: unknown key; `max_new_tokens` belongs to "
            "`rollout.max_new_tokens`, `evaluation.max_new_tokens` or `report.max_new_tokens`",
        ),
        ("train: {deepspeed: x}", "4:9: train.deepspeed: unknown key; `deepspeed` belongs to `engine.deepspeed`"),
        (
            "train: {output-dir: x}",
            "4:9: train.output-dir: unknown key; `output_dir` belongs to the top level of the recipe",
        ),
        (
            "train: {rollout: {}}",
            "4:9: train.rollout: unknown key; `rollout` belongs to the top level of the recipe or a stage",
        ),
        (
            "learning_rte: 1",
            "4:1: learning_rte: unknown key; did you mean `learning_rate`? "
            "`learning_rate` belongs to `train.learning_rate`",
        ),
        ("checkpoint: {xyz: 1}", "4:14: checkpoint.xyz: unknown key; the keys here are `every`, `keep` and `resume`"),
        (
            "checkpoint: {resume: atuo}",
            "4:22: checkpoint.resume: must be one of `auto` or `never`, not the string 'atuo'; did you mean `auto`?",
        ),
        ("rollout: {engine: vllm}", "4:19: rollout.engine: must be `transformers`, not the string 'vllm'"),
        (
            'train: {learning_rate: "0.1"}',
            "4:24: train.learning_rate: must be a number, not the string '0.1': remove the quotes",
        ),
        ("train: {learning_rate: true}", "4:24: train.learning_rate: must be a number, not true"),
        ("train: {seed: 1.5}", "4:15: train.seed: must be a whole number, not 1.5"),
        ("train: {seed: true}", "4:15: train.seed: must be a whole number, not true"),
        ("engine: {zero_stage: true}", "4:22: engine.zero_stage: must be a whole number, not true"),
        ("engine: {zero_stage: 4}", "4:22: engine.zero_stage: must be at most 3, not 4"),
        ("train: {warmup_ratio: 3}", "4:23: train.warmup_ratio: must be at most 1, not 3"),
        ("train: {learning_rate: 0}", "4:24: train.learning_rate: must be greater than 0, not 0"),
        ("train: 3", "4:8: train: must be a mapping such as `{learning_rate: ...}`, not 3"),
        ("train: {adam_betas: 0.9}", "4:21: train.adam_betas: must be a list, not 0.9"),
        ("train: {adam_betas: [0.9, 1]}", "4:27: train.adam_betas.1: must be less than 1, not 1"),
        (
            "engine: {chunk_tokens: all}",
            "4:24: engine.chunk_tokens: must be a whole number or `auto`, not the string 'all'",
        ),
        ("logging: {trackers: tensorboard}", "4:21: logging.trackers: must be a list, not the string 'tensorboard'"),
        (
            "engine: {deepspeed: {zero_optimization: {stage: 1}}}",
            "4:42: engine.deepspeed.zero_optimization.stage: the recipe decides this; set engine.zero_stage instead",
        ),
        (
            "engine: {deepspeed: {train_batch_size: 8}}",
            "4:22: engine.deepspeed.train_batch_size: the recipe decides this; set train.batch_size instead",
        ),
        ("engine: {offload: parameters}", "4:10: engine.offload: `parameters` needs engine.zero_stage: 3"),
        (
            "train: {epochs: 1, max_steps: 2}",
            "4:20: train.max_steps: give epochs or max_steps, not both; remove one of them",
        ),
        (
            "train: {micro_batch_size: 2, micro_batch_tokens: 512}",
            "4:30: train.micro_batch_tokens: give micro_batch_size or micro_batch_tokens, not both; remove one of them",
        ),
        (
            "engine: {zero_stage: 3, compile: all}",
            "4:25: engine.compile: `all` does not go with zero_stage 3, which splits the models; write `head`",
        ),
        ("schema_version: 2", "4:1: schema_version: this aligndistil reads version 1, not 2; upgrade it"),
        ("name: a/b", "4:7: name: must be made of letters, digits, `.`, `_` and `-`, not the string 'a/b'"),
        ("stage: {}", "4:1: stage: unknown key; did you mean `stages`?"),
        ("name: 3", "4:7: name: must be a string, not 3: put it in quotes"),
        (
            "train: {batch_size: 9, micro_batch_size: 2}",
            "4:21: train.batch_size: 9 is not a multiple of train.micro_batch_size, 2",
        ),
        ("evaluation: {every: 5}", "4:21: evaluation.every: there is nothing to evaluate on; name it in data.eval"),
        (
            "rollout: {}",
            "4:1: rollout: `sft` learns from data alone and samples nothing; remove this section",
        ),
        (
            "models: {teacher: x}",
            "4:10: models.teacher: `sft` does not read this model (it compares with no other model); remove the line",
        ),
    ],
)
def test_a_mistake_gets_its_place_and_a_remedy(refused, sft, section, line):
    assert refused(sft + section + "\n") == [f"r.yaml:{line}"]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("per_device_train_batch_size", "here it is `train.micro_batch_size`"),
        ("model_name_or_path", "here it is `model.path`"),
        ("num_train_epochs", "here it is `train.epochs`"),
        (
            "gradient_accumulation_steps",
            "it follows from train.batch_size (global) and train.micro_batch_size (per process): set those two",
        ),
        ("lr", "here it is `train.learning_rate`"),
        ("learning-rate", "`learning_rate` belongs to `train.learning_rate`"),
        ("adam_beta2", "here it is `train.adam_betas`"),
        ("beta2", "`beta2` belongs to `objective.beta2`"),
        (
            "max_length",
            "a prompt and its response are cut separately: set data.max_prompt_length and data.max_response_length",
        ),
        ("max_prompt_len", "here it is `data.max_prompt_length`"),
        ("max_prompt_length", "`max_prompt_length` belongs to `data.max_prompt_length`"),
        ("bf16", "here it is `model.dtype`"),
        ("num_generations", "here it is `rollout.samples_per_prompt`"),
        ("lora_alpha", "adapters are not supported: all weights are trained"),
        ("use_peft", "adapters are not supported: all weights are trained"),
        ("dataset_name", "here it is `data.train.path`"),
        ("save_steps", "here it is `checkpoint.every`"),
        ("report_to", "here it is `logging.trackers`"),
        ("simpo_gamma", "`simpo_gamma` belongs to `objective.simpo_gamma`"),
    ],
)
def test_peers_names_get_ours(refused, sft, key, text):
    assert refused(f"{sft}{key}: 1\n") == [f"r.yaml:4:1: {key}: unknown key; {text}"]


def test_every_name_that_is_offered_for_a_peers_name_exists():
    fields = {f"{name}.{field}" for name, cls in sections().items() for field in cls.model_fields}
    fields |= {f"data.{part}.{field}" for part in ("train", "eval") for field in Source.model_fields}
    fields |= {"objective.name", *Header.model_fields}
    assert set(FIELDS.values()) <= fields
    sentences = " ".join([*REMARKS.values(), *PREFIXES.values()])
    named = {word.strip(":,;()`") for word in sentences.split() if word.split(".")[0] in sections() and "." in word}
    assert named
    assert named <= fields


def test_a_peers_name_is_never_one_of_ours():
    classes = [*sections().values(), Source, Header, *registry().values()]
    ours = {field for cls in classes for field in cls.model_fields} | set(sections())
    assert not ours & {*FIELDS, *REMARKS}


def test_all_mistakes_are_reported_in_file_order(refused):
    text = """\
        trian: {}
        model: {dtype: fp16}
        data: {train: [{path: d, wight: 1}]}
        stages:
          a: {objective: {name: sft}, train: {seed: -1}, output_dir: x}
          b: {objective: {name: sft}, extends: y}
        """
    assert refused(text) == [
        "r.yaml:1:1: trian: unknown key; did you mean `train`?",
        "r.yaml:2:1: model.path: is required",
        "r.yaml:2:16: model.dtype: must be one of `auto`, `float32` or `bfloat16`, not the string 'fp16'",
        "r.yaml:3:26: data.train.0.wight: unknown key; did you mean `weight`?",
        "r.yaml:5:45: stages.a.train.seed: must be at least 0, not -1",
        "r.yaml:5:50: stages.a.output_dir: unknown key; `output_dir` belongs to the top level of the recipe",
        "r.yaml:6:31: stages.b.extends: unknown key; the keys here are `objective`, `model`, `models`, `data`, "
        "`rollout`, `train`, `engine`, `evaluation`, `checkpoint` and `logging`",
    ]


def test_an_unknown_objective_lists_the_known_ones(refused, sft):
    known = list(registry())
    listed = f"{', '.join(f'`{name}`' for name in known[:-1])} and `{known[-1]}`"
    assert refused(sft.replace("sft", "dpoo")) == [
        f"r.yaml:1:19: objective.name: unknown objective `dpoo`; did you mean `dpo`? The objectives are {listed}"
    ]
    assert refused(sft.replace("sft", "zzzz")) == [
        f"r.yaml:1:19: objective.name: unknown objective `zzzz`; the objectives are {listed}"
    ]
    assert refused(sft.replace("name: sft", "name: [dpo]")) == [
        f"r.yaml:1:19: objective.name: unknown objective `['dpo']`; did you mean `dpo`? The objectives are {listed}"
    ]
    assert refused(sft.replace("name: sft", "beta: 1")) == [
        f"r.yaml:1:1: objective.name: is required; the objectives are {listed}"
    ]
    assert refused(sft.replace("{name: sft}", "dpo"))[0].startswith(
        "r.yaml:1:12: objective: must be a mapping, for example `objective: {name: "
    )


def test_a_field_of_another_objective_says_whose_it_is(refused, sft):
    (line,) = refused(sft.replace("name: sft", "name: sft, label_smoothing: 0.1"))
    assert line == (
        "r.yaml:1:24: objective.label_smoothing: unknown key; "
        "`label_smoothing` is a field of `dpo`, not of `sft`: it has no fields"
    )


def test_hyperparameters_are_as_strict_as_the_rest(refused, sft):
    text = sft.replace("name: sft", 'name: dpo, beta: "0.1"') + "models: {reference: m}\n"
    assert refused(text) == ["r.yaml:1:30: objective.beta: must be a number, not the string '0.1': remove the quotes"]


def test_what_an_objective_refuses_itself_has_a_place(refused, sft):
    text = sft.replace("name: sft", "name: aligndistil, weight: constant")
    text += "models: {teacher: a, reverse_teacher: b}\n"
    assert refused(text)[0].startswith("r.yaml:1:1: objective: weight: constant needs `beta`")


def test_missing_sections_are_named_at_the_stage(refused):
    assert refused("objective: {name: sft}\n") == [
        "r.yaml:1:1: model.path: is required",
        "r.yaml:1:1: data.train: is required",
    ]
    assert refused("model: {path: m}\ndata: {train: {path: d}}\nstages:\n  a: {}\n")[0].startswith(
        "r.yaml:4:3: stages.a.objective.name: is required; the objectives are "
    )


def test_data_that_is_a_string_or_a_stage_is_refused(refused, sft):
    assert refused(sft.replace("{path: d}", "d")) == [
        "r.yaml:3:15: data.train: must be a mapping such as `{path: ...}`, not the string 'd'"
    ]
    assert refused(sft.replace("path: d", 'path: "stage:x"')) == [
        "r.yaml:3:16: data.train.path: a stage's model is not data; name a file, a folder, a Hub id or `builtin:NAME`"
    ]
    assert refused(sft.replace("{path: d}", "[]")) == [
        "r.yaml:3:15: data.train: must be a list of at least 1, not a list of 0"
    ]


def test_a_mistake_in_a_default_is_reported_once_for_all_stages(refused, three_stages):
    assert refused(three_stages.replace("epochs: 2", "epoch: 2")) == [
        "r.yaml:4:67: train.epoch: unknown key; did you mean `epochs`?"
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('name: "\\UFFFFFFFF"\n', "x.yaml: an escape such as \\U names no character of Unicode; write another"),
        ('name: "\\U00110000"\n', "x.yaml: an escape such as \\U names no character of Unicode; write another"),
        ("a: 1\nb: \x01\n", "x.yaml:2:4: this is not valid YAML: unacceptable character"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2:1: this is not valid YAML: expected a single document in the stream, but"),
    ],
)
def test_text_that_is_no_yaml_is_refused_where_it_stands(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "x.yaml")
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        ("{fraction: 1.5}", ["eval.fraction: must be less than 1, not 1.5"]),
        ("{fraction: a}", ["eval.fraction: must be a number, not the string 'a'"]),
        ("{fraction: 0.1, sed: 1}", ["eval.sed: unknown key; did you mean `seed`?"]),
        (
            "{fraction: 0.1, path: x}",
            ["eval.path: unknown key; `path` belongs to `model.path` or `data.train.path`"],
        ),
        ("{}", ["eval.path: is required"]),
        ("{path: x, split: 3}", ["eval.split: must be a string, not 3: put it in quotes"]),
        ("[{path: x, limt: 3}]", ["eval.0.limt: unknown key; did you mean `limit`?"]),
        ("0.1", ["eval: must be a mapping such as `{path: ...}`, not 0.1"]),
    ],
)
def test_evaluation_data_are_sources_or_a_share_and_a_mistake_is_told_about_that_one(refused, sft, value, lines):
    told = refused(sft.replace("{path: d}}", f"{{path: d}}, eval: {value}}}"))
    assert [line.split(": data.", 1)[1] for line in told] == lines
