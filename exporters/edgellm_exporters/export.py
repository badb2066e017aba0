"""An export: its options are checked, a whole bundle is made beside its destination, and only a proved one appears."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from edgellm.models.protocol import LanguageModel, answers_sources
from edgellm.streaming import OwnWeights, Weights
from edgellm_exporters.atomic import check_destination, whole_directory
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.engines.tensorrt import check_engine_options
from edgellm_exporters.errors import ExportError
from edgellm_exporters.graph.capture import check_model
from edgellm_exporters.graph.layers import layer_modules
from edgellm_exporters.graph.targets import find_target
from edgellm_exporters.graph.write import Progress
from edgellm_exporters.options import ExportOptions, TextAssets, check_encoder_options
from edgellm_exporters.pipeline import Exported, Pipeline
from edgellm_exporters.proof.draft_graph import check_drafter
from edgellm_exporters.proof.receipt import check_receipt
from edgellm_exporters.quantize.tuning.layer_stream import check_layers
from edgellm_exporters.quantize.tuning.store import forget
from edgellm_exporters.weights.widened import widened
from edgellm_runtime.backends.ort import library
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.errors import OptionError
from edgellm_runtime.option_ranges import check_defaults

__all__ = ["ExportOptions", "Exported", "TextAssets", "export"]


def export(
    model: LanguageModel, destination: str | Path, *, weights: Weights | None = None,
    options: ExportOptions | None = None, text: TextAssets | None = None, provenance: Mapping[str, Any] | None = None,
    force: bool = False, progress: Progress = lambda what, share: None,
) -> Exported:  # fmt: skip
    """Make a bundle that computes what the model computes, and prove it before it appears.

    Args:
        model: follows :class:`edgellm.models.protocol.LanguageModel`.
        destination: the bundle's directory: nothing yet, an empty one or, with ``force``, a bundle.
        weights: where the parameters of a model on the meta device are read from, one by one, so that memory does not
            grow with the model; None for a model that holds them.
        options: what to make.
        text: tokenizer and chat template; None for a model of token ids only.
        provenance: where the model came from, for the manifest.
        force: replace a bundle that is there when the new one is finished; other files are never replaced.
        progress: told what is being done and how much of it.

    Returns:
        The opened bundle with its parity report.

    Raises:
        ExportError: the model cannot be captured, lowered or quantized, the disk is full, or the result is not equal
            (:class:`ParityError`). No bundle is left behind.
    """
    options, destination = options or ExportOptions(), Path(destination)
    check_destination(destination, force=force)
    check_model(model)
    options = _checked(options, model, text)
    assert isinstance(model, nn.Module)
    was_training = model.training
    model.eval()
    gc.freeze()  # what is there stays: each look at PyTorch's own objects takes a tenth of a second and more
    try:
        with whole_directory(destination, force=force) as scratch, widened(model) as note:
            name = options.name or destination.name
            source = weights or OwnWeights(model)
            exported = Pipeline(model, source, scratch, name, options, text, provenance or {}, progress).run()
    finally:
        model.train(was_training)
        gc.unfreeze()
    if options.tuning is not None and options.tuning.directory is not None:
        forget(options.tuning.directory)
    notes = (*exported.notes, note) if note else exported.notes
    return dataclasses.replace(exported, bundle=Bundle(destination, checksums=False), notes=notes)


def _checked(options: ExportOptions, model: LanguageModel, text: TextAssets | None) -> ExportOptions:
    """Options that the model can follow, before any work; what is said of generation as it will be read."""
    generation = _checked_generation(options.generation, model, text)
    if options.receipt is not None:
        check_receipt(model, text is not None, options.dtype)
    library()  # the proof at the end needs it, so its absence is told now
    if answers_sources(model):
        check_encoder_options(options)
    if options.drafter is not None:
        check_drafter(options.drafter, options.target, model.config.vocab_size, hidden=options.hidden)
    if find_target(options.target).roles:
        check_engine_options(options.engine or EngineOptions(), {"method": options.quantize})
    assert isinstance(model, nn.Module)
    if options.tuning is not None:
        check_layers(model, list(layer_modules(model)))
    return dataclasses.replace(options, generation=generation)


def _checked_generation(options: Mapping[str, Any], model: LanguageModel, text: TextAssets | None) -> dict[str, Any]:
    try:
        found = check_defaults(options, model.config.vocab_size)
    except OptionError as error:
        raise ExportError(f"generation: {error}; correct it, in a checkpoint's generation_config.json") from error
    if text is None and found.get("stop"):
        raise ExportError(f"generation: stop is {found['stop']!r}, but there is no tokenizer; leave stop out")
    return found
