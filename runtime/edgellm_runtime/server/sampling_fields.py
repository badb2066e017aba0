"""The fields that say how an answer is chosen: those of OpenAI, and further ones by the field's usual names."""

from __future__ import annotations

from typing import Any

from edgellm_runtime.generation.options import OptionKeywords
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.server.host import Hosted

__all__ = ["common_options", "openai_options"]

_MOST_TOKENS = 2**31 - 1
_MOST_STOPS = 16


def openai_options(fields: Fields, hosted: Hosted) -> OptionKeywords:
    """Those of chats and completions."""
    options = common_options(fields, hosted, highest=2.0)
    for name in ("presence_penalty", "frequency_penalty"):
        if (value := fields.number(name, -2, 2)) is not None:
            options[name] = value
    if (bias := fields.get("logit_bias")) is not None:
        options["logit_bias"] = _bias(fields, bias)
    if (seed := fields.integer("seed", -(2**63), 2**64 - 1)) is not None:
        options["seed"] = seed % 2**64
    if stops := fields.texts("stop", _MOST_STOPS):
        options["stop"] = stops
    if (value := fields.number("repetition_penalty", 0.01, 100)) is not None:
        options["repetition_penalty"] = value
    if (least := fields.integer("min_tokens", 0, _MOST_TOKENS)) is not None:
        options["min_tokens"] = least
    if fields.flag("ignore_eos"):
        options["ignore_eos"] = True
    if (tokens := fields.get("stop_token_ids")) is not None:
        options["stop_tokens"] = tokens  # the runtime checks them
    return options


def common_options(fields: Fields, hosted: Hosted, *, highest: float) -> OptionKeywords:
    """Temperature and filters, which every interface has.

    Args:
        fields: of the request.
        hosted: whose own defaults hold; where it has none, the interfaces' temperature of 1 does, and 0 of translators
            and their like.
        highest: the highest temperature.
    """
    options: OptionKeywords = {}
    temperature = fields.number("temperature", 0, highest)
    unsaid = temperature is None and "temperature" not in hosted.model.generation_defaults
    if unsaid and not hosted.answers:  # which are the likeliest, not any
        temperature = 1.0
    if temperature is not None:
        options["temperature"] = temperature
    top_p = fields.number("top_p", 0, 1)
    if top_p == 0:  # the fewest tokens that there can be: one
        options["top_k"] = 1
    elif top_p is not None:
        options["top_p"] = top_p
    if (top_k := fields.integer("top_k", -1, _MOST_TOKENS)) is not None and top_p != 0:
        options["top_k"] = max(top_k, 0)
    for name in ("min_p", "typical_p"):
        if (value := fields.number(name, 0, 1)) is not None:
            options[name] = value
    return options


def _bias(fields: Fields, bias: Any) -> dict[int, float]:
    if not isinstance(bias, dict):
        raise fields.wrong("logit_bias", bias, "an object of token ids to numbers from -100 to 100")
    found = {}
    for token, value in bias.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 11) or type(value) not in (int, float):
            raise fields.wrong("logit_bias", bias, "an object of token ids to numbers from -100 to 100")
        if not -100 <= value <= 100:
            raise fields.wrong(f"logit_bias.{token}", value, "a number from -100 to 100")
        found[int(token)] = float(value)
    return found
