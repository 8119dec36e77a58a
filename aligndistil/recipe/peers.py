"""What other tools call our fields: TRL, transformers, OpenRLHF, LLaMA-Factory, axolotl."""

from __future__ import annotations

_MODEL = "model.path"
_SOURCE = "data.train.path"
_PROMPT = "data.max_prompt_length"
_RESPONSE = "data.max_response_length"

FIELDS: dict[str, str] = {
    "model_name_or_path": _MODEL,
    "model_name": _MODEL,
    "base_model": _MODEL,
    "pretrain": _MODEL,
    "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "flash_attn": "model.attn_implementation",
    "ref_model": "models.reference",
    "ref_model_name_or_path": "models.reference",
    "ref_pretrain": "models.reference",
    "reference_model": "models.reference",
    "teacher_model_name_or_path": "models.teacher",
    "teacher_model": "models.teacher",
    "dataset_name": _SOURCE,
    "dataset": _SOURCE,
    "datasets": _SOURCE,
    "train_dataset": _SOURCE,
    "prompt_data": _SOURCE,
    "dataset_config": "data.train.name",
    "dataset_split": "data.train.split",
    "dataset_train_split": "data.train.split",
    "dataset_test_split": "data.eval.split",
    "eval_dataset": "data.eval.path",
    "max_prompt_len": _PROMPT,
    "prompt_max_len": _PROMPT,
    "max_completion_length": _RESPONSE,
    "max_target_length": _RESPONSE,
    "max_response_len": _RESPONSE,
    "loss_type": "objective.name",
    "algorithm": "objective.name",
    "num_generations": "rollout.samples_per_prompt",
    "n_samples_per_prompt": "rollout.samples_per_prompt",
    "generate_max_len": "rollout.max_new_tokens",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.lr_scheduler",
    "scheduler": "train.lr_scheduler",
    "min_lr": "train.min_lr_ratio",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "steps": "train.max_steps",
    "num_steps": "train.max_steps",
    "train_batch_size": "train.batch_size",
    "global_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "micro_train_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "max_norm": "train.max_grad_norm",
    "clip_grad": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "adam_beta1": "train.adam_betas",
    "adam_beta2": "train.adam_betas",
    "betas": "train.adam_betas",
    "l2": "train.weight_decay",
    "ds_config": "engine.deepspeed",
    "deepspeed_config": "engine.deepspeed",
    "eval_steps": "evaluation.every",
    "eval_every": "evaluation.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "checkpoint.resume",
    "logging_steps": "logging.every",
    "report_to": "logging.trackers",
    "run_name": "name",
    "exp_name": "name",
    "save_path": "output_dir",
    "out_dir": "output_dir",
}
"""Their name -> our path."""

_LENGTHS = f"a prompt and its response are cut separately: set {_PROMPT} and {_RESPONSE}"
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
    """What to write instead of a peer's key, or None for a key that no peer has."""
    name = key.lower().replace("-", "_")
    if name in FIELDS:
        return f"here it is `{FIELDS[name]}`"
    return REMARKS.get(name) or next((text for prefix, text in PREFIXES.items() if name.startswith(prefix)), None)
