"""Options of a request that do not go with a soft prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lopa_lightning.errors import LoPAError, shown

_READS_PROMPT = "it reads the prompt's own tokens, which a soft prompt does not have: some servers end, or count others"
_RENDERS = "it changes how the chat is rendered or cut, and the soft prompt was trained in the template's own way"
_OURS = "the client sets it"
_REFUSED = {
    **dict.fromkeys(("echo", "prompt_logprobs", "prompt_logprob_token_ids"), _READS_PROMPT),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "repetition_penalty"), _READS_PROMPT),
    **dict.fromkeys(("suffix", "use_beam_search"), "no server takes it with soft prompts"),
    **dict.fromkeys(("tools", "tool_choice", "functions", "function_call", "documents", "reasoning_effort"), _RENDERS),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "add_generation_prompt"), _RENDERS),
    **dict.fromkeys(("continue_final_message", "add_special_tokens", "truncate_prompt_tokens"), _RENDERS),
    **dict.fromkeys(("messages", "prompt", "prompt_embeds"), _OURS),
    "model": "it is chosen once, as LoPAClient(..., model=...); adapters of a server's own do not go with soft prompts",
}
_NEUTRAL = {"echo": False, "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1}
_NEUTRAL["use_beam_search"] = False


def check_options(options: Mapping[str, Any], ours: Sequence[str] = ()) -> None:
    """Refuses options of a request that do not go with a soft prompt.

    Args:
        options: As they are given to the ``openai`` package.
        ours: More that must not be among them.

    Raises:
        LoPAError: If there is one; the message says why.
    """
    extra = options.get("extra_body") or {}
    if not isinstance(extra, Mapping):
        raise LoPAError(f"extra_body must be a mapping, got {shown(extra)}")
    for name, value in [*options.items(), *extra.items()]:
        if name in _REFUSED and value is not None and not (name in _NEUTRAL and value == _NEUTRAL[name]):
            raise LoPAError(f"{name}={shown(value)} is refused with a soft prompt: {_REFUSED[name]}")
    if taken := sorted(set(ours) & set(options)):
        raise LoPAError(f"{', '.join(taken)} goes with single requests")
    if inside := {"stream", "stream_options"} & set(extra):
        raise LoPAError(f"extra_body must not have {', '.join(sorted(inside))}; give it as an argument")
