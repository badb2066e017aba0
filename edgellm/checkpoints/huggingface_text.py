"""What a Hugging Face folder says about text: its tokenizer, special tokens and chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgellm.checkpoints.files import read_json, read_text, read_tokenizer, token_ids, tokenizer_errors
from edgellm.checkpoints.generation_defaults import huggingface_defaults
from edgellm.checkpoints.older_tokenizer import older_tokenizer
from edgellm.errors import CheckpointError

__all__ = ["TextFiles", "read_text_files"]

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """What the files say; fields as :class:`edgellm.checkpoints.Checkpoint` has them."""

    tokenizer_json: str | None
    chat_template: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    special_tokens: Mapping[str, str]
    generation: Mapping[str, Any]
    notes: tuple[str, ...]


def read_text_files(path: Path, config: Mapping[str, Any]) -> TextFiles:
    """Read them.

    Args:
        path: the folder.
        config: its ``config.json``.

    Raises:
        CheckpointError: one of them is damaged.
    """
    settings, generation = (_read_optional(path / f"{n}_config.json") for n in ("tokenizer", "generation"))
    defaults, notes = huggingface_defaults(generation, path / "generation_config.json")
    tokenizer_json = read_tokenizer(path / "tokenizer.json")
    built: tuple[str, ...] = ()
    if tokenizer_json is None:
        tokenizer_json, built = older_tokenizer(path, settings)
    tokenizer = None if tokenizer_json is None else Tokenizer.from_str(tokenizer_json)
    names = _special_names(path, settings)
    bos, eos = (_special_ids(path, generation, config, names, tokenizer, kind) for kind in ("bos", "eos"))
    first = None if tokenizer is None else _put_first(tokenizer, path)
    if built and bos and settings.get("add_bos_token"):  # such a tokenizer has no post-processor that could say it
        first = bos[0]
    return TextFiles(
        tokenizer_json=tokenizer_json,
        chat_template=_chat_template(path, settings),
        bos_token_id=first if first is not None else bos[0] if bos else None,
        eos_token_ids=eos,
        add_bos=first is not None,
        add_eos=tokenizer is not None and bool(eos) and _put_last(tokenizer) == eos[0],
        special_tokens=names,
        generation=defaults,
        notes=(*built, *notes),
    )


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _special_names(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """How the tokenizer writes its special tokens; tokenizer_config.json takes precedence over the older file."""
    older = _read_optional(path / "special_tokens_map.json")
    found: dict[str, str] = {}
    for name in _NAMES:
        token = settings[name] if name in settings else older.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            found[name] = content
    return found


def _special_ids(
    path: Path, generation: Mapping[str, Any], config: Mapping[str, Any], names: Mapping[str, str],
    tokenizer: Tokenizer | None, kind: str,
) -> tuple[int, ...]:  # fmt: skip
    """The ids of the token ``kind``: from generation_config.json, else config.json, else the name."""
    key = f"{kind}_token_id"
    ids = token_ids(generation, key, path / "generation_config.json") or token_ids(config, key, path / "config.json")
    if ids or tokenizer is None or f"{kind}_token" not in names:
        return ids
    found = tokenizer.token_to_id(names[f"{kind}_token"])
    return () if found is None else (found,)


def _put_first(tokenizer: Tokenizer, path: Path) -> int | None:
    """The token that the post-processor begins every text with; beside it, ``add_bos_token`` means nothing.

    Raises:
        CheckpointError: it begins texts with several.
    """
    with tokenizer_errors(f"{path / 'tokenizer.json'} cannot encode", "copy the checkpoint again"):
        encoded = tokenizer.encode("a")
    at = next((i for i, special in enumerate(encoded.special_tokens_mask) if not special), len(encoded.ids))
    first: list[int] = encoded.ids[: at if at < len(encoded.ids) else 1]
    if len(first) > 1:
        names = " ".join(encoded.tokens[:at])
        raise CheckpointError(f"{path / 'tokenizer.json'} begins texts with {names}; edgellm can put one token there")
    return first[0] if first else None


def _put_last(tokenizer: Tokenizer) -> int | None:
    """The token that the post-processor ends every text with; what an encoder reads ends so."""
    encoded = tokenizer.encode("a")
    ids: list[int] = encoded.ids
    return ids[-1] if len(ids) > 1 and encoded.special_tokens_mask[-1] else None


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        return read_text(file)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = {t["name"]: t["template"] for t in template if isinstance(t, dict) and {"name", "template"} <= t.keys()}
        template = named.get("default")
    return template if isinstance(template, str) else None
