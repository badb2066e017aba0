"""Complex numbers as pairs of real tensors, which is what a traced model makes of them."""

from __future__ import annotations

import pytest
import torch

from edgellm_exporters.graph.complex_pairs import MAKERS, Pair


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_rotation_by_complex_numbers_is_the_same_by_pairs() -> None:
    x, angles = numbers(2, 5, 3, 8, seed=0), numbers(2, 5, 4, seed=1)

    def rotated(as_complex, polar):  # type: ignore[no-untyped-def]
        turns = polar(torch.ones_like(angles), angles) * 0.7
        return torch.view_as_real(as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns[:, :, None]).flatten(3)

    pairs = rotated(MAKERS[torch.view_as_complex], MAKERS[torch.polar])
    torch.testing.assert_close(pairs, rotated(torch.view_as_complex, torch.polar))


def test_shapes_are_changed_in_both_parts() -> None:
    pair = Pair(numbers(2, 3, seed=0), numbers(2, 3, seed=1))
    plain = torch.complex(pair.real, pair.imag)
    for change in (lambda x: x.unsqueeze(1), lambda x: x.transpose(0, 1), lambda x: x[1:], lambda x: x.to("cpu")):
        torch.testing.assert_close(torch.view_as_real(change(pair)), torch.view_as_real(change(plain)))


def test_what_pairs_have_no_form_of_is_told() -> None:
    pair = Pair(torch.ones(2), torch.ones(2))
    with pytest.raises(TypeError, match="no form in a graph for abs"):
        torch.abs(pair)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="no form in a graph for conj"):
        pair.conj()
