"""The frame of a model that answers sources, and the layers of its transformer, normed before or after each part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, cast

from torch import Tensor, nn

from edgellm.models.layers.source_attention import SOURCE_MASK, SourceAttention, mask_spec
from edgellm.models.protocol import State, Step
from edgellm_runtime.spec import StateSpec

__all__ = ["DecoderLayer", "EncoderLayer", "SourceStack"]


class _Layer(nn.Module):
    """Parts, each with a norm of its own and beside a residual.

    Args:
        parts: by the names that parameters have, in their order; a part's norm has its name and ``_norm``.
        norm: makes one.
        first: whether what goes into a part is normed; otherwise its sum with the residual is.
    """

    mlp: nn.Module

    def __init__(self, parts: Mapping[str, nn.Module], norm: Callable[[], nn.Module], *, first: bool) -> None:
        super().__init__()
        self.first = first
        for name, part in parts.items():
            pair = ((name, part), (f"{name}_norm", norm()))
            for key, module in reversed(pair) if first else pair:
                self.add_module(key, module)

    def before(self, name: str, x: Tensor) -> Tensor:
        """What a part is given."""
        y: Tensor = getattr(self, f"{name}_norm")(x) if self.first else x
        return y

    def after(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """X with what a part made of it."""
        out: Tensor = x + y if self.first else getattr(self, f"{name}_norm")(x + y)
        return out

    def finish(self, x: Tensor) -> Tensor:
        """The MLP with its residual."""
        return self.after("mlp", x, self.mlp(self.before("mlp", x)))


class EncoderLayer(_Layer):
    """Attention to the whole source and an MLP; the parts ``attention`` and ``mlp``."""

    attention: SourceAttention

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
        """(batch, source, width) to the same shape; mask and bias as for :class:`SourceAttention`."""
        y = self.before("attention", x)
        return self.finish(self.after("attention", x, self.attention(y, *self.attention.keys(y), mask, bias)))


class DecoderLayer(_Layer):
    """A mixer over the answer so far, attention to the source and an MLP; the latter parts ``cross`` and ``mlp``.

    Args:
        parts: as for every layer.
        norm: makes one.
        first: whether what goes into a part is normed; otherwise its sum with the residual is.
        mixer: the name of the mixer, which is called as :meth:`forward` is.
    """

    cross: SourceAttention

    def __init__(
        self, parts: Mapping[str, nn.Module], norm: Callable[[], nn.Module], *, first: bool, mixer: str = "attention"
    ) -> None:
        super().__init__(parts, norm, first=first)
        self.mixer = mixer

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """What the mixer carries, and keys and values of the source."""
        return [*getattr(self, self.mixer).state_specs(prefix, dtype), *self.cross.state_specs(prefix, dtype)]

    def forward(self, x: Tensor, state: State, prefix: str, step: Step, *more: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state; the mixer gets ``more``."""
        y, present = getattr(self, self.mixer)(self.before(self.mixer, x), state, prefix, step, *more)
        x = self.after(self.mixer, x, y)
        x = self.after("cross", x, self.cross.answer(self.before("cross", x), state, prefix))
        return self.finish(x), present


class Answering(Protocol):
    """What a :class:`SourceStack` asks of a layer of the decoder."""

    @property
    def cross(self) -> SourceAttention:
        """Its attention to the source."""
        ...

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """Those of its mixer, and of that attention."""
        ...

    def __call__(
        self, x: Tensor, state: State, prefix: str, step: Step, *more: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and its part of the new state."""
        ...


class SourceStack(nn.Module):
    """What such models do alike; with ``config``, ``encode`` and ``forward`` a :class:`SourceModel`.

    A family gives its token embedding the name ``embedding``, and says which layers answer.
    """

    embedding: nn.Embedding
    place = "layers"  # of these layers' states

    def answering(self) -> Iterable[nn.Module]:
        """The layers of the decoder, first to last; each follows :class:`Answering`."""
        raise NotImplementedError

    def _places(self) -> list[tuple[str, Answering]]:
        return [(f"{self.place}.{i}", cast(Answering, layer)) for i, layer in enumerate(self.answering())]

    @property
    def dtype(self) -> str:
        """Of states that are computed."""
        return str(self.embedding.weight.dtype).removeprefix("torch.")

    def state_specs(self) -> list[StateSpec]:
        """The mask of the sources, what each layer carries, and its keys and values of them."""
        dtype = self.dtype
        return [mask_spec(), *(spec for place, layer in self._places() for spec in layer.state_specs(place, dtype))]

    def read(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The states of sources, of what the encoder made of them (batch, source, width) and their mask."""
        made = {SOURCE_MASK: mask}
        for place, layer in self._places():
            made |= layer.cross.states(x, place)
        return made

    def answered(self, x: Tensor, state: State, step: Step, *more: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) through the layers to the same shape, and the new state; each is given ``more``, too."""
        present: dict[str, Tensor] = {}
        for place, layer in self._places():
            x, new = layer(x, state, place, step, *more)
            present |= new
        return x, present
