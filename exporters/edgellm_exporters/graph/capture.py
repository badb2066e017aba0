"""From a PyTorch module to a graph of canonical ops, guided by nothing but the state that the module declares.

The graph has four inputs besides the state (see :data:`INPUTS`), so that one trace serves prefill, decode, evaluation
and ragged batches; that of a model that reads rows in one pass has no past lengths. Nothing here knows an architecture
or a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgellm.models.protocol import (
    LanguageModel,
    SourceConfig,
    SourceModel,
    Step,
    answers_sources,
    logit_width,
    reads_in_one_pass,
    with_hidden,
)
from edgellm.ops.canonical import DOMAIN
from edgellm.streaming import OwnWeights, Weights
from edgellm_exporters.errors import CaptureError
from edgellm_exporters.graph.faults import (
    check_keeps_nothing,
    is_about_sizes,
    kept_tensors,
    let_interrupt_through,
    quiet,
    reason,
    writes_to,
)
from edgellm_exporters.graph.free_sizes import renamed
from edgellm_exporters.graph.held_signals import held_signals
from edgellm_exporters.graph.layers import layer_modules, layer_nodes
from edgellm_exporters.graph.tracing import CanonicalFunctions, canonical, fake_parameters, no_collection
from edgellm_exporters.graph.translate import translated
from edgellm_exporters.weights.lazy import LazyWeight
from edgellm_runtime.spec import (
    BATCH,
    CAPACITY,
    HIDDEN,
    PAST_LENGTHS,
    SOURCE,
    Signature,
    SpecError,
    StateSpec,
    TensorSpec,
)

__all__ = [
    "INPUTS", "OPSET", "capture", "check_model", "hidden_of", "name_dimensions", "name_weights", "signature_of",
    "traced",
]  # fmt: skip

OPSET = 23
INPUTS = (
    TensorSpec("tokens", (BATCH, "time"), "int64"),
    TensorSpec(PAST_LENGTHS, (BATCH,), "int32"),
    TensorSpec("lengths", (BATCH,), "int32"),
    TensorSpec("logit_positions", (BATCH, "count"), "int64"),
)
# Sizes of the example: torch.export bakes 0 and 1 in, and equal sizes would hide a dimension that was mixed up.
_EXAMPLE = {BATCH: 2, "time": 5, "count": 3, CAPACITY: 11, SOURCE: 7}


def check_model(model: LanguageModel) -> None:
    """Make sure that a model can be asked for what an export needs, before any work.

    Raises:
        CaptureError: it does not follow :class:`edgellm.models.protocol.LanguageModel`, or a weight is not finite.
            Weights that are not in memory are checked when they are read.
    """
    if not isinstance(model, nn.Module) or not isinstance(model, LanguageModel):
        raise CaptureError(
            f"{type(model).__name__} is not an nn.Module with config, state_specs() and forward(tokens, state, step); "
            "see docs/embedding.md, 'A model of your own'"
        )
    _check_config(model)
    signature_of(model)
    if answers_sources(model):
        _check_sources(model)
    for name, weight in model.named_parameters():
        if weight.numel() and not weight.is_meta and not bool(torch.stack(weight.detach().aminmax()).isfinite().all()):
            raise CaptureError(f"{name} holds NaN or infinite weights; train the model again, or load sound weights")


def _check_config(model: LanguageModel) -> None:
    kind = type(model).__name__
    for name, meaning in (("vocab_size", "how many tokens there are"), ("max_context", "the most that one row holds")):
        found = getattr(model.config, name, None)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            has = "has no" if found is None else f"has {found!r} as"
            raise CaptureError(f"{kind}.config {has} {name}; give it {meaning}, a whole number of at least 1")


def _check_sources(model: LanguageModel) -> None:
    """What a model that declares states of sources must have besides."""
    kind, config = type(model).__name__, model.config
    if not isinstance(model, SourceModel) or not isinstance(config, SourceConfig):
        raise CaptureError(
            f"{kind}'s state_specs() have the symbol {SOURCE!r}, but it has no encode(source, lengths), or its config "
            "no max_source and start_tokens; see docs/embedding.md, 'A model of your own'"
        )
    start = list(config.start_tokens)
    if not start or not all(type(token) is int and 0 <= token < config.vocab_size for token in start):
        raise CaptureError(f"{kind}.config has {start} as start_tokens; give it one token or more of its vocabulary")


def signature_of(model: LanguageModel, hidden: TensorSpec | None = None) -> Signature:
    """What the captured graph takes, gives and carries.

    Args:
        model: follows :class:`edgellm.models.protocol.LanguageModel`.
        hidden: a further output, of :func:`hidden_of`.

    Raises:
        CaptureError: the model's configuration or state specs describe no graph.
    """
    dtype = next((str(p.dtype).removeprefix("torch.") for _, p in model.named_parameters()), "float32")
    try:
        logits = TensorSpec("logits", (BATCH, "count", logit_width(model.config)), dtype)
        outputs = (logits,) if hidden is None else (logits, hidden)
        whole, state = reads_in_one_pass(model.config), tuple(model.state_specs())
        if whole and state:
            raise SpecError(f"state {state[0].name}, and that it reads rows in one pass, which carries nothing")
        return Signature(tuple(t for t in INPUTS if t.name != PAST_LENGTHS or not whole), outputs, state)
    except (SpecError, AttributeError) as error:
        raise CaptureError(
            f"{type(model).__name__} declares what no graph can have: {error}; correct its config or state_specs()"
        ) from error


def hidden_of(captured: ir.Model) -> TensorSpec | None:
    """What the signature says of a captured graph's hidden states; None where it gives none."""
    value = next((v for v in captured.graph.outputs if v.name == HIDDEN), None)
    if value is None:
        return None
    assert value.shape is not None
    if not isinstance(width := value.shape[-1], int):
        raise CaptureError(f"the last hidden state has {width} features; --hidden needs a number that is fixed")
    return TensorSpec(HIDDEN, (BATCH, "time", width), "float32")


def capture(model: LanguageModel, weights: Weights | None = None, *, hidden: bool = False) -> ir.Model:
    """Trace a model once, without a look at its weights.

    Args:
        model: follows :class:`edgellm.models.protocol.LanguageModel`; in eval mode, on any device.
        weights: where the parameters are read from; None for the model's own.
        hidden: whether the graph gives the last hidden state of every token, too.

    Returns:
        A graph of canonical ops (domain ``edgellm``) and plain ONNX ops, its inputs and outputs named by the signature;
        its weights are read when they are asked for.

    Raises:
        CaptureError: the module's forward depends on sizes or values that a graph cannot follow, or changes the state.
    """
    check_model(model)
    signature = signature_of(model)
    assert isinstance(model, nn.Module)
    names = [t.name for t in signature.inputs] + [s.past_name for s in signature.state]
    outputs = [t.name for t in signature.outputs] + [HIDDEN] * hidden + [s.present_name for s in signature.carried]
    with fake_parameters(model), no_collection():
        program = _trace(model, signature, hidden=hidden)
        layers = layer_nodes(program.graph, layer_modules(model), "model.")
        captured = translated(program, names, outputs, opset=OPSET, named=layers)
    captured.opset_imports.setdefault(DOMAIN, 1)
    name_weights(captured, model, weights or OwnWeights(model))
    name_dimensions(captured, signature_of(model, hidden_of(captured)) if hidden else signature)
    return captured


class _OneGraph(nn.Module):
    """The model with its state as a flat list, in the order of its specs; if wanted, with its last hidden state."""

    def __init__(self, model: nn.Module, specs: Sequence[StateSpec], *, hidden: bool) -> None:
        super().__init__()
        self.model, self.specs, self.hidden = model, specs, hidden

    def forward(
        self, tokens: Tensor, past_lengths: Tensor, lengths: Tensor, logit_positions: Tensor, state: list[Tensor]
    ) -> tuple[Any, ...]:
        past = {spec.name: tensor for spec, tensor in zip(self.specs, state, strict=True)}
        kept = kept_tensors(self.model)
        with CanonicalFunctions():
            result, last = with_hidden(self.model, tokens, past, Step(past_lengths, lengths, logit_positions))
        check_keeps_nothing(self.model, kept)
        if not isinstance(result, tuple) or len(result) != 2:
            raise CaptureError(f"the model's forward gave a {type(result).__name__}; it must give (logits, state)")
        logits, present = result
        carried = [spec.name for spec in self.specs if not spec.encoded]
        if missing := [name for name in carried if name not in present]:
            raise CaptureError(f"the model's forward gave no new state for {missing}, which state_specs() declares")
        if undeclared := sorted(present.keys() - set(carried)):
            raise CaptureError(f"the model's forward gave a state {undeclared} that state_specs() does not declare")
        if self.hidden and last is None:
            raise CaptureError(
                f"{type(self.model).__name__} picks positions without take_positions(x, step.logit_positions), which "
                "shows its last hidden state; use it, or leave --hidden out"
            )
        return logits, *([last] if self.hidden else []), [present[name] for name in carried]


class _OnePass(_OneGraph):
    """The same of a model that reads whole rows: nothing comes before them."""

    def forward(  # type: ignore[override]
        self, tokens: Tensor, lengths: Tensor, logit_positions: Tensor, state: list[Tensor]
    ) -> tuple[Any, ...]:
        return super().forward(tokens, torch.zeros_like(lengths), lengths, logit_positions, state)


def _trace(model: LanguageModel, signature: Signature, *, hidden: bool) -> torch.export.ExportedProgram:
    assert isinstance(model, nn.Module)
    was_training = model.training
    kind = _OnePass if signature.one_pass else _OneGraph
    wrapped, ran = kind(model, signature.state, hidden=hidden).eval(), dict[str, nn.Module]()
    try:
        with quiet(), _noted(model, ran):
            program = _of_any_time(wrapped, _example(model, signature), signature, model.config.max_context)
        for name in program.graph_signature.buffers_to_mutate.values():
            raise writes_to(name.removeprefix("model."))
        return program
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises many kinds; each means: not one graph
        let_interrupt_through(error)
        raise CaptureError(
            f"{type(model).__name__} cannot be traced as one graph: {reason(ran.items(), error)}"
        ) from error
    finally:
        model.train(was_training)


def traced(wrapped: nn.Module, example: tuple[Any, ...], shapes: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """A module as one program of canonical ops.

    Args:
        wrapped: in eval mode.
        example: its arguments.
        shapes: which of their sizes are free, as ``torch.export.export`` takes it.
    """
    dynamo_config: Any = torch._dynamo.config
    shape_config: Any = torch.fx.experimental._config
    # The cache keeps what operators give at sizes that were met before; symbols are met anew all the time.
    with held_signals(), dynamo_config.patch(fake_tensor_cache_enabled=False):
        try:
            return canonical(torch.export.export(wrapped, example, dynamic_shapes=shapes, strict=False))
        except Exception as error:
            if not is_about_sizes(error):
                raise
            # x[:, :-1] asks whether one token fewer is none; told not to care for 0 and 1, PyTorch asks other things
            with shape_config.patch(backed_size_oblivious=True):
                try:
                    return canonical(torch.export.export(wrapped, example, dynamic_shapes=shapes, strict=False))
                except Exception:
                    raise error from None


@contextmanager
def _noted(model: nn.Module, ran: dict[str, nn.Module]) -> Iterator[None]:
    """Note which of PyTorch's own recurrent modules run."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase)]
    hooks = [m.register_forward_pre_hook(lambda m, _, n=n: ran.update({n: m})) for n, m in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _example(model: LanguageModel, signature: Signature) -> tuple[Any, ...]:
    size = _EXAMPLE
    lengths = torch.tensor([size["time"], size["time"] - 1], dtype=torch.int32)
    before = () if signature.one_pass else (torch.zeros(size[BATCH], dtype=torch.int32),)
    return (
        torch.zeros(size[BATCH], size["time"], dtype=torch.int64),
        *before,
        lengths,
        torch.zeros(size[BATCH], size["count"], dtype=torch.int64),
        [
            torch.zeros(s.of_source(size[SOURCE]).resolve(size[BATCH], size[CAPACITY]), dtype=getattr(torch, s.dtype))
            for s in signature.state
        ],
    )


def _of_any_time(
    wrapped: nn.Module, example: tuple[Any, ...], signature: Signature, max_context: int
) -> torch.export.ExportedProgram:
    """The program for any number of tokens; for no more than the context, where a model cuts its tables to them."""
    try:
        return traced(wrapped, example, _dynamic_shapes(signature))
    except Exception as error:
        if not is_about_sizes(error) or max_context <= _EXAMPLE["time"]:
            raise
        try:
            return traced(wrapped, example, _dynamic_shapes(signature, max_context))
        except Exception:
            raise error from None


def _dynamic_shapes(signature: Signature, most: int | None = None) -> tuple[Any, ...]:
    dims = {name: torch.export.Dim(name, max=most if name == "time" else None) for name in _EXAMPLE}

    def dynamic(shape: Sequence[int | str]) -> dict[int, Any]:
        return {axis: dims[dim] for axis, dim in enumerate(shape) if isinstance(dim, str)}

    return (*(dynamic(t.shape) for t in signature.inputs), [dynamic(s.shape) for s in signature.state])


def name_weights(captured: ir.Model, model: nn.Module, weights: Weights) -> None:
    """Call weights what the model calls them, for tracing saw it inside a wrapper, and say where they are."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for value in list(captured.graph.initializers.values()):
        if value.name and value.name.startswith("model."):
            value.name = value.name.removeprefix("model.")
        if value.name in parameters:
            assert value.const_value is not None
            value.const_value = LazyWeight(weights, value.name, parameters[value.name].shape, value.const_value.dtype)


def name_dimensions(captured: ir.Model, signature: Signature) -> None:
    """Call free sizes of inputs, outputs and values between what the signature calls them."""
    shapes = {t.name: t.shape for t in (*signature.inputs, *signature.outputs)}
    shapes |= {name: s.shape for s in signature.state for name in (s.past_name, s.present_name)}
    known: dict[str, str] = {}  # the tracer's symbols, which the inputs tell apart, to ours
    for value in (*captured.graph.inputs, *captured.graph.outputs):
        assert value.name is not None and value.shape is not None
        wanted = shapes[value.name]
        found = [
            known.get(str(dim.value), dim.value) if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape
        ]
        if value.is_graph_input():
            known |= {str(f): dim for f, dim in zip(found, wanted, strict=True) if isinstance(dim, str)}
        else:
            _check_shape(value.name, found, wanted, frozenset(known.values()))
        value.shape = ir.Shape(wanted)
    names = known | {name: name for name in known.values()}
    for value in (v for node in captured.graph for v in node.outputs if not v.is_graph_output()):
        value.shape = None if value.shape is None else renamed(value.shape, names) or value.shape


def _check_shape(name: str, found: Sequence[Any], wanted: Sequence[int | str], symbols: frozenset[str]) -> None:
    # a symbol of neither side is an expression that the tracer did not simplify: nothing to judge by
    fits = len(found) == len(wanted) and all(
        f == w or not (isinstance(f, int) or f in symbols) for f, w in zip(found, wanted, strict=True)
    )
    if not fits:
        shape = "(" + ", ".join(map(str, found)) + ")"
        raise CaptureError(
            f"{name}: the forward gives shape {shape}, but must give ({', '.join(map(str, wanted))}), whatever the "
            "sizes of its inputs are"
        )
