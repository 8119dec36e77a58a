"""The review grammar: deterministic, varied, balanced, and with a gold reward that is known exactly."""

import gzip
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from statistics import correlation, mean

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import aligndistil
from aligndistil.data import reviews
from aligndistil.data.reviews import SENTIMENT, generate, gold_reward, gold_rewards

ASSETS = Path(aligndistil.__file__).parent / "assets"
CORPUS = generate(seed=7, n=4000)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_the_same_seed_gives_the_same_reviews_and_a_longer_run_begins_with_them() -> None:
    assert generate(seed=7, n=50) == CORPUS[:50]
    assert generate(seed=8, n=50) != CORPUS[:50]


def test_the_reviews_of_a_seed_never_change() -> None:
    # The shipped model and pairs were made of this grammar: whoever changes it rebuilds the assets, and this line.
    assert generate(seed=0, n=2)[1] == {
        "prompt": "Summarise The Salt Door from 2010 for a newspaper. Keep to three sentences.",
        "response": "The Salt Door follows a detective who sells the family farm in Quebec. "
        "Karin Alvarez plays a gardener and Anna Jensen plays a pilot. In the end, it soars.",
    }


def test_the_language_has_several_hundred_words_in_thousands_of_different_prompts_and_reviews() -> None:
    used = {word for row in CORPUS for word in words_of(row["prompt"] + " " + row["response"])}
    assert 400 <= len(used) <= 600
    assert len({row["prompt"] for row in CORPUS}) > 3500
    assert len({row["response"] for row in CORPUS}) > 3900


def test_positive_negative_and_mixed_reviews_balance_out() -> None:
    golds = gold_rewards(row["response"] for row in CORPUS)
    assert abs(mean(golds)) < 0.05
    for low, high in ((-1.01, -0.4), (-0.2, 0.2), (0.4, 1.01)):
        assert sum(low < gold < high for gold in golds) > len(golds) / 10


def test_the_gold_reward_is_blind_to_length() -> None:
    lengths = [float(len(row["response"].split())) for row in CORPUS]
    assert abs(correlation(gold_rewards(row["response"] for row in CORPUS), lengths)) < 0.05
    text = CORPUS[0]["response"]
    assert gold_reward(text + " " + text) == gold_reward(text)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("", 0.0),
        ("It follows a sailor who builds a boat in Oslo.", 0.0),
        ("What a BRILLIANT film!", 1.0),
        ("The plot felt weak, yet I 'loved' the music.", (-0.5 + 1.0) / 2),
        ("A good, solid bore.", (0.5 + 0.5 - 0.5) / 3),
        ("brilliantly made, unbrilliant", 1.0),
    ],
)
def test_the_gold_reward_is_the_mean_sentiment_of_the_opinion_words(text: str, gold: float) -> None:
    assert gold_reward(text) == pytest.approx(gold)


def test_every_review_has_an_opinion() -> None:
    assert all(SENTIMENT.keys() & words_of(row["response"]) for row in CORPUS)


def test_an_opinion_word_has_one_sentiment_and_no_other_use() -> None:
    levels = [level.split() for slot in reviews._OPINIONS.values() for level in slot]
    scores: dict[str, set[int]] = {}
    for index, level in enumerate(levels):
        for word in level:
            scores.setdefault(word, set()).add(index % 4)
    assert all(len(found) == 1 for found in scores.values())
    forms = [
        *reviews._PROMPTS, *reviews._REQUESTS, *reviews._OPENINGS, *reviews._OPINION_FORMS, *reviews._CONTRAST_FORMS,
        *reviews._NEUTRAL_FORMS, *reviews._CLOSINGS,
    ]  # fmt: skip
    facts = [*reviews._FACTS.values(), reviews._TITLE_ADJ, reviews._TITLE_NOUN, reviews._FIRST, reviews._LAST]
    neutral = words_of(" ".join([re.sub(r"\{~?\w+\}", "", form) for form in forms] + facts))
    assert not SENTIMENT.keys() & set(neutral)


def test_nothing_is_negated() -> None:
    negations = {"not", "no", "never", "nothing", "hardly", "without", "nor", "neither", "barely", "t"}
    assert not any(negations & set(words_of(row["response"])) for row in CORPUS)


def test_a_review_repeats_the_title_and_keeps_to_the_number_of_sentences_asked_for() -> None:
    numbers = {"two": 2, "three": 3, "four": 4, "five": 5}
    asked = 0
    for row in CORPUS:
        if match := re.search(r"(two|three|four|five) sentences", row["prompt"]):
            asked += 1
            assert len(re.findall(r"[.!]", row["response"])) == numbers[match[1]]
        titles = re.findall(r"The [A-Z]\w+ [A-Z]\w+", row["response"])
        assert all(title in row["prompt"] for title in titles)
    assert asked > len(CORPUS) / 2


def test_sentences_are_clean_english_text() -> None:
    for row in CORPUS:
        text = row["prompt"] + " " + row["response"]
        assert not re.search(r"[{}~|]|  |\ba [aeiou]|\ban (?!hour)[^aeiou]", text)
        assert all(sentence[0].isupper() for sentence in re.split(r"(?<=[.!?]) ", text))


def test_no_sentence_form_occurs_twice_in_a_review() -> None:
    for row in CORPUS[:500]:
        sentences = re.split(r"(?<=[.!]) ", row["response"])
        assert all(first != second for first, second in pairwise(sentences))


def pairs_of(split: str) -> list[dict[str, str]]:
    with gzip.open(ASSETS / "reviews" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_the_embedded_default_is_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 6e6


def test_the_embedded_pairs_differ_and_no_prompt_is_in_both_splits() -> None:
    train, test = pairs_of("train"), pairs_of("test")
    prompts = [pair["prompt"] for pair in train + test]
    assert (len(train), len(test), len(set(prompts))) == (1500, 256, len(prompts))
    assert all(pair["chosen"] != pair["rejected"] for pair in train + test)


def test_the_embedded_pairs_follow_the_gold_reward_with_noise() -> None:
    for split in ("train", "test"):
        pairs = pairs_of(split)
        golds = [(gold_reward(pair["chosen"]), gold_reward(pair["rejected"])) for pair in pairs]
        right = [chosen > rejected for chosen, rejected in golds if chosen != rejected]
        expected = mean(1 / (1 + math.exp(-4 * abs(c - r))) for c, r in golds if c != r)
        # Three standard deviations of the share of right labels.
        assert abs(mean(right) - expected) < 3 * math.sqrt(expected * (1 - expected) / len(right))


def test_the_embedded_tokenizer_returns_any_text_and_knows_the_chat() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    for text in (CORPUS[0]["response"], CORPUS[1]["prompt"], "Hello, wörld!  two  spaces\n\nin 1994.\t ok  "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turns = [("system", "Be brief."), ("user", "Hi."), ("assistant", "Yes?"), ("user", "Well.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be brief.<|user|>Hi.<|assistant|>Yes?<|end|><|user|>Well.<|assistant|>"
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_embedded_model_answers_about_the_film_it_is_asked_about() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny")
    chat = [{"role": "user", "content": "Tell me about The Iron Garden, a western from 1961. Use three sentences."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=96)[0, inputs["input_ids"].shape[1] :]
    assert ids[-1] == tokenizer.eos_token_id
    assert "The Iron Garden" in tokenizer.decode(ids)
