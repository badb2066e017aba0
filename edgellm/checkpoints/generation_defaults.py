"""What a checkpoint's makers ask for when nobody says how to choose tokens: the options of generation that it sets.

Of what transformers' ``generation_config.json`` can ask for, a bundle carries what its runtime does; what would change
an answer and has no option here is told by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellm.errors import CheckpointError
from edgellm_runtime.errors import OptionError
from edgellm_runtime.option_ranges import RANGES

__all__ = ["gguf_defaults", "huggingface_defaults"]

_TOP_K = 50  # transformers' own, wherever a checkpoint samples and says nothing else

# Their names and ours, and the values that change nothing: where an option is off, none is carried.
_OPTIONS: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "top_k": ("top_k", (0, None)),
    "top_p": ("top_p", (1, None)),
    "min_p": ("min_p", (0, None)),
    "repetition_penalty": ("repetition_penalty", (1, None)),
    "no_repeat_ngram_size": ("no_repeat_ngram", (0, None)),
    "suppress_tokens": ("banned_tokens", (None, [])),
    "min_new_tokens": ("min_tokens", (0, None)),
    "max_new_tokens": ("max_new_tokens", (None,)),
    "stop_strings": ("stop", (None, [])),
}
_WITHOUT_OPTION: Mapping[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1, None), "begin_suppress_tokens": (None, []), "bad_words_ids": (None, []),
    "forced_bos_token_id": (None,), "forced_eos_token_id": (None,), "forced_decoder_ids": (None, []),
    "sequence_bias": (None, {}), "min_length": (0, None), "num_beams": (1, None), "typical_p": (1, None),
    "epsilon_cutoff": (0, None), "eta_cutoff": (0, None), "top_h": (None,), "penalty_alpha": (0, None),
    "guidance_scale": (1, None), "exponential_decay_length_penalty": (None,), "num_return_sequences": (1, None),
    "watermarking_config": (None,), "dola_layers": (None,), "constraints": (None, []), "force_words_ids": (None, []),
    "max_time": (None,), "token_healing": (False, None),
}  # fmt: skip

_GGUF = "general.sampling."
_GGUF_OPTIONS: Mapping[str, str] = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
_GGUF_WITHOUT: Mapping[str, Any] = {"penalty_repeat": 1, "xtc_probability": 0, "mirostat": 0, "sequence": None}


def huggingface_defaults(generation: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The options that a ``generation_config.json`` sets, and notes on what else it asks for.

    Without ``do_sample`` the most probable token is taken, whatever the temperature says; ``top_k`` and the like are
    carried all the same, for callers who give a temperature of their own.

    Args:
        generation: the file's values; none where there is no such file.
        path: of the file, for messages.

    Raises:
        CheckpointError: a value that is no value of its option.
    """
    found = {ours: generation[name] for name, (ours, off) in _OPTIONS.items() if generation.get(name) not in off}
    samples = generation.get("do_sample")
    if samples not in (True, False, None):
        raise CheckpointError(f"{path}: do_sample is {samples!r}; it must be true or false")
    if samples:
        temperature = generation.get("temperature")
        found = {"temperature": 1.0 if temperature is None else temperature, **found}
        if generation.get("top_k") is None:
            found["top_k"] = _TOP_K
    asked = sorted(f"{k} {generation[k]!r}" for k, off in _WITHOUT_OPTION.items() if generation.get(k) not in off)
    told = f"generation_config.json asks for {', '.join(asked)}, which a bundle does not do by itself"
    return _checked(found, path), (told,) if asked else ()


def gguf_defaults(metadata: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The same of a GGUF file, whose ``general.sampling.temp`` is 0 or less for the most probable token.

    Raises:
        CheckpointError: a value that is no value of its option.
    """
    said = {key.removeprefix(_GGUF): value for key, value in metadata.items() if key.startswith(_GGUF)}
    found = {ours: said[name] for name, ours in _GGUF_OPTIONS.items() if name in said}
    for name in ("temperature", "top_k"):  # below 0 is llama.cpp's way to say that there is none
        if type(found.get(name)) in (int, float):
            found[name] = max(found[name], 0)
    asked = sorted(f"{name} {said[name]!r}" for name, off in _GGUF_WITHOUT.items() if said.get(name, off) != off)
    told = f"its metadata asks for sampling with {', '.join(asked)}, which a bundle does not do by itself"
    return _checked(found, path), (told,) if asked else ()


def _checked(found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    try:
        return {name: RANGES[name](name, value) for name, value in found.items()}
    except OptionError as error:
        raise CheckpointError(f"{path}: {error}") from error
