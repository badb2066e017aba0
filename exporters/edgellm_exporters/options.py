"""What to make of a model: the options of an export, and what turns text into its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgellm.draft_head import DraftHead
from edgellm_exporters.auto.budget import AUTO, Budget
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.errors import ExportError
from edgellm_exporters.graph.targets import find_target
from edgellm_exporters.proof.receipt import ReceiptText
from edgellm_exporters.quantize.methods import METHODS, find_method
from edgellm_exporters.quantize.tuning.tune import Tuning
from edgellm_runtime.bundle import TokenizerInfo
from edgellm_runtime.task_spec import TaskSpec

__all__ = ["ExportOptions", "TextAssets", "check_encoder_options"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to make.

    Args:
        target: a name in :data:`edgellm_exporters.graph.targets.TARGETS`.
        dtype: of activations and unquantized weights.
        quantize: what :func:`edgellm_exporters.quantize.methods.find_method` knows.
        name: what the bundle calls itself; the destination's name if empty.
        calibration: windows of token ids, each up to the model's context; with them, weights of fewer than 8 bits are
            quantized with GPTQ.
        bounds: overrides for what the bundle must hold to.
        budget: what a bundle of ``quantize="auto"`` must keep to.
        held_out: windows of token ids that such a bundle is judged on; none of them is in ``calibration``.
        kv_cache: what attention keeps keys and values in: ``float32``, ``float16``, or ``int8`` with one scale for
            each feature of each head.
        engine: what engines are built for, by a target that has them; None for what :class:`EngineOptions` says.
        generation: options of generation that the bundle sets for whoever names no others, such as
            ``{"temperature": 0.7}``; see :mod:`edgellm_runtime.option_ranges`.
        hidden: whether steps can be asked for the last hidden states, too, which embeddings are made of.
        receipt: a text that the bundle is measured on beside the model, for its receipt; None for no receipt.
        tuning: how codes are tuned after they were chosen; None: not at all.
        drafter: proposes tokens from hidden states, for the model to check; None for none.
    """

    target: str = "cpu"
    dtype: str = "float32"
    quantize: str = "none"
    name: str = ""
    calibration: Sequence[Sequence[int]] = ()
    bounds: Mapping[str, float] = field(default_factory=dict)
    budget: Budget | None = None
    held_out: Sequence[Sequence[int]] = ()
    kv_cache: str = "float32"
    engine: EngineOptions | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    hidden: bool = False
    receipt: ReceiptText | None = None
    tuning: Tuning | None = None
    drafter: DraftHead | None = None

    def __post_init__(self) -> None:
        target = find_target(self.target)
        if self.kv_cache not in target.caches:
            raise ExportError(
                f"target {self.target} keeps keys and values in {' or '.join(target.caches)}, not {self.kv_cache!r}"
            )
        if self.dtype not in target.dtypes:
            raise ExportError(f"target {self.target} has no dtype {self.dtype!r}; it has {', '.join(target.dtypes)}")
        if (self.quantize == AUTO) != (self.budget is not None):
            raise ExportError(f"quantize {self.quantize!r} and budget {self.budget}: {AUTO!r} and a budget go together")
        if self.budget is None:
            method = find_method(self.quantize, target.methods)
            if method.layers is not None:
                target.check_kernel(method.layers)
            elif self.tuning is not None:
                raise ExportError(f"quantize {self.quantize!r} has no codes of its own to tune; leave tuning out")
        elif target.methods is not METHODS:
            raise ExportError(f"target {self.target} has no {AUTO!r}; it has {', '.join(target.methods)}")
        if self.engine is not None and not target.roles:
            raise ExportError(f"target {self.target} has no engines; leave their options out, or use --target tensorrt")


@dataclass(frozen=True, kw_only=True)
class TextAssets:
    """What turns text into tokens and back, and what the model was trained to do with it; copied into the bundle."""

    tokenizer_json: str
    chat_template: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    add_bos: bool = False
    task: TaskSpec | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    add_eos: bool = False

    @property
    def info(self) -> TokenizerInfo:
        """What the manifest says of it."""
        return TokenizerInfo(
            self.bos_token_id, self.eos_token_ids, self.add_bos, self.chat_template is not None, self.special_tokens,
            self.add_eos,
        )  # fmt: skip


def check_encoder_options(options: ExportOptions) -> None:
    """Refuse what is not there for models that answer sources, before any work.

    Raises:
        ExportError: such an option.
    """
    if options.budget is not None or options.kv_cache != "float32":
        what = "a search of formats" if options.budget is not None else f"a cache in {options.kv_cache}"
        raise ExportError(f"{what} looks at models that go on with texts, and this one answers sources; leave it out")
