"""GPTQ of models whose windows together are too much for memory: some windows at a time, one layer at a time.

What each layer gives is on disk, and so are codes. The layer is begun anew for each set of weights in it that read the
same, once those before them have their codes: memory is that of some windows in one layer and of one set's inputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgellm.models.protocol import answers_sources, logit_width, read_rows
from edgellm.streaming import Weights, resident
from edgellm_exporters.quantize.codes_on_disk import ChosenCodes
from edgellm_exporters.quantize.curvature import Curvature
from edgellm_exporters.quantize.gptq import gptq_by_rows
from edgellm_exporters.quantize.in_range import in_range
from edgellm_exporters.quantize.named_weights import is_parametrized
from edgellm_exporters.quantize.plan import Scheme
from edgellm_exporters.quantize.tuning.layer_stream import Call, LayerStream, hidden_of, shell_of
from edgellm_exporters.weights.memory import give_back
from edgellm_runtime.freed_pages import trim

__all__ = ["GROUP_TOKENS", "Calls", "Factors", "calls_of", "quantize_by_layers"]

GROUP_TOKENS = 2048  # that are run at a time
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Linears:
    """Linear layers that read the same tensor.

    Args:
        path: of the first that is called.
        names: of their weights.
    """

    path: str
    names: list[str]


@dataclass(frozen=True)
class Calls:
    """How a model calls its layers, and the linear layers in and after them.

    Args:
        order: paths of the layers.
        inside: by a layer's path, first to last.
        after: those that are called when all layers were.
    """

    order: list[str]
    inside: Mapping[str, list[Linears]]
    after: list[Linears]


@dataclass(frozen=True)
class Factors:
    """What weights are multiplied with before they are quantized, by their names."""

    columns: Mapping[str, Array] = field(default_factory=dict)
    rows: Mapping[str, Array] = field(default_factory=dict)

    def column(self, name: str, count: int) -> Tensor:
        """Those of a weight's columns, (columns,)."""
        return torch.from_numpy(self.columns.get(name, np.ones(count, dtype=np.float32)))

    def row(self, name: str, start: int, stop: int) -> Tensor:
        """Those of some of its rows, (rows, 1)."""
        given = self.rows.get(name)
        found = np.ones(stop - start, dtype=np.float32) if given is None else given[start:stop]
        return torch.from_numpy(found)[:, None]


class _Done(Exception):
    """The logits' layer was reached: the rest would be for nothing."""


def calls_of(
    model: nn.Module, weights: Weights, token: int, paths: Sequence[str], names: Mapping[str, Any]
) -> Calls | None:  # fmt: skip
    """What one token shows of a model's calls; None for one that cannot be passed layer by layer.

    That is one that calls a layer or a linear layer of those names twice, or such a one before, between or as the
    layers or not for each token, that computes one of their weights, whose layers read more than what the one before
    them gave, or that answers sources.

    Args:
        model: in eval mode.
        weights: where its parameters are read.
        token: any.
        paths: of its layers.
        names: of weights of linear layers.
    """
    if not paths or (hasattr(model, "state_specs") and answers_sources(model)):
        return None
    met = _Met(model, paths, names)
    if met.computed:
        return None
    with torch.no_grad(), resident(model, weights), met.watching(), suppress(_Done):
        read_rows(model, torch.tensor([[token]]))
    calls = met.calls()
    return calls if calls is not None and _passes(model, weights, token, calls, met) else None


def _passes(model: nn.Module, weights: Weights, token: int, calls: Calls, met: _Met) -> bool:
    """Whether layers that are given what the one before them gave, and nothing else, give what they give in the model.

    In a model whose layers read more, that may end in any error of its own.
    """
    with tempfile.TemporaryDirectory() as room, suppress(Exception):
        stream = LayerStream(shell_of(model), weights, torch.tensor([[token]]), calls.order, Path(room) / "x", group=1)
        for _ in calls.order:
            stream.advance(stream.parameters(weights))
        pairs = [(stream.call([0], linears.path).args[0], met.read(linears.path)) for linears in calls.after]
        pairs.append((stream.passed_outputs(), hidden_of(met.last, calls.order[-1]).float()))
        return all(torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in pairs)
    return False


class _Met:
    """What is called in one pass."""

    def __init__(self, model: nn.Module, paths: Sequence[str], names: Mapping[str, Any]) -> None:
        by_id: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            by_id.setdefault(id(parameter), []).append(name)
        linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.computed = any(is_parametrized(m) and f"{path}.weight" in names for path, m in linears.items())
        wanted = {
            path: [name for name in by_id[id(m.weight)] if name in names]
            for path, m in linears.items()
            if not is_parametrized(m)
        }
        self._wanted = {path: own for path, own in wanted.items() if own}
        self._modules = {path: model.get_submodule(path) for path in (*paths, *self._wanted)}
        config: Any = getattr(model, "config", None)
        self._paths, self._width = frozenset(paths), None if config is None else logit_width(config)
        self._order: list[str] = []
        self._seen: list[tuple[str | None, int, str, Tensor]] = []  # layer, layers before, path, what was read
        self._within: str | None = None
        self.last: Any = None  # what the last layer gave

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what is called meanwhile."""
        hooks = []
        for path, module in self._modules.items():
            if path in self._paths:
                hooks.append(module.register_forward_pre_hook(lambda *_, path=path: self._enter(path)))
                hooks.append(module.register_forward_hook(lambda *given: self._leave(given[-1]), always_call=True))
            if path in self._wanted:
                hooks.append(module.register_forward_pre_hook(lambda m, x, path=path: self._meet(path, m, x[0])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, path: str) -> None:
        self._order.append(path)
        self._within = path

    def _leave(self, given: Any) -> None:
        self._within, self.last = None, given

    def _meet(self, path: str, module: Any, x: Tensor) -> None:
        self._seen.append((self._within, len(self._order), path, x))
        if self._within is None and module.out_features == self._width:
            raise _Done

    def read(self, path: str) -> Tensor:
        """What a linear layer read."""
        return next(x for _, _, where, x in self._seen if where == path)

    def calls(self) -> Calls | None:
        """See :func:`calls_of`."""
        met = [path for _, _, path, _ in self._seen]
        names = [name for path in met for name in self._wanted[path]]
        between = any(layer is None and before < len(self._order) for layer, before, _, _ in self._seen)
        if (
            not self._order or len(set(self._order)) < len(self._order) or between
            or sorted(met) != sorted(self._wanted) or len(set(names)) < len(names) or self._paths & self._wanted.keys()
        ):  # fmt: skip
            return None
        inside: dict[str, list[Linears]] = {path: [] for path in self._order}
        after: list[Linears] = []
        last: Tensor | None = None
        for layer, _, path, x in self._seen:
            found = after if layer is None else inside[layer]
            if found and x is last:
                found[-1].names.extend(self._wanted[path])
            else:
                found.append(Linears(path, list(self._wanted[path])))
            last = x
        return Calls(self._order, inside, after)


def quantize_by_layers(
    model: nn.Module, weights: Weights, windows: Sequence[Sequence[int]], schemes: Mapping[str, Scheme],
    factors: Factors, calls: Calls, directory: Path | None, progress: Callable[[float], None],
) -> ChosenCodes:  # fmt: skip
    """GPTQ, layer after layer; each layer's inputs come from the layers before it as they were quantized.

    Args:
        model: in eval mode; it is left as it was.
        weights: where its parameters are read.
        windows: rows of token ids of one length, each read from an empty state.
        schemes: the formats of the weights to quantize, by the model's names for them.
        factors: what they are smoothed with.
        calls: of :func:`calls_of`.
        directory: for what is computed meanwhile, and for codes; None for where temporary files are.
        progress: told the share that is done.

    Returns:
        The numbers of each weight, smoothed.

    Raises:
        QuantizeError: inputs that are not finite, or a layer that reads more than what the one before it gave.
    """
    with tempfile.TemporaryDirectory(dir=directory) as room:
        run = _Run(model, weights, windows, schemes, factors, calls, directory, Path(room))
        for path in calls.order:
            for linears in run.alike(calls.inside[path]):
                run.quantize(linears, partial(run.inside, path, linears.path))
                progress(run.share)
            run.advance()
        for linears in run.alike(calls.after):
            run.quantize(linears, partial(run.after, linears.path))
            progress(run.share)
    return run.chosen


class _Run:
    """One passage through a model; see :func:`quantize_by_layers`."""

    def __init__(
        self, model: nn.Module, weights: Weights, windows: Sequence[Sequence[int]], schemes: Mapping[str, Scheme],
        factors: Factors, calls: Calls, directory: Path | None, room: Path,
    ) -> None:  # fmt: skip
        self.chosen = ChosenCodes(directory)
        self._schemes, self._factors, self._directory = schemes, factors, directory
        self._so_far = _SoFar(model, weights, self.chosen, factors)
        self._total = sum(len(linears.names) for own in (*calls.inside.values(), calls.after) for linears in own)
        tokens = torch.tensor([list(window) for window in windows])
        self._stream = LayerStream(
            shell_of(model), self._so_far, tokens, calls.order, room / "outputs", group=_group(*tokens.shape)
        )  # fmt: skip

    @property
    def share(self) -> float:
        """Of the weights, how many have their codes."""
        return len(self.chosen) / self._total

    def alike(self, found: Sequence[Linears]) -> Iterator[Linears]:
        """Those whose columns have the same factors, so that their inputs are the same when they are smoothed."""
        for linears in found:
            kinds: dict[bytes, list[str]] = {}
            for name in linears.names:
                kinds.setdefault(self._factors.columns.get(name, np.empty(0)).tobytes(), []).append(name)
            yield from (Linears(linears.path, names) for names in kinds.values())

    def inside(self, layer: str, path: str, some: range) -> Call | None:
        """What a linear layer of the next layer reads of some windows."""
        return self._stream.call_inside(some, path.removeprefix(f"{layer}."), self._so_far)

    def after(self, path: str, some: range) -> Call | None:
        """What a linear layer behind all layers reads of some windows."""
        return self._stream.call(some, path)

    def advance(self) -> None:
        """Pass a layer with what was chosen in it."""
        self._stream.advance(self._stream.parameters(self._so_far))
        give_back()

    def quantize(self, linears: Linears, call_of: Callable[[range], Call | None]) -> None:
        """Choose the codes of weights that read the same; none where nothing is read."""
        curvature = self._curvature(linears.names[0], call_of)
        give_back()
        if curvature is None:
            return
        for name in linears.names:
            rows = partial(self._so_far.smoothed, name)
            parts = gptq_by_rows(rows, self._so_far.count(name), curvature, self._schemes[name])
            self.chosen.add(name, parts, self._schemes[name].kernel_bits)
            give_back()

    def _curvature(self, name: str, call_of: Callable[[range], Call | None]) -> Curvature | None:
        hessian: Tensor | None = None
        for some in self._stream.groups:
            call = call_of(some)
            if call is None:
                continue
            x = call.args[0].reshape(-1, call.args[0].shape[-1]).float()
            hessian = torch.zeros(x.shape[1], x.shape[1]) if hessian is None else hessian
            hessian.addmm_(x.T, x)
            del call, x
            trim()
        if hessian is None:
            return None
        column = self._factors.column(name, len(hessian))
        return Curvature(hessian.div_(column).div_(column[:, None]), self._directory)


def _group(count: int, time: int) -> int:
    """Windows to run at a time: all groups are alike."""
    most = max(1, GROUP_TOKENS // time)
    return next(size for size in range(min(most, count), 0, -1) if count % size == 0)


class _SoFar:
    """A model's weights, with the codes in their place that were chosen; follows :class:`edgellm.streaming.Weights`."""

    def __init__(self, model: nn.Module, weights: Weights, chosen: ChosenCodes, factors: Factors) -> None:
        self._weights, self._chosen, self.factors = weights, chosen, factors
        named: dict[int, list[str]] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in parameters.items():
            named.setdefault(id(parameter), []).append(name)
        self._names = {name: named[id(parameter)] for name, parameter in parameters.items()}
        self._counts = {name: len(parameter) for name, parameter in parameters.items() if parameter.dim()}

    def count(self, name: str) -> int:
        """Rows of a weight."""
        return self._counts[name]

    def smoothed(self, name: str, start: int, stop: int) -> Array:
        """Some rows of a float weight, smoothed."""
        rows = self._weights.rows(name, start, stop).detach().float()
        smooth_rows = rows * self.factors.column(name, rows.shape[1]) * self.factors.row(name, start, stop)
        return in_range(name, smooth_rows.numpy())

    def read(self, name: str) -> Tensor:
        """One parameter."""
        found = self._coded(name, 0, self._counts.get(name, 0))
        return self._weights.read(name) if found is None else found

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one parameter."""
        found = self._coded(name, start, stop)
        return self._weights.rows(name, start, stop) if found is None else found

    def _coded(self, name: str, start: int, stop: int) -> Tensor | None:
        own = next((other for other in self._names[name] if other in self._chosen), None)
        if own is None:
            return None
        wide = torch.from_numpy(self._chosen.rows(own, start, stop).dequantize())
        return wide.div_(self.factors.column(own, wide.shape[1])).div_(self.factors.row(own, start, stop))
