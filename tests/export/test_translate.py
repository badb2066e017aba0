"""The translator against PyTorch: its numbers, and those of PyTorch's own ONNX exporter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from plain_models import PlainConfig, PlainGemma
from torch import Tensor, nn

from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.graph.capture import OPSET
from edgellm_exporters.graph.translate import translated

BATCH, TIME, WIDTH = 2, 5, 8


def inputs(batch: int = BATCH, time: int = TIME) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers (batch, time, 8), token ids (batch, time), and which are valid (batch, time)."""
    generator = torch.Generator().manual_seed(batch * 100 + time)
    x = torch.randn(batch, time, WIDTH, generator=generator)
    ids = torch.randint(0, 50, (batch, time), generator=generator)
    return x, ids, torch.rand(batch, time, generator=generator) > 0.4


class Of(nn.Module):
    """A function of the three inputs as a module, beside modules that it may use."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor, ids: Tensor, valid: Tensor) -> Any:
        return self.function(x, ids, valid, *self.parts)


def traced(module: nn.Module) -> torch.export.ExportedProgram:
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time", min=5)
    oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=True)
    with warnings.catch_warnings(), oblivious:
        warnings.simplefilter("ignore")
        return torch.export.export(
            module.eval(), inputs(), dynamic_shapes=({0: batch, 1: time},) * 3, strict=False
        ).run_decompositions({})  # fmt: skip


def named(program: torch.export.ExportedProgram) -> list[str]:
    return [f"out{i}" for i in range(len(program.graph_signature.user_outputs))]


def translation(module: nn.Module) -> ir.Model:
    program = traced(module)
    return translated(program, ["x", "ids", "valid"], named(program), opset=OPSET)


def run(model: ir.Model, given: Sequence[Tensor]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    wanted = {i.name for i in session.get_inputs()}
    feeds = {n: t.numpy() for n, t in zip(("x", "ids", "valid"), given, strict=True) if n in wanted}
    return list(session.run(None, feeds))


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


sdpa = F.scaled_dot_product_attention


def rotate(x: Tensor) -> Tensor:
    """Rotary positions by hand, halves turned against each other."""
    width = x.shape[-1]
    angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * 10 ** -torch.arange(width // 2)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    left, right = x[..., : width // 2], x[..., width // 2 :]
    return x * cos + torch.cat([-right, left], -1) * sin


def rotate_complex(x: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[1]).float(), 1.0 / 10 ** torch.arange(WIDTH // 2).float())
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns).flatten(2)


def heads(x: Tensor, count: int = 2) -> Tensor:
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def causal(time: int) -> Tensor:
    return torch.ones(time, time, dtype=torch.bool).tril()


def attend(x: Tensor) -> Tensor:
    scores = heads(x) @ heads(x).mT / math.sqrt(WIDTH / 2)
    scores = scores.masked_fill(~causal(x.shape[1]), float("-inf"))
    return (scores.softmax(-1) @ heads(x)).transpose(1, 2).flatten(2)


def scattered(x: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros(*x.shape[:2], 50).scatter(2, ids[..., None], 1.0)


def written_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 1.0
    y.mul_(2)
    y[..., 2:4].add_(x[..., :2])
    return y


def rows_of(x: Tensor) -> Tensor:
    _, y = torch.ops.higher_order.scan(
        lambda carry, row: (carry * 0.5 + row, carry + row), [x[:, 0]], [x.transpose(0, 1)], []
    )
    return y


PAGE: dict[str, Callable[..., Any]] = {
    "arithmetic with numbers": lambda x, ids, valid: (x * 0.5 + 1, 1 - x, x / 3, 2.0**x, x**2, -x, x % 2, x // 2),
    "numbers of several kinds": lambda x, ids, valid: (ids * 0.5, x + ids[..., None], valid * x[..., 0], ids / 2),
    "whole numbers": lambda x, ids, valid: (ids // 3, ids % 7, ids.int() + 1, ids.int().sum(1), valid.sum(1), -ids),
    "comparisons": lambda x, ids, valid: (x > 0, ids == 3, ids[..., None] <= x, (x != 0) & valid[..., None], ~valid),
    "functions": lambda x, ids, valid: (
        x.exp(), x.tanh(), x.sigmoid(), x.abs().log1p(), x.abs().sqrt(), x.abs().rsqrt(), x.sin(), x.erf(), x.relu(),
        x.clamp(-1, 1), x.clamp(min=0.1), x.round(), x.floor(), x.sign(), x.reciprocal(), x.square(), x.expm1(),
    ),
    "activations": lambda x, ids, valid: (
        F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x), F.softplus(x), F.logsigmoid(x), F.elu(x), F.leaky_relu(x),
        F.mish(x), F.hardswish(x), F.glu(x), F.selu(x), F.relu6(x),
    ),
    "softmax": lambda x, ids, valid: (x.softmax(-1), F.log_softmax(x, 1), x.logsumexp(-1), torch.softmax(x, 0)),
    "sums": lambda x, ids, valid: (
        x.sum(), x.sum(1), x.mean(-1, keepdim=True), x.amax(1), x.amin(-1), x.prod(-1), x.norm(dim=-1), x.cumsum(1),
        ids.cumsum(1), valid.any(1), valid.all(1), x.argmax(-1), ids.int().cumsum(-1), x.max(1).values,
    ),
    "variance": lambda x, ids, valid: (x.var(-1, unbiased=False), x.std(-1), *torch.var_mean(x, -1, keepdim=True)),
    "shapes": lambda x, ids, valid: (
        x.reshape(x.shape[0] * x.shape[1], 8), x.view(x.shape[0], -1, 2, 4), x.flatten(1), x.unflatten(-1, (4, 2)),
        x.transpose(1, 2), x.permute(2, 0, 1), x.mT, x[..., None], x.unsqueeze(1).squeeze(1), x.movedim(0, 1),
        x.reshape(-1), x.unsqueeze(0).expand(3, -1, -1, -1), x.swapaxes(0, 1), x[:, None].repeat(1, 2, 1, 1),
    ),
    "slices": lambda x, ids, valid: (
        x[:, 1:], x[:, :-1], x[..., ::2], x[:, -1], x[0], x[:, 1:3, 2:5], x[:, -2:], x[..., [3, 1]], x.narrow(2, 1, 3),
        x[:, : x.shape[1] // 2], x[:, x.shape[1] - 2 :], x.flip(1), x.roll(1, 2), x.select(2, 3), x[:, None, :, 1:],
    ),
    "joined and cut": lambda x, ids, valid: (
        torch.cat([x, x * 2], 1), torch.stack([x, x], 1), torch.cat([ids, ids.int()], -1), *x.chunk(3, -1),
        *x.split(3, 2), *x.split([1, 7], -1), *x.unbind(-1), *x.tensor_split(3, -1), torch.cat([x, ids[..., None]], 2),
        *x.split([x.shape[1] - 1, 1], 1),
    ),
    "token shift": lambda x, ids, valid: torch.cat([x[:, -1][:, None], x[:, :-1]], 1),
    "new tensors": lambda x, ids, valid: (
        torch.arange(x.shape[1]), torch.arange(1, x.shape[1], 2), torch.zeros_like(x), x.new_ones(x.shape[0], 3),
        torch.full((x.shape[0], 2), 0.5), torch.linspace(0, 1, 5) + x[:, :1, :5], torch.eye(8) @ x[0].T,
        torch.full_like(ids, 7), torch.empty(x.shape[1]).fill_(2.0), torch.tensor([1.0, 2.0]) * x[..., :2],
    ),
    "masks": lambda x, ids, valid: (
        x.masked_fill(~valid[..., None], 0.0), torch.where(valid[..., None], x, -x), torch.where(x > 0, x, 0.0),
        x.masked_fill(x < 0, -torch.inf), causal(x.shape[1]), torch.ones(x.shape[1], x.shape[1]).triu(1) * -1e9,
        torch.where(valid, ids, -100), x * valid[..., None], (x @ x.mT).tril(-1),
    ),
    "gathered": lambda x, ids, valid: (
        x.gather(1, (ids % x.shape[1])[..., None].expand(-1, -1, 8)), x[torch.arange(x.shape[0]), 0],
        x.index_select(2, torch.tensor([0, 2])), x.gather(-1, x.argsort(-1)), x[:, ids[0] % 2],
        x[torch.arange(x.shape[0])[:, None], ids % 2], F.embedding(ids % 8, x[0, 0][:, None].expand(8, 4)),
    ),
    "scattered": lambda x, ids, valid: (
        scattered(x, ids), F.one_hot(ids, 50), torch.zeros(50).index_add(0, ids[0], x[0, :, 0]),
        x.index_fill(2, torch.tensor([1]), 9.0), torch.zeros_like(x).scatter_add(2, ids[..., None].expand_as(x) % 8, x),
    ),
    "sorted": lambda x, ids, valid: (
        x.sort(-1).values, x.argsort(-1, descending=True), *x.topk(3, -1), x.topk(2, -1).values.min(-1).values,
    ),
    "products": lambda x, ids, valid: (
        x @ x.mT, torch.einsum("btd,bsd->bts", x, x), torch.einsum("btd,de->bte", x, torch.eye(8)), x.mT.bmm(x),
        torch.baddbmm(x @ x.mT, x, x.mT), torch.addmm(x[0], x[0], torch.eye(8)), torch.outer(x[0, 0], x[0, 1]),
        torch.tensordot(x, torch.ones(8, 3), 1), x[0] @ x[0, 0], (x[:, :, None] * x[:, None]).sum(-1),
    ),
    "rotary": lambda x, ids, valid: rotate(x),
    "rotary in complex numbers": lambda x, ids, valid: rotate_complex(x),
    "attention by hand": lambda x, ids, valid: attend(x),
    "attention of PyTorch": lambda x, ids, valid: (
        sdpa(heads(x), heads(x), heads(x)),
        sdpa(heads(x), heads(x), heads(x), causal(x.shape[1]), scale=0.3),
        sdpa(heads(x), heads(x), heads(x), (x @ x.mT)[:, None]),
        sdpa(heads(x, 4), heads(x[..., :4]), heads(x[..., 4:]), enable_gqa=True),
        sdpa(heads(x), heads(x), heads(x), valid[:, None, None].expand(-1, 1, x.shape[1], -1)),
    ),
    "soft caps": lambda x, ids, valid: 30.0 * torch.tanh(x @ x.mT / 30.0),
    "padded": lambda x, ids, valid: (F.pad(x, (1, 2)), F.pad(x, (0, 0, 3, 0)), F.pad(ids, (1, 0), value=-1)),
    "repeated": lambda x, ids, valid: (x.repeat_interleave(2, 1), x[:, :, None].expand(-1, -1, 3, -1).flatten(1, 2)),
    "windows": lambda x, ids, valid: F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).mean(-1),
    "dtypes": lambda x, ids, valid: (
        x.double().sum(-1), x.half().float(), ids.float(), x.long(), x.to(torch.int32), valid.to(x.dtype), ids.bool(),
        x.type_as(ids), x.bfloat16().to(torch.float32),
    ),
    "written in place": lambda x, ids, valid: written_in_place(x),
    "no gradients": lambda x, ids, valid: torch.no_grad()(lambda y: y * 2 + 1)(x),
    "sizes": lambda x, ids, valid: (
        x * x.shape[1], x / math.sqrt(x.shape[-1]), torch.arange(-(-x.shape[1] // 2)), x.sum(1) / x.shape[1],
        torch.ones(max(x.shape[1] - 3, 2)), x[:, : x.shape[1] % 4],
    ),
    "branches": lambda x, ids, valid: torch.cond(x.sum() > 0, lambda y: (y * 2,), lambda y: (y - 1,), (x,)),
    "a scan": lambda x, ids, valid: rows_of(x),
    "normed by hand": lambda x, ids, valid: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "unusual": lambda x, ids, valid: (
        x.nan_to_num(), torch.lerp(x, x * 2, 0.3), x.diff(dim=1), x.trace() if x.dim() == 2 else x[0, :5].diagonal(),
        torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])), torch.isin(ids, torch.tensor([3, 4])), x.fmod(2),
        F.cosine_similarity(x, x * 2 + 1, -1), F.normalize(x, dim=-1), x.logical_not(), x.remainder(1.5),
        x.maximum(x * 2),        F.smooth_l1_loss(x, x * 2), torch.atan2(x, x + 1), F.threshold(x, 0.1, 20),
    ),
}  # fmt: skip


def close(found: Sequence[np.ndarray], wanted: Sequence[Tensor], what: str) -> None:
    assert len(found) == len(wanted)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.dtype == b.detach().numpy().dtype, (what, i)
        assert a.shape == tuple(b.shape), (what, i, a.shape, tuple(b.shape))
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=f"{what} {i}")


@pytest.mark.parametrize("name", PAGE)
def test_operators_give_what_pytorch_gives_at_other_sizes_too(name: str) -> None:
    module = Of(PAGE[name])
    model = translation(module)
    assert {node.domain for node in model.graph} == {""}
    for given in (inputs(), inputs(1, 7), inputs(3, 6)):
        close(run(model, given), flat(module(*given)), name)


@pytest.mark.parametrize("name", ["attention by hand", "normed by hand", "rotary", "softmax"])
def test_operators_give_what_pytorchs_own_exporter_gives(name: str) -> None:
    module = Of(PAGE[name])
    program = traced(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.onnx.export(
            program, (), dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
            input_names=["x", "ids", "valid"], output_names=named(program),
        )  # fmt: skip
    assert theirs is not None
    given = inputs(3, 6)
    for ours, other in zip(run(translation(module), given), run(theirs.model, given), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-5)


def test_a_model_of_plain_pytorch_is_captured_without_pytorchs_exporter_and_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", None)
        exported = export(PlainGemma(PlainConfig(num_layers=2)), tmp_path / "out", options=ExportOptions(target="onnx"))
    assert exported.verification.ok
    assert exported.parity.logits < 1e-4
