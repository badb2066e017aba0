"""What is run: models of random weights, their graphs for CUDA, and the same models in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["BOUNDS", "Lowered", "TorchRunner", "parity_of", "shapes"]

# largest difference of a logit relative to the largest, and share of equal most likely tokens, against PyTorch in
# float32 with the very same weights
BOUNDS = {"float16": (0.01, 0.98), "bfloat16": (0.06, 0.9)}


def shapes(quick: bool) -> dict[str, Callable[[], Any]]:
    """Models by name: two decoders of well-known sizes, and the recurrent hybrid; tiny ones if quick."""
    from edgellm.models.decoder import Decoder, DecoderConfig
    from edgellm.models.hybrid import Hybrid, HybridConfig
    from edgellm.models.registry import find

    if quick:
        small = DecoderConfig(vocab_size=211, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
                              mlp_width=128, max_context=64)  # fmt: skip
        mixed = HybridConfig(vocab_size=211, width=64, pattern=("lstm", "attention"), num_heads=4, num_kv_heads=2,
                             recurrent_width=64, mlp_width=128, max_context=64)  # fmt: skip
        return {"tiny decoder": lambda: Decoder(small), "tiny hybrid": lambda: Hybrid(mixed)}
    smollm2 = DecoderConfig(vocab_size=49152, width=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
                            mlp_width=1536, max_context=2048, tie_embeddings=True)  # fmt: skip
    larger = DecoderConfig(vocab_size=151936, width=1536, num_layers=28, num_heads=12, num_kv_heads=2, head_dim=128,
                           mlp_width=8960, max_context=2048, tie_embeddings=True)  # fmt: skip
    reference = find("hybrid").presets["reference"]
    return {"SmolLM2 shape": lambda: Decoder(smollm2), "hybrid reference": lambda: Hybrid(reference),  # type: ignore[arg-type]
            "1.5B shape": lambda: Decoder(larger)}  # fmt: skip


class Lowered:
    """A model's graph for the cuda target, with the plan that it was quantized by.

    Args:
        model: in eval mode, with weights on the CPU.
        dtype: of activations.
        method: of quantization.
        folder: where it is written.
    """

    def __init__(self, model: Any, dtype: str, method: str, folder: Path) -> None:
        import dataclasses

        from edgellm_exporters.graph.capture import capture, signature_of
        from edgellm_exporters.graph.lower import lower_to, prepare
        from edgellm_exporters.graph.targets import find_target
        from edgellm_exporters.graph.write import write_graph
        from edgellm_exporters.proof.samples import golden_rows
        from edgellm_exporters.quantize.methods import find_method
        from edgellm_exporters.quantize.planning import make_plan

        target, config = find_target("cuda"), model.config
        graph = prepare(capture(model), target)
        rows = golden_rows(None, config.vocab_size, config.max_context).rows
        self.plan = make_plan(find_method(method, target.methods), graph, model, rows)
        folder.mkdir(parents=True)
        write_graph(lower_to(graph, target, self.plan, dtype=dtype), folder, lambda what, share: None)
        whole = signature_of(model)
        state = tuple(dataclasses.replace(spec, dtype=dtype) for spec in whole.state)
        self.signature = dataclasses.replace(whole, inputs=(*whole.inputs, *target.inputs), state=state)
        self.folder, self.config = folder, config
        self.weight_bytes = (folder / "model.onnx.data").stat().st_size

    def session(self, device: str, *, capture: bool = True, profile: Path | None = None) -> Any:
        """Steps of the graph on a device."""
        from edgellm_runtime.backends.ort_device import OrtDeviceBackend
        from edgellm_runtime.session import Session

        context = self.config.max_context
        backend = OrtDeviceBackend(
            self.folder / "model.onnx", self.signature, max_context=context, device=device, capture=capture,
            profile=profile,
        )  # fmt: skip
        return Session(backend, self.signature, max_context=context, ragged_chunks=False)


class TorchRunner:
    """The same model in PyTorch: edgellm's own modules, eager or compiled.

    Args:
        model: in eval mode.
        dtype: of weights, activations and state.
        device: where.
        compiled: which backend of ``torch.compile``; empty for none.
    """

    def __init__(self, model: Any, dtype: str, device: str, *, compiled: str) -> None:
        import copy

        import torch

        self.torch, self.device, self.dtype = torch, device, getattr(torch, dtype)
        self.model = copy.deepcopy(model).to(device, self.dtype)
        self.forward = torch.compile(self.model, backend=compiled) if compiled else self.model

    def start(self, batch: int, capacity: int) -> None:
        """An empty state."""
        from edgellm.models.protocol import empty_state

        self.state = empty_state(self.model, batch, capacity, dtype=self.dtype, device=self.device)
        self.lengths = self.torch.zeros(batch, dtype=self.torch.int32, device=self.device)

    def step(self, tokens: Any) -> Any:
        """Read tokens (batch, time) and choose the next, (batch, 1)."""
        from edgellm.models.protocol import Step

        torch = self.torch
        with torch.inference_mode():
            batch, length = tokens.shape
            valid = torch.full((batch,), length, dtype=torch.int32, device=self.device)
            last = torch.full((batch, 1), length - 1, device=self.device)
            logits, self.state = self.forward(tokens, self.state, Step(self.lengths, valid, last))
            self.lengths = self.lengths + valid
            return logits[:, -1].argmax(-1, keepdim=True)


def parity_of(model: Any, lowered: Lowered, dtype: str, method: str, device: str, session: Any) -> dict[str, Any]:
    """A session's logits against PyTorch's in float32 on the same device, with the same weights."""
    import numpy as np
    import torch

    from edgellm.models.protocol import Step, empty_state
    from edgellm_exporters.quantize.quantized_model import quantized_model

    reference = model if method == "none" else quantized_model(model, lowered.plan, integer_products=False)
    length = min(256, model.config.max_context)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length))
    with torch.no_grad():
        there = torch.from_numpy(tokens).to(device)
        reference = reference.to(device)
        state = empty_state(reference, 1, length, device=device)
        expected = reference(there, state, Step.whole(there))[0][0].double().cpu().numpy()
        model.to("cpu")
    found = session.step(tokens, session.new_state(1, length), logits="all")[0].astype(np.float64)
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    top1 = float((found.argmax(-1) == expected.argmax(-1)).mean())
    most, least = BOUNDS[dtype]
    return {"precision": f"{dtype} {method}", "logits": difference, "top1": top1,
            "ok": difference <= most and top1 >= least}  # fmt: skip
