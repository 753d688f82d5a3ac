"""Chat templates of model families as their public tokenizer configs have them, and what they render."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from tests.tiny import causal_tokenizer


@dataclass(frozen=True)
class Template:
    """A family's template.

    Attributes:
        text: In Jinja.
        specials: The special tokens of its tokenizer.
        system: What is rendered before and after a soft prompt that is the system message, for a user's "It was good";
            None where the template refuses it.
        user: The same for a soft prompt before the user's text.
    """

    text: str
    specials: tuple[str, ...]
    system: tuple[str, str] | None
    user: tuple[str, str]


def tokenizer_of(template: Template) -> PreTrainedTokenizerFast:
    """A tiny tokenizer with a family's template and special tokens; the first of them starts a text."""
    tokenizer = causal_tokenizer()
    tokenizer.add_tokens(list(template.specials), special_tokens=True)
    tokenizer.bos_token = template.specials[0]
    tokenizer.chat_template = template.text
    return tokenizer


_CHATML = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
_CHATML_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_LLAMA_DATE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
_LLAMA_HEAD = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + _LLAMA_DATE
_LLAMA_USER = "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
_LLAMA_END = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
_QWEN_DEFAULT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_SMOL_DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def _chatml(system: str) -> dict[str, tuple[str, str]]:
    end = "<|im_end|>\n<|im_start|>assistant\n"
    return {
        "system": ("<|im_start|>system\n", f"<|im_end|>\n<|im_start|>user\nIt was good{end}"),
        "user": (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n", f"\nIt was good{end}"),
    }


TEMPLATES = {
    "smollm2": Template(
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        f"{{{{ '<|im_start|>system\n{_SMOL_DEFAULT}<|im_end|>\n' }}}}{{% endif %}}{_CHATML}{{% endfor %}}{_CHATML_END}",
        ("<|im_start|>", "<|im_end|>"),
        **_chatml(_SMOL_DEFAULT),
    ),
    "qwen2.5": Template(
        "{%- if messages[0]['role'] == 'system' %}"
        "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
        f"{{%- else %}}{{{{- '<|im_start|>system\n{_QWEN_DEFAULT}<|im_end|>\n' }}}}{{%- endif %}}"
        "{%- for message in messages %}{%- if message.role == 'user' or (message.role == 'system' and not loop.first) "
        "or (message.role == 'assistant' and not message.tool_calls) %}{{- '<|im_start|>' + message.role + '\n' + "
        "message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        ("<|im_start|>", "<|im_end|>"),
        **_chatml(_QWEN_DEFAULT),
    ),
    "llama3": Template(
        "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{{- 'Cutting Knowledge Date: December 2023\n' }}"
        "{{- 'Today Date: ' + date_string + '\n\n' }}{{- system_message }}{{- '<|eot_id|>' }}"
        "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
        "message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        (_LLAMA_HEAD, f"{_LLAMA_USER}It was good{_LLAMA_END}"),
        (f"{_LLAMA_HEAD}{_LLAMA_USER}", f"\nIt was good{_LLAMA_END}"),
    ),
    "gemma2": Template(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
        "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        None,
        ("<bos><start_of_turn>user\n", "\nIt was good<end_of_turn>\n<start_of_turn>model\n"),
    ),
    "gemma3": Template(  # goes through parts: there is no newline between the soft prompt and the user's text
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}"
        "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- else -%}"
        "{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}"
        "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}"
        "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
        "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
        "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
        "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
        "{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}"
        "{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
        "{{ '<end_of_turn>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        ("<bos><start_of_turn>user\n", "\n\nIt was good<end_of_turn>\n<start_of_turn>model\n"),
        ("<bos><start_of_turn>user\n", "It was good<end_of_turn>\n<start_of_turn>model\n"),
    ),
    "mistral": Template(
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
        "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
        "{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
        "{%- if loop.last and system_message is defined %}"
        "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
        "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
        "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token}}{%- endif %}{%- endfor %}",
        ("<s>", "[INST]", "[/INST]"),
        ("<s>[INST] ", "\n\nIt was good[/INST]"),
        ("<s>[INST] ", "\nIt was good[/INST]"),
    ),
    "phi3": Template(
        "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
        "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
        "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        ("<|system|>\n", "<|end|>\n<|user|>\nIt was good<|end|>\n<|assistant|>\n"),
        ("<|user|>\n", "\nIt was good<|end|>\n<|assistant|>\n"),
    ),
    "qwen3_vl": Template(  # a macro goes through the parts
        "{%- macro shown(content, counts) %}{%- if content is string %}{{- content }}{%- else %}"
        "{%- for item in content %}{%- if 'text' in item %}{{- item.text }}{%- endif %}{%- endfor %}{%- endif %}"
        "{%- endmacro %}{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
        "{{- shown(message.content, true) }}{{- '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        ("<|im_start|>", "<|im_end|>"),
        ("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\nIt was good<|im_end|>\n<|im_start|>assistant\n"),
        ("<|im_start|>user\n", "It was good<|im_end|>\n<|im_start|>assistant\n"),
    ),
}
