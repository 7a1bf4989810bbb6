"""Statistics for the initialisation of ActNorm, on every backend that can run here.

Proven against the two-pass formula in float64: mean and population standard deviation, their stability far from
zero, and that ranks with batches of any size, even empty ones, compute the statistics of all data.
"""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operators import (
    DTYPES,
    INTERPRETED,
    LAYOUTS,
    PROPERTY,
    SHAPES,
    Case,
    OperatorProperties,
    any_shape,
    assert_accurate,
    check_results,
    evaluate,
    in_layout,
)
from ranks import run

import glow_kernels as gk


def plain(x):
    """Mean and standard deviation in two passes."""
    channels = x.transpose(0, 1).flatten(1)
    mean = channels.mean(1)
    return mean, (channels - mean[:, None]).square().mean(1).sqrt()


CASE = Case("statistics", gk.actnorm_statistics, plain, lambda shape: (torch.randn(tuple(shape), dtype=torch.float64),))


class TestProperties(OperatorProperties):
    """Properties of every operator."""

    module = "actnorm_statistics"
    arguments: ClassVar = {"forward": lambda shape, lay: (lay(torch.randn(tuple(shape))),)}
    cases: ClassVar = [CASE]
    shapes = SHAPES


@given(data=st.data(), shape=any_shape(smallest=1))
@PROPERTY
def test_anything_is_as_accurate_as_eager(backend, data, shape):
    inputs = CASE.draw(shape, data.draw(st.sampled_from(list(DTYPES.values()))))
    check_results(CASE, in_layout(inputs, data.draw(st.sampled_from(list(LAYOUTS)))))


@pytest.mark.parametrize("size", [*range(1, 51), 384])
def test_every_number_of_channels(backend, size):
    check_results(CASE, CASE.draw((2, size, 3, 5)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_means_that_move_along_the_positions(backend, layout):
    (x,) = CASE.draw((2, 3, 5000))
    check_results(CASE, in_layout([x + torch.arange(5000) * 1e-3], layout))


@pytest.mark.parametrize("first", [1e4, -1e7], ids=["like_the_others", "far_away"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_mean_of_a_million_standard_deviations_does_not_cancel(backend, layout, first):
    if backend == "triton" and INTERPRETED and first < 0:
        pytest.skip(
            "the interpreter adds rows one after the other in float32, which loses small ones beside a large one"
        )
    # In float32 E[x^2] - E[x]^2 has an error of 1e8 * 6e-8, 60 000 times the variance of 1e-4.
    x = 1e4 + 1e-2 * torch.randn(8, 3, 16, 16)
    x[:4, :, 0, 0] = first
    (x,) = in_layout([x], layout)
    mean, std = gk.actnorm_statistics(x)
    true_mean, true_std = plain(x.double())
    eager_mean, eager_std = plain(x)
    assert_accurate(mean, true_mean, eager_mean, "mean")
    assert_accurate(std, true_std, eager_std, "std", unit=0.0)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4, 1e30], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_constant_channel_has_no_deviation(backend, value, dtype):
    x = torch.randn(3, 3, 5, 7, dtype=dtype)
    x[:, 1] = value
    mean, std = gk.actnorm_statistics(x)
    assert mean[1] == x[0, 1, 0, 0]
    assert std[1] == 0
    assert (std[[0, 2]] > 0.5).all()


def test_nan_and_infinity_show_in_their_channel_only(backend):
    x = torch.randn(3, 4, 5)
    x[1, 0, 2], x[1, 2, 2] = torch.nan, torch.inf
    mean, std = gk.actnorm_statistics(x)
    assert torch.equal(mean.isfinite() & std.isfinite(), torch.tensor([False, True, False, True]))


def test_statistics_carry_no_gradient(backend):
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert not any(statistic.requires_grad for statistic in gk.actnorm_statistics(x))


# What each of two ranks sees, for every question put to them.
QUESTIONS = {
    "different_batches": lambda: [torch.randn(2, 5, 4, 4), 3 + 2 * torch.randn(7, 5, 4, 4)],
    "different_positions": lambda: [torch.randn(3, 5, 2, 9), torch.randn(3, 5, 7)],
    "first_rank_empty": lambda: [torch.empty(0, 5, 4), torch.randn(3, 5, 4)],
    "second_rank_empty": lambda: [torch.randn(3, 5, 4), torch.empty(0, 5, 4)],
    "means_far_apart": lambda: [1e3 + torch.randn(4, 5), torch.randn(6, 5) - 1e3],
    "far_from_zero": lambda: [1e4 + 1e-2 * torch.randn(64, 5), 1e4 + 1e-2 * torch.randn(32, 5)],
    "bfloat16": lambda: [torch.randn(4, 5).bfloat16(), 1 + torch.randn(6, 5).bfloat16()],
    "float64": lambda: [torch.randn(4, 5).double(), 1 + torch.randn(6, 5).double()],
    "nan_on_one_rank": lambda: [torch.full((2, 5), torch.nan), torch.randn(3, 5)],
}


def rank_data(question: str) -> list[torch.Tensor]:
    """The same data in every process, on the CPU, since gloo sends CPU tensors."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        return QUESTIONS[question]()


def answer(rank: int) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """All questions on every backend as one of two ranks."""
    answers = {}
    for backend in gk.available_backends():
        with gk.use_backend(backend):
            answers[backend] = {name: gk.actnorm_statistics(rank_data(name)[rank]) for name in QUESTIONS}
    return answers


@pytest.fixture(scope="module")
def answers_of_two_ranks(tmp_path_factory):
    """What two processes say, one entry per rank."""
    return run(answer, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("question", QUESTIONS)
def test_ranks_agree_on_the_statistics_of_all_data(backend, answers_of_two_ranks, question):
    first, second = (answers[backend][question] for answers in answers_of_two_ranks)
    data = rank_data(question)
    together = torch.cat([x.movedim(1, -1).flatten(0, -2) for x in data])
    if question == "nan_on_one_rank":
        assert all(statistic.isnan().all() for statistic in (*first, *second))
        return
    eager = evaluate(plain, [together], first[0].dtype)
    for mine, others, truth, naive in zip(first, second, evaluate(plain, [together.double()]), eager, strict=True):
        assert torch.equal(mine, others)
        assert mine.dtype == torch.promote_types(data[0].dtype, torch.float32)
        assert_accurate(mine, truth, naive, question, unit=0.0)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "x must be a tensor, got list"),
        (torch.zeros(2, 3).int(), TypeError, "x must be a floating-point tensor, got int32"),
        (torch.zeros(2, 3).bool(), TypeError, "x must be a floating-point tensor, got bool"),
        (torch.zeros(2, 3).cfloat(), TypeError, "x must be a floating-point tensor, got complex64"),
        (
            torch.zeros(3),
            ValueError,
            "x must be (B, C, *spatial) with 0 to 3 spatial dimensions, got shape (3,)",
        ),
        (torch.zeros(0, 3), ValueError, "x must have at least one sample and one position, got shape (0, 3)"),
        (torch.zeros(2, 3, 0), ValueError, "x must have at least one sample and one position, got shape (2, 3, 0)"),
    ],
    ids=["no_tensor", "integer", "bool", "complex", "one_dimension", "no_sample", "no_position"],
)
def test_bad_arguments_are_named(x, error, message):
    with pytest.raises(error) as caught:
        gk.actnorm_statistics(x)
    assert str(caught.value) == message
