"""The 1x1 convolution multiplies by the product of its factors, starts as a rotation, and never changes fixed parts."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_nn import assert_close, moved
from torch import Tensor

from glow_kernels.nn import ChannelPermutation, FlowStep, InvertibleConv1x1

SIZES = [1, 2, 3, 12, 48]


def assemble(layer: InvertibleConv1x1) -> Tensor:
    """``P L (U + diag(s))``, assembled element by element from the entries inside the triangles."""
    channels = layer.channels
    lower, upper = torch.eye(channels, dtype=torch.float64), torch.zeros(channels, channels, dtype=torch.float64)
    for row, column in itertools.product(range(channels), repeat=2):
        if row > column:
            lower[row, column] = layer.lower[row, column]
        elif row < column:
            upper[row, column] = layer.upper[row, column]
        else:
            upper[row, row] = layer.diagonal_sign[row] * layer.log_diagonal[row].exp()
    return layer.permutation.double() @ lower @ upper


@torch.no_grad()
@pytest.mark.parametrize("channels", SIZES)
def test_weight_is_the_product_of_its_factors(channels):
    layer = moved(InvertibleConv1x1(channels).double())
    weight, log_det = layer.matrix()
    assert_close(weight, assemble(layer), 1e-13)
    assert_close(log_det, torch.linalg.slogdet(weight).logabsdet, 1e-12)
    x = torch.randn(2, channels, 3, 4, dtype=torch.float64)
    z, log_det = layer(x)
    assert_close(z, torch.einsum("ij,bjhw->bihw", weight, x), 1e-12)
    assert_close(log_det, (12 * torch.linalg.slogdet(weight).logabsdet).expand(2), 1e-11)


@torch.no_grad()
@pytest.mark.parametrize("lu", [True, False])
@pytest.mark.parametrize("channels", SIZES)
def test_starts_as_a_rotation_or_reflection(channels, lu):
    layer = InvertibleConv1x1(channels, lu)
    weight, _ = layer.matrix()
    # The product is orthogonal up to the rounding of its float32 factors.
    assert_close(weight @ weight.mT, torch.eye(channels), 4 * channels**0.5 * torch.finfo(torch.float32).eps)
    _, log_det = layer(torch.randn(2, channels, 3, 4))
    assert_close(log_det, torch.zeros(2), 12 * 4 * channels**0.5 * torch.finfo(torch.float32).eps)


def test_every_layer_starts_somewhere_else():
    assert not torch.equal(InvertibleConv1x1(4).matrix()[0], InvertibleConv1x1(4).matrix()[0])


def test_entries_outside_the_triangles_do_not_matter():
    layer = moved(InvertibleConv1x1(5).double())
    before, _ = layer.matrix()
    with torch.no_grad():
        layer.lower += torch.randn(5, 5, dtype=torch.float64).triu()
        layer.upper += torch.randn(5, 5, dtype=torch.float64).tril()
    after, _ = layer.matrix()
    assert torch.equal(before, after)
    gradients = torch.autograd.grad(after.square().sum(), [layer.lower, layer.upper])
    assert torch.equal(gradients[0].triu(), torch.zeros_like(after))
    assert torch.equal(gradients[1].tril(), torch.zeros_like(after))


def test_what_is_learned_and_what_is_saved():
    lu, plain, shuffle = InvertibleConv1x1(4), InvertibleConv1x1(4, lu=False), ChannelPermutation(4, "shuffle")
    assert {name for name, _ in lu.named_parameters()} == {"lower", "upper", "log_diagonal"}
    assert set(lu.state_dict()) == {"lower", "upper", "log_diagonal", "permutation", "diagonal_sign"}
    assert [name for name, _ in plain.named_parameters()] == list(plain.state_dict()) == ["weight"]
    assert not list(shuffle.parameters())
    assert list(shuffle.state_dict()) == ["weight"]
    assert torch.equal(lu.diagonal_sign.abs(), torch.ones(4))
    assert torch.equal(lu.permutation.sum(0), torch.ones(4))


@pytest.mark.parametrize("make", [InvertibleConv1x1, lambda c: ChannelPermutation(c, "shuffle")], ids=["lu", "shuffle"])
def test_state_dict_restores_the_map(make):
    layer, other = make(16), make(16)
    x = torch.randn(2, 16, 3, 3)
    assert not torch.equal(layer(x)[0], other(x)[0])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], other(x)[0])


def test_permutations():
    x = torch.randn(2, 16, 3, 3)
    assert torch.equal(ChannelPermutation(16, "reverse")(x)[0], x.flip(1))
    shuffle = ChannelPermutation(16, "shuffle")
    z, log_det = shuffle(x)
    assert torch.equal(log_det, torch.zeros(2))
    assert torch.equal(z, x[:, shuffle.weight.argmax(1)])
    assert not torch.equal(z, x)
    assert torch.equal(z.sort(1).values, x.sort(1).values)
    assert torch.equal(shuffle.inverse(z)[0], x)


def test_a_singular_weight_is_refused_by_the_inverse_only():
    step = FlowStep(4, 8, mixing="plain")
    x = torch.randn(2, 4, 3, 3)
    step(x)
    torch.nn.init.zeros_(step.mixing.weight)
    z, log_det = step(x)
    assert z.isfinite().all()
    assert torch.equal(log_det, torch.full((2,), -torch.inf))
    with pytest.raises(ValueError, match=r"^weight must be invertible, got a singular \(4, 4\) matrix, or"):
        step.inverse(x)
