"""`aligndistil generate`: sample a model's answers to prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from aligndistil.data.encoding import Encoder
from aligndistil.data.records import Record, Unusable
from aligndistil.engine.policy import on_device
from aligndistil.engine.processes import start_processes
from aligndistil.errors import UserError
from aligndistil.evaluation.samples import decode
from aligndistil.models import load_model, load_tokenizer, shared_vocab, stop_ids
from aligndistil.recipe import Model
from aligndistil.rollout import SamplingParams, TransformersRollout, sample_seed


def answers(
    path: str, prompts: Sequence[str], samples: int, seed: int, max_new_tokens: int, temperature: float, top_p: float
) -> Iterator[tuple[str, str, bool]]:
    """(prompt, sampled answer, whether it ended by itself), `samples` for each prompt."""
    section = Model(path=path)
    tokenizer = load_tokenizer(path, section)
    stops = stop_ids(path, section, tokenizer)
    encoder = Encoder(
        tokenizer,
        stop_ids=stops,
        chat_template=tokenizer.chat_template,
        max_prompt_length=2**31,
        max_response_length=max_new_tokens,
    )
    processes = start_processes()
    model = on_device(load_model(path, section, trained=False), processes.device).eval()
    processes.stop()
    vocab = shared_vocab([model], tokenizer)
    rollout = TransformersRollout(lambda: nullcontext(model), stops, tokenizer.pad_token_id, vocab, batch_size=16)
    asked = [prompt for prompt in prompts for _ in range(samples)]
    seeds = [sample_seed(seed, prompt, k) for prompt in prompts for k in range(samples)]
    params = SamplingParams(max_new_tokens, temperature, top_p)
    encoded = encoder.encode([Record(prompt, ()) for prompt in asked])
    if unusable := [one for one in encoded if isinstance(one, Unusable)]:
        raise UserError(f"--prompt: {unusable[0]}")
    ids = [one.rows[0].prompt_ids for one in encoded if not isinstance(one, Unusable)]
    drawn = rollout.generate(ids, params, seeds)
    for prompt, sample in zip(asked, drawn, strict=True):
        yield prompt, decode(tokenizer, [sample])[0], sample.finished
