"""``accelerate`` in difficult cases: hooks, modes, devices, precision, sharing, compilation."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from dialects import openai, pclucas14, rosinality, survae
from dialects.zoo import nflows_glow, normflows_glow, normflows_loss
from nflows.transforms import ActNorm, CompositeTransform, OneByOneConvolution
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import glow_kernels as gk

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated", "ignore:torch.triangular_solve is deprecated")


def step(**options) -> rosinality.Flow:
    """A step whose network does not start at zero, and whose ActNorm has been initialised."""
    flow = rosinality.Flow(4, filter_size=4, **options)
    nn.init.normal_(flow.coupling.net[-1].conv.weight, 0, 0.1)
    flow(torch.randn(8, 4, 6, 6))
    return flow


def kinds(report: gk.interop.Report) -> dict[str, bool]:
    """Whether each kind of layer was patched."""
    return {row.kind: row.patched for row in report.layers}


def test_model_without_flow_layers_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Linear(4, 4))
    types = [type(layer) for layer in model.modules()]
    report = gk.accelerate(model)
    assert [type(layer) for layer in model.modules()] == types
    assert report.as_dict() == {
        "patched": [],
        "left_alone": [],
        "note": "no flow layers were recognised: the model is unchanged",
    }
    assert str(report).splitlines()[0] == report.note


def test_note_for_a_model_of_this_package_says_where_to_choose_its_memory():
    report = gk.accelerate(nn.Sequential(gk.nn.FlowStep(4, 4)), memory="anchor")
    assert not report.layers
    assert report.note.startswith("the model is made of layers of glow_kernels")


def test_only_modules_are_accepted():
    for function in (gk.accelerate, gk.restore):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
            function({})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_are_not_patched(dtype):
    report = gk.accelerate(step().to(dtype))
    assert not report.patched
    assert {row.reason.partition(":")[0] for row in report.left_alone} >= {"it has half-precision weights"}


def test_reason_for_a_checkerboard_is_that_positions_are_split():
    report = gk.accelerate(normflows_glow(1, 1, split_mode="checkerboard"))
    reasons = {row.kind: row.reason for row in report.left_alone}
    split = "its network reads some of the positions, as of a checkerboard, not of the channels"
    block = "its AffineCouplingBlock is not patched: "
    assert reasons == {"AffineCouplingBlock": split, "GlowBlock": block + split}


def test_parameters_on_several_devices_are_not_patched():
    flow = step()
    flow.coupling.to("meta")
    report = gk.accelerate(flow)
    assert kinds(report) == {
        "Flow": False,
        "ActNorm": True,
        "InvConv2dLU": True,
        "AffineCoupling": False,
        "ScaledConv2d": False,
    }
    reasons = {row.kind: row.reason for row in report.left_alone}
    assert reasons["AffineCoupling"] == "its parameters have no data yet"
    assert reasons["Flow"] == "its parameters are on several devices"


def test_layers_of_fake_tensors_are_not_patched():
    with FakeTensorMode():
        layer = openai.ActNorm2d(4)
    assert [row.reason for row in gk.accelerate(layer).left_alone] == ["its parameters have no data yet"]


def test_compiled_layers_are_not_patched():
    flow = step()
    flow.coupling.compile(backend="eager")
    report = gk.accelerate(flow)
    assert [row.reason for row in report.left_alone if row.kind == "AffineCoupling"] == [
        "it is compiled: accelerate before compile()"
    ]


def test_layers_that_pytorch_refuses_to_differentiate_are_not_patched():
    (row,) = gk.accelerate(nn.ModuleList([pclucas14.AffineCoupling(4, 4, in_place=True)])).layers[:1]
    assert (row.kind, row.patched) == ("Coupling", False)
    assert row.reason.startswith("forward_ fails when it is called as such layers are: ")
    assert "modified inplace" in row.reason


def test_steps_that_overwrite_views_of_their_input_are_not_patched():
    class InPlaceStep(openai.FlowStep):
        def overwrite(self, z, inverse):
            h = self.f(z[:, :2])
            z[:, 2:] -= h if inverse else -h
            return z

        def normal_flow(self, x, logdet):
            z, logdet = self.permute(*self.actnorm(x, logdet), False)
            return self.overwrite(z, False), logdet

        def reverse_flow(self, z, logdet):
            return self.actnorm(*self.permute(self.overwrite(z, True), logdet, True), reverse=True)

    row = gk.accelerate(InPlaceStep(4, 8, coupling="additive")).layers[0]
    assert (row.kind, row.patched) == ("FlowStep", False)
    assert "is being used in an in-place operation" in row.reason


def test_factors_with_plain_attributes_are_recognised_as_chaiyujins():
    convolution = openai.InvertibleConv1x1(4, LU_decomposed=True)
    for name in ("p", "sign_s"):
        setattr(convolution, name, convolution._buffers.pop(name))
    x, log_det = torch.randn(2, 4, 6, 6), torch.zeros(2)
    expected = convolution(x, log_det)
    (row,) = gk.accelerate(convolution).layers
    assert row.patched, row.reason
    torch.testing.assert_close(convolution(x, log_det), expected)
    convolution.double()(x.double(), log_det)


class ActNormOfVectors(rosinality.ActNorm):
    """As in taming-transformers and net2net."""

    def forward(self, x):
        if x.dim() == 4:
            return super().forward(x)
        y, log_det = super().forward(x[:, :, None, None])
        return y[:, :, 0, 0], log_det


def test_actnorm_that_takes_vectors_too_still_does():
    layer = ActNormOfVectors(4)
    x = torch.randn(8, 4)
    layer(x)
    expected = layer(x)
    (row,) = gk.accelerate(layer).layers
    assert row.patched, row.reason
    torch.testing.assert_close(layer(x), expected)


class SqueezedActNorm(rosinality.ActNorm):
    """As in bertflow, which treats vectors as images of one position."""

    def forward(self, x):
        y, log_det = super().forward(x)
        return y.squeeze(), log_det


def test_layers_that_squeeze_their_output_are_not_patched():
    (row,) = gk.accelerate(SqueezedActNorm(4)).layers
    assert row.reason == "forward of one position: result 0 is (4,), where that of such a layer would be (1, 4, 1, 1)"


class ActNormWithoutChoice(rosinality.ActNorm):
    """As in glow2, which always returns a log-determinant."""

    def __init__(self, in_channel):
        super().__init__(in_channel)
        del self.logdet

    def forward(self, x):
        if not self.initialized:
            self.initialize(x)
            self.initialized.fill_(1)
        return self.scale * (x + self.loc), x[0, 0].numel() * self.scale.abs().log().sum()


def test_actnorm_without_a_choice_returns_a_log_determinant():
    (row,) = gk.accelerate(ActNormWithoutChoice(4)).layers
    assert row.patched, row.reason


class ActNormWithPlainFlag(rosinality.ActNorm):
    """As in copies whose checkpoints do not save whether it was initialised."""

    def __init__(self, in_channel):
        super().__init__(in_channel)
        del self.initialized
        self.initialized = False

    def forward(self, x):
        if not self.initialized:
            self.initialize(x)
            self.initialized = True
        return self.scale * (x + self.loc), x[0, 0].numel() * self.scale.abs().log().sum()


def test_steps_whose_actnorm_keeps_its_flag_as_an_attribute_are_accelerated():
    flow, x = step(), 3 + 2 * torch.randn(4, 4, 6, 6)
    flow.actnorm = ActNormWithPlainFlag(4)
    original = copy.deepcopy(flow)
    report = gk.accelerate(flow)
    assert not report.left_alone
    assert "wait for the device" not in str(report)
    for _ in range(2):  # the first initialises
        torch.testing.assert_close(flow(x), original(x))
    flow.actnorm.initialized = False  # as after loading a checkpoint
    original.actnorm.initialized = False
    torch.testing.assert_close(flow(10 * x), original(10 * x))


class PortedActNorm(nn.Module):
    """As in ports whose flag has rosinality's name."""

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.logs = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.initialized = False

    def forward(self, x, logdet, reverse=False):
        if not self.initialized:
            self.bias.data = -x.mean((0, 2, 3), keepdim=True)
            self.logs.data = -x.std((0, 2, 3), keepdim=True).log()
            self.initialized = True
        change = x[0, 0].numel() * self.logs.sum()
        if reverse:
            return x * torch.exp(-self.logs) - self.bias, logdet - change
        return (x + self.bias) * torch.exp(self.logs), logdet + change


def test_steps_of_ports_whose_actnorm_names_its_flag_as_rosinality_are_accelerated():
    flow, x, log_det = openai.FlowStep(4, 8), 3 + 2 * torch.randn(4, 4, 6, 6), torch.zeros(4)
    flow.actnorm = PortedActNorm(4)
    original = copy.deepcopy(flow)
    assert not gk.accelerate(flow).left_alone
    for _ in range(2):  # the first initialises
        z = original(x, log_det)
        torch.testing.assert_close(flow(x, log_det), z)
    torch.testing.assert_close(flow(*z, reverse=True)[0], x)


@pytest.mark.parametrize("verify", [True, False])
def test_actnorm_of_chrischutes_networks_returns_data_alone(verify):
    class ActNormAlone(openai.ActNorm2d):
        return_ldj = False

        def forward(self, x, logdet=None, reverse=False):
            return super().forward(x, logdet, reverse)[0]

    layer = ActNormAlone(4)
    (row,) = gk.accelerate(layer, verify=verify).layers
    assert row.reason.startswith("it returns no log-determinant")
    assert layer(torch.randn(2, 4, 6, 6)).shape == (2, 4, 6, 6)


class CachedWeight:
    """As in blow, which multiplies its factors once before sampling."""

    weight = None


class CachedConvolution(CachedWeight, rosinality.InvConv2dLU):
    def calc_weight(self):
        return super().calc_weight() if self.weight is None else self.weight


class CachedConvolutionOfOpenAI(CachedWeight, openai.InvertibleConv1x1):
    def get_weight(self, x, reverse):
        weight, change = super().get_weight(x, reverse)
        return weight if self.weight is None else self.weight, change


@pytest.mark.parametrize("make", [CachedConvolution, lambda width: CachedConvolutionOfOpenAI(width, True)])
def test_factors_with_a_weight_computed_for_sampling_are_used(make):
    layer, x = make(4), torch.randn(2, 4, 6, 6)
    expected, double = layer(x), 2 * torch.eye(4)[:, :, None, None]
    (row,) = gk.accelerate(layer).layers
    assert row.patched, row.reason
    torch.testing.assert_close(layer(x), expected)
    layer.weight = double
    torch.testing.assert_close(layer(x)[0], 2 * x)


class DirectionFirst:
    """As in copies whose log-determinant is the last argument."""

    def forward(self, x, reverse=False, logdet=None):
        return super().forward(x, logdet, reverse)


class ActNormDirectionFirst(DirectionFirst, openai.ActNorm2d):
    pass


class ConvolutionDirectionFirst(DirectionFirst, openai.InvertibleConv1x1):
    pass


class ActNormWithoutLogDet(openai.ActNorm2d):
    def forward(self, x, reverse=False):
        return super().forward(x, x.new_zeros(len(x)), reverse)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("make", [ActNormDirectionFirst, ConvolutionDirectionFirst, ActNormWithoutLogDet])
def test_the_direction_is_not_mistaken_for_a_log_determinant(make, verify):
    layer, x = make(4), torch.randn(2, 4, 6, 6)
    layer(x)
    expected = layer(x, True)
    (row,) = gk.accelerate(layer, verify=verify).layers
    assert row.reason == "its arguments are not the data, a log-determinant and the direction"
    torch.testing.assert_close(layer(x, True), expected)


class ConditionalConvolution(openai.InvertibleConv1x1):
    """As in copies of chrischute's code, whose layers pass a condition on."""

    def forward(self, x, condition, logdet, reverse=False):
        return super().forward(x, logdet, reverse)


@pytest.mark.parametrize("verify", [True, False])
def test_a_condition_is_not_mistaken_for_a_log_determinant(verify):
    layer, x, log_det = ConditionalConvolution(4), torch.randn(2, 4, 6, 6), torch.zeros(2)
    (row,) = gk.accelerate(layer, verify=verify).layers
    assert row.reason == "its arguments are not the data, a log-determinant and the direction"
    layer(x, x, log_det)


def test_vectors_are_multiplied_from_the_side_that_the_layer_multiplies_them():
    class Convolution(openai.InvertibleConv1x1):
        def forward(self, x, logdet=None, reverse=False):
            return super().forward(x, logdet, reverse) if x.dim() == 4 else (x @ self.weight, logdet)

    layer, x = Convolution(4), torch.randn(2, 4)
    expected = layer(x)
    assert gk.accelerate(layer).patched
    torch.testing.assert_close(layer(x), expected)


class CouplingWithGraph(survae.AffineCouplingBijection):
    inverse = inspect.unwrap(survae.AffineCouplingBijection.inverse)


@pytest.mark.parametrize("make", [survae.AffineCouplingBijection, CouplingWithGraph])
def test_inverses_of_survae_have_a_graph_if_they_had_one(make):
    coupling = make(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), survae.ElementwiseParams(2)))
    (row,) = gk.accelerate(coupling).layers
    assert row.patched, row.reason
    assert coupling.inverse(torch.randn(2, 4, 6, 6)).requires_grad == (make is CouplingWithGraph)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(2, 4), (3, 4)),
        (nn.Conv1d(2, 4, 3, padding=1), (3, 4, 8)),
        (nn.Conv3d(2, 4, 3, padding=1), (3, 4, 2, 4, 6)),
    ],
    ids=["vectors", "sequences", "volumes"],
)
def test_couplings_of_survae_are_accelerated_whatever_they_transform(layer, shape):
    coupling, x = survae.AffineCouplingBijection(nn.Sequential(layer, survae.ElementwiseParams(2))), torch.randn(shape)
    expected = coupling(x), coupling.inverse(x)
    (row,) = gk.accelerate(coupling).layers
    assert row.patched, row.reason
    torch.testing.assert_close((coupling(x), coupling.inverse(x)), expected)


def coupling_with(network):
    coupling = rosinality.AffineCoupling(4, 4)
    coupling.net = network
    return coupling


@pytest.mark.parametrize("memory", ["store", "anchor"])
def test_couplings_with_rosinalitys_methods_are_accelerated_on_sequences_too(memory):
    coupling, x = coupling_with(nn.Conv1d(2, 4, 3, padding=1)), torch.randn(3, 4, 8)
    expected = (*coupling(x), coupling.reverse(x))
    (row,) = gk.accelerate(coupling, memory=memory).layers
    assert (row.patched, row.memory) == (True, memory), row.reason
    torch.testing.assert_close((*coupling(x), coupling.reverse(x)), expected)


def test_couplings_that_halve_the_last_dimension_are_not_mistaken_for_couplings_of_vectors():
    class LastHalved(rosinality.AffineCoupling):
        def forward(self, x):
            y, log_det = super().forward(x.movedim(-1, 1))
            return y.movedim(1, -1), log_det

        def reverse(self, y):
            return super().reverse(y.movedim(-1, 1)).movedim(1, -1)

    coupling = LastHalved(4, 4)
    coupling.net = nn.Linear(2, 4)
    assert not gk.accelerate(coupling).patched


def test_reason_for_networks_that_also_read_a_condition_names_the_channels_tried():
    coupling = coupling_with(nn.Conv2d(2 + 3, 4, 3, padding=1))  # a condition of three channels
    (row,) = gk.accelerate(coupling).layers
    assert "on 7 channels, as its network suggests" in row.reason


@pytest.mark.parametrize("verify", [True, False])
def test_padded_convolutions_whose_kernel_is_not_square_are_not_patched(verify):
    class ZeroConvolutionInTime(rosinality.ZeroConv2d):
        def __init__(self):
            super().__init__(2, 4)
            self.conv = nn.Conv2d(2, 4, (3, 1))

        def forward(self, x):
            return self.conv(F.pad(x, [0, 0, 1, 1], value=1)) * torch.exp(self.scale * 3)

    (row,) = gk.accelerate(ZeroConvolutionInTime(), verify=verify).layers
    assert row.reason.endswith("a kernel that is not square")


def alone(layer: type[nn.Module]) -> type[nn.Module]:
    """A layer that returns only the data, as ArtFlow's do."""

    class Alone(layer):
        def forward(self, x):
            return super().forward(x)[0]

    return Alone


class FlowAlone(nn.Module):
    def __init__(self, convolution, affine):
        super().__init__()
        self.actnorm = alone(rosinality.ActNorm)(4)
        self.invconv = alone(convolution)(4)
        self.coupling = alone(rosinality.AffineCoupling)(4, 8, affine)

    def forward(self, x):
        return self.coupling(self.invconv(self.actnorm(x)))

    def reverse(self, y):
        return self.actnorm.reverse(self.invconv.reverse(self.coupling.reverse(y)))


@pytest.mark.parametrize("memory", ["store", "anchor"])
@pytest.mark.parametrize(
    ("convolution", "affine"), [(rosinality.InvConv2dLU, False), (rosinality.InvConv2d, True)], ids=["lu", "plain"]
)
def test_steps_without_log_determinants_are_accelerated(convolution, affine, memory):
    model = nn.Sequential(*(FlowAlone(convolution, affine) for _ in range(2))).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model(x)
    original = copy.deepcopy(model)
    report = gk.accelerate(model, memory=memory)
    assert not report.left_alone
    assert {row.memory for row in report.layers if row.kind == "Flow"} == {memory}
    losses = [(m[0].reverse(m(x)) ** 2).sum() for m in (model, original)]
    grads = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (model, original), strict=True)]
    torch.testing.assert_close(*grads)
    for layer in (0, 1):
        for name in ("actnorm", "invconv", "coupling"):  # called by themselves
            pair = [getattr(m[layer], name)(x) for m in (model, original)]
            torch.testing.assert_close(*pair)


def test_convolutions_without_a_log_determinant_may_be_singular():
    convolution, x = alone(rosinality.InvConv2d)(4), torch.randn(2, 4, 6, 6)
    original = copy.deepcopy(convolution)
    assert gk.accelerate(convolution).patched
    for layer in (convolution, original):
        with torch.no_grad():
            layer.weight[0] = 0
        layer(x).square().sum().backward()
    torch.testing.assert_close(convolution.weight.grad, original.weight.grad)


def test_reason_for_additive_couplings_is_the_one_found_for_halves():
    class Multiplied(rosinality.AffineCoupling):
        def forward(self, x):
            first, second = x.chunk(2, 1)
            return torch.cat([first, self.net(first) * second], 1), None

    (row,) = gk.accelerate(Multiplied(4, 8, affine=False)).left_alone
    assert row.reason == "the network's output is not added"


def test_images_that_actnorm_refuses_are_not_broadcast():
    actnorm = openai.ActNorm2d(4)
    actnorm(torch.randn(2, 4, 6, 6))
    assert gk.accelerate(actnorm).layers[0].patched
    for shape in ((2, 1, 6, 6), (2, 4, 6), (2, 4)):
        with pytest.raises(AssertionError, match="expected 4 channels"):
            actnorm(torch.randn(shape))


def test_actnorm_with_offsets_as_in_srflow_calls_the_original_when_they_are_given():
    class ActNormWithOffset(openai.ActNorm2d):
        def forward(self, x, logdet=None, reverse=False, offset_mask=None, bias_offset=None):
            y, logdet = super().forward(x, logdet, reverse)
            return (y if bias_offset is None else y + bias_offset), logdet

    actnorm = ActNormWithOffset(4)
    x, log_det = torch.randn(2, 4, 6, 6), torch.zeros(2)
    expected = [actnorm(x, log_det), actnorm(x, log_det, bias_offset=torch.ones(1, 4, 6, 6))]
    assert len(gk.accelerate(actnorm).patched) == 1
    actual = [actnorm(x, log_det), actnorm(x, log_det, bias_offset=torch.ones(1, 4, 6, 6))]
    torch.testing.assert_close(actual, expected)


def test_scripted_layers_are_not_touched():
    scripted = torch.jit.script(nn.ReLU())
    model = nn.ModuleDict({"scripted": scripted, "flow": step()})
    report = gk.accelerate(model)
    assert len(report.patched) == len(report.layers)
    assert type(model["scripted"]) is type(scripted)


def test_accelerated_model_compiles_at_once():
    flow = step()
    x = torch.randn(2, 4, 6, 6)
    expected, expected_log_det = flow(x)
    gk.accelerate(flow)
    torch._dynamo.reset()
    y, log_det = torch.compile(flow, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(log_det, expected_log_det)
    flow.actnorm.initialized.fill_(0)  # marks it as not initialised
    y, _ = torch.compile(flow.actnorm, backend="eager")(7 * x + 3)
    torch.testing.assert_close(y.std(), torch.tensor(1.0), atol=2e-2, rtol=0.0)


@pytest.mark.parametrize("memory", ["store", "anchor"])
@pytest.mark.parametrize(("how", "make"), [("trace", survae.Flow), ("export", nflows_glow)])
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_accelerated_model_is_traced_and_exported(how, make, memory):
    model = make().eval()
    gk.accelerate(model, memory=memory, verify=False)
    x, other = torch.randn(2, 2, 3, 8, 8)
    expected = model(other)
    if how == "trace":
        copied = torch.jit.trace(model, (x,), check_trace=False)
    else:
        copied = torch.export.export(model, (x,), strict=False).module()
    for actual, result in zip(copied(other), expected, strict=True):
        torch.testing.assert_close(actual, result, rtol=1e-4, atol=1e-4)


def test_shared_layers_are_patched_once():
    shared = step()
    model = nn.ModuleList([shared, shared])
    report = gk.accelerate(model)
    assert [row.path for row in report.layers if row.kind == "Flow"] == ["0"]
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(model[0](x)[0], model[1](x)[0])


def test_hooks_of_every_layer_still_run():
    flow = step()
    seen: list[str] = []
    for name, layer in flow.named_modules():
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    gk.accelerate(flow)
    assert seen == []  # probing has not called them
    flow(torch.randn(2, 4, 6, 6))
    assert set(seen) == {name for name, _ in flow.named_modules()}


def test_hooks_of_the_permutation_in_a_convolution_of_nflows_still_run():
    model = CompositeTransform([ActNorm(4), OneByOneConvolution(4)])
    assert not gk.accelerate(model, verify=False).left_alone
    seen = []
    model._transforms[1].permutation.register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(2, 4, 6, 6))
    assert len(seen) == 1


def test_hook_that_changes_the_output_of_actnorm_has_its_effect():
    flow = step()
    x = torch.randn(2, 4, 6, 6)
    gk.accelerate(flow)
    handle = flow.actnorm.register_forward_hook(lambda module, inputs, output: (2 * output[0], output[1]))
    doubled = flow(x)[0]
    handle.remove()
    plain = flow(x)[0]
    assert not torch.allclose(doubled, plain)
    gk.restore(flow)
    flow.actnorm.register_forward_hook(lambda module, inputs, output: (2 * output[0], output[1]))
    torch.testing.assert_close(doubled, flow(x)[0])


def test_global_hooks_still_see_every_layer():
    flow = step()
    gk.accelerate(flow)
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        flow(torch.randn(2, 4, 6, 6))
    finally:
        handle.remove()
    assert flow.actnorm in seen
    assert flow.invconv in seen


def test_random_numbers_parameters_and_modes_are_not_disturbed():
    model = normflows_glow().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    gk.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer.training for layer in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_devices_that_the_model_is_not_on_keep_their_seeds(monkeypatch):
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    gk.accelerate(normflows_glow())
    assert seeded == []


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_may_be_called_without_gradients(context):
    flow = step()
    with context():
        assert len(gk.accelerate(flow).left_alone) == 0


def test_optimizer_goes_on_with_the_same_parameters():
    model = normflows_glow()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x = torch.randn(4, 3, 8, 8)
    normflows_loss(model, x)
    gk.accelerate(model)
    before = normflows_loss(model, x)
    before.backward()
    optimizer.step()
    assert normflows_loss(model, x) < before


def test_frozen_parameters_get_no_gradient():
    flow = step()
    flow.actnorm.requires_grad_(False)
    flow.invconv.w_u.requires_grad_(False)
    gk.accelerate(flow)
    x = torch.randn(2, 4, 6, 6)
    (flow(x)[0].square().sum() + flow(x)[1].sum()).backward()
    assert flow.actnorm.loc.grad is flow.invconv.w_u.grad is None
    assert flow.invconv.w_l.grad is not None


def test_uninitialised_actnorm_stays_so_and_initialises_as_the_dialect_would():
    original = rosinality.Glow(3, 2, 2, filter_size=4)
    accelerated = copy.deepcopy(original)
    gk.accelerate(accelerated)
    assert not accelerated.blocks[0].flows[0].actnorm.initialized
    x = 3 + 2 * torch.randn(4, 3, 8, 8)
    for model in (original, accelerated):
        model.eval()(x)  # this dialect initialises in evaluation too
    for (name, expected), actual in zip(original.state_dict().items(), accelerated.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=name)
    assert accelerated.blocks[0].flows[0].actnorm.initialized


def test_actnorm_of_nflows_passes_through_in_evaluation_until_it_is_initialised():
    model = nflows_glow().eval()
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)[0]
    gk.accelerate(model)
    torch.testing.assert_close(model(x)[0], expected)
    model.train()(x)
    assert all(layer.initialized for layer in model.modules() if hasattr(layer, "initialized"))


def test_loading_an_uninitialised_checkpoint_initialises_again():
    fresh = rosinality.ActNorm(4)
    blank = copy.deepcopy(fresh.state_dict())
    gk.accelerate(fresh)
    x = 3 + 2 * torch.randn(8, 4, 6, 6)
    fresh(x)
    fresh(x)  # now the set flag is remembered
    fresh.load_state_dict(blank)
    y, _ = fresh(10 * x)
    torch.testing.assert_close(y.std(), torch.tensor(1.0), atol=1e-2, rtol=0.0)


def test_initialised_flag_is_read_once(monkeypatch):
    flow = step()
    gk.accelerate(flow)
    x = torch.randn(2, 4, 6, 6)
    flow(x)

    def refuse(*_):
        raise AssertionError("the flag was read again")

    monkeypatch.setattr(Tensor, "__bool__", refuse)
    monkeypatch.setattr(Tensor, "item", refuse)
    flow(x)


def test_float64_and_autocast_work():
    flow = step()
    x = torch.randn(2, 4, 6, 6)
    truth = copy.deepcopy(flow).double()(x.double())[0]
    gk.accelerate(flow)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = flow(x)
    assert y.dtype == log_det.dtype == torch.float32
    assert (y - truth).abs().max() < 0.05
    assert (flow.double()(x.double())[0] - truth).abs().max() < 1e-12


def test_network_that_needs_contiguous_images_gets_them():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(x.view(x.shape[0], -1).view(x.shape))

    flow = step()
    flow.coupling.net = Views()
    x = torch.randn(2, 4, 6, 6)
    expected = flow(x)[0]
    report = gk.accelerate(flow)
    assert kinds(report)["AffineCoupling"]
    torch.testing.assert_close(flow(x)[0], expected)


def test_network_with_dropout_keeps_its_random_numbers():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, padding=1)

        def forward(self, x):
            return F.dropout(self.conv(x), 0.5, self.training)

    flow = step()
    flow.coupling.net = Dropping()
    x = torch.randn(2, 4, 6, 6)
    torch.manual_seed(5)
    expected = flow(x)[0]
    gk.accelerate(flow)
    torch.manual_seed(5)
    torch.testing.assert_close(flow(x)[0], expected)


def test_classes_that_define_how_they_are_copied_are_not_patched():
    class Special(rosinality.AffineCoupling):
        def __reduce__(self):
            return (Special, (4, 4))

    report = gk.accelerate(Special(4, 4))
    assert [row.reason for row in report.layers if row.kind == "AffineCoupling"] == [
        "its class defines __reduce__, which copies and pickles must keep"
    ]


def test_deep_copies_of_a_step_with_closures_use_their_own_convolution():
    original = openai.FlowStep(4, 4, style="y0ast")
    gk.accelerate(original)
    x, log_det = torch.randn(2, 4, 6, 6), torch.zeros(2)
    original(x, log_det)
    copied = copy.deepcopy(original)
    with torch.no_grad():
        copied.invconv.weight *= 2
    assert not torch.allclose(copied(x, log_det)[0], original(x, log_det)[0])


def test_report_is_a_table_and_plain_values():
    flow = step()
    report = gk.accelerate(flow)
    text = str(report)
    assert text.splitlines()[0].split()[:3] == ["layer", "recognised", "as"]
    assert "s = sigmoid(u + 2), chunk_scale_shift, shift_scale, net reads the first half" in text
    assert f"{len(report.layers)} of {len(report.layers)} flow layers accelerated" in text
    assert "better: log s is computed as log(sigmoid)" in text
    row = next(row for row in report.as_dict()["patched"] if row["kind"] == "AffineCoupling")
    assert row["path"] == "coupling"
    assert set(row["agreement"]["values"]) == set(row["agreement"]["gradients"]) == {"forward", "reverse"}
    assert set(row["agreement"]["log_dets"]) == {"forward"}  # this dialect's reverse returns only the data
    assert row["agreement"]["values"]["forward"] < 1e-12
    assert min(row["agreement"]["rounding"]) > 0


def test_underflowing_scales_stay_finite():
    coupling = rosinality.AffineCoupling(2, 4)
    with torch.no_grad():
        coupling.net[-1].conv.bias[0] = -200.0
        x = torch.randn(1, 2, 4, 4)
        assert coupling(x)[1].isinf().all()
        gk.accelerate(coupling)
        torch.testing.assert_close(coupling(x)[1], torch.tensor([-198.0 * 16]))
