"""`aligndistil generate`: sample a model's answers to prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from aligndistil.data import Encoder, Record
from aligndistil.data.records import Unusable
from aligndistil.engine.policy import on_device
from aligndistil.errors import UserError
from aligndistil.models import load_model, load_tokenizer, model_hash, shared_vocab, stop_ids
from aligndistil.rollout import LoadedModel, SamplingParams, sample_seed
from aligndistil.run_folder import check_as_trained, section_of

_BATCH = 16


def answers(
    path: str, prompts: Sequence[str], samples: int, seed: int, max_new_tokens: int, temperature: float, top_p: float
) -> Iterator[tuple[str, str, bool]]:
    """(prompt, sampled answer, whether it ended by itself), `samples` for each prompt."""
    check_as_trained(path, model_hash)
    section = section_of(path)
    tokenizer = load_tokenizer(path, section)
    stops = stop_ids(path, section, tokenizer)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    encoder = Encoder(tokenizer, stop_ids=stops, max_prompt_length=2**31, template_kwargs=section.chat_template_kwargs)
    encoded = encoder.encode([Record(prompt, ()) for prompt in repeated])
    if unusable := [one for one in encoded if isinstance(one, Unusable)]:
        raise UserError(f"--prompt: {unusable[0]}")
    ids = [one.rows[0].prompt_ids for one in encoded if not isinstance(one, Unusable)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = on_device(load_model(path, section, trained=False), device).eval()
    loaded = LoadedModel(model, tokenizer, stops, shared_vocab([model], tokenizer), _BATCH)
    seeds = [sample_seed(seed, prompt, k) for prompt in prompts for k in range(samples)]
    drawn = loaded.sample(ids, SamplingParams(max_new_tokens, temperature, top_p), seeds)
    for prompt, text, sample in zip(repeated, loaded.texts(drawn), drawn, strict=True):
        yield prompt, text.strip(), sample.finished
