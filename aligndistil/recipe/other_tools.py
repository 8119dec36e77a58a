"""What other tools call our fields: TRL, transformers, OpenRLHF, LLaMA-Factory, axolotl."""

from __future__ import annotations

NAMES: dict[str, str] = {
    "model.path": "model_name_or_path model_name base_model pretrain",
    "model.revision": "model_revision",
    "model.dtype": "torch_dtype bf16",
    "model.attn_implementation": "flash_attn",
    "models.reference": "ref_model ref_model_name_or_path ref_pretrain reference_model",
    "models.teacher": "teacher_model_name_or_path teacher_model",
    "data.train.path": "dataset_name dataset datasets train_dataset prompt_data",
    "data.train.name": "dataset_config",
    "data.train.split": "dataset_split dataset_train_split",
    "data.eval.split": "dataset_test_split",
    "data.eval.path": "eval_dataset",
    "data.max_prompt_length": "max_prompt_len prompt_max_len",
    "data.max_response_length": "max_completion_length max_target_length max_response_len",
    "objective.name": "loss_type algorithm",
    "rollout.samples_per_prompt": "num_generations n_samples_per_prompt",
    "rollout.max_new_tokens": "generate_max_len",
    "train.learning_rate": "lr",
    "train.lr_scheduler": "lr_scheduler_type scheduler",
    "train.min_lr_ratio": "min_lr",
    "train.epochs": "num_train_epochs num_epochs max_epochs",
    "train.max_steps": "steps num_steps",
    "train.batch_size": "train_batch_size global_batch_size",
    "train.micro_batch_size": "per_device_train_batch_size micro_train_batch_size",
    "train.micro_batch_tokens": "ppo_max_token_len_per_gpu max_tokens_per_microbatch",
    "engine.compile": "torch_compile",
    "evaluation.batch_size": "per_device_eval_batch_size",
    "train.max_grad_norm": "max_norm clip_grad gradient_clipping",
    "train.adam_betas": "adam_beta1 adam_beta2 betas",
    "train.weight_decay": "l2",
    "engine.deepspeed": "ds_config deepspeed_config",
    "evaluation.every": "eval_steps eval_every",
    "checkpoint.every": "save_steps",
    "checkpoint.keep": "save_total_limit",
    "checkpoint.resume": "resume_from_checkpoint",
    "logging.every": "logging_steps",
    "logging.trackers": "report_to",
    "name": "run_name exp_name",
    "output_dir": "save_path out_dir",
}
"""Our path -> their names."""

FIELDS = {name: ours for ours, names in NAMES.items() for name in names.split()}
"""Their name -> our path."""

_LENGTHS = "a prompt and its response are cut separately: set data.max_prompt_length and data.max_response_length"
_LOGGING = "name the trackers in logging.trackers; metrics.jsonl is always written"

REMARKS: dict[str, str] = {
    "gradient_accumulation_steps": "it follows from train.batch_size (global) and train.micro_batch_size "
    "(per process): set those two",
    "max_length": _LENGTHS,
    "max_seq_length": _LENGTHS,
    "max_len": _LENGTHS,
    "cutoff_len": _LENGTHS,
    "sequence_len": _LENGTHS,
    "fp16": "half precision here is bfloat16: set model.dtype",
    "warmup_steps": "the warm-up is a share of the steps: set train.warmup_ratio",
    "optim": "the optimizer is AdamW: set train.learning_rate, train.adam_betas and train.weight_decay",
    "optimizer": "the optimizer is AdamW: set train.learning_rate, train.adam_betas and train.weight_decay",
    "load_in_4bit": "quantized models cannot be trained here: set model.dtype",
    "load_in_8bit": "quantized models cannot be trained here: set model.dtype",
    "packing": "rows of similar length share a micro-batch, by train.micro_batch_size or train.micro_batch_tokens",
    "padding_free": "set model.attn_implementation: flash_attention_2, which is given rows without padding",
    "group_by_length": "rows of similar length always share a micro-batch; remove it",
    "use_liger_kernel": "logits are never held for a whole batch here: engine.chunk_tokens says how many at once",
    "num_processes": "the number of processes is an option of the command: `--processes`",
    "local_rank": "the number of processes is an option of the command: `--processes`",
    "eval_strategy": "set evaluation.every, in steps",
    "save_strategy": "set checkpoint.every, in steps",
    "use_wandb": _LOGGING,
    "use_tensorboard": _LOGGING,
    "defaults": "a recipe has `extends`, and sections above `stages`, instead of Hydra's defaults",
}
"""Their name -> what to do, where no single field of ours is the same thing."""

PREFIXES: dict[str, str] = {
    "lora": "adapters are not supported: all weights are trained",
    "use_lora": "adapters are not supported: all weights are trained",
    "peft": "adapters are not supported: all weights are trained",
    "use_peft": "adapters are not supported: all weights are trained",
    "vllm": "rollout.engine says what generates",
    "use_vllm": "rollout.engine says what generates",
    "wandb": _LOGGING,
}
"""Their names that start so -> what to do."""


def remark_on(key: str) -> str | None:
    """What to write instead of another tool's key, or None for a key that none has."""
    name = key.lower().replace("-", "_")
    if name in FIELDS:
        return f"here it is `{FIELDS[name]}`"
    return REMARKS.get(name) or next((text for prefix, text in PREFIXES.items() if name.startswith(prefix)), None)
