"""Build a tiny model of every causal-LM family of the installed transformers, compare what is trained with the model's
own numbers, and write docs/families.md.

    python scripts/families.py                      # all that are not in the results yet, then the page
    python scripts/families.py llama qwen3          # these again

Every family runs in a process of its own, with a time limit: a crash of one is a line of the table. The results are
kept in runs/families.jsonl, where a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from aligndistil import recipe
from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.divergence import LogProbability
from aligndistil.engine.policy import Policy
from aligndistil.engine.trained import import_deepspeed
from aligndistil.errors import UserError
from aligndistil.models import load_model
from aligndistil.rollout.sampling import SeededSampling

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"
VOCAB, PAD, EOS = 96, 0, 1
LIMITS = {"logp": 1e-4, "gradient": 1e-3, "rollout": 2e-3}
"""Nats a token, share of the largest gradient, nats a token: within them a family is exact."""
MOST_PARAMETERS = 100_000_000

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("attention_hidden_size", "word_embed_proj_dim", "input_embedding_size", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner", "d_inner", "dff"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "dim_ff", "feed_forward_size"), 64),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "output_embedding_size", "router_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 4),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "kv_channels", "attention_head_size", "d_head", "dim_head"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "attention_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("qk_head_dim",), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "laurel_rank", "gated_norm_rank"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "o_groups"), 2),
    "index_n_heads": 16,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size", "attention_chunk_size", "index_topk"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "rotary_dim"), 4),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "sliding_window_size"), 4),
    **dict.fromkeys(("local_attention", "keep_window_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "context_length", "max_seq_len"), 128),
    **dict.fromkeys(("model_max_length", "max_source_positions", "max_target_positions"), 128),
    **dict.fromkeys(("vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"), VOCAB),
    "vocab_size": VOCAB,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "query_pre_attn_scalar": 8,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
"""Of any family that has the field."""

LINEAR_AND_FULL = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
LINEAR_AND_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": LINEAR_AND_FULL},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cwm": {"bos_token_id": 2},
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2, "num_hidden_layers": 6},
    "falcon_h1": {"lm_head_multiplier": 0.0390625, "mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite": {"logits_scaling": 3.0},
    "granitemoehybrid": {"layer_types": LINEAR_AND_FULL},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": LINEAR_AND_FULL},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "modernbert-decoder": {"bos_token_id": 2, "cls_token_id": 2, "sep_token_id": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"] * 4},
    "whisper": {"begin_suppress_tokens": None, "decoder_start_token_id": 2},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": LINEAR_AND_HYBRID, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        "layers_block_type": LINEAR_AND_HYBRID,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 8,
        "hybrid_layer_ids": [1, 3],
    },
    "zaya": {"layer_types": ["hybrid"] * 4, "num_experts_per_tok": 1},
}
"""What a family needs beside it."""


def tiny(family: str) -> PreTrainedModel:
    """A model of 30,000 or so random weights whose distributions are far from uniform. Composite families are built
    from their text configuration.
    """
    default = CONFIG_MAPPING[family]().get_text_config()
    known = {*default.to_dict(), "pad_token_id", "eos_token_id", "bos_token_id"}
    given = {key: value for key, value in SIZES.items() if key in known}
    if "kv_lora_rank" in known:  # its keys are compressed, not shared
        given["num_key_value_heads"] = given["num_attention_heads"]
    config = type(default)(**given | OWN.get(family, {}))
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters, which is not tiny")
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (head := model.get_output_embeddings()) is not None:
        with torch.no_grad():
            head.weight.copy_(0.5 * torch.randn(head.weight.shape))
    model.config.use_cache = False
    return model.eval()


def ragged_rows(count: int, seed: int = 0) -> list[Row]:
    """Of 2 to 9 prompt and 3 to 14 response tokens."""
    draw = random.Random(seed)

    def words(shortest: int, longest: int) -> list[int]:
        return [draw.randrange(5, VOCAB) for _ in range(draw.randint(shortest, longest))]

    return [Row(words(2, 9), [*words(2, 13), EOS]) for _ in range(count)]


def read(policy: Policy, batch: Batch) -> Tensor:
    """(B, T) log-probabilities of the response tokens, as they are trained."""
    return policy(batch, LogProbability(), {})["logp"]


def own_log_probabilities(model: PreTrainedModel, row: Row) -> Tensor:
    """(n,) of the response tokens of a row that is alone, from the model's own logits."""
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1, :VOCAB].float()
    picked = logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    return picked[len(row.prompt_ids) - 1 :]


def gradients(model: PreTrainedModel, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compared(model: PreTrainedModel) -> dict[str, float]:
    """Largest differences between a padded batch, read in chunks, and the model's own logits of each row alone."""
    rows = ragged_rows(4)
    batch, policy = collate(rows, DataKind.RESPONSES, PAD), Policy(model, VOCAB, 7)
    ours_BT = read(policy, batch)
    own = torch.cat([own_log_probabilities(model, row) for row in rows])
    logp = float((ours_BT[batch.response_BT] - own).detach().abs().max())
    found, expected = gradients(model, ours_BT.sum()), gradients(model, own.sum())
    largest = max(float(value.abs().max()) for value in expected.values())
    missing = torch.zeros(())
    error = max(
        float((found.get(name, missing) - expected.get(name, missing)).abs().max()) for name in found | expected
    )
    return {"logp": logp, "gradient": error / largest}


@torch.no_grad()
def rollout_difference(model: PreTrainedModel, new_tokens: int = 12) -> float:
    """Largest difference between what generation (a cache, left padding) gave its tokens and what is trained."""
    prompts = [row.prompt_ids for row in ragged_rows(4, seed=1)]
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=PAD, use_cache=True)
    settings.output_logits, settings.return_dict_in_generate = True, True
    model.generation_config = GenerationConfig()
    output = model.generate(
        ids,
        attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        generation_config=settings,
        logits_processor=LogitsProcessorList([SeededSampling([0, 1, 2, 3], new_tokens, model.device)]),
    )
    sampled = output.sequences[:, width:]
    logits = torch.stack(output.logits, 1)[..., :VOCAB].float()
    given = logits.log_softmax(-1).gather(-1, sampled[..., None]).squeeze(-1)
    rows = [Row(prompt, response) for prompt, response in zip(prompts, sampled.tolist(), strict=True)]
    batch = collate(rows, DataKind.RESPONSES, PAD)
    trained = read(Policy(model, VOCAB, 7), batch)[batch.response_BT]
    return float((trained - given.flatten()).abs().max())


@torch.no_grad()
def repeats(model: PreTrainedModel) -> bool:
    """Whether two passes in training mode agree."""
    policy, batch = Policy(model, VOCAB, 7).train(), collate(ragged_rows(4), DataKind.RESPONSES, PAD)
    first, second = read(policy, batch), read(policy, batch)
    model.eval()
    return torch.allclose(first, second, rtol=0, atol=1e-4)


def result_of(family: str) -> dict[str, Any]:
    result: dict[str, Any] = {"family": family}
    step = "built"
    try:
        model = tiny(family)
        result["class"] = type(model).__name__
        step = "saved and loaded"
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = load_model(folder, recipe.Model(path=folder, dtype="float32"), trained=True)
        step = "read"
        result |= compared(model)
        step = "trained twice alike"
        result["random"] = not repeats(model)
        step = "sampled from"
        result["rollout"] = rollout_difference(model)
    except UserError as error:
        text = str(error).split(f"({result['class']}) ")[-1].split("; use a causal")[0]
        result["refused"] = text
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        result["failed"] = f"cannot be {step}: {type(error).__name__}: {first[:200]}"
    return result


def in_a_process(family: str, seconds: float) -> dict[str, Any]:
    """The result of a family, or that it crashed or was too slow."""

    def work(end: Connection) -> None:
        warnings.simplefilter("ignore")
        transformers.utils.logging.set_verbosity_error()
        end.send(result_of(family))

    context = multiprocessing.get_context("fork")  # what is imported is imported once
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs,))
    process.start()
    theirs.close()
    try:
        return (
            ours.recv() if ours.poll(seconds) else {"family": family, "failed": f"took more than {seconds:g} seconds"}
        )
    except EOFError:
        process.join()
        return {"family": family, "failed": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def verdict(result: dict[str, Any]) -> str:
    for word in ("failed", "refused"):
        if word in result:
            return f"{word}: {result[word]}"
    wrong = [name for name, limit in LIMITS.items() if not result[name] <= limit]
    if wrong == ["rollout"]:
        return "training exact; generation with a cache disagrees"
    return "**wrong**: " + ", ".join(wrong) if wrong else "exact"


def page(results: Sequence[dict[str, Any]]) -> str:
    verdicts = [verdict(result) for result in results]
    count = {word: sum(one.startswith(word) for one in verdicts) for word in ("exact", "training", "refused", "failed")}
    within = f"{LIMITS['logp']:g} nats, {LIMITS['gradient']:g} and {LIMITS['rollout']:g} nats"
    text = f"""\
# Model families

A tiny model of each of the {len(results)} causal-LM families of transformers {transformers.__version__} was built from
its configuration (a composite one from that of its text model), in float32. Written by
`python scripts/families.py`; each number is the largest difference.

* *Log-probabilities*: of the tokens of a padded batch, as they are trained, against log_softmax of
  the model's own logits of each row alone; nats a token.
* *Gradients*: of their sum, in all weights; as a share of the largest.
* *Rollout*: what generation gave each token that it sampled, with a cache and left padding, against
  what training gives it; nats a token.
* *Noise*: training mode draws random numbers. It is switched off, and a warning says so.

**Exact** are {count["exact"]} (within {within}). {count["training"]} more train on exact numbers, but what
transformers generates with a cache is not what it computes without; such a model is for off-policy
stages. {count["refused"]} are refused before anything is trained, for the reason that is given.
{count["failed"]} could not be built tiny, or run, by transformers alone.

| family | class | log-probabilities | gradients | rollout | noise | |
|---|---|---:|---:|---:|---|---|
"""
    lines = []
    for result, said in zip(results, verdicts, strict=True):
        numbers = [f"{result[name]:.0e}" if name in result else "" for name in LIMITS]
        noise = "yes" if result.get("random") else ""
        said = said.replace("|", "\\|")
        lines.append(f"| {result['family']} | {result.get('class', '')} | {' | '.join(numbers)} | {noise} | {said} |")
    return text + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="measured again; without any, all that have no result yet")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "families.jsonl")
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit of a family")
    given = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_deepspeed()  # once, and not in the process of each family
    given.results.parent.mkdir(parents=True, exist_ok=True)
    lines = given.results.read_text().splitlines() if given.results.exists() else []
    known = {result["family"]: result for result in map(json.loads, lines)}
    for family in given.families or [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in known]:
        known[family] = in_a_process(family, given.seconds)
        print(f"{family}: {verdict(known[family])}", flush=True)
        with given.results.open("a") as file:
            file.write(json.dumps(known[family]) + "\n")
    results = [known[name] for name in sorted(known)]
    PAGE.write_text(page(results))
    raise SystemExit(any(verdict(result).startswith("**wrong**") for result in results))


if __name__ == "__main__":
    main()
