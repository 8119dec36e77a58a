"""The sections of a recipe. Each may stand above `stages`, as every stage's default, or inside a stage.

Numbers are strict: a quoted number is not a number, and neither is `true`. Null is as good as not writing a field,
but where an objective's field means "none" by it.
A path that starts with `./` or `../` is relative to the recipe file it is written in; any other is relative to the
current folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from aligndistil.objectives import roles

Text: TypeAlias = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Closed and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def refusal(at: str, text: str) -> PydanticCustomError:
    """An error about one field of several that belong together; with an empty `at`, about the value itself."""
    return PydanticCustomError("refused", "{text}", {"at": at, "text": text})


Format: TypeAlias = Literal["auto", "preference", "unpaired", "prompts", "hh", "demonstrations"]

OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate, train.adam_betas and train.weight_decay",
    "scheduler": "train.lr_scheduler",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "zero_optimization.stage": "engine.zero_stage",
}
"""Keys of a DeepSpeed configuration that the recipe decides, and the field that decides them."""


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), which are trained instead of the weights."""

    r: int = Field(default=16, ge=1)
    """The rank of an adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """What adapters add to a layer is multiplied by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is left out while it is trained."""
    target_modules: Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """The layers that are given one, by the end of their names; `all-linear` is all of the body's linear layers."""


class Model(Section):
    """The model that is trained."""

    path: Text
    """A folder, a Hub id (`OWNER/NAME` or `OWNER/NAME@REVISION`), `builtin:NAME`, or `stage:NAME` for the model that
    another stage ends with."""
    revision: Text | None = None
    """Branch, tag or commit of `path` on the Hub, also where the same path stands for another role; null is the default
    branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed in: `auto` is bfloat16 on CUDA, and for models of 512 hidden units or more on a CPU with AMX,
    else float32. What is exported has the dtype that the model came in."""
    attn_implementation: str | None = None
    """`sdpa`, `eager`, `flash_attention_2` ...; null leaves the choice to transformers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: Lora | None = None
    """Train adapters on the model and leave its weights as they are; null trains the weights."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    chat_template: str | None = None
    """A Jinja template, or the path of a file that holds one; null takes the tokenizer's own."""
    chat_template_kwargs: dict[str, JsonValue] = Field(default={})
    """What the chat template is given beside messages and tools, such as `enable_thinking: false`: for training data,
    rollouts and evaluation alike."""


def models_section(roles: Mapping[str, str]) -> type[Section]:
    """The section `models`: its fields are the roles that some registered objective may read, with what each is."""
    fields: dict[str, Any] = {
        role: (Text | None, Field(default=None, description=what)) for role, what in roles.items()
    }
    doc = "The models beside the policy: each a folder, a Hub id, `builtin:NAME` or `stage:NAME`."
    return create_model("Models", __base__=Section, __doc__=doc, **fields)


class Source(Section):
    """Where examples come from."""

    path: Text
    """A local file or folder, a Hub id, or `builtin:NAME`."""
    name: str | None = None
    """The configuration of a Hub data set that has several."""
    split: Text = "train"
    """Which split to read."""
    format: Format = "auto"
    """What a row looks like; `auto` looks at the columns."""
    columns: dict[str, str] = Field(default={})
    """Our column name -> theirs, where they differ."""
    templated: bool = False
    """The text of the rows is final: it has been through a chat template, and is tokenised as it stands."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often an epoch sees this source's examples: 2 is twice, 0.25 is a quarter of them, drawn once by the seed."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many rows, in file order."""

    @model_validator(mode="after")
    def _not_a_stage(self) -> Self:
        if self.path.startswith("stage:"):
            raise refusal("path", "a stage's model is not data; name a file, a folder, a Hub id or `builtin:NAME`")
        return self


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) or value is None else [value]


Sources: TypeAlias = Annotated[list[Source], BeforeValidator(_as_list, json_schema_input_type=Source | list[Source])]


class HeldOut(Section):
    """A share of the training data that is kept out of it, by prompt: no prompt is on both sides."""

    fraction: float = Field(gt=0, lt=1)
    """Of the prompts."""
    seed: int = Field(default=0, ge=0)
    """Which prompts."""


def _kind_of_eval(value: Any) -> str:
    if isinstance(value, Mapping):
        share = "fraction" in value or ("path" not in value and any(key.startswith(("frac", "seed")) for key in value))
    else:
        share = isinstance(value, HeldOut)
    return "<share>" if share else "<sources>"


EvalData: TypeAlias = Annotated[
    Annotated[Sources, Field(min_length=1), Tag("<sources>")] | Annotated[HeldOut, Tag("<share>")],
    Discriminator(_kind_of_eval),
]
KINDS_OF_EVAL: Mapping[str | int, type[Section]] = {"<sources>": Source, "<share>": HeldOut}
"""What pydantic calls the two in the place of an error: no key of a recipe looks like that."""


class Data(Section):
    """What the stage is trained and evaluated on."""

    train: Annotated[Sources, Field(min_length=1)]
    """One source, or a list of them that is mixed by weight."""
    eval: EvalData | None = None
    """One source or a list of them, held out from training; or a share of the training data."""
    reverse_preferences: bool = False
    """Swap chosen and rejected, as a reverse teacher needs: in the training data, and in the eval data while training.
    The final comparison has them the right way round."""
    max_prompt_length: int = Field(default=1024, ge=1)
    """Tokens; a longer prompt keeps its end."""
    max_response_length: int = Field(default=1024, ge=1)
    """Tokens; a longer response keeps its start, and gets no end-of-text token."""
    overlong_prompts: Literal["keep_end", "drop"] = "keep_end"
    """What becomes of a longer prompt: its end is kept, after the system turn, or the row is dropped."""
    workers: int | None = Field(default=None, ge=1)
    """Processes that prepare the data; null is one a processor core. No token depends on it."""
    max_dropped_fraction: float = Field(default=0.05, ge=0, le=1)
    """The run refuses to start when a larger share of the rows cannot be used."""
    on_boundary_mismatch: Literal["error", "shift", "drop"] = "error"
    """When the tokens of the prompt are not the start of the tokens of prompt + response: stop, move the boundary to
    the longest common start, or drop the row."""

    @property
    def held_out(self) -> HeldOut | None:
        """The share of the training data that `eval` is, if it is one."""
        return self.eval if isinstance(self.eval, HeldOut) else None


class Rollout(Section):
    """Responses are sampled from the policy while it trains: the section makes a stage on-policy."""

    engine: Literal["transformers"] = "transformers"
    """What generates."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Longest response."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the sampling; 1 samples from the policy itself. PPO and RTO train the policy at this temperature, AlignDistil
    only learns after other texts; where the method needs samples of the policy itself, others are refused."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability; 1 is all of them, and what every method but
    AlignDistil needs."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses to each prompt in a rollout; they all count in train.batch_size."""
    responses: int | None = Field(default=None, ge=1)
    """Responses of one rollout, over which several optimizer steps are taken; null is train.batch_size, one step."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the responses of a rollout."""
    batch_size: int | None = Field(default=None, ge=1)
    """Rows generated at once on a process; null is as many as a micro-batch has."""


class Train(Section):
    """The optimizer (AdamW), its schedule and the batch."""

    learning_rate: float = Field(default=1e-6, gt=0, le=1e30)
    """Peak, after the warm-up."""
    critic_learning_rate: float | None = Field(default=None, gt=0, le=1e30)
    """The critic's peak, on the same schedule; null is learning_rate."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """What the learning rate does after the warm-up."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """The floor of cosine and linear, as a share of learning_rate."""
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps in which the learning rate rises: of n, the first has 1/n of it and the last all of it."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training data; give this or max_steps."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, instead of epochs."""
    batch_size: int = Field(default=128, ge=1)
    """Examples of one optimizer step over all processes. A pair is one example; on-policy, a response is one."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Examples that one process holds at once, those of similar length together."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Instead of a number of examples: as many as have so many tokens, padding included, or one that is longer."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient is scaled down to this norm."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's two decay rates."""
    seed: int = Field(default=0, ge=0)
    """Of the order of the data and of sampling. (Dropout is off, but for that of adapters.)"""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.max_steps is not None and "epochs" in self.model_fields_set:
            raise refusal("max_steps", "give epochs or max_steps, not both; remove one of them")
        if self.micro_batch_tokens is not None and "micro_batch_size" in self.model_fields_set:
            text = "give micro_batch_size or micro_batch_tokens, not both; remove one of them"
            raise refusal("micro_batch_tokens", text)
        return self


class Engine(Section):
    """DeepSpeed."""

    zero_stage: int = Field(default=2, ge=0, le=3)
    """What is split over processes: nothing, optimizer states, also gradients, also parameters. 0 is 1 in bfloat16."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What is kept in CPU memory: `optimizer` needs a zero_stage above 0; `parameters` needs 3 and moves the optimizer
    too."""
    chunk_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Response tokens projected to the vocabulary at once; `auto` chooses by the vocabulary."""
    compile: Literal["auto", "never", "head", "all"] = "auto"
    """What `torch.compile` makes faster, after some seconds: what happens to logits, or the models' bodies too; `auto`
    is `head` on CUDA and `never` on a CPU."""
    share_prompts: Literal["auto", "never"] = "auto"
    """Read chosen and rejected as one row in which their prompt stands once: `auto` does so where it takes less time
    and the model allows it."""
    teacher_cache: bool = False
    """Keep the last hidden states of an off-policy stage's frozen models on disk, and read them instead of running the
    models: in this run and in every later one with the same models and rows."""
    stop_timeout: float = Field(default=600.0, gt=0)
    """Seconds that `--processes` gives the processes to end their step and save it after a signal, before they are
    killed. A step, with its rollout and an evaluation that is due, must be shorter."""
    timeout_minutes: float = Field(default=60.0, gt=0)
    """How long a process waits for the others before it gives up: longer than any of them may need alone."""
    deepspeed: dict[str, JsonValue] | str | None = None
    """More DeepSpeed configuration, inline or the path of a JSON file; it is merged over ours."""

    @model_validator(mode="after")
    def _owned_keys(self) -> Self:
        if self.offload == "parameters" and self.zero_stage != 3:
            raise refusal("offload", "`parameters` needs engine.zero_stage: 3")
        if self.compile == "all" and self.zero_stage == 3:
            raise refusal("compile", "`all` does not go with zero_stage 3, which splits the models; write `head`")
        if self.offload == "optimizer" and self.zero_stage == 0:
            text = "`optimizer` does nothing at engine.zero_stage 0; write `zero_stage: 1` (or 2, or 3)"
            raise refusal("offload", text)
        if isinstance(self.deepspeed, dict):
            for key, owner in OWNED_DEEPSPEED_KEYS.items():
                section, _, field = key.partition(".")
                inner = self.deepspeed.get(section)
                if section in self.deepspeed and (not field or (isinstance(inner, dict) and field in inner)):
                    raise refusal(f"deepspeed.{key}", f"the recipe decides this; set {owner} instead")
        return self


class Evaluation(Section):
    """The pass over `data.eval`, at the end of the stage and every so many steps."""

    every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; null is only at the end."""
    batch_size: int | None = Field(default=None, ge=1)
    """Examples a process evaluates at once; null is as many as a micro-batch has."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many examples."""
    samples: int = Field(default=0, ge=0)
    """Prompts of the eval data that the policy answers at each evaluation."""
    kl_initial: bool = False
    """Also measure how far the answers are from the model that training began from, which is then kept in memory."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest answer; null is data.max_response_length."""


class Checkpoint(Section):
    """What a stopped run continues from."""

    every: Annotated[int, Field(ge=1)] | Literal["auto", "never"] = "auto"
    """Steps between checkpoints; `auto` saves when twenty times as long as saving takes has passed, at least every ten
    minutes; `never` saves only when the run is told to stop."""
    keep: int = Field(default=2, ge=1)
    """The newest so many stay."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the newest checkpoint of the same stage."""


class Logging(Section):
    """What a run writes while it trains, besides metrics.jsonl."""

    every: int = Field(default=1, ge=1)
    """Steps between lines."""
    trackers: list[Annotated[Text, Field(examples=["tensorboard", "wandb", "trackio", "mlflow"])]] = Field(default=[])
    """Other places the metrics go to: those of this package, and what others bring."""
    samples: int = Field(default=8, ge=0)
    """Sampled responses written at each logged step of an on-policy stage."""


_RENAMED = {
    "reward_accuracy": "rewards/accuracies",
    "length_mean": "completions/mean_length",
    "truncated_fraction": "completions/truncated_fraction",
}
"""Columns that were called otherwise before training logs and reports had one name for one thing."""


def _new_name(column: Any) -> Any:
    if isinstance(column, str) and column in _RENAMED:
        raise refusal("", f"`{column}` is called `{_RENAMED[column]}` now, as in the training log")
    return column


Benchmark: TypeAlias = Literal["alpaca_eval", "mt_bench", "arena_hard", "pairwise"]
"""What a judge can be asked of a recipe's models."""
ReportColumn: TypeAlias = Literal[
    "gold_reward",
    "rewards/accuracies",
    "reward_score",
    "alpaca_eval/lc_win_rate",
    "alpaca_eval/win_rate",
    "alpaca_eval/position_bias",
    "alpaca_eval/repeat_spread",
    "alpaca_eval/length",
    "mt_bench/turn_1",
    "mt_bench/turn_2",
    "mt_bench/average",
    "mt_bench/repeat_spread",
    "arena_hard/win_rate",
    "arena_hard/style_controlled_win_rate",
    "arena_hard/position_bias",
    "arena_hard/repeat_spread",
    "arena_hard/length",
    "pairwise/win_rate",
    "pairwise/tie_rate",
    "pairwise/position_bias",
    "pairwise/repeat_spread",
    "kl_initial",
    "kl",
    "kl_data",
    "kl_initial_data",
    "completions/mean_length",
    "length_characters",
    "completions/truncated_fraction",
    "distinct_1",
    "distinct_2",
    "steps_to_reward",
    "steps",
    "seconds",
    "compute_seconds",
    "tokens_per_second",
    "peak_memory_gib",
]
"""What docs/metrics.md defines of whole models."""


class ReportRow(Section):
    """What tables and pictures call the model of a stage."""

    method: Text
    """Models of the same method share a colour, and a line that joins them in frontier.png."""
    setting: Text | None = None
    """What tells it from others of its method, such as `3 epochs`."""


class Report(Section):
    """The table and the picture at the end of a recipe."""

    kl_to: Text | None = None
    """The model that D_KL(policy || .) is measured against; null is the teacher of the last stage that has one, or else
    the initial model."""
    reward: Text | None = None
    """The model with a scalar head that scores the samples, as text if it has another tokenizer; null is the last stage
    that trains one, or else the reward of the last stage that is given one."""
    samples: int = Field(default=256, ge=1)
    """Prompts each model answers, and responses of the data that divergences are measured on."""
    pairs: int | None = Field(default=None, ge=1)
    """Pairs of the eval data that every model ranks; null is all of them."""
    batch_size: int = Field(default=64, ge=1)
    """Rows generated or scored at once."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest answer; null is data.max_response_length of the stage."""
    seed: int = Field(default=0, ge=0)
    """Of the samples: the same for every model, whatever it was trained with."""
    reward_accuracy: bool = False
    """Also lay the rewards that the models stand for beside each other (scores, DPO rewards, contrastive ones): how
    often each ranks eval pairs right, and as many training pairs."""
    benchmarks: list[Benchmark] = Field(default=[])
    """What the models are judged on too: published benchmarks, and `pairwise`, win rates on the eval prompts against
    the model `against`."""
    judge: Text | None = None
    """Who judges: a JUDGE.yaml, the name of one that comes with the package (`gold` among them), or a reward model."""
    judge_repeats: int = Field(default=2, ge=1)
    """How often the judge is asked everything."""
    against: Text | None = None
    """The model whose answers `pairwise` compares with."""
    benchmark_limit: int | None = Field(default=None, ge=1)
    """Only so many questions of each published benchmark: not comparable with published numbers."""
    benchmark_files: Text | None = None
    """A folder with the benchmarks' files; null fetches them once."""
    allow_contaminated: bool = False
    """Also score models that were trained on the questions, and say so."""
    allow_missing: bool = False
    """Also score without the verdicts that could not be had, and say so."""
    threshold: float | None = None
    """The value that `steps_to_reward` counts the steps to; null is 90 % of the way to the lowest final value."""
    threshold_metric: Text | None = None
    """Of the training log, or of its evaluations as `eval/NAME`; null is `reward/token_mean`, or else a gold reward."""
    rows: dict[str, ReportRow] = Field(default={})
    """By stage, what tables and pictures call its model; the others are called by their objective's method."""
    columns: Annotated[list[Annotated[ReportColumn, BeforeValidator(_new_name)]], Field(min_length=1)] | None = None
    """What the tables show, in this order; null is the usual choice. The .csv and .json always have everything."""

    @model_validator(mode="after")
    def _names_and_columns_once(self) -> Self:
        if self.columns is not None and len(set(self.columns)) < len(self.columns):
            raise refusal("columns", "a column is named twice; remove one of them")
        seen: dict[tuple[str, str | None], str] = {}
        for stage, row in self.rows.items():
            if row.method == "initial":
                raise refusal(f"rows.{stage}.method", "`initial` is the model that training began from; choose another")
            if (other := seen.setdefault((row.method, row.setting), stage)) != stage:
                raise refusal(f"rows.{stage}", f"is called the same as `{other}`; give it another setting")
        return self

    @model_validator(mode="after")
    def _who_judges_what(self) -> Self:
        if len(set(self.benchmarks)) < len(self.benchmarks):
            raise refusal("benchmarks", "a benchmark is named twice; remove one of them")
        if self.benchmarks and self.judge is None:
            raise refusal("benchmarks", "say in `judge` who judges: a JUDGE.yaml, `qwen2.5-72b-instruct` or `gold`")
        if "pairwise" in self.benchmarks and self.against is None:
            raise refusal("benchmarks", "say in `against` whose answers `pairwise` compares with")
        # An empty list is how a recipe leaves out the benchmarks of the one that it extends.
        if self.benchmarks != [] and self.against is not None and "pairwise" not in self.benchmarks:
            raise refusal("against", "only `pairwise` reads this; name it in `benchmarks`, or remove the line")
        if "benchmarks" not in self.model_fields_set:
            read = ["judge", "judge_repeats", "against", "benchmark_limit", "benchmark_files"]
            read += ["allow_contaminated", "allow_missing"]
            for key in read:
                if key in self.model_fields_set:
                    raise refusal(key, "there is nothing to judge; name `benchmarks`, or remove the line")
        return self


class Header(Section):
    """What a recipe says once, for all of its stages."""

    schema_version: int = 1
    """The version of this format."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] | None = None
    """Of the run; null is the name of the recipe file. Not inherited through `extends`."""
    output_dir: Text | None = None
    """The run folder, relative to the current folder; null is `runs/NAME`. Not inherited through `extends`."""
    report: Report = Report()
    """The table and the picture at the end."""

    @model_validator(mode="after")
    def _known_version(self) -> Self:
        if self.schema_version != 1:
            raise refusal("schema_version", f"this aligndistil reads version 1, not {self.schema_version}; upgrade it")
        return self


def sections() -> dict[str, type[Section]]:
    """Every section of a stage but `objective`, whose fields its own class declares."""
    return {
        "model": Model,
        "models": models_section(roles()),
        "data": Data,
        "rollout": Rollout,
        "train": Train,
        "engine": Engine,
        "evaluation": Evaluation,
        "checkpoint": Checkpoint,
        "logging": Logging,
    }
