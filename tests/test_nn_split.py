"""The split prior and the top prior are the Gaussians of their formulas, and sample from the density that they score.

The truth is torch.distributions in float64, with a convolution written plainly.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_nn import assert_close, log_abs_det, moved
from test_nn_step import plain_zero_conv
from torch import Tensor
from torch.distributions import Normal

from glow_kernels.nn import SplitPrior, TopPrior

LABELS = torch.tensor([2, 0, 1])
TOP_PRIORS = [(True, None), (False, None), (True, 3), (False, 3)]


def split_distribution(split: SplitPrior, kept: Tensor) -> Normal:
    h = plain_zero_conv(kept, split.prior)
    return Normal(h[:, 0::2], h[:, 1::2].exp())


def top_distribution(top: TopPrior, labels: Tensor | None) -> Normal:
    h = torch.zeros(3, 2 * top.channels, dtype=torch.float64)
    if top.learned:
        h = h + top.common * (3 * top.common_log_scale).exp()
    if labels is not None:
        h = h + top.per_class[labels] * (3 * top.per_class_log_scale).exp()
    mean, log_sd = h[:, :, None, None].chunk(2, dim=1)
    return Normal(mean, log_sd.exp())


def draw_split() -> tuple[SplitPrior, Tensor]:
    return moved(SplitPrior(6).double(), 0.2), torch.randn(3, 6, 4, 2, dtype=torch.float64)


def draw_top(learned: bool, num_classes: int | None) -> tuple[TopPrior, Tensor, Tensor | None]:
    top = moved(TopPrior(4, learned, num_classes).double(), 0.2)
    return top, torch.randn(3, 4, 5, 2, dtype=torch.float64), None if num_classes is None else LABELS


def test_split_keeps_the_first_half_and_scores_the_second(backend):
    split, x = draw_split()
    kept, log_prob = split(x)
    assert torch.equal(kept, x[:, :3])
    distribution = split_distribution(split, kept)
    assert_close(log_prob, distribution.log_prob(x[:, 3:]).sum((1, 2, 3)), 1e-12)
    same, eps = split.encode(x)
    assert torch.equal(same, kept)
    assert_close(eps, (x[:, 3:] - distribution.mean) / distribution.stddev, 1e-12)
    assert_close(split.decode(kept, eps), x, 1e-12)


def test_data_of_low_precision_under_autocast(backend):
    split = moved(SplitPrior(6), 0.2)
    x = torch.randn(3, 6, 4, 2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        kept, log_prob = split(x)
        same, eps = split.encode(x)
        back = split.decode(same, eps)
    assert kept.dtype == eps.dtype == back.dtype == torch.bfloat16
    torch.testing.assert_close(log_prob, split(x.float())[1], rtol=1e-6, atol=0.0)
    assert_close(back[:, :3], x[:, :3], 0.0)
    # eps is rounded to 8 significant bits.
    assert_close(back[:, 3:], x[:, 3:], 2e-2 * float(x.abs().max()))


def test_split_samples_what_it_scores(backend):
    split, x = draw_split()
    kept = x[:, :3]
    torch.manual_seed(1)
    sample, minus_log_prob = split.inverse(kept, temperature=0.5)
    torch.manual_seed(1)
    assert_close(sample, split.decode(kept, 0.5 * torch.randn_like(kept)), 1e-12)
    assert_close(-minus_log_prob, split(sample)[1], 1e-12)
    mode, minus_log_prob = split.inverse(kept, temperature=0.0)
    distribution = split_distribution(split, kept)
    assert_close(mode[:, 3:], distribution.mean, 1e-12)
    assert_close(-minus_log_prob, distribution.log_prob(distribution.mean).sum((1, 2, 3)), 1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("of", [torch.float32, torch.float64])
def test_a_temperature_in_a_tensor_changes_no_type_and_no_shape(shape, of):
    split, kept = moved(SplitPrior(4), 0.2).to(torch.float32), torch.randn(3, 2, 2, 2)
    results = []
    for temperature in (0.5, torch.full(shape, 0.5, dtype=of)):
        torch.manual_seed(1)
        results.append(split.inverse(kept, temperature))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("learned", "num_classes"), TOP_PRIORS)
def test_top_prior_equals_the_formulas(backend, learned, num_classes):
    top, z, labels = draw_top(learned, num_classes)
    distribution = top_distribution(top, labels)
    assert_close(top(z, labels), distribution.log_prob(z).sum((1, 2, 3)), 1e-12)
    eps = top.encode(z, labels)
    assert_close(eps, (z - distribution.mean) / distribution.stddev, 1e-12)
    assert_close(top.decode(eps, labels), z, 1e-12)
    # The density of z is that of eps times the change of volume.
    eps_log_prob = Normal(0.0, 1.0).log_prob(eps).sum((1, 2, 3))
    assert_close(top(z, labels), eps_log_prob + log_abs_det(lambda z: top.encode(z, labels), z), 1e-9)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_priors_start_standard_normal(num_classes):
    expected = torch.full((3,), -0.5 * 24 * math.log(2 * math.pi))
    assert_close(SplitPrior(6)(torch.zeros(3, 6, 4, 2))[1].detach(), expected, 1e-5)
    top = TopPrior(3, num_classes=num_classes)
    assert_close(top(torch.zeros(3, 3, 4, 2), LABELS if num_classes else None).detach(), expected, 1e-5)


def test_top_prior_learns_only_what_it_should():
    assert {name for name, _ in TopPrior(4).named_parameters()} == {"common", "common_log_scale"}
    assert not list(TopPrior(4, learned=False).parameters())
    top = TopPrior(4, learned=False, num_classes=3)
    assert {name for name, _ in top.named_parameters()} == {"per_class", "per_class_log_scale"}
    assert top.per_class.shape == (3, 8)


def test_autocast_does_not_touch_the_densities(backend):
    split, x = moved(SplitPrior(6), 0.2), torch.randn(3, 6, 4, 2)
    top = moved(TopPrior(6, num_classes=3), 0.2)

    def results() -> list[Tensor]:
        kept, eps = split.encode(x)
        return [split(x)[1], eps, split.decode(kept, eps), top(x, LABELS), top.encode(x, LABELS), top.decode(x, LABELS)]

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = results()
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_labels_of_single_samples_are_mapped():
    top, z = moved(TopPrior(4, num_classes=3).double(), 0.2), torch.randn(3, 4, 2, 2, dtype=torch.float64)
    single = torch.func.vmap(lambda z, label: top(z[None], label[None]).squeeze())
    assert_close(single(z, LABELS), top(z, LABELS), 1e-12)
