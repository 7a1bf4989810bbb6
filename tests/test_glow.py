"""The whole model is a density: its log-determinant, its formulas, its samples, and its round trip after training.

The latents are standard normal under the model: ``log_prob`` is their log-density plus the log-determinant of
autograd's Jacobian of ``encode``, in float64. The formulas are composed of those in the flow step's test.
"""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_nn import assert_close, log_abs_det, moved, ready, standard_normal_log_prob
from test_nn_split import split_distribution, top_distribution
from test_nn_step import compiled, plain_step
from torch import Tensor

import glow_kernels as gk
from glow_kernels.models import Glow
from glow_kernels.nn import FlowStep
from glow_kernels.training import data

# Channels, image size, steps, levels, options.
MODELS = {
    "one-level": (3, (4, 4), 1, 1, {}),
    "grey-wide": (1, (4, 8), 2, 2, {}),
    "colour-high": (3, (8, 4), 2, 2, {"mixing": "plain"}),
    "four-channels": (4, (4, 4), 1, 2, {"mixing": "shuffle"}),
    "three-levels": (1, (8, 8), 1, 3, {}),
    "nice": (1, (8, 4), 2, 2, {"coupling": "additive", "mixing": "reverse"}),
    "realnvp": (3, (4, 4), 2, 2, {"coupling": "affine", "mixing": "reverse", "scale_map": "tanh"}),
    "standard-normal-top": (1, (4, 4), 1, 2, {"learn_top": False}),
    "classes": (3, (4, 8), 1, 2, {"num_classes": 3}),
    "classes-only": (1, (4, 4), 1, 1, {"num_classes": 3, "learn_top": False}),
}
LABELS = torch.tensor([2, 0, 1])


def draw(name: str, dtype: torch.dtype = torch.float64) -> tuple[Glow, Tensor, Tensor | None]:
    """A model with moved weights, three images and their labels."""
    channels, size, steps, levels, options = MODELS[name]
    model = Glow(channels, size, steps, levels, hidden_channels=8, **options)
    x = torch.rand(3, channels, *size, dtype=dtype) - 0.5
    labels = LABELS if "num_classes" in options else None
    return ready(model, x, labels), x, labels


def flat(latents: list[Tensor]) -> Tensor:
    return torch.cat([latent.flatten(1) for latent in latents], dim=1)


def plain_log_prob(model: Glow, x: Tensor, labels: Tensor | None) -> Tensor:
    log_prob = torch.zeros(len(x), dtype=x.dtype)
    for level in model.levels:
        x = F.pixel_unshuffle(x, 2)
        for step in level.steps:
            x, log_det = plain_step(x, step)
            log_prob = log_prob + log_det
        if level.split is not None:
            x, dropped = x.chunk(2, dim=1)
            log_prob = log_prob + split_distribution(level.split, x).log_prob(dropped).sum((1, 2, 3))
    return log_prob + top_distribution(model.top_prior, labels).log_prob(x).sum((1, 2, 3))


@pytest.mark.parametrize("name", MODELS)
def test_latents_are_standard_normal(backend, name):
    model, x, labels = draw(name)
    eps = flat(model.encode(x, labels))
    jacobian = log_abs_det(lambda x: flat(model.encode(x, labels)), x)
    assert_close(model.log_prob(x, labels), standard_normal_log_prob(eps) + jacobian, 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_decode_and_encode_undo_each_other(backend, name):
    model, x, labels = draw(name)
    latents = model.encode(x, labels)
    assert [tuple(latent.shape[1:]) for latent in latents] == model.latent_shapes()
    assert sum(math.prod(shape) for shape in model.latent_shapes()) == model.dimensions == x[0].numel()
    assert_close(model.decode(latents, labels), x, 1e-12)
    eps = [torch.randn_like(latent) for latent in latents]
    assert_close(flat(model.encode(model.decode(eps, labels), labels)), flat(eps), 1e-12)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "realnvp"])
def test_log_prob_equals_the_formulas(backend, name):
    model, x, labels = draw(name)
    actual, expected = model.log_prob(x, labels), plain_log_prob(model, x, labels)
    assert_close(actual, expected, 1e-9)
    parameters = list(model.parameters() if model.classifier is None else [*model.levels.parameters()])
    for one, other in zip(
        torch.autograd.grad(actual.mean(), parameters), torch.autograd.grad(expected.mean(), parameters), strict=True
    ):
        assert_close(one, other, 1e-9)


def test_latent_shapes():
    assert Glow(3, (16, 32), 1, 3, 4).latent_shapes() == [(6, 8, 16), (12, 4, 8), (48, 2, 4)]


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch(training):
    model, x, _ = draw("colour-high", torch.float32)
    model.train(training)
    assert model.log_prob(x[:0]).shape == (0,)
    latents = model.encode(x[:0])
    assert [tuple(latent.shape) for latent in latents] == [(0, *shape) for shape in model.latent_shapes()]
    assert model.decode(latents).shape == model.sample(0).shape == x[:0].shape


def test_samples_are_decoded_normal_latents():
    model, x, labels = draw("classes")
    generator = torch.Generator()
    hot, warm, again = (
        model.sample(3, temperature, labels, generator.manual_seed(7)) for temperature in (1.0, 0.5, 0.5)
    )
    assert hot.shape == x.shape
    assert hot.dtype == x.dtype
    assert not hot.requires_grad
    assert torch.equal(warm, again)
    hot, warm = flat(model.encode(hot, labels)), flat(model.encode(warm, labels))
    assert_close(warm, 0.5 * hot, 1e-12)
    # 288 normal numbers: mean and standard deviation must be within five of their own standard deviations.
    assert abs(hot.mean().item()) < 5 / 288**0.5
    assert abs(hot.std().item() - 1) < 5 / 576**0.5


def test_sampling_without_noise_or_generator():
    model, x, labels = draw("classes")
    zeros = [torch.zeros(3, *shape, dtype=x.dtype) for shape in model.latent_shapes()]
    assert torch.equal(model.sample(3, 0.0, labels), model.decode(zeros, labels))
    torch.manual_seed(3)
    default = model.sample(3, labels=labels)
    torch.manual_seed(3)
    assert torch.equal(model.sample(3, 0.7, labels), default)
    assert not torch.equal(model.sample(3, 0.7, labels), default)
    state = torch.get_rng_state()
    model.sample(3, 0.7, labels, torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_forward_is_log_prob():
    model, x, labels = draw("classes")
    assert torch.equal(model(x, labels), model.log_prob(x, labels))


def test_classes_start_equal_and_become_different():
    model = Glow(3, 4, steps=1, levels=2, hidden_channels=8, num_classes=3).double()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64).expand(3, -1, -1, -1)
    model.initialize(torch.randn(8, 3, 4, 4, dtype=torch.float64), torch.zeros(8, dtype=torch.int64))
    assert model.log_prob(x, LABELS).unique().numel() == 1
    assert torch.equal(model.log_prob_and_logits(x, LABELS)[1], torch.zeros(3, 3, dtype=torch.float64))
    moved(model)
    assert model.log_prob(x, LABELS).unique().numel() == 3
    assert not torch.equal(model.decode(model.encode(x, LABELS), LABELS.roll(1)), x)


def test_logits_are_a_linear_map_of_the_deepest_latent():
    model, x, labels = draw("classes")
    log_prob, logits = model.log_prob_and_logits(x, labels)
    assert torch.equal(log_prob, model.log_prob(x, labels))
    z = model.top_prior.decode(model.encode(x, labels)[-1], labels)
    expected = z.mean((2, 3)) @ model.classifier.weight.mT + model.classifier.bias
    assert_close(logits, expected, 1e-12)
    logits.sum().backward()
    assert model.levels[0].steps[0].actnorm.bias.grad.abs().min() > 0


def test_options_reach_the_steps():
    model = Glow(1, 4, steps=3, levels=2, hidden_channels=6, coupling="additive", mixing="plain")
    assert [len(level.steps) for level in model.levels] == [3, 3]
    assert [level.split is None for level in model.levels] == [False, True]
    for step in model.modules():
        if isinstance(step, FlowStep):
            assert step.coupling.network.first.weight.shape[0] == 6
            assert not hasattr(step.coupling, "scale_map")
            assert not step.mixing.lu
    assert Glow(1, 4, 1, 1, 4, scale_map="exp").levels[0].steps[0].coupling.scale_map.kind == "exp"
    assert Glow(1, 4, 1, 1, 4).levels[0].steps[0].mixing.lu
    assert not Glow(1, 4, 1, 1, 4, learn_top=False).top_prior.learned


def test_whole_model_compiles_into_one_graph(backend):
    model, x, labels = draw("classes", torch.float32)
    in_one_graph = compiled(model.log_prob)
    in_one_graph(x, labels)
    with torch.compiler.set_stance("fail_on_recompile"):
        x, labels = torch.randn_like(x), labels.roll(1)
        actual, expected = in_one_graph(x, labels), model.log_prob(x, labels)
        assert torch.equal(actual, expected)
        parameters = [*model.levels.parameters(), *model.top_prior.parameters()]
        gradients = [torch.autograd.grad(log_prob.mean(), parameters) for log_prob in (actual, expected)]
        for one, other in zip(*gradients, strict=True):  # sums may be in another order
            assert (one - other).norm() <= 1e-5 * other.norm()


def test_torch_func_differentiates_the_model(backend):
    model, x, _ = draw("one-level")
    x.requires_grad_()
    per_sample = [torch.autograd.grad(model.log_prob(image[None]), list(model.parameters())) for image in x]
    (grad,) = torch.autograd.grad(model.log_prob(x).sum(), x)
    x, tangent = x.detach(), torch.randn_like(x)

    def log_prob(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).squeeze()

    found = torch.func.vmap(torch.func.grad(log_prob), (None, 0))(dict(model.named_parameters()), x)
    for actual, *expected in zip(found.values(), *per_sample, strict=True):
        assert_close(actual, torch.stack(expected), 1e-9)
    assert_close(torch.func.jvp(model.log_prob, (x,), (tangent,))[1], (grad * tangent).sum((1, 2, 3)), 1e-9)


@pytest.mark.parametrize("memory", ["store", "anchor"])
def test_a_model_on_the_meta_device_has_shapes(memory):
    model = Glow(3, 4, 2, 1, 8, memory=memory)
    model.initialize(torch.rand(3, 3, 4, 4))
    log_prob = model.to("meta").log_prob(torch.rand(3, 3, 4, 4, device="meta"))
    log_prob.sum().backward()
    assert log_prob.shape == (3,)


def test_autocast_keeps_the_density_in_float32():
    model, x, _ = draw("grey-wide", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.log_prob(x).dtype == torch.float32
        latents = model.encode(x)
        assert all(latent.dtype == torch.float32 for latent in latents)
        assert model.decode(latents).dtype == torch.float32


def test_deep_model_reconstructs_photographs_after_training():
    photographs = data.load("patches", image_size=8)
    model = Glow(3, 8, steps=32, levels=3, hidden_channels=32)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    losses = []
    # For convolutions this small oneDNN's set-up takes longer than the work, and so do NNPACK's transforms.
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None), torch.backends.nnpack.flags(enabled=False):
        model.initialize(model.dequantize(photographs.train[:64]))
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 30)
            x = model.dequantize(photographs.train[torch.randint(len(photographs.train), (16,))])
            loss = model.bits_per_dim(x).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-20:]) < sum(losses[:20]) - 20 * 0.5
    model.eval()
    with torch.no_grad():
        x = model.dequantize(photographs.train[:32])
        assert (model.decode(model.encode(x)) - x).abs().max() < 1e-5


BAD_OPTIONS = {
    "in_channels must be at least 1, got 0": {"in_channels": 0},
    "steps must be at least 1, got 0": {"steps": 0},
    "levels must be at least 1, got -1": {"levels": -1},
    "image_size must be divisible by 2 ** levels = 4, got 6 with levels = 2": {"image_size": 6},
    "image_size must be divisible by 2 ** levels = 4, got (8, 6) with levels = 2": {"image_size": (8, 6)},
    "image_size must be divisible by 2 ** levels = 4, got (4, 4, 4) with levels = 2": {"image_size": (4, 4, 4)},
    "image_size must be divisible by 2 ** levels = 4, got 0 with levels = 2": {"image_size": 0},
    "coupling must be one of 'affine', 'additive', got 'spline'": {"coupling": "spline"},
    "mixing must be one of 'lu', 'plain', 'reverse', 'shuffle', got 'qr'": {"mixing": "qr"},
    "scale_map must be a ScaleMap or one of 'sigmoid', 'exp', 'tanh', got 'relu'": {"scale_map": "relu"},
}


BAD_OPTIONS |= {f"n_bins must be at least 2, got {number}": {"n_bins": number} for number in (1, 0, -3)}
BAD_OPTIONS |= {"num_classes must be at least 1, got 0": {"num_classes": 0}}
BAD_OPTIONS |= {"hidden_channels must be at least 1, got 0": {"hidden_channels": 0}}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_options(message):
    options = {"in_channels": 3, "image_size": 4, "steps": 1, "levels": 2, "hidden_channels": 4}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Glow(**{**options, **BAD_OPTIONS[message]})


@pytest.mark.parametrize("name", ["in_channels", "steps", "levels", "hidden_channels", "num_classes", "n_bins"])
@pytest.mark.parametrize("value", [4.0, True, "4"])
def test_options_that_must_be_whole_numbers(name, value):
    with pytest.raises(TypeError, match=rf"^{name} must be a whole number, got {value!r}$"):
        Glow(**{"in_channels": 3, "image_size": 16, "steps": 1, "levels": 2, "hidden_channels": 4, name: value})


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (8.0, "a whole number or two, (height, width), got 8.0"),
        (None, "a whole number or two, (height, width), got None"),
        ((8.0, 8), "a whole number, got 8.0"),
        ("8", "a whole number, got '8'"),
        (True, "a whole number, got True"),
    ],
)
def test_image_size_that_is_none(size, message):
    with pytest.raises(TypeError, match=f"^image_size must be {re.escape(message)}$"):
        Glow(1, size, steps=1, levels=1, hidden_channels=4)


def test_numbers_of_numpy():
    sizes = {"in_channels": 1, "image_size": 8, "steps": 1, "levels": 1, "hidden_channels": 4, "n_bins": 17}
    model = Glow(**{name: np.int64(size) for name, size in sizes.items()})
    assert model.image_size == (8, 8)
    assert model.bits_per_dim(model.dequantize(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))).isfinite().all()


IMAGE = torch.zeros(3, 3, 4, 8, dtype=torch.float64)
LATENTS = [torch.zeros(3, 6, 2, 4, dtype=torch.float64), torch.zeros(3, 24, 1, 2, dtype=torch.float64)]
WRONG_IMAGE = "x must be (B, C, H, W) with (C, H, W) = (3, 4, 8), got "
WRONG_LATENTS = "latents must have the shapes (B, *) with * = [(6, 2, 4), (24, 1, 2)], got "
NO_FLOAT = "x must be a floating-point tensor, got uint8: convert integer pixels with model.dequantize(levels)"
WRONG_LABELS = "labels must be int64 of shape (3,), got "

BAD_CALLS = {
    WRONG_IMAGE + "(3, 1, 4, 8)": (ValueError, lambda m: m.log_prob(IMAGE[:, :1], LABELS)),
    WRONG_IMAGE + "(3, 3, 4, 2)": (ValueError, lambda m: m.bits_per_dim(IMAGE[..., :2], LABELS)),
    WRONG_IMAGE + "(3, 4, 8)": (ValueError, lambda m: m.encode(IMAGE[0], LABELS)),
    NO_FLOAT: (TypeError, lambda m: m.log_prob(IMAGE.to(torch.uint8), LABELS)),
    "x must be a tensor, got float": (TypeError, lambda m: m.log_prob(0.5, LABELS)),
    WRONG_LATENTS + "[(6, 2, 4)]": (ValueError, lambda m: m.decode(LATENTS[:1], LABELS)),
    WRONG_LATENTS + "[(24, 1, 2), (6, 2, 4)]": (ValueError, lambda m: m.decode(LATENTS[::-1], LABELS)),
    WRONG_LATENTS + "[]": (ValueError, lambda m: m.decode([], LABELS)),
    WRONG_LABELS + "int64 of shape (2,)": (ValueError, lambda m: m.log_prob(IMAGE, LABELS[:2])),
    WRONG_LABELS + "int32 of shape (3,)": (ValueError, lambda m: m.encode(IMAGE, LABELS.int())),
    WRONG_LABELS + "int64 of shape (3, 1)": (ValueError, lambda m: m.decode(LATENTS, LABELS[:, None])),
    WRONG_LABELS + "float32 of shape (3,)": (ValueError, lambda m: m.sample(3, labels=LABELS.float())),
    "labels must be a tensor, got list": (TypeError, lambda m: m.encode(IMAGE, [2, 0, 1])),
    "labels must be given: the prior has 3 classes": (ValueError, lambda m: m.sample(3)),
    "n must be a whole number, got 2.5": (TypeError, lambda m: m.sample(2.5, labels=LABELS)),
    "n must be at least 0, got -1": (ValueError, lambda m: m.sample(-1, labels=LABELS)),
    "latents must be a sequence of tensors, got NoneType": (TypeError, lambda m: m.decode(None, LABELS)),
    "latents[1] must be a tensor, got str": (TypeError, lambda m: m.decode([LATENTS[0], "z"], LABELS)),
    "temperature must be finite and at least 0, got -0.1": (ValueError, lambda m: m.sample(3, -0.1, LABELS)),
    "temperature must be finite and at least 0, got inf": (ValueError, lambda m: m.sample(3, math.inf, LABELS)),
    "temperature must be one number, got a tensor of shape (3,)": (
        ValueError,
        lambda m: m.sample(3, torch.ones(3), LABELS),
    ),
    "temperature must be a number, got 'hot'": (TypeError, lambda m: m.sample(3, "hot", LABELS)),
    "temperature must be finite and at least 0, got nan": (ValueError, lambda m: m.sample(3, math.nan, LABELS)),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls(message):
    error, call = BAD_CALLS[message]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(draw("classes")[0])


def test_models_without_classes_refuse_them():
    model, x, _ = draw("one-level")
    with pytest.raises(ValueError, match=r"^labels must be None: the prior has no classes$"):
        model.log_prob(x, LABELS)
    with pytest.raises(ValueError, match=r"^num_classes must be given to the model to classify, got None$"):
        model.log_prob_and_logits(x)


@pytest.mark.parametrize("label", [-1, 3])
@pytest.mark.parametrize("call", ["log_prob", "encode"])
def test_labels_outside_the_classes_are_refused(call, label):
    model, x, _ = draw("classes")
    message = rf"^labels must be in 0 \.\. 2 for a prior of 3 classes, got {min(label, 0)} \.\. {max(label, 2)}$"
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(x, torch.tensor([0, label, 2]))


def test_latents_of_different_batches_are_refused():
    model, x, _ = draw("colour-high")
    first, second = model.encode(x)
    with pytest.raises(ValueError, match=r"^latents must have the same batch size, got 3, 2$"):
        model.decode([first, second[:2]])


@pytest.mark.parametrize("call", ["log_prob", "encode", "sample", "decode"])
def test_an_uninitialised_model_says_what_to_do(call):
    model = Glow(3, 4, steps=1, levels=1, hidden_channels=4).eval()
    argument = {"sample": 1, "decode": [torch.zeros(1, 12, 2, 2)]}.get(call, torch.zeros(1, 3, 4, 4))
    message = r"^ActNorm of \d+ channels is not initialised: run one forward in training mode, or model.initialize\("
    with pytest.raises(RuntimeError, match=message):
        getattr(model, call)(argument)


def test_training_has_the_same_losses_on_every_backend(backend):
    if backend == "reference":
        pytest.skip("it is what the others are compared with")
    batches = [torch.rand(4, 1, 8, 8) - 0.5 for _ in range(30)]
    start = Glow(1, 8, steps=2, levels=2, hidden_channels=8)
    start.train().initialize(batches[0])

    def losses(name: str) -> list[float]:
        model = copy.deepcopy(start)
        # Not Adam, which takes full steps along gradients that are only rounding errors.
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        with gk.use_backend(name):
            return [take_step(model, optimizer, x) for x in batches]

    def take_step(model: Glow, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = model.bits_per_dim(x).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    assert losses(backend) == pytest.approx(losses("reference"), abs=1e-4)


def test_biases_of_actnorm_have_no_gradient_on_the_batch_that_initialised_them():
    """Couplings start constant and means at 0, so these gradients are pure rounding, which Adam would amplify."""
    x = torch.rand(8, 3, 8, 8, dtype=torch.float64) - 0.5
    model = Glow(3, 8, steps=2, levels=2, hidden_channels=8).double().train()
    model.bits_per_dim(x).mean().backward()
    steps = [step for level in model.levels for step in level.steps]
    assert max(step.actnorm.bias.grad.abs().max() for step in steps) < 1e-14
    assert min(step.actnorm.log_scale.grad.abs().max() for step in steps) > 1e-4


class Decoder(torch.nn.Module):
    """Decodes latents to images, and draws as many samples."""

    def __init__(self, model: Glow) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.model.decode(latents), self.model.sample(latents[0].shape[0])


def test_decoding_and_sampling_are_exported_for_any_number_of_images():
    model = ready(Glow(1, (4, 4), 1, 2, 4), torch.randn(3, 1, 4, 4)).eval()
    two, three = ([torch.randn(n, *shape) for shape in model.latent_shapes()] for n in (2, 3))
    batch = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(Decoder(model), (two,), dynamic_shapes=([batch, batch],)).module()
    images, samples = exported(three)
    assert_close(images, model.decode(three), 1e-6)
    assert samples.shape == images.shape


def test_temperature_may_be_an_element_of_a_tensor():
    model = ready(Glow(1, (4, 4), 1, 2, 4), torch.randn(3, 1, 4, 4))
    for temperature in [*torch.linspace(0.0, 1.0, 2), torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)]:
        sample = model.sample(1, temperature)
        assert (sample.shape, sample.dtype) == ((1, 1, 4, 4), torch.float32)
