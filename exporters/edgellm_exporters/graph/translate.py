"""From a traced program to a graph, operator by operator.

Canonical nodes go over as they are. Of PyTorch's own operators, those that models are full of have forms of ours
(:mod:`operators`); every other is written as onnxscript's function library writes it (:mod:`function_library`), and
what that does not know is divided into what it does (:mod:`decompose`). PyTorch's own exporter does the same to a whole
program at once and takes a hundred times as long; a test holds the two together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnx_ir.tensor_adapters
import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from edgellm.ops.canonical import DOMAIN
from edgellm_exporters.errors import CaptureError
from edgellm_exporters.graph.branches import BRANCHES
from edgellm_exporters.graph.decompose import decomposed
from edgellm_exporters.graph.function_library import Recorder, Symbol, find_function
from edgellm_exporters.graph.operators import FORMS
from edgellm_exporters.graph.promotion import promoted
from edgellm_exporters.graph.values import onnx_dtype, typed

__all__ = ["Translation", "translated"]

_IR_VERSION = 10
_EMITTED = ("onnx_symbolic::_symbolic_multi_out", "onnx_symbolic::_symbolic")  # what a canonical op leaves
_SOURCES = {"i": "attr_ints", "f": "attr_floats", "s": "attr_strs"}  # by the first letter of an attribute's type
_CHECKS = ("aten::_assert", "aten::sym_constrain_range", "aten::_check")  # say what is so; they compute nothing


def translated(
    program: torch.export.ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    opset: int,
    named: Mapping[torch.fx.Node, str] = MappingProxyType({}),
) -> ir.Model:
    """The program as a graph, its weights named as in the traced module.

    Args:
        program: traced, without operators that write into what they are given.
        inputs: names of the graph's inputs.
        outputs: names of its outputs.
        opset: of the plain ONNX operators.
        named: what to call the values of some nodes.

    Raises:
        CaptureError: an operator that ONNX has no form of.
    """
    made = Translation()
    graph_inputs = made.take_inputs(program, inputs)
    made.run(program.graph)
    specs = program.graph_signature.output_specs
    wanted = [node for node, spec in zip(program.graph.output_node().args[0], specs, strict=True)
              if spec.kind == OutputKind.USER_OUTPUT]  # fmt: skip
    for node, name in named.items():
        if isinstance(value := made.values.get(node), ir.Value) and value.producer() is not None:
            value.name = name
    results = made.results(wanted, outputs)
    graph = ir.Graph(
        graph_inputs, results, nodes=made.nodes, initializers=made.initializers, name="main_graph",
        opset_imports={"": opset, **made.domains},
    )  # fmt: skip
    model = ir.Model(graph, ir_version=_IR_VERSION, functions=list(made.functions.values()))
    if made.functions:
        for function in made.functions.values():
            function.opset_imports[""] = opset  # nothing that they call has changed since the library's
        common.InlinePass()(model)
    common.RemoveUnusedNodesPass()(model)
    return model


class Translation:
    """The values and nodes of a graph in the making."""

    def __init__(self) -> None:
        self.values: dict[torch.fx.Node, Any] = {}  # a value, several, or a number
        self.nodes: list[ir.Node] = []  # of the graph, or of the branch, that is being made
        self.initializers: list[ir.Value] = []
        self.functions: dict[ir.OperatorIdentifier, ir.Function] = {}
        self.domains: dict[str, int] = {DOMAIN: 1}
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._names: list[str] = []  # of the calls that are being translated, each within the one before
        self._count = 0
        self._depth = 0  # of branches

    # --- what rules use ---------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: ir.Value | None, like: Any = None, **attributes: Any) -> ir.Value:
        """A plain ONNX node with one output, of the dtype and shape of a traced value."""
        value = typed(Symbol(name=self.fresh()), like)
        self.nodes.append(
            ir.Node("", kind, inputs, ir.convenience.convert_attributes(attributes), outputs=[value])
        )  # fmt: skip
        return value

    def ops(self, kind: str, *inputs: ir.Value | None, like: Sequence[Any], **attributes: Any) -> list[ir.Value]:
        """A plain ONNX node with several outputs."""
        values = [typed(Symbol(name=self.fresh()), each) for each in like]
        self.nodes.append(ir.Node("", kind, inputs, ir.convenience.convert_attributes(attributes), outputs=values))
        return list(values)

    def constant(self, content: Any) -> ir.Value:
        """A constant of the graph, made once for each distinct content."""
        tensor = content if isinstance(content, ir.TensorProtocol) else ir.tensor(np.asarray(content))
        key = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
        if key not in self._constants:
            value = Symbol(name=f"traced/{len(self._constants)}", shape=ir.Shape(key[1]))
            value.type, value.const_value = ir.TensorType(tensor.dtype), tensor
            self.initializers.append(value)
            self._constants[key] = value
        return self._constants[key]

    def integers(self, *numbers: int) -> ir.Value:
        """A constant vector of int64."""
        return self.constant(np.array(numbers, dtype=np.int64))

    def vector(self, sizes: Sequence[Any]) -> ir.Value:
        """Sizes, some of them computed, as one vector of int64."""
        if all(isinstance(size, int) for size in sizes):
            return self.integers(*sizes)
        parts = [self.integers(s) if isinstance(s, int) else self.op("Reshape", self.value(s), self.integers(-1))
                 for s in sizes]  # fmt: skip
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def value(self, given: Any) -> ir.Value:
        """The value of a traced tensor or number."""
        found = self.values[given] if isinstance(given, torch.fx.Node) else given
        if isinstance(found, ir.Value):
            return found
        if isinstance(found, bool | int | float):
            dtype = np.bool_ if isinstance(found, bool) else np.int64 if isinstance(found, int) else np.float32
            return self.constant(np.array(found, dtype=dtype))
        raise TypeError(f"{given} is a {type(found).__name__}, not a tensor")

    def fresh(self) -> str:
        """A name that no other value has."""
        self._count += 1
        return f"{self._names[-1] if self._names else 'traced'}.{self._count}"

    def refuse(self, node: torch.fx.Node, what: str) -> CaptureError:
        """An error that names where in the model a call stands."""
        return CaptureError(f"{what} ({_place(node)})" if _place(node) else what)

    def branch(self, graph: torch.fx.Graph, inputs: Sequence[Any]) -> tuple[list[ir.Node], list[ir.Value]]:
        """The nodes and results of a graph within this one, which reads this one's values."""
        outer, self.nodes = self.nodes, []
        self._depth += 1
        try:
            results = self.inline(graph, inputs)
            # what a branch gives must be its own, and each result another value
            given = [self.op("Identity", self.value(r), like=self.value(r)) for r in results]
            return self.nodes, given
        finally:
            self.nodes = outer
            self._depth -= 1

    def inline(self, graph: torch.fx.Graph, inputs: Sequence[Any]) -> list[Any]:
        """Another graph's calls in the place of this call, and what it gives: values or numbers."""
        for node, given in zip(_placeholders(graph), inputs, strict=True):
            self.values[node] = self.values[given] if isinstance(given, torch.fx.Node) else given
        self.run(graph)
        (results,) = graph.output_node().args
        found = self.values[results] if isinstance(results, torch.fx.Node) else results
        several = found if isinstance(found, tuple | list) else [found]
        return [self.values[r] if isinstance(r, torch.fx.Node) else r for r in several]

    # --- the walk ---------------------------------------------------------------------------------------------------

    def take_inputs(self, program: torch.export.ExportedProgram, names: Sequence[str]) -> list[ir.Value]:
        """The graph's inputs; weights become initializers, without a look at them."""
        found: list[ir.Value] = []
        rest = iter(names)
        tensors: Mapping[str, Any] = {**program.state_dict, **program.constants}
        for node, spec in zip(_placeholders(program.graph), program.graph_signature.input_specs, strict=True):
            if isinstance(spec.arg, ConstantArgument):
                self.values[node] = spec.arg.value
            elif spec.kind == InputKind.USER_INPUT:
                found.append(typed(Symbol(name=next(rest)), node.meta["val"]))
                self.values[node] = found[-1]
            elif node.users:
                assert spec.target is not None
                self.values[node] = self._initializer(spec.target, tensors[spec.target], node.meta["val"])
        return found

    def _initializer(self, name: str, tensor: torch.Tensor, like: Any) -> ir.Value:
        value = typed(Symbol(name=name), like)
        value.const_value = ir.tensor_adapters.TorchTensor(tensor.detach(), name=name)
        self.initializers.append(value)
        return value

    def run(self, graph: torch.fx.Graph) -> None:
        """Every call of a traced graph."""
        owner: Any = graph.owning_module
        for node in graph.nodes:
            if node.op == "get_attr":
                self.values[node] = self._attribute(operator.attrgetter(node.target)(owner))
            elif node.op == "call_function":
                self._names.append(node.name if not self._names else f"{self._names[0]}/{node.name}")
                try:
                    self.values[node] = self._named(node, self._call(node))
                finally:
                    self._names.pop()

    def _attribute(self, found: Any) -> Any:
        if not isinstance(found, torch.Tensor):
            return found  # a graph, for an operator that has branches
        name = f"traced/tensor{len(self.initializers)}"
        return self._initializer(name, found, found)

    def _named(self, node: torch.fx.Node, made: Any) -> Any:
        """Dtypes and shapes of what a call gave; those of the traced program hold."""
        like = node.meta.get("val")
        if isinstance(made, ir.Value) and made.producer() is not None and not isinstance(like, list | tuple):
            if made.dtype is not None and (wanted := onnx_dtype(like)) is not None and made.dtype != wanted:
                made = self.op("Cast", made, to=int(wanted))
            typed(made, like)
        elif isinstance(made, list | tuple) and isinstance(like, list | tuple):
            for value, each in zip(made, like, strict=False):
                if isinstance(value, ir.Value):
                    typed(value, each)
        return made

    def _call(self, node: torch.fx.Node) -> Any:
        target: Any = node.target
        if target is operator.getitem:
            return self._item(*node.args)
        if isinstance(target, type):  # a tuple with names
            return self._given(node.args)
        if (name := _name(target)).startswith(_CHECKS):
            return None
        if name in _EMITTED:
            return self._emitted(node, several=name == _EMITTED[0])
        for table in (FORMS, BRANCHES):
            form: Callable[..., Any] | None = table.get(target)
            if form is not None and (made := form(self, node, *node.args, **node.kwargs)) is not None:
                return made
        return self._library(node, name)

    def _item(self, source: Any, index: Any) -> Any:
        several = self.values[source]
        if isinstance(several, ir.Value):  # a sequence, of a length that no trace tells
            return self.op("SequenceAt", several, self.value(index))
        return several[index]

    def _library(self, node: torch.fx.Node, name: str) -> Any:
        args = promoted(self, node)
        if any(isinstance(_like(x), torch.SymInt | torch.SymFloat) for x in node.args):
            name = name.replace(".Scalar", ".Tensor")  # the library takes a scalar for a number that is known
        function = find_function(name, is_complex=any(map(_is_complex, node.all_input_nodes)))
        if function is None or (_is_complex(node) and name == "aten::_to_copy"):
            return self._divided(node, name)
        recorder = Recorder(self.constant, self.fresh)
        kwargs = {key: -1 if key == "dtype" and given is None else self._given(given)
                  for key, given in node.kwargs.items()}  # fmt: skip
        try:
            made = recorder.run(function, [self._given(arg) for arg in args], kwargs)
        except Exception as error:  # of the library, for a combination of arguments that it does not have
            raise self.refuse(node, f"ONNX has no form of {name.replace('::', '.')} with these arguments: "
                              f"{' '.join(str(error).split())[:200]}") from error  # fmt: skip
        self.nodes += recorder.nodes
        self.functions |= recorder.functions
        return list(made) if isinstance(made, tuple) else made

    def _divided(self, node: torch.fx.Node, name: str) -> Any:
        unknown = self.refuse(
            node, f"ONNX has no form of {name.replace('::', '.')}; use other operators in its forward"
        )
        parts = decomposed(node)
        if parts is None:
            raise unknown
        graph, inputs = parts
        try:
            results = self.inline(graph.graph, inputs)
        except CaptureError as error:  # of a part, which the model's author did not write
            raise unknown from error
        return results if isinstance(node.meta["val"], list | tuple) else results[0]

    def _given(self, argument: Any) -> Any:
        """An argument of a call, as the function library takes it."""
        if isinstance(argument, torch.fx.Node):
            return self.values[argument]
        if isinstance(argument, list | tuple):
            return [self._given(each) for each in argument]
        if isinstance(argument, torch.dtype):
            return int(ir.tensor_adapters.from_torch_dtype(argument))
        if isinstance(argument, torch.device | torch.layout | torch.memory_format):
            return str(argument)
        return argument

    def _emitted(self, node: torch.fx.Node, *, several: bool) -> Any:
        inputs, kind = node.args[:2]
        assert isinstance(inputs, Sequence)
        more: Mapping[str, Any] = node.kwargs
        domain, like = str(more.get("domain")), node.meta["val"]
        if self._depth and domain == DOMAIN:
            raise self.refuse(
                node, f"{kind} stands within a branch or a loop, which no target lowers; compute both sides and choose "
                "with torch.where",
            )  # fmt: skip
        if domain:
            self.domains.setdefault(domain, more.get("version") or 1)
        outputs = [typed(Symbol(name=self.fresh()), each) for each in (like if several else [like])]
        given = [None if x is None else self.value(x) for x in inputs]
        self.nodes.append(ir.Node(domain, str(kind), given, _attributes(more), outputs=outputs))
        return outputs if several else outputs[0]

    def results(self, wanted: Sequence[Any], names: Sequence[str]) -> list[ir.Value]:
        """The graph's outputs under their names: each a value of its own that a node computes."""
        found: list[ir.Value] = []
        for node, name in zip(wanted, names, strict=True):
            value = self.value(node)
            if value.is_graph_input() or value.producer() is None or value in found:
                value = self.op("Identity", value, like=value)
            value.name = name
            found.append(value)
        return found


def _attributes(encoded: Mapping[str, Any]) -> Iterator[ir.Attr]:
    for key, kind, span in zip(encoded["attr_keys"], encoded["attr_types"], encoded["attr_pos"], strict=True):
        found = list(encoded[_SOURCES[kind[0]]][slice(*span)])
        yield ir.convenience.convert_attribute(key, found if len(kind) > 1 else found[0])


def _name(target: Any) -> str:
    """An operator as PyTorch writes it, without the name of an only overload."""
    found: str = target.name() if hasattr(target, "name") else f"{target.__module__}.{target.__name__}"
    return found.removesuffix(".default")


def _like(argument: Any) -> Any:
    return argument.meta.get("val") if isinstance(argument, torch.fx.Node) else argument


def _is_complex(node: torch.fx.Node) -> bool:
    value = _like(node)
    return isinstance(value, torch.Tensor) and value.is_complex()


def _placeholders(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _place(node: torch.fx.Node) -> str:
    """The module that a call stands in, and the last line of the model's own code that led to it."""
    modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]
    module = modules[-1].partition(".")[2] if modules else ""  # within the wrapper that is traced
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    own = [i for i, line in enumerate(lines) if line.lstrip().startswith("File ") and "/torch/" not in line]
    if not own:
        return module
    file, number = lines[own[-1]].split('"')[1], lines[own[-1]].split("line ")[1].split(",")[0]
    code = lines[own[-1] + 1].strip() if own[-1] + 1 < len(lines) else ""
    return ", ".join(filter(None, (module, f"{file.rpartition('/')[2]}:{number}", code)))
