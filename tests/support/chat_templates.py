"""Miniatures of our own of the chat templates of eight model families, each with a tokenizer that has its markers.

Each does what its family's template does that matters here (a default system prompt, a date, trimmed content, an empty
thought, an opened `<think>`, no system role, tools), in our words.
"""

from dataclasses import dataclass, field
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from aligndistil.data import Encoder

CHATML_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML_OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

# A default system turn, into which tools go; calls and their answers in tags.
QWEN25 = (
    "{%- set given = messages[0].content if messages[0].role == 'system' else 'You are Miniature.' -%}"
    "{{ '<|im_start|>system\n' + given }}{% if tools %}{{ '\n# Tools\n' }}{% for t in tools %}{{ t | tojson }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{%- for m in (messages[1:] if messages[0].role == 'system' else messages) -%}"
    "{%- if m.role == 'tool' -%}{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}"
    "{%- else -%}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{%- for c in m.tool_calls or [] -%}{{ '<tool_call>' + c.function.name + ' ' + c.function.arguments | tojson }}"
    "{%- endfor -%}{{ '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
# Reasoning of earlier turns is dropped, the last answer always has a thought, and the prompt one if thinking is off.
QWEN3 = (
    "{%- set ns = namespace(last=0) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' -%}"
    "{%- set text, thought = m.content, m.reasoning_content or '' -%}"
    "{%- if not thought and '</think>' in text -%}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1] -%}"
    "{%- set text = text.split('</think>')[-1] -%}{%- endif -%}"
    "{%- if loop.index0 > ns.last -%}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif -%}"
    "{{ text.lstrip('\n') }}"
    "{%- else -%}{{ m.content }}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{%- endif -%}"
)
# BOS, a system turn with a date in every conversation, trimmed content, tools in the system turn, answers as JSON.
LLAMA3 = (
    "{{- bos_token }}"
    "{%- if not date_string is defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}"
    "{%- set given = messages[0].content | trim if messages[0].role == 'system' else '' -%}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '\n\n' }}"
    "{%- for t in tools or [] -%}{{ t | tojson }}{{ '\n\n' }}{%- endfor -%}{{ given + '<|eot_id|>' }}"
    "{%- for m in (messages[1:] if given else messages) -%}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{%- if m.tool_calls -%}{%- for c in m.tool_calls -%}{{ c.function | tojson }}{%- endfor -%}"
    "{%- elif m.role == 'tool' -%}{{ m.content | tojson }}"
    "{%- else -%}{{ m.content | trim }}{%- endif -%}{{ '<|eot_id|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)
# The system's words go into the first user's turn; roles must alternate; the assistant is the model.
GEMMA3 = (
    "{{ bos_token }}{%- set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' -%}"
    "{%- set turns = messages[1:] if first else messages -%}"
    "{%- for m in turns -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('the turns must alternate') }}{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}"
    "{{ m.content | trim }}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
# No generation prompt, spaces after the markers, a system turn is refused, tools before the last question.
MISTRAL = (
    "{{ bos_token }}{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{%- if tools and loop.last -%}{{ '[AVAILABLE_TOOLS] ' + tools | tojson }}{%- endif -%}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{%- elif m.role == 'assistant' -%}{{ ' ' + m.content | trim + eos_token }}"
    "{%- else -%}{{ raise_exception('only user and assistant roles') }}{%- endif -%}{%- endfor -%}"
)
# A whole conversation ends with the end of the turn, a line break, and the end of the text.
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are small.<|im_end|>\n' }}{% endif %}"
    f"{CHATML_TURN.replace(chr(10), '{{ chr }}')}{{% endfor %}}{CHATML_OPENING}"
).replace("{{ chr }}", "{{ '\n' }}")
# Full-width markers, the reasoning of every answer is dropped, and the prompt opens a thought that answers have not.
# The arguments of a call are written as they are, so they must be text.
R1 = (
    "{{ bos_token }}{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{{ '<｜User｜>' + m.content }}"
    "{%- elif m.tool_calls -%}"
    "{%- for c in m.tool_calls -%}{{ '<｜Call｜>' + c.function.name + c.function.arguments + eos_token }}{%- endfor -%}"
    "{%- elif m.role == 'assistant' -%}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}"
    "{%- else -%}{{ m.content }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<｜Assistant｜><think>\n' }}{%- endif -%}"
)
# Whoever answers thinks: prompts and answers both open the thought (Qwen3-Thinking).
ALWAYS = QWEN3.replace(
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}",
    "{{ '<think>\n' }}",
)
# A thought that the prompt opens with a line break and an answer without reasoning closes at once (Nemotron 3).
TIGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think></think>' if '<think>' not in m.content else '' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{{ '<think></think>' if enable_thinking is false else '<think>\n' }}{% endif %}"
)
# Thinking is asked for in the system turn, and off unless it is (Gemma 4).
ASKED = (
    "{% if enable_thinking %}{{ '<|im_start|>system\nThink.<|im_end|>\n' }}{% endif %}"
    f"{{% for m in messages %}}{CHATML_TURN}{{% endfor %}}{CHATML_OPENING}"
)


@dataclass(frozen=True)
class Family:
    template: str
    specials: list[str]
    eos: str
    bos: str | None = None
    stops: list[str] = field(default_factory=list)

    def tokenizer(self) -> Any:
        """Bytes, line breaks in twos, and the special tokens; it adds the BOS as those of Llama, Gemma, Mistral do."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [*alphabet, "ĊĊ"]
        tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, [("Ċ", "Ċ")]))
        # Line breaks stay apart from the word that follows, as for Qwen and Llama 3.
        words_and_breaks = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+|\S+"), "isolated")
        in_bytes = pre_tokenizers.ByteLevel(False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words_and_breaks, in_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(self.specials)
        if self.bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, tokenizer.token_to_id(self.bos))]
            )
        names = {"eos_token": self.eos, "chat_template": self.template} | ({"bos_token": self.bos} if self.bos else {})
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=self.specials, **names)

    def encoder(self, **options: Any) -> Encoder:
        tokenizer = self.tokenizer()
        return Encoder(tokenizer, stop_ids=frozenset(map(tokenizer.convert_tokens_to_ids, self.stops)), **options)


CHATML_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_SPECIALS = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
GEMMA_SPECIALS = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
R1_SPECIALS = ["<｜begin｜>", "<｜end｜>", "<｜User｜>", "<｜Assistant｜>"]
FAMILIES = {
    "qwen2.5": Family(QWEN25, CHATML_SPECIALS, "<|im_end|>", stops=["<|endoftext|>"]),
    "qwen3": Family(QWEN3, CHATML_SPECIALS, "<|im_end|>", stops=["<|endoftext|>"]),
    "always": Family(ALWAYS, CHATML_SPECIALS, "<|im_end|>"),
    "tight": Family(TIGHT, CHATML_SPECIALS, "<|im_end|>"),
    "asked": Family(ASKED, CHATML_SPECIALS, "<|im_end|>"),
    "llama3": Family(LLAMA3, LLAMA_SPECIALS, "<|eot_id|>", "<|begin_of_text|>"),
    "gemma3": Family(GEMMA3, GEMMA_SPECIALS, "<eos>", "<bos>", ["<end_of_turn>"]),
    "mistral": Family(MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]"], "</s>", "<s>"),
    "phi": Family(PHI, ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"], "<|endoftext|>", stops=["<|end|>"]),
    "smollm2": Family(SMOLLM2, CHATML_SPECIALS, "<|im_end|>"),
    "r1": Family(R1, R1_SPECIALS, "<｜end｜>", "<｜begin｜>"),
}
