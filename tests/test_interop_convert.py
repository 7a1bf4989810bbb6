"""``convert``: the weights of one implementation compute the same in another, or it reports what does not."""

from __future__ import annotations

import normflows
import pytest
import torch
from dialects import openai, rosinality, tensorflow
from test_interop import mark_initialized
from torch import Tensor, nn

from glow_kernels.interop import convert
from glow_kernels.models import Glow

STEPS, LEVELS, HIDDEN = 2, 2, 6
EXACT = ("glow_kernels", "chaiyujin", "y0ast")

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated")


class LearnedTop(openai.Glow):
    """A port of OpenAI's Glow with a learned prior for the deepest latent."""

    def __init__(self, style, lu):
        super().__init__(3, HIDDEN, STEPS, LEVELS, style=style, LU_decomposed=lu)
        zeros = openai.Conv2dZeros if style == "chaiyujin" else openai.InnerConv2dZeros
        self.top_name = "learn_top" if style == "chaiyujin" else "learn_top_fn"
        setattr(self, self.top_name, zeros(48, 48))

    def forward(self, x):
        z, objective = self.flow(x, logdet=x.new_zeros(x.shape[0]))
        mean, logs = getattr(self, self.top_name)(torch.zeros_like(torch.cat((z, z), 1))).chunk(2, 1)
        return z, -(objective + openai.gaussian_log_prob(mean, logs, z))


def normflows_glow(lu: bool, net_actnorm: bool = False) -> nn.Module:
    flows, bases = [], []
    for level in range(LEVELS):
        channels = 3 * 2 ** (LEVELS + 1 - level)
        blocks = [normflows.flows.GlowBlock(channels, HIDDEN, use_lu=lu, net_actnorm=net_actnorm) for _ in range(STEPS)]
        flows.append([*blocks, normflows.flows.Squeeze()])
        side = 8 // 2 ** (LEVELS - level)
        bases.append(normflows.distributions.GlowBase((channels // (2 if level else 1), side, side)))
    return normflows.MultiscaleFlow(bases, flows, [normflows.flows.Merge()] * (LEVELS - 1), class_cond=False)


def build(dialect: str, lu: bool) -> nn.Module:
    if dialect == "glow_kernels":
        return Glow(3, 8, STEPS, LEVELS, HIDDEN, mixing="lu" if lu else "plain")
    if dialect == "rosinality":
        return rosinality.Glow(3, STEPS, LEVELS, filter_size=HIDDEN, conv_lu=lu)
    if dialect == "openai":
        return tensorflow.Glow(3, STEPS, LEVELS, HIDDEN)
    if dialect.startswith("normflows"):
        return normflows_glow(lu, net_actnorm=dialect == "normflows with hidden ActNorms")
    return LearnedTop(dialect, lu)


def log_prob(model: nn.Module, x: Tensor) -> Tensor:
    if isinstance(model, rosinality.Glow):
        log_p, log_det, _ = model(x)
        return log_p + log_det
    if isinstance(model, openai.Glow):
        return -model(x)[1]
    return model.log_prob(x) if isinstance(model, (Glow, tensorflow.Glow)) else model.log_prob(x, None)


def trained(dialect: str, lu: bool = True, conditional: bool = True) -> nn.Module:
    """A float64 model with parameters away from special values, and nonzero values outside of LU triangles."""
    torch.manual_seed(0)
    model = build(dialect, lu).double()
    with torch.no_grad():
        log_prob(model, torch.rand(4, 3, 8, 8, dtype=torch.float64))
        for name, parameter in model.named_parameters():
            if conditional or not is_prior_weight(name, parameter):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def is_prior_weight(name: str, parameter: Tensor) -> bool:
    is_split = any(part in name for part in (".split.prior", ".layers.3.conv.", "blocks.0.prior", "blocks.1.prior"))
    return is_split and parameter.dim() == 4 and parameter.shape[-1] > 1


def loaded(dialect: str, lu: bool, state: dict[str, Tensor]) -> nn.Module:
    model = build(dialect, lu).double()
    model.load_state_dict(state)  # checks that no name is missing or unexpected
    mark_initialized(model)
    return model


def same(one: nn.Module, other: nn.Module) -> None:
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    # rosinality rounds the log-determinant of its plain convolution to float32.
    torch.testing.assert_close(log_prob(other, x), log_prob(one, x), rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("lu", [True, False], ids=["lu", "plain"])
@pytest.mark.parametrize("source", EXACT)
@pytest.mark.parametrize("target", EXACT)
def test_ports_of_openai_and_our_own_glow_compute_the_same(source, target, lu):
    model = trained(source, lu)
    conversion = convert(model.state_dict(), source=source, target=target)
    assert conversion.exact
    assert conversion.ignored == ()
    same(model, loaded(target, lu, conversion.state_dict))
    back = convert(conversion.state_dict, source=target, target=source).state_dict
    junk = (".l", ".u", ".lower", ".upper", "learn_top.weight", "learn_top_fn.conv.weight")
    for name, tensor in model.state_dict().items():
        if not name.endswith(junk):
            torch.testing.assert_close(back[name], tensor, msg=name)
    same(model, loaded(source, lu, back))


@pytest.mark.parametrize("lu", [True, False], ids=["lu", "plain"])
@pytest.mark.parametrize("source", [*EXACT, "normflows"])
def test_normflows_has_priors_without_a_condition(source, lu):
    model = trained(source, lu, conditional=False)
    conversion = convert(model.state_dict(), source=source, target="normflows")
    assert conversion.exact
    same(model, loaded("normflows", lu, conversion.state_dict))
    if source != "normflows":
        back = convert(conversion.state_dict, source="normflows", target=source).state_dict
        same(model, loaded(source, lu, back))
        lossy = convert(trained(source, lu).state_dict(), source=source, target="normflows")
        assert lossy.inexact == ("q0.1: the source's prior depends on the channels that are kept",)
        assert "not exact" in str(lossy)


@pytest.mark.parametrize("target", EXACT)
def test_hidden_actnorms_of_normflows_go_into_convolutions(target):
    model = trained("normflows with hidden ActNorms")
    conversion = convert(model.state_dict(), source="normflows", target=target)
    assert conversion.exact
    assert conversion.ignored == ()
    same(model, loaded(target, True, conversion.state_dict))


@pytest.mark.parametrize("lu", [True, False], ids=["lu", "plain"])
def test_rosinality_round_trip_is_exact_and_negative_scales_survive(lu):
    model = trained("rosinality", lu)
    with torch.no_grad():
        for block in model.blocks:
            block.flows[0].actnorm.scale[0, ::2] *= -1
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}  # as DataParallel names them
    conversion = convert(state, source="rosinality", target="rosinality")
    assert conversion.exact
    assert conversion.ignored == ()
    same(model, loaded("rosinality", lu, conversion.state_dict))


@pytest.mark.parametrize("lu", [True, False], ids=["lu", "plain but for the last block"])
@pytest.mark.parametrize("target", [*EXACT, "normflows"])
def test_padding_with_ones_is_named_and_the_rest_of_rosinality_is_exact(target, lu):
    model = trained("rosinality", lu)
    with torch.no_grad():
        for block in model.blocks:
            block.flows[0].actnorm.scale[0, ::2] *= -1
    lossy = convert(model.state_dict(), source="rosinality", target=target)
    assert len(lossy.inexact) >= STEPS * LEVELS + 1
    assert any("pads its input with 0, the source with 1" in line for line in lossy.inexact)
    with torch.no_grad():  # zero the convolutions whose result depends on the border
        for name, parameter in model.named_parameters():
            if parameter.shape[-1] == 3 and ("net.4" in name or "prior" in name):
                parameter.zero_()
    conversion = convert(model.state_dict(), source="rosinality", target=target)
    assert conversion.exact
    same(model, loaded(target, lu, conversion.state_dict))
    back = convert(conversion.state_dict, source=target, target="rosinality")
    assert back.exact
    same(model, loaded("rosinality", lu, back.state_dict))


@pytest.mark.parametrize("source", ["glow_kernels", "normflows"])
@pytest.mark.parametrize("lu", [True, False], ids=["to lu", "to plain"])
def test_the_convolution_may_change_its_form(source, lu):
    model = trained(source, lu=not lu, conditional=False)
    conversion = convert(model.state_dict(), source=source, target="chaiyujin", lu=lu)
    assert conversion.exact
    same(model, loaded("chaiyujin", lu, conversion.state_dict))


@pytest.mark.parametrize("source", [*EXACT, "rosinality"])
def test_the_tensorflow_original_expresses_the_others(source):
    model = trained(source)  # rosinality's border is a channel of the original's convolutions
    conversion = convert(model.state_dict(), source=source, target="openai")
    assert conversion.exact
    assert conversion.ignored == ()
    same(model, loaded("openai", False, conversion.state_dict))


@pytest.mark.parametrize("target", EXACT)
def test_the_tensorflow_original_is_read_except_for_its_border(target):
    model = trained("openai")
    lossy = convert(model.state_dict(), source="openai", target=target)
    marked = [name for name, parameter in model.named_parameters() if parameter.shape[:2] == (3, 3)]
    expected = [f"{name}: its last input channel, which marks the border, is left out" for name in marked]
    assert sorted(lossy.inexact) == sorted(expected)
    with torch.no_grad():
        for name in marked:
            model.get(name)[:, :, -1] = 0
    conversion = convert(model.state_dict(), source="openai", target=target)
    assert conversion.exact
    assert conversion.ignored == ()
    same(model, loaded(target, False, conversion.state_dict))
    back = convert(conversion.state_dict, source=target, target="openai").state_dict
    for name, tensor in model.state_dict().items():
        if name != "model/prior/p/W":  # its input is zero
            torch.testing.assert_close(back[name], tensor, msg=name)


def test_the_tensorflow_original_has_no_factors():
    state = Glow(3, 8, 1, 1, 4).state_dict()
    with pytest.raises(ValueError, match=r"lu must not be True for target='openai'"):
        convert(state, source="glow_kernels", target="openai", lu=True)


def test_additive_couplings():
    torch.manual_seed(0)
    model = Glow(3, 8, STEPS, LEVELS, HIDDEN, coupling="additive").double()
    model.log_prob(torch.rand(4, 3, 8, 8, dtype=torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    conversion = convert(model.state_dict(), source="glow_kernels", target="chaiyujin")
    other = openai.Glow(3, HIDDEN, STEPS, LEVELS, coupling="additive", LU_decomposed=True).double()
    state = {name: t for name, t in conversion.state_dict.items() if not name.startswith("learn_top")}
    other.load_state_dict(state)
    mark_initialized(other)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    back = convert(conversion.state_dict, source="chaiyujin", target="normflows")
    flow = normflows_glow(True)
    for block in [block for level in flow.flows for block in list(level)[:-1]]:
        channels = block.flows[1].num_channels
        block.flows[0] = normflows.flows.GlowBlock(channels, HIDDEN, scale=False).flows[0]
    assert any(line.startswith("q0.1") for line in back.inexact)
    flow = flow.double()
    flow.load_state_dict(back.state_dict)
    z, _ = flow.inverse_and_log_det(x)
    ours, _ = model._to_top(x, None)
    torch.testing.assert_close(z[0], ours)
    torch.testing.assert_close(other(x)[0], ours)


def test_other_state_dicts_and_unknown_dialects_are_refused():
    state = Glow(3, 8, 1, 1, 4).state_dict()
    with pytest.raises(TypeError, match=r"state_dict must be a mapping of names to tensors, got Linear"):
        convert(torch.nn.Linear(2, 2), source="rosinality", target="openai")
    with pytest.raises(ValueError, match=r"source must be one of .*, got 'tensorflow'"):
        convert(state, source="tensorflow", target="y0ast")
    with pytest.raises(ValueError, match=r"state_dict must be that of a Glow of rosinality: it has no steps"):
        convert(state, source="rosinality", target="y0ast")
    with pytest.raises(ValueError, match=r"it has no steps, its first names are \['model', 'epoch'\]"):
        convert({"model": state, "epoch": 3}, source="glow_kernels", target="y0ast")
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    with pytest.raises(TypeError, match=r"state_dict must hold tensors, got ndarray for levels\.0\.steps\.0\."):
        convert(arrays, source="glow_kernels", target="y0ast")
    del state["levels.0.steps.0.coupling.network.last.bias"]
    with pytest.raises(ValueError, match=r"it has no levels.0.steps.0.coupling.network.last.bias"):
        convert(state, source="glow_kernels", target="y0ast")


def test_a_shuffled_model_cannot_be_converted_and_unknown_names_are_listed():
    shuffled = openai.Glow(3, 4, 1, 1, permutation="shuffle").state_dict()
    with pytest.raises(ValueError, match=r"it has no flow.layers.1.invconv.p"):
        convert(shuffled, source="chaiyujin", target="glow_kernels")
    state = Glow(3, 8, 1, 1, 4, num_classes=3).state_dict()
    conversion = convert(state, source="glow_kernels", target="y0ast")
    assert set(conversion.ignored) == {
        "classifier.weight",
        "classifier.bias",
        "top_prior.per_class",
        "top_prior.per_class_log_scale",
    }
    assert "ignored: top_prior.per_class" in str(conversion)
    assert conversion.exact  # the prior has not learned anything about classes yet


PARTS = {  # for each dialect, the prefixes of a split, of the last level, and of a step before the last one
    "glow_kernels": ("levels.0.split.", "levels.1.", "levels.0.steps.0."),
    "rosinality": ("blocks.0.prior.", "blocks.1.flows.", "blocks.0.flows.0."),
    "chaiyujin": ("flow.layers.3.", "flow.layers.5.", "flow.layers.1."),
    "y0ast": ("flow.layers.3.", "flow.layers.5.", "flow.layers.1."),
    "normflows": ("q0.1.", "flows.0.", "flows.1.0."),
    "openai": ("model/pool0/", "model/1/", "model/0/0/"),
}


@pytest.mark.parametrize("source", PARTS)
def test_a_part_of_a_model_is_refused(source):
    state = trained(source).state_dict()
    for part in PARTS[source]:
        truncated = {name: tensor for name, tensor in state.items() if not name.startswith(part)}
        with pytest.raises(ValueError, match=rf"state_dict must be that of a Glow of {source}: it"):
            convert(truncated, source=source, target="glow_kernels")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("glow_kernels", "top_prior.per_class"),
        ("chaiyujin", "project_ycond.weight"),
        ("y0ast", "project_ycond.linear.weight"),
        ("normflows", "q0.0.loc_cc"),
        ("openai", "model/prior/y_emb/W"),
    ],
)
def test_a_prior_that_depends_on_classes_is_not_exact(source, name):
    state = {f"module.{key}": tensor for key, tensor in trained(source, conditional=False).state_dict().items()}
    expected = convert(state, source=source, target="glow_kernels").inexact
    lossy = convert(state | {f"module.{name}": torch.ones(3, 96)}, source=source, target="glow_kernels")
    assert set(lossy.inexact) - set(expected) == {
        f"module.{name}: what the source's prior makes of classes is left out"
    }


def test_densities_of_normflows_that_differ_between_classes_are_not_exact():
    state = trained("normflows").state_dict()
    for level, channels in enumerate((24, 6)):
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"q0.{level}.")}
        density = normflows.distributions.ClassCondDiagGaussian((channels, 2 << level, 2 << level), 3)
        torch.nn.init.normal_(density.loc)
        state |= {f"q0.{level}.{name}": tensor.double() for name, tensor in density.state_dict().items()}
    conversion = convert(state, source="normflows", target="glow_kernels")
    line = "q0.0.loc, q0.0.log_scale: differ between positions or classes, of which the mean is taken"
    assert line in conversion.inexact
    mean = conversion.state_dict["top_prior.common"][:24]
    torch.testing.assert_close(mean, state["q0.0.loc"].mean((1, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lu", [True, False], ids=["to lu", "to plain"])
def test_half_precision_is_not_rounded_again(dtype, lu):
    model = trained("chaiyujin", lu=not lu)
    half = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    conversion = convert(half, source="chaiyujin", target="glow_kernels", lu=lu)
    assert {tensor.dtype for tensor in conversion.state_dict.values()} == {torch.float32, torch.bool}
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    expected = log_prob(loaded("chaiyujin", not lu, half), x)
    torch.testing.assert_close(
        log_prob(loaded("glow_kernels", lu, conversion.state_dict), x), expected, rtol=1e-3, atol=0
    )
