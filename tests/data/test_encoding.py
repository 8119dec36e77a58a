"""Token ids: one BOS, one EOS, a boundary on ids, and truncation, for tokenizers of four makes."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken, AutoTokenizer

from aligndistil.batch import DataKind, collate
from aligndistil.data import Encoder, Record, to_records
from aligndistil.data.encoding import NOT_FINAL, _splitting_tokens
from aligndistil.data.records import Unusable
from aligndistil.data.templating import MARKED, REPEATED
from aligndistil.errors import UserError

TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Are you sure?"},
]


def encoder(tokenizer, stops=(), template=None, **options):
    if template is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    stop_ids = frozenset(tokenizer.convert_tokens_to_ids(stop) for stop in stops)
    return Encoder(tokenizer, stop_ids=stop_ids, **options)


def encode(tokenizer, record, stops=(), **options):
    [encoded] = encoder(tokenizer, stops, **options).encode([record])
    return encoded


def texts(tokenizer, record, stops=(), **options):
    [row] = encode(tokenizer, record, stops, **options).rows
    return tokenizer.decode(row.prompt_ids), tokenizer.decode(row.response_ids)


def test_chatml_ends_with_the_end_of_turn_and_not_with_its_line_break(qwen):
    prompt, response = texts(qwen, Record(TURNS, ("Yes, 4.",)))
    assert prompt.endswith("<|im_start|>user\nAre you sure?<|im_end|>\n<|im_start|>assistant\n")
    assert response == "Yes, 4.<|im_end|>"


def test_a_string_prompt_is_the_users_turn_when_there_is_a_template(qwen):
    assert texts(qwen, Record("Hi", ("Yes.",))) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Yes.<|im_end|>",
    )


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("prompt", [TURNS, "What is 2 + 2?"])
def test_there_is_one_bos_though_tokenizer_and_template_both_write_it(request, name, prompt):
    tokenizer = request.getfixturevalue(name)
    [row] = encode(tokenizer, Record(prompt, ("Yes, 4.",))).rows
    assert [*row.prompt_ids, *row.response_ids].count(tokenizer.bos_token_id) == 1
    assert row.prompt_ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id == tokenizer(tokenizer.bos_token)["input_ids"][0]


@pytest.mark.parametrize(
    "text", ["The film was", "<|begin_of_text|>The film was", "<|begin_of_text|>" * 2 + "The film was"]
)
def test_plain_text_gets_the_tokenizers_own_bos_exactly_once(llama, text):
    [row] = encode(llama_without_template(llama), Record(text, (" good.",))).rows
    assert row.prompt_ids.count(llama.bos_token_id) == 1
    assert row.prompt_ids[0] == llama.bos_token_id
    assert llama.decode(row.response_ids) == " good.<|eot_id|>"


def llama_without_template(llama):
    bare = copy.deepcopy(llama)
    bare.chat_template = None
    return bare


def test_no_bos_means_none_in_ids(qwen, plain):
    for tokenizer, prompt in ((qwen, TURNS), (plain, "The film was")):
        assert tokenizer.bos_token_id is None
        [row] = encode(tokenizer, Record(prompt, (" good.",))).rows
        assert all(isinstance(token, int) for token in [*row.prompt_ids, *row.response_ids])


def test_a_template_that_writes_two_bos_tokens_is_refused(llama):
    double = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"opens the row .*Hi' with two BOS tokens"):
        encode(llama, Record("Hi", ("Yes.",)), template=double)


def test_a_bos_in_the_text_of_a_row_is_a_marker_of_the_template(llama):
    text = f"{llama.bos_token}Hi"
    assert str(encode(llama, Record(text, ("Yes.",)))) == f"{MARKED}, {llama.bos_token!r}"
    assert not isinstance(encode(llama_without_template(llama), Record(text, ("Yes.",))), Unusable)


HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"


@pytest.mark.parametrize("bos", ["", "<|begin_of_text|>", "<|begin_of_text|>" * 2])
@pytest.mark.parametrize("end", ["", "<|eot_id|>", "<|eot_id|>\n"])
def test_final_text_is_read_as_it_stands(llama, bos, end):
    """Special tokens are parsed, one BOS and one stop token: the ids are those of the row that was templated."""
    final = HEADER.format("user") + "Are you sure?<|eot_id|>" + HEADER.format("assistant")
    [row] = encode(llama, Record(f"{bos}{final}", (f"Yes, 4.{end}",), templated=True)).rows
    assert (row,) == encode(llama, Record("Are you sure?", ("Yes, 4.",))).rows
    assert str(encode(llama, Record(final, ("Yes, 4.",)))).startswith(MARKED)


def test_final_text_is_text(llama):
    tool = {"type": "function", "function": {"name": "add"}}
    for record in (
        Record(TURNS, ("Yes.",), templated=True),
        Record("Hi", ({"role": "assistant", "content": "Yes.", "reasoning_content": "4."},), templated=True),
        Record("Hi", ("Yes.",), tools=[tool], templated=True),
    ):
        assert str(encode(llama, record)) == NOT_FINAL


QUESTION = "What is two and two?"


@pytest.mark.parametrize(
    ("prompt", "response", "refused"),
    [
        (QUESTION, f"{QUESTION} It is 4.", True),
        (QUESTION, f"\n{QUESTION}", True),
        (f" {QUESTION}\n", f"{QUESTION} It is 4.", True),
        (QUESTION, f"You ask: {QUESTION}", False),
        (QUESTION[1:], f"{QUESTION[1:]} It is 4.", False),  # 19 characters
        (TURNS, "Are you sure? Yes.", False),
        ([{"role": "user", "content": QUESTION}], f"{QUESTION} It is 4.", False),
    ],
)
@pytest.mark.parametrize("chat", [True, False])
def test_an_answer_that_begins_with_its_prompt_is_refused(qwen, plain, prompt, response, refused, chat):
    if not chat and not isinstance(prompt, str):
        return
    for templated in (False, True) if isinstance(prompt, str) else (False,):
        record = Record(prompt, ("No.", response), templated=templated)
        encoded = encode(qwen if chat else plain, record)
        assert (str(encoded) == REPEATED) == refused
        assert isinstance(encoded, Unusable) == refused


@pytest.mark.parametrize(
    ("name", "stops", "end"),
    [
        ("qwen", (), "<|im_end|>"),
        ("llama", (), "<|eot_id|>"),
        ("gemma", ("<end_of_turn>",), "<end_of_turn>"),
    ],
)
def test_a_whole_response_ends_with_the_stop_token_once(request, name, stops, end):
    tokenizer = request.getfixturevalue(name)
    stop = tokenizer.convert_tokens_to_ids(end)
    for response in ("Yes, 4.", f"Yes, 4.{end}", "Yes, 4.\n\n"):
        [row] = encode(tokenizer, Record(TURNS, (response,)), stops).rows
        assert row.response_ids[-1] == stop
        assert row.response_ids.count(stop) == 1


def test_an_end_of_turn_that_is_no_stop_id_is_text_and_the_eos_follows(gemma):
    [row] = encode(gemma, Record(TURNS, ("Yes, 4.",))).rows
    assert row.response_ids[-1] == gemma.eos_token_id
    assert gemma.convert_tokens_to_ids("<end_of_turn>") in row.response_ids
    assert row.response_ids.count(gemma.eos_token_id) == 1


def test_plain_text_gets_the_eos_once(plain):
    for response in (" good.", " good.<|endoftext|>"):
        assert texts(plain, Record("The film was", (response,))) == ("The film was", " good.<|endoftext|>")


def test_eos_is_a_response_token_though_it_is_also_the_padding(llama):
    """Pain 7: with a mask from `ids != pad` the model would never learn to stop."""
    assert llama.pad_token_id == llama.eos_token_id
    rows = encode(llama, Record(TURNS, ("Yes.", "Yes, yes, maybe."))).rows
    batch = collate(rows, DataKind.PAIRS, llama.pad_token_id)
    for b, row in enumerate(rows):
        masked = batch.ids_BT[b][batch.response_BT[b]].tolist()
        assert masked == list(row.response_ids)
        assert masked[-1] == llama.eos_token_id


def test_a_truncated_response_has_no_forged_eos(qwen):
    whole = encode(qwen, Record(TURNS, ("Yes, 4.",)))
    length = len(whole.rows[0].response_ids)
    cut = encode(qwen, Record(TURNS, ("Yes, 4.",)), max_response_length=length - 1)
    assert cut.rows[0].response_ids == whole.rows[0].response_ids[:-1]
    assert (whole.responses_truncated, cut.responses_truncated) == ((False,), (True,))
    assert encode(qwen, Record(TURNS, ("Yes, 4.",)), max_response_length=length) == whole


def test_a_long_prompt_keeps_its_end(qwen):
    whole = encode(qwen, Record(TURNS, ("Yes.",)))
    cut = encode(qwen, Record(TURNS, ("Yes.",)), max_prompt_length=7)
    assert cut.rows[0].prompt_ids == whole.rows[0].prompt_ids[-7:]
    assert (whole.prompt_truncated, cut.prompt_truncated) == (False, True)
    assert cut.rows[0].response_ids == whole.rows[0].response_ids


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_long_prompt_keeps_its_bos_too_when_there_is_room(llama, length):
    whole = encode(llama, Record(TURNS, ("Yes.",))).rows[0].prompt_ids
    cut = encode(llama, Record(TURNS, ("Yes.",)), max_prompt_length=length).rows[0].prompt_ids
    assert cut == (whole[-1:] if length == 1 else [llama.bos_token_id, *whole[len(whole) - length + 1 :]])


def test_a_merge_over_the_boundary_is_found_on_ids_and_shifted(plain):
    """Pain 4: in "the mus" + "ic" the last token of the prompt is another one when the response follows."""
    alone, whole = (plain(text)["input_ids"] for text in ("the mus", "the music"))
    assert whole[: len(alone)] != alone
    encoded = encode(plain, Record("the mus", ("ic", "t")))
    assert encoded.shifted
    assert encoded.rows[0].prompt_ids == encoded.rows[1].prompt_ids
    assert [plain.decode([*row.prompt_ids, *row.response_ids[:-1]]) for row in encoded.rows] == [
        "the music",
        "the must",
    ]
    assert not encode(plain, Record("the music", (" was good",))).shifted


def test_a_template_that_rewrites_history_is_a_mismatch(qwen):
    rewriting = (
        "{% for m in messages %}{% if m.role == 'user' and not loop.last %}(earlier) {% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoded = encode(qwen, Record(TURNS, ("Yes.",)), template=rewriting)
    assert encoded.shifted
    [row] = encoded.rows
    assert qwen.decode(row.prompt_ids).endswith("It is 4.<|im_end|>\n")
    assert qwen.decode(row.response_ids).startswith("(earlier) <|im_start|>user\nAre you sure?")


def test_a_template_without_generation_prompt_leaves_the_header_to_the_response(qwen):
    silent = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    prompt, response = texts(qwen, Record("Hi", ("Yes.",)), template=silent)
    assert (prompt, response) == ("[user]Hi<|im_end|>", "[assistant]Yes.<|im_end|>")


def test_a_conversation_the_template_refuses_is_dropped_with_its_words(gemma):
    refused = encode(gemma, Record([{"role": "system", "content": "Be kind."}, *TURNS], ("Yes.",)))
    assert str(refused) == "the chat template refuses the conversation: System role not supported"


def test_a_template_that_does_not_parse_is_the_users_mistake(qwen):
    with pytest.raises(UserError, match="the chat template does not parse: line 1"):
        encode(qwen, Record(TURNS, ("Yes.",)), template="{% for m in messages %}")


def test_messages_without_a_template_are_refused(plain):
    tool = {"type": "function", "function": {"name": "add"}}
    for record in (Record(TURNS, ("Yes.",)), Record("Hi", ("Yes.",), tools=[tool])):
        with pytest.raises(UserError, match=r"no chat template: set model\.chat_template"):
            encode(plain, record)
    with pytest.raises(UserError, match=r"model\.chat_template_kwargs: the tokenizer has no chat template"):
        encoder(plain, template_kwargs={"enable_thinking": False})


def test_a_tokenizer_without_any_stop_is_refused(plain):
    endless = copy.deepcopy(plain)
    endless.eos_token = None
    with pytest.raises(UserError, match="no response could end"):
        encode(endless, Record("Hi", ("Yes.",)))
    [row] = Encoder(endless, stop_ids=frozenset({7})).encode([Record("Hi", ("Yes.",))])[0].rows
    assert row.response_ids[-1] == 7


def test_a_response_of_nothing_but_stop_tokens_is_empty(qwen):
    assert str(encode(qwen, Record(TURNS, ("<|im_end|>",)))) == "empty response"


def test_answers_that_truncation_makes_equal_are_dropped(qwen):
    same = encode(qwen, Record(TURNS, ("Yes, no.", "Yes, maybe.")), max_response_length=2)
    assert str(same) == "chosen and rejected are the same after truncation"


def test_a_prompt_alone_is_a_row_without_response(llama):
    [row] = encode(llama, Record(TURNS, ())).rows
    assert row.response_ids == []
    assert row.prompt_ids == encode(llama, Record(TURNS, ("Yes.",))).rows[0].prompt_ids


def test_hh_text_reads_the_same_with_the_prompt_said_once(plain):
    """Pain 5: the prompt is not repeated in the response, and only the last answer is one."""
    opening = "\n\nHuman: Can you help?\n\nAssistant: Of course.\n\nHuman: With a poem?\n\nAssistant:"
    row = {"chosen": f"{opening} Gladly.", "rejected": f"{opening} No."}
    [record] = to_records(row, "hh", DataKind.PAIRS, chat=False)
    rows = encode(plain, record).rows
    assert [plain.decode(row.prompt_ids) for row in rows] == [opening, opening]
    assert [plain.decode(row.response_ids) for row in rows] == [" Gladly.<|endoftext|>", " No.<|endoftext|>"]


def test_many_records_give_what_each_gives_alone(qwen):
    records = [Record("Hi", ("Yes.",)), Record("", (" ",)), Record(TURNS, ("a", "b")), Record("Why?", ())]
    one = encoder(qwen)
    assert list(map(repr, one.encode(records))) == [repr(one.encode([record])[0]) for record in records]
    assert one.encode([]) == []


@given(prompt=st.text(min_size=1), response=st.text(min_size=1))
def test_prompt_and_response_together_are_the_rendered_text(qwen, prompt, response):
    encoded = encode(qwen, Record(prompt, (response,)))
    if isinstance(encoded, Unusable):
        return
    [row] = encoded.rows
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    ids = [*row.prompt_ids, *row.response_ids]
    assert ids == qwen(qwen.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"][:-1]


MARKED_TEXT = st.lists(
    st.sampled_from(["<|im_start|>", "<|im_", "end|>", "<bos>", "<start_of_turn>", "<|eot_id|>", "yes", " ", "\n", "▁"])
).map("".join)


@pytest.mark.parametrize("name", ["qwen", "llama", "gemma", "plain"])
@given(prompt=MARKED_TEXT, one=MARKED_TEXT, other=MARKED_TEXT)
def test_what_prompt_and_answers_share_is_tokenised_once_without_a_difference(request, name, prompt, one, other):
    tokenizer = request.getfixturevalue(name)
    once, thrice = encoder(tokenizer, checked=False), encoder(tokenizer, checked=False)
    thrice._splitting = []
    for templated in (False, True):
        record = Record(prompt, (one, other), templated=templated)
        assert repr(once.encode([record])) == repr(thrice.encode([record]))


def test_a_long_prompt_reaches_the_tokenizer_once(qwen):
    seen = []

    class Counting(type(qwen)):
        def __call__(self, text, **options):
            seen.extend(text if isinstance(text, list) else [text])
            return super().__call__(text, **options)

    counting = Counting(tokenizer_object=qwen.backend_tokenizer, **qwen.special_tokens_map)
    counting.chat_template = qwen.chat_template
    [encoded] = encoder(counting).encode([Record("Is the film good?", ("Yes.", "No."))])
    assert len(encoded.rows) == 2
    assert sum("film" in text for text in seen) == 1


@pytest.mark.parametrize(
    ("options", "splits"),
    [
        ({}, True),
        ({"lstrip": True}, False),
        ({"rstrip": True}, True),
        ({"single_word": True}, False),
        ({"normalized": True}, False),
    ],
)
def test_a_token_that_depends_on_what_stands_before_it_splits_nothing(plain, options, splits):
    tokenizer = copy.deepcopy(plain)
    tokenizer.add_tokens([AddedToken("<turn>", **{"normalized": False, **options})])
    assert ("<turn>" in _splitting_tokens(tokenizer)) is splits


def test_a_token_that_another_may_overlap_splits_nothing(plain):
    tokenizer = copy.deepcopy(plain)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("[a]", "[[a]", "x(", "(y)", "{z}", "##")])
    assert _splitting_tokens(tokenizer) == ["<|endoftext|>", "[[a]", "x(", "{z}"]


def test_the_fingerprint_covers_tokenizer_template_stops_and_lengths(qwen, llama):
    prints = [
        encoder(qwen).fingerprint(),
        encoder(llama).fingerprint(),
        encoder(qwen, template="{{ messages[0].content }}").fingerprint(),
        encoder(qwen, ("<|endoftext|>",)).fingerprint(),
        encoder(qwen, max_prompt_length=5).fingerprint(),
        encoder(qwen, max_response_length=5).fingerprint(),
    ]
    assert len(set(prints)) == len(prints)
    assert encoder(qwen).fingerprint() == prints[0]
    qwen("padded", padding="max_length", truncation=True, max_length=8)
    assert encoder(qwen).fingerprint() == prints[0]


def test_a_finished_conversation_that_leaves_the_prompt_inside_a_marker_is_tokenised_as_it_is(plain):
    tokenizer = copy.deepcopy(plain)
    tokenizer.add_tokens([AddedToken("<turn>", normalized=False)])
    answered = "{% if add_generation_prompt %}<turn>{% else %}<turned>{{ messages[-1].content }}{% endif %}"
    template = "{{ messages[0].content }}" + answered
    [encoded] = encoder(tokenizer, template=template, checked=False).encode([Record("good", ("yes",))])
    [row] = encoded.rows
    whole = tokenizer("good<turned>yes", add_special_tokens=False)["input_ids"]
    assert [*row.prompt_ids, *row.response_ids][: len(whole)] == whole


def test_the_boundary_is_that_of_the_answer_that_shares_less(plain):
    """A merge with the first answer moves it for both, and so does one with the second."""
    for responses in ((" film", "!"), ("!", " film")):
        [encoded] = encoder(plain).encode([Record("a good", responses)])
        assert encoded.rows[0].prompt_ids == encoded.rows[1].prompt_ids
        for row, response in zip(encoded.rows, responses, strict=True):
            assert plain.decode([*row.prompt_ids, *row.response_ids]) == f"a good{response}<|endoftext|>"


def test_options_of_a_tokenizer_are_part_of_the_fingerprint_and_where_it_lies_is_not(qwen, tmp_path):
    before = encoder(qwen).fingerprint()
    for folder in ("one", "two"):
        qwen.save_pretrained(tmp_path / folder)
        loaded = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert encoder(loaded).fingerprint() == encoder(AutoTokenizer.from_pretrained(tmp_path / "one")).fingerprint()
    other = copy.deepcopy(qwen)
    other.pad_token = "<|im_start|>"
    assert encoder(other).fingerprint() != before
    other = copy.deepcopy(qwen)
    other.split_special_tokens = True
    assert encoder(other).fingerprint() != before


@pytest.mark.parametrize("after", ["<|im_start|>assistant\n", "Extra text", "<|im_end|>\n<|im_end|>"])
def test_what_a_template_writes_after_the_end_of_the_answer_is_not_the_answers(qwen, after):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}" + after + "{% endif %}"
    )
    [row] = encode(qwen, Record("Is it?", ("Yes.",)), template=template).rows
    assert qwen.decode(row.response_ids) == "Yes.<|im_end|>"
