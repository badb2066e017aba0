"""Texts to token ids and back, over HTTP, in the form that vLLM's clients and lm-evaluation-harness know."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import Response

from edgellm_runtime.server.call import Call, JsonText
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.host import Hosted
from edgellm_runtime.server.messages_fields import messages_of
from edgellm_runtime.text.tokenizer import Tokenizer, check_tokens

__all__ = ["detokenize", "tokenize", "tokenizer_info"]

_ROLES = ("system", "developer", "user", "assistant", "tool")


async def tokenize(call: Call) -> Response:
    """The tokens of a text, in which the names of special tokens are those, or of a chat."""
    fields = call.fields
    hosted, tokenizer = _hosted(call, fields.get("model"))
    prompt, given = fields.text("prompt"), fields.get("messages")
    bos = fields.get("add_special_tokens") is None or fields.flag("add_special_tokens")
    ask = fields.get("add_generation_prompt") is None or fields.flag("add_generation_prompt")
    if (prompt is None) == (given is None):
        raise ApiError("Give 'prompt' or 'messages', one of them.", param="prompt", code="missing_required_parameter")
    fields.done()

    def encoded() -> list[int]:
        if prompt is not None:
            return tokenizer.encode(prompt, bos=bos and tokenizer.add_bos, special=True)
        return hosted.model.chat_template.encode(messages_of(given, roles=_ROLES), add_generation_prompt=ask)

    tokens = await asyncio.to_thread(encoded)
    return JsonText({"tokens": tokens, "count": len(tokens), "max_model_len": hosted.scheduler.context})


async def detokenize(call: Call) -> Response:
    """The text of tokens, special ones by their names."""
    fields = call.fields
    hosted, tokenizer = _hosted(call, fields.get("model"))
    tokens = check_tokens(fields.need("tokens"), hosted.model.session.vocab_size)
    fields.done()
    return JsonText({"prompt": await asyncio.to_thread(tokenizer.decode, tokens, skip_special=False)})


async def tokenizer_info(call: Call) -> Response:
    """Special tokens, and the chat template."""
    hosted, tokenizer = _hosted(call, call.request.query_params.get("model"))
    made: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.token_text(tokenizer.bos_token_id),
        "eos_token": tokenizer.token_text(tokenizer.eos_token_id), "add_bos_token": tokenizer.add_bos,
        "vocab_size": hosted.model.session.vocab_size, "model_max_length": hosted.scheduler.context,
    }  # fmt: skip
    if hosted.model.has_chat_template:
        made["chat_template"] = hosted.model.chat_template.source
    return JsonText(made)


def _hosted(call: Call, name: Any) -> tuple[Hosted, Tokenizer]:
    """The model that is named, or the only one."""
    models = list(call.host)
    if name is None and len(models) > 1:
        raise ApiError(f"Missing required parameter: 'model'; it is one of {', '.join(m.name for m in models)}.",
                       param="model", code="missing_required_parameter")  # fmt: skip
    hosted = models[0] if name is None else call.host.find(name)
    call.model = hosted.name
    if hosted.model.tokenizer is None:
        raise ApiError(f"{hosted.name} has no tokenizer; its prompts are token ids.", code="no_tokenizer")
    return hosted, hosted.model.tokenizer
