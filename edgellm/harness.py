"""A bundle as a model of lm-evaluation-harness: ``--model edgellm --model_args bundle=DIR``; extra ``lm_eval``.

``python -m edgellm.harness`` is the harness's own command with this model in it; importing this module adds it to the
harness's registry, for programs that call ``lm_eval.simple_evaluate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from edgellm_runtime import Model, OptionError, load
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["BundleLM", "main"]

_MOST_TOKENS = 256  # of an answer, as the harness has it
_ROWS = 8
_SEED = 1234  # the harness's
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
_Pair = tuple[tuple[str, str], list[int], list[int]]


@register_model("edgellm")  # type: ignore[untyped-decorator, unused-ignore]
class BundleLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A bundle, asked as the harness asks PyTorch's models: its pairs, its windows, its prefix, its truncation.

    Args:
        bundle: its folder; a model that is loaded already is taken too.
        device: as for :func:`edgellm_runtime.load`.
        threads: likewise.
        batch_size: answers that are made at once; None or ``auto``: eight.
        max_length: tokens of context and answer; None: as many as the model's context holds.
        add_bos_token: whether texts begin with the begin token.
        max_batch_size: is of no use here, where rows come and go.
    """

    def __init__(
        self, bundle: str | Model, *, device: str | None = None, threads: int | None = None,
        batch_size: int | str | None = None, max_length: int | None = None, add_bos_token: bool = False,
        max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = bundle if isinstance(bundle, Model) else load(bundle, device=device or "auto", threads=threads)
        if self.model.tokenizer is None:
            raise OptionError(f"{self.model.bundle.manifest.name} has no tokenizer, and a task is made of texts")
        self._tokenizer: Tokenizer = self.model.tokenizer
        self._rows = int(str(batch_size)) if str(batch_size).isdecimal() else _ROWS
        self.max_length = min(max_length or self.model.session.max_context, self.model.session.max_context)
        self._bos = add_bos_token

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return self._tokenizer.eos_token_id or 0

    @property
    def prefix_token_id(self) -> int:
        """What is read before a text that has nothing before it."""
        bos = self._tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return self.model.bundle.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The bundle's, for the harness's record."""
        return self.model.chat_template.source if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as a text, in which special tokens have their names."""
        return self.model.chat_template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A text's tokens; the names of special tokens in it are those, as everywhere in the harness."""
        bos = self._bos if add_special_tokens is None else add_special_tokens
        return self._tokenizer.encode(string, bos=bos, special=True)

    def _loglikelihood_tokens(self, requests: Sequence[_Pair], **_: Any) -> list[tuple[float, bool]]:
        # of one context all continuations together, since it is then read once
        order = sorted(range(len(requests)), key=lambda i: (requests[i][1], i))
        pairs = [self._cut(requests[i][1], requests[i][2]) for i in order]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for i, score in zip(order, self.model.score(pairs), strict=True):
            found[i] = (score.logprob, score.greedy)
            self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return found

    def _cut(self, context: list[int], tokens: list[int]) -> tuple[list[int], list[int]]:
        """Of both together the last that fit, the very last of which is not read."""
        whole = (context + tokens)[-(self.max_length + 1) :]
        scored = min(len(tokens), len(whole) - 1)
        return whole[: len(whole) - scored], whole[len(whole) - scored :]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in the harness's windows, which do not overlap."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            found.append(sum(score.logprob for score in self.model.score([*map(make_disjoint_window, windows)])))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each with its own options, as many at once as there are rows."""
        with self.model.scheduler(rows=self._rows, queue=max(len(requests), 1)) as scheduler:
            tickets = []
            for request in requests:
                context, options = request.args
                wanted = self._wanted(options)
                tokens = self.tok_encode(context)[-max(self.max_length - wanted["max_new_tokens"], 1) :]
                tickets.append(scheduler.submit(tokens, wait=True, **wanted))
            answers = [ticket.results()[0].text for ticket in tickets]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _wanted(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A request's options by the names that they have here; the most probable token unless it is to draw."""
        asked = normalize_gen_kwargs(dict(given), _MOST_TOKENS)
        until = [text for text in asked.pop("until", None) or [] if text]
        most, samples, named = asked.pop("max_gen_toks"), asked.pop("do_sample", False), dict(asked)
        if unknown := sorted(named.keys() - _SAMPLING):
            raise OptionError(f"a task asks for {unknown[0]}, which a bundle's answers have not; leave it out")
        chosen = named if samples else {"temperature": 0.0}
        return {"max_new_tokens": most, "stop": until, "seed": _SEED, **chosen}


def main() -> None:
    """The harness's command."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
