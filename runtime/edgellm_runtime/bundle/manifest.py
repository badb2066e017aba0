"""What a bundle says of itself: the manifest, every key of it checked. The format is in docs/bundle-format.md."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from edgellm_runtime.bundle.draft_info import DraftInfo, draft_signature
from edgellm_runtime.bundle.encoder_info import EncoderInfo, check_engines
from edgellm_runtime.bundle.engine_info import ENCODE, ROLES, ChooserInfo, EngineInfo, GraphInfo
from edgellm_runtime.bundle.limits import MAX_WIDTH
from edgellm_runtime.errors import BundleError, first_line
from edgellm_runtime.graphs.operators import TARGETS
from edgellm_runtime.option_ranges import check_defaults
from edgellm_runtime.spec import ADAPTER, ADAPTER_NAME, BATCH, HIDDEN, Signature, SpecError, TensorSpec, adapter_spec
from edgellm_runtime.task_spec import TaskSpec

__all__ = ["FORMAT", "GRAPH", "MANIFEST", "TEXT_FILES", "FileInfo", "Manifest", "TokenizerInfo"]

FORMAT = 2
MANIFEST, GRAPH = "manifest.json", "model.onnx"
TEXT_FILES = ("tokenizer.json", "chat_template.jinja", "goldens.json")
_MAX_NAME = 255
_T = TypeVar("_T")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_KEYS = {"format", "name", "target", "signature", "max_context", "ragged_chunks", "dtype", "files"}


@dataclass(frozen=True)
class FileInfo:
    """What a file must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TokenizerInfo:
    """What the runtime must know besides ``tokenizer.json``.

    Args:
        bos_token_id: the token that begins a text, or None.
        eos_token_ids: the tokens that end one; the first is the usual one.
        add_bos: whether plain text begins with ``bos_token_id``.
        has_chat_template: whether there is a ``chat_template.jinja``.
        special_tokens: the tokenizer's own names of its special tokens, such as ``{"pad_token": "<pad>"}``.
        add_eos: whether a plain source ends with the first of ``eos_token_ids``; of models with an encoder only.
    """

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    add_bos: bool = False
    has_chat_template: bool = False
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    add_eos: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "bos_token_id": self.bos_token_id, "eos_token_ids": list(self.eos_token_ids), "add_bos": self.add_bos,
            "has_chat_template": self.has_chat_template, "special_tokens": dict(self.special_tokens),
            "add_eos": self.add_eos,
        }  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Args:
        name: for people.
        target: ``name``, and what the device needs: ``requires``, library to least version.
        signature: the graph's inputs, outputs and state.
        max_context: the most tokens that a row may hold.
        ragged_chunks: see :class:`edgellm_runtime.session.Session`.
        dtype: of activations and unquantized weights.
        files: every file but the manifest.
        tokenizer: None for a model of token ids only.
        quantization: ``method`` and figures, for people; ``{"method": "none"}`` when there is none.
        provenance: where it came from, for people.
        bounds: what ``verify`` holds the bundle to; see :mod:`edgellm_runtime.checks.verify`.
        exact_bounds: what it must hold to against PyTorch with its very numbers, on a processor of the export's kind.
        layers: by the path of a layer whose output the graph names, what ``verify`` holds it to: ``bound``, of its
            samples' distance from PyTorch with its very numbers, ``rounding``, the most that sums in another order make
            of a token's output, and ``distance``, what the exporter found from the float model.
        far: what it must hold to at a row that begins far into the context, likewise.
        measured: what the exporter measured against PyTorch, for people.
        receipt: how well it predicts a text, for people and for whoever measures it again.
        task: what the model was trained to do; None: to go on with a text.
        generation: options of generation for whoever names no others; see :mod:`edgellm_runtime.option_ranges`.
        vocab_size: how many tokens there are; 0: as many as logits, which only a model that labels tokens differs from.
        graphs: role to graph, where there is one for prompts and one for single tokens; empty: ``model.onnx`` for all.
        capacity: slots that each row of the state must have, for such graphs; None: the caller's choice.
        engines: built from those graphs.
        choosers: engines that choose tokens from the logits of one position.
        encoder: of a model that answers sources; None: it goes on with texts.
        drafter: proposes tokens that the model then checks; None: there is none.
        adapters: names of those that a row may have one of; the first is number 1 in the state that chooses.
    """

    name: str
    target: Mapping[str, Any]
    signature: Signature
    max_context: int
    ragged_chunks: bool
    dtype: str
    files: Mapping[str, FileInfo]
    tokenizer: TokenizerInfo | None = None
    quantization: Mapping[str, Any] = field(default_factory=lambda: {"method": "none"})
    provenance: Mapping[str, Any] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    exact_bounds: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    far: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)
    receipt: Mapping[str, Any] = field(default_factory=dict)
    task: TaskSpec | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    vocab_size: int = 0
    graphs: Mapping[str, GraphInfo] = field(default_factory=dict)
    capacity: int | None = None
    engines: tuple[EngineInfo, ...] = ()
    choosers: tuple[ChooserInfo, ...] = ()
    encoder: EncoderInfo | None = None
    drafter: DraftInfo | None = None
    adapters: tuple[str, ...] = ()

    @property
    def graph_files(self) -> tuple[str, ...]:
        """The names of the graphs."""
        steps = tuple(graph.file for graph in self.graphs.values()) or (GRAPH,)
        return (*steps, *(part.file for part in (self.encoder, self.drafter) if part is not None))

    def signature_of(self, graph: str) -> Signature:
        """What a graph of that name takes and gives."""
        if self.drafter is not None and graph == self.drafter.file and self.signature.hidden is not None:
            return draft_signature(int(self.signature.hidden.shape[-1]), self.drafter.width)
        return self.signature.encoder if self.encoder and graph == self.encoder.file else self.signature

    @property
    def width(self) -> int:
        """Over how many tokens or labels the logits are."""
        return int(self.signature.outputs[0].shape[-1])

    @property
    def known_files(self) -> frozenset[str]:
        """The names of files that are something else than weights."""
        return frozenset((*self.graph_files, *self.engine_files, *TEXT_FILES))

    @property
    def engine_files(self) -> frozenset[str]:
        """The names of the engines, of either kind."""
        return frozenset(e.file for e in (*self.engines, *(chooser.engine for chooser in self.choosers)))

    def to_json(self) -> dict[str, Any]:
        return {
            # readers of 1 would step such a graph piece by piece
            "format": FORMAT if self.signature.one_pass else 1,
            "name": self.name,
            "target": dict(self.target),
            "dtype": self.dtype,
            "quantization": dict(self.quantization),
            "max_context": self.max_context,
            "ragged_chunks": self.ragged_chunks,
            "tokenizer": None if self.tokenizer is None else self.tokenizer.to_json(),
            "provenance": dict(self.provenance),
            "bounds": dict(self.bounds),
            "exact_bounds": dict(self.exact_bounds),
            "layers": {path: dict(figures) for path, figures in self.layers.items()},
            "far": dict(self.far),
            "measured": dict(self.measured),
            **({"receipt": dict(self.receipt)} if self.receipt else {}),
            "task": None if self.task is None else self.task.to_json(),
            **({"generation": dict(self.generation)} if self.generation else {}),
            "vocab_size": self.vocab_size,
            **self._roles_json(),
            **({} if self.encoder is None else {"encoder": self.encoder.to_json()}),
            **({} if self.drafter is None else {"drafter": self.drafter.to_json()}),
            **({"adapters": list(self.adapters)} if self.adapters else {}),
            "files": {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in self.files.items()},
            "signature": self.signature.to_json(),
        }

    def _roles_json(self) -> dict[str, Any]:
        if not self.graphs:
            return {}
        return {
            "graphs": {role: graph.to_json() for role, graph in self.graphs.items()},
            "capacity": self.capacity,
            "engines": [engine.to_json() for engine in self.engines],
            **({"choosers": [chooser.to_json() for chooser in self.choosers]} if self.choosers else {}),
        }

    @classmethod
    def from_json(cls, data: Any, source: Path) -> Manifest:
        """Check and read a manifest.

        Args:
            data: the parsed JSON, of which nothing is believed yet.
            source: the file, for messages.

        Raises:
            BundleError: a newer format, a missing key, a value of the wrong kind.
        """
        if not isinstance(data, dict) or type(data.get("format")) is not int or data["format"] < 1:
            raise BundleError(f"{source}: not an edgellm manifest; export the model again")
        if data["format"] > FORMAT:
            raise BundleError(
                f"{source}: format {data['format']}, this runtime reads up to {FORMAT}; install a newer edgellm"
            )
        if missing := _KEYS - data.keys():
            raise BundleError(f"{source}: {sorted(missing)} missing; export the model again")
        try:
            return cls._parse(data)
        except (SpecError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BundleError(f"{source}: damaged ({first_line(error)}); export the model again") from error

    @classmethod
    def _parse(cls, data: dict[str, Any]) -> Manifest:
        _check_texts(data)
        files = {name: FileInfo(_whole(f["bytes"]), _a(str, f["sha256"])) for name, f in data["files"].items()}
        for name in files:
            if not _FILE_NAME.fullmatch(name) or name.lower() == MANIFEST or len(name) > _MAX_NAME:
                raise ValueError(f"file name {name[:80]!r} is not a plain name inside the bundle")
        if len({name.lower() for name in files}) < len(files):  # one file on some disks
            raise ValueError("two files' names differ in capital letters only")
        tokenizer = data.get("tokenizer")
        if tokenizer is not None:
            bos = tokenizer.get("bos_token_id")
            tokenizer = TokenizerInfo(
                None if bos is None else _whole(bos), tuple(_whole(t) for t in tokenizer["eos_token_ids"]),
                _a(bool, tokenizer["add_bos"]), _a(bool, tokenizer["has_chat_template"]),
                {name: _a(str, text) for name, text in _a(dict, tokenizer.get("special_tokens", {})).items()},
                _a(bool, tokenizer.get("add_eos", False)),
            )  # fmt: skip
        signature = Signature.from_json(data["signature"])
        if not signature.outputs or type(signature.outputs[0].shape[-1]) is not int:
            raise ValueError("the signature must have an output, logits over a vocabulary of known size")
        if wrong := [t.name for t in signature.outputs[1:] if not _is_hidden(t)]:
            raise ValueError(f"the signature has a further output {wrong[0]!r}; only hidden states may be one")
        if signature.outputs[0].shape[-1] > MAX_WIDTH:
            raise ValueError(f"logits over {signature.outputs[0].shape[-1]}, of at most {MAX_WIDTH}")
        task = None if data.get("task") is None else TaskSpec.from_json(data["task"])
        width = signature.outputs[0].shape[-1]
        if task is not None and task.labels and len(task.labels) != width:
            raise ValueError(f"{len(task.labels)} labels for logits over {width}")
        target = _a(dict, data["target"])
        if _a(str, target["name"]) not in TARGETS:
            raise ValueError(f"target {target['name'][:80]!r} is none of {', '.join(TARGETS)}")
        encoder, roles = _encoder(data, files, signature), _roles(data, files, width)
        check_engines(encoder, roles.get("engines", ()), signature)
        return cls(
            name=_a(str, data["name"]), target=target, signature=signature,
            max_context=_whole(data["max_context"], least=1), ragged_chunks=_a(bool, data["ragged_chunks"]),
            dtype=_a(str, data["dtype"]), files=files, tokenizer=tokenizer,
            quantization=_a(dict, data.get("quantization", {"method": "none"})),
            provenance=_a(dict, data.get("provenance", {})),
            bounds={k: _number(v) for k, v in _a(dict, data.get("bounds", {})).items()},
            exact_bounds={k: _number(v) for k, v in _a(dict, data.get("exact_bounds", {})).items()},
            layers={
                path: {k: _number(_a(dict, figures)[k]) for k in ("bound", "rounding", "distance")}
                for path, figures in _a(dict, data.get("layers", {})).items()
            },
            far={k: _number(v) for k, v in _a(dict, data.get("far", {})).items()},
            measured={k: _number(v) for k, v in _a(dict, data.get("measured", {})).items()},
            receipt=_a(dict, data.get("receipt", {})),
            task=task, generation=_generation(data, width), vocab_size=_whole(data.get("vocab_size", 0)),
            **roles, encoder=encoder,
            drafter=_drafter(data, files, signature),
            adapters=_adapters(data, signature),
        )  # fmt: skip


def _is_hidden(tensor: TensorSpec) -> bool:
    known = (tensor.name, tensor.shape[:-1], tensor.dtype) == (HIDDEN, (BATCH, "time"), "float32")
    return known and type(tensor.shape[-1]) is int and tensor.shape[-1] <= MAX_WIDTH


def _generation(data: dict[str, Any], width: int) -> dict[str, Any]:
    """The model's own options; texts that end an answer need a tokenizer."""
    found = check_defaults(_a(dict, data.get("generation", {})), _whole(data.get("vocab_size", 0)) or width)
    if found.get("stop") and data.get("tokenizer") is None:
        raise ValueError("generation has stop, but there is no tokenizer")
    return found


def _encoder(data: dict[str, Any], files: Mapping[str, FileInfo], signature: Signature) -> EncoderInfo | None:
    """The encoder, which is there if it makes a state."""
    given = data.get("encoder")
    if (given is not None) != bool(signature.encoded):
        raise ValueError(f"an encoder {given!r} and {len(signature.encoded)} states of sources: one without the other")
    if given is None:
        return None
    size = _whole(data.get("vocab_size", 0)) or int(signature.outputs[0].shape[-1])
    found = EncoderInfo.from_json(_a(dict, given), vocab_size=size, max_context=_whole(data["max_context"], least=1))
    steps = {graph["file"] for graph in _a(dict, data.get("graphs", {})).values()}
    if found.file not in files or found.file in {GRAPH, *steps}:
        raise ValueError(f"an encoder in {found.file!r}, which is not a further one of the files")
    return found


def _drafter(data: dict[str, Any], files: Mapping[str, FileInfo], signature: Signature) -> DraftInfo | None:
    """The drafter, if there is one; it reads hidden states."""
    if data.get("drafter") is None:
        return None
    if signature.hidden is None or data.get("graphs") or data.get("encoder") is not None:
        raise ValueError("a drafter without hidden states, or beside an encoder or graphs of fixed sizes")
    found = DraftInfo.from_json(_a(dict, data["drafter"]))
    if found.file not in files or found.file == GRAPH:
        raise ValueError(f"a drafter in {found.file!r}, which is not a further one of the files")
    return found


def _adapters(data: dict[str, Any], signature: Signature) -> tuple[str, ...]:
    """The adapters, of which there are some if a state chooses among them."""
    names = tuple(_a(list, data.get("adapters", [])))
    if any(type(name) is not str or not ADAPTER_NAME.fullmatch(name) for name in names) or len({*names}) < len(names):
        raise ValueError("adapters are no list of different names")
    states = [spec for spec in signature.state if spec.name == ADAPTER]
    if states != ([adapter_spec()] if names else []):
        raise ValueError(f"{len(names)} adapters and {len(states)} states that choose one")
    return names


def _roles(data: dict[str, Any], files: Mapping[str, FileInfo], width: int) -> dict[str, Any]:
    """Graphs, capacity and engines, which go together."""
    graphs = {role: GraphInfo.from_json(graph) for role, graph in _a(dict, data.get("graphs", {})).items()}
    engines = tuple(EngineInfo.from_json(engine, (*ROLES, ENCODE)) for engine in _a(list, data.get("engines", [])))
    choosers = tuple(ChooserInfo.from_json(entry, width) for entry in _a(list, data.get("choosers", [])))
    if not graphs:
        if engines or choosers or data.get("capacity") is not None:
            raise ValueError("engines or a capacity without graphs")
        return {}
    if set(graphs) != set(ROLES) or graphs["decode"].time != 1:
        raise ValueError(f"graphs {sorted(graphs)} instead of {sorted(ROLES)}, the latter of one token")
    capacity = _whole(data["capacity"], least=_whole(data["max_context"], least=1) + graphs["prefill"].time)
    built = (*engines, *(chooser.engine for chooser in choosers))
    if absent := {*(graph.file for graph in graphs.values()), *(e.file for e in built)} - files.keys():
        raise ValueError(f"{sorted(absent)} not among the files")
    return {"graphs": graphs, "capacity": capacity, "engines": engines, "choosers": choosers}


def _whole(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**62:
        raise ValueError(f"{value!r} is not a whole number from {least}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return value  # type: ignore[no-any-return]


def _a(kind: type[_T], value: Any) -> _T:
    if type(value) is not kind:
        raise ValueError(f"{value!r} is not a {kind.__name__}")
    return value


def _check_texts(value: Any) -> None:
    """Refuse texts that a terminal would obey or that cannot be encoded; some are printed as they are."""
    if isinstance(value, str) and any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in value):
        raise ValueError(f"{value!r} holds control characters")
    if isinstance(value, dict):
        _check_texts([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for item in value:
            _check_texts(item)
