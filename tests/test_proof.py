"""The proof of a cut before training, and the trial of find_spaces: what they see, and what they must not touch."""

import copy
import threading
import time
from collections import UserDict, deque
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csgd
from csgd.proof import Trial
from csgd.trial import random_clusters
from tests import nets


class Body(nn.Module):
    """conv → function → linear head over positions."""

    def __init__(self, function, channels=12, **modules):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, channels, 3, padding=1), function
        self.last = nn.Conv2d(channels, 5, 1)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x, *more, **how):
        return self.last(torch.tanh(self.function(self.conv(x), self, *more, **how))).mean((2, 3))


IMAGES = torch.randn(nets.IMAGES, generator=torch.Generator().manual_seed(3))


def free(net, example=IMAGES, **how):
    return {space.name for space in csgd.find_spaces(net, example, **how) if space.trimmable}


def state_of(net):
    return {key: value.clone() for key, value in net.state_dict().items()}, [m.training for m in net.modules()]


# the clusters in use


def test_control_flow_that_looks_at_widths_is_seen_with_the_clusters_in_use():
    """A1: random widths pass it, the widths in use go wrong."""
    net = Body(lambda y, m: y + m.inner(y).relu() if y.shape[1] > 7 else y, channels=16, inner=nn.Conv2d(16, 16, 1))
    spaces = csgd.find_spaces(net, IMAGES, trial=False)
    narrow, wide = (csgd.cluster(net, spaces, csgd.target_widths(spaces, n), "even") for n in (0.25, 0.75))
    assert csgd.prove(net, spaces, wide, IMAGES).exact
    proof = csgd.prove(net, spaces, narrow, IMAGES)
    assert not proof.exact
    assert proof.change > 1e-3
    assert set(proof.failing) == {"conv"}
    assert "its trial trim changes the output" in str(proof)


def test_a_proof_tells_each_mode_and_its_control():
    net = nets.Plain()
    spaces = csgd.find_spaces(net, IMAGES)
    proof = csgd.prove(net, spaces, random_clusters(spaces), IMAGES)
    assert proof.exact
    assert proof.changes.keys() == {"eval", "train"}
    assert proof.change < 1e-12 < 1e-3 < proof.control
    assert not proof.failing


def test_a_proof_runs_the_wide_network_twice_and_its_control_at_the_narrow_width(monkeypatch):
    widths, passes = [], Trial.passes

    def noted(trial, model, *how):
        widths.append(model.conv.out_channels)
        return passes(trial, model, *how)

    monkeypatch.setattr(Trial, "passes", noted)
    net = Body(lambda y, m: m.norm(y), norm=nn.BatchNorm2d(12))
    spaces = csgd.find_spaces(net, IMAGES, trial=False)
    assert csgd.prove(net, spaces, random_clusters(spaces), IMAGES).exact
    assert sorted(widths) == [6, 6, 6, 12, 12], "statistics are fitted in a pass that is needed anyway"


@pytest.mark.parametrize("shared", [False, True], ids=["own statistics", "shared statistics"])
def test_statistics_are_fitted_once_and_the_pass_that_fits_them_is_the_one_of_eval_mode(shared):
    """Where two layers share them, or a layer is called again, the pass that fits sees what all later ones see."""
    first, second = nn.BatchNorm2d(12), nn.BatchNorm2d(12)
    if shared:
        second.running_mean, second.running_var = first.running_mean, first.running_var
    net = Body(lambda y, m: m.second(3 * m.first(5 * m.first(y))), first=first, second=second)
    spaces = csgd.find_spaces(net, IMAGES, trial=False)
    trial = Trial(net, spaces, random_clusters(spaces), IMAGES)
    fitted, again = (passes.outputs[0] for passes in (trial.before["eval"], trial.passes(trial.model, False)))
    torch.testing.assert_close(again, fitted, rtol=1e-13, atol=0)
    of_equal, of_random = trial.model.first.running_var, trial.twin().first.running_var
    assert torch.isin(of_equal, of_random).all(), "a twin that is made anew has the same"
    assert csgd.prove(net, spaces, random_clusters(spaces), IMAGES).exact


def test_a_proof_whose_cut_cannot_run_tells_its_control_all_the_same():
    net = Body(lambda y, _: y.view(2, 12, 64).view(2, 12, 8, 8))
    spaces = csgd.find_spaces(net, IMAGES, trial=False)
    proof = csgd.prove(net, spaces, random_clusters(spaces), IMAGES)
    assert "raises in eval mode" in proof.failing["conv"]
    assert 1e-3 < proof.control < 1e3


def test_a_random_train_mode_is_run_all_the_same():
    """A14: a typed size behind dropout."""

    def typed(y, m):
        return y if not m.training else F.dropout(y, 0.5).view(-1, 12 * 64).view(-1, 12, 8, 8)

    assert free(Body(typed)) == set()
    net = Body(lambda y, m: F.rrelu(y, training=m.training))  # draws a number for each entry
    spaces = csgd.find_spaces(net, IMAGES)
    proof = csgd.prove(net, spaces, random_clusters(spaces), IMAGES)
    assert proof.exact
    assert proof.changes["train"] is None


def test_a_random_train_mode_is_compared_where_a_cut_leaves_the_draws_alone():
    def keep(y):
        return y * (torch.rand(len(y), 1, 1, 1, dtype=y.dtype) < 0.7)

    assert free(Body(lambda y, m: y / y.shape[1] + keep(y.relu()) if m.training else y)) == set()
    net = Body(lambda y, m: y + keep(y.relu()) if m.training else y)
    spaces = csgd.find_spaces(net, IMAGES)
    assert csgd.prove(net, spaces, random_clusters(spaces), IMAGES).changes["train"] < 1e-12


@pytest.mark.parametrize("dropout", [F.dropout, F.dropout2d, F.alpha_dropout])
def test_dropout_drops_nothing_in_a_trial(dropout):
    assert free(Body(lambda y, m: dropout(y, 0.5, m.training) / (y.shape[1] if m.training else 1))) == set()
    assert free(Body(lambda y, m: dropout(y, 0.5, True))) == {"conv"}, "also where it is always on"


# inputs


@pytest.mark.parametrize("example", [torch.zeros(nets.IMAGES), torch.ones(nets.IMAGES), IMAGES > 0])
def test_the_trial_draws_its_own_inputs(example):
    """A13: without biases all activations of an example of zeros are 0."""
    example = example.float()
    net = Body(lambda y, m: y / y.shape[1])
    net.conv.bias = net.last.bias = None
    assert "conv" not in free(net, example)
    assert "conv" in free(Body(lambda y, m: y.relu()), example)


def test_inputs_of_one_sign_are_drawn_with_both():
    """Under a large mean channels keep their sign, and it does not show whether a positive one is rectified."""

    class Switched(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            return self[1](y.relu() if y.shape[1] > 7 else y).mean((2, 3))

    net, example = Switched(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 5, 1)), 255 + 0.1 * IMAGES
    spaces = csgd.find_spaces(net, example, trial=False)
    for seed in range(9):
        proof = csgd.prove(net, spaces, {"0": [[*range(6)], [*range(6, 12)]]}, example, seed=seed)
        assert set(proof.failing) == {"0"}, seed

    class Logarithm(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Body(lambda y, m: y.relu())

        def forward(self, x):
            return self.body(x.log())

    assert "body.conv" in free(Logarithm(), IMAGES.abs()), "but where a network takes one sign alone"


def test_channels_that_reach_no_output_are_not_called_free():
    net = Body(lambda y, m: y.relu() + 0.0 * m.inner(y), inner=nn.Conv2d(12, 12, 1))
    pinned = {space.name: space.pinned for space in csgd.find_spaces(net, IMAGES)}
    assert pinned["conv"] == []
    unseen = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1), nn.Hardtanh(7.0, 7.1), nn.Conv2d(5, 4, 1))
    (first, *_) = csgd.find_spaces(unseen, IMAGES)
    assert first.pinned == ["its trial cannot see it: no output depends on these channels"]


def test_one_backward_pass_shows_what_is_computed_in_training_alone(monkeypatch):
    """A trial looks at gradients in train mode first: an auxiliary head, or losses, depend on most."""
    backward, calls = torch.autograd.backward, []
    monkeypatch.setattr(torch.autograd, "backward", lambda *args: calls.append(backward(*args)))

    def body(y, m):
        return y + m.aux(m.inner(y).relu()).mean() if m.training else y

    net = Body(body, inner=nn.Conv2d(12, 12, 1), aux=nn.Conv2d(12, 1, 1))
    assert {"conv", "inner"} <= free(net)
    assert len(calls) == 1


def test_a_trial_that_raises_accuses_no_other_space():
    """It ends a pass in train mode half way, where statistics have moved already."""

    def body(y, m):
        y = m.inner(m.norm(y).relu())
        return y if not m.training else y.relu().view(-1, 12, 64).view(-1, 12, 8, 8)

    assert free(Body(body, norm=nn.BatchNorm2d(12), inner=nn.Conv2d(12, 12, 1))) == {"conv"}


def test_statistics_that_an_example_of_zeros_leaves_alone_are_not_frozen():
    net = Body(lambda y, m: m.norm(y).relu(), norm=nn.BatchNorm2d(12))
    net.conv.bias = None
    assert csgd.find_spaces(net, torch.zeros(nets.IMAGES))[0].conditions == []
    net.norm.momentum = 0.0
    (condition,) = csgd.find_spaces(net, torch.zeros(nets.IMAGES))[0].conditions
    assert condition.tensors == ("norm.running_mean", "norm.running_var")


def test_infinities_in_the_output_are_no_change():
    """A12: a sound network that masks a class."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Body(lambda y, m: y.relu())

        def forward(self, x):
            out = self.body(x)
            return out.masked_fill(torch.tensor([False, True, False, False, False]), float("-inf"))

    assert "body.conv" in free(Masked())


def test_a_finite_mask_over_most_outputs_hides_nothing_and_pins_nothing():
    """A12: the median of all entries would be that of the mask."""

    class Masked(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.body = Body(function)

        def forward(self, x):
            return self.body(x).masked_fill(torch.tensor([False, True, True, True, False]), -1e9)

    assert "body.conv" in free(Masked(lambda y, m: y.relu()))
    wrong = Masked(lambda y, m: y / y.shape[1])
    spaces = csgd.find_spaces(wrong, IMAGES, trial=False)
    proof = csgd.prove(wrong, spaces, random_clusters(spaces), IMAGES)
    assert proof.failing.keys() == {"body.conv"}


def test_outputs_of_other_layouts_are_compared_as_dense_ones():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Body(lambda y, m: y.relu())

        def forward(self, x):
            return self.body(x).to_sparse()

    assert free(Sparse()) == {"body.conv"}


def test_one_large_output_hides_no_change():
    """A12: a tolerance relative to the largest entry would."""

    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.loud = Body(lambda y, m: y / y.shape[1]), nn.Conv2d(3, 1, 1)

        def forward(self, x):
            return torch.cat([self.body(x), 1e12 * self.loud(x).mean((2, 3)).abs()], 1)

    assert "body.conv" not in free(Loud())


# what must stay as it was


def test_replaced_methods_hooks_and_lambdas_reach_the_twin_only():
    """A3."""
    net, seen = Body(lambda y, m: m.norm(y), norm=nn.BatchNorm2d(12), inner=nn.Conv2d(12, 12, 1)), {}
    old = net.norm.forward
    net.norm.forward = lambda x: old(x).relu()
    net.scale = lambda x: net.inner(x)
    net.function = lambda y, m: net.scale(m.norm(y)) + seen.get("conv", y).sum(1, keepdim=True)
    net.conv.register_forward_hook(lambda m, i, out: seen.__setitem__("conv", out))
    before, modes = state_of(net)
    names = free(net)
    after, now = state_of(net)
    assert seen == {}
    assert modes == now
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert names == {"inner"}, "the network sums over the channels of what the hook kept"


def test_what_a_network_keeps_from_call_to_call_is_not_shared_with_the_cut_one():
    def remembers(y, m):
        last, m.kept = m.kept, y.detach()
        return y if last is None or last.shape != y.shape else y + last

    def noisy(y, m):
        return y + torch.rand(len(y), 1, 1, 1, generator=m.generator, dtype=y.dtype)

    for body in (remembers, noisy):
        net = Body(body)
        net.kept, net.generator = None, torch.Generator().manual_seed(3)
        assert free(net) == {"conv"}
        assert net.kept is None


def test_a_network_that_cannot_be_copied_is_refused_before_its_hooks_run():
    net, seen = Body(lambda y, m: y.relu()), []
    net.lock = threading.Lock()
    net.conv.register_forward_hook(lambda m, args, out: seen.append(out))
    with pytest.raises(csgd.InputError, match="cannot be copied for its trial .*lock.*; trial=False leaves it out"):
        csgd.find_spaces(net, IMAGES)
    assert seen == []
    assert "conv" in free(net, trial=False)


def test_backward_hooks_are_not_called():
    net = Body(lambda y, m: y.relu())
    net.conv.register_full_backward_hook(lambda *_: pytest.fail("called"))
    net.conv.register_full_backward_pre_hook(lambda *_: pytest.fail("called"))
    assert "conv" in free(net)


def test_a_network_that_is_reached_from_outside_is_refused_with_the_name():
    norm = nn.BatchNorm2d(12)

    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 12, 1), norm, nn.Conv2d(12, 5, 1)

        def forward(self, x):
            return self.last(norm(self.conv(x)).relu())

    net = Outside()
    before, _ = state_of(net)
    with pytest.raises(csgd.InputError, match=r"norm\.\w+ of the network is used while a copy of it runs"):
        csgd.find_spaces(net, IMAGES)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@dataclass
class Batch:
    images: Tensor
    more: dict


@pytest.mark.parametrize(
    "wrap, unwrap",
    [
        (lambda x: Batch(x, {"n": 1}), lambda b: b.images),
        (lambda x: UserDict(images=x), lambda b: b["images"]),
        (lambda x: {"images": [x]}, lambda b: b["images"][0]),
    ],
)
def test_examples_of_any_class_are_left_as_they_were_and_tried_in_float64(wrap, unwrap):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Body(lambda y, m: y.relu())

        def forward(self, batch):
            return self.body(unwrap(batch))

    net, images = Wrapped(), IMAGES.clone()
    example = wrap(images)
    spaces = csgd.find_spaces(net, example)
    assert torch.equal(images, IMAGES)
    assert unwrap(example) is images
    assert vars(images) == {}
    assert csgd.prove(net, spaces, random_clusters(spaces), example).dtype == torch.float64


class Pair(NamedTuple):
    images: Tensor
    n: int


class Slotted:
    __slots__ = "images"


class Derived(Slotted):
    __slots__ = ("n",)


def slotted(images):
    example = Derived()
    example.images, example.n = images, 1
    return example


@pytest.mark.parametrize(
    "wrap, unwrap",
    [
        (lambda x: Pair(x, 1), lambda b: b.images),
        (slotted, lambda b: b.images),
        (lambda x: deque([x]), lambda b: b[0]),
    ],
)
def test_named_tuples_slots_and_queues_are_one_input_and_one_output(wrap, unwrap):
    class Wrapped(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.body = Body(function)

        def forward(self, batch):
            return wrap(self.body(unwrap(batch)))

    images = IMAGES.clone()
    assert free(Wrapped(lambda y, m: y.relu()), wrap(images)) == {"body.conv"}
    assert free(Wrapped(lambda y, m: y / y.shape[1]), wrap(images)) == set()
    assert torch.equal(images, IMAGES)
    assert vars(images) == {}


# other ways in, and layers that no example reaches


def ways(y, m, task="a"):
    return y.relu() if task == "a" else y.relu().view(-1, 12, 64).mean(2)[:, :, None, None].expand(-1, 12, 8, 8)


def test_the_mode_that_a_network_is_in_is_one_of_those_tried():
    """Fine-tuning with norms in eval mode: neither in eval nor in train mode do the flags differ."""

    def body(y, m):
        y = m.norm(y)
        return y / y.shape[1] if m.training and not m.norm.training else y.relu()

    net = Body(body, norm=nn.BatchNorm2d(12))
    assert "conv" in free(net)
    net.norm.eval()
    assert "conv" not in free(net)
    net = Body(lambda y, m: m.norm(y).relu(), norm=nn.BatchNorm2d(12))
    net.norm.eval()
    spaces = csgd.find_spaces(net, IMAGES)
    assert csgd.prove(net, spaces, random_clusters(spaces), IMAGES).changes.keys() == {"eval", "train", "own"}


def test_several_examples_and_keywords():
    """A4."""
    net = Body(ways)
    assert "conv" in free(net)
    assert "conv" not in free(net, examples=[csgd.Inputs(IMAGES, task="b")])
    assert "conv" in free(net, csgd.Inputs(IMAGES, task="a"))


def test_a_layer_that_no_example_reaches_pins_what_it_may_read():
    """A15."""

    def larger(y, m):
        return y.relu() if y.shape[-1] <= 8 else m.beside(y)

    net = Body(larger, beside=nn.Conv2d(12, 12, 1))
    (conv,) = [space for space in csgd.find_spaces(net, IMAGES) if space.name == "conv"]
    assert "beside, which the example does not reach, may read it" in "; ".join(conv.pinned)
    assert "conv" in free(net, unused=["beside"])
    assert "conv" in free(net, examples=[torch.randn(2, 3, 16, 16)])
    with pytest.raises(csgd.InputError, match="unused: no layer that the example leaves out matches 'nowhere'"):
        csgd.find_spaces(net, IMAGES, unused=["nowhere"])


def test_a_layer_that_no_example_reaches_pins_two_activations_that_it_may_read_side_by_side():
    """Also where a single one would do."""

    def larger(y, m):
        a, b = m.a(y).relu(), m.b(y).relu()
        y = m.of_a(a) + m.of_b(b) + m.of_c(m.c(y).relu())
        return y if y.shape[-1] <= 8 else y + m.both(torch.cat([a, b], 1))

    widths = {"a": 7, "b": 6, "c": 13}
    layers = {name: nn.Conv2d(12, width, 1) for name, width in widths.items()}
    layers |= {f"of_{name}": nn.Conv2d(width, 12, 1) for name, width in widths.items()}
    net = Body(larger, both=nn.Conv2d(13, 12, 1), **layers)
    assert free(net) == set()
    assert free(net, examples=[torch.randn(2, 3, 16, 16)]) == {"conv", "a", "b", "c", "of_a"}


def test_a_head_that_is_called_now_and_then_is_seen():
    def rarely(y, m):
        if m.training and torch.rand(()) < 0.4:
            return y + m.aux(y.flatten(1)).mean() * 1e-3
        return y.relu()

    spaces = csgd.find_spaces(Body(rarely, aux=nn.Linear(12 * 64, 3)), IMAGES, trial=False)
    refs = {owner for space in spaces if space.name == "conv" for ref in space.refs for owner in ref.owners}
    assert ("aux", "weight") in refs


# what cannot be tried


@pytest.mark.parametrize(
    "example, line",
    [
        (torch.empty(0, 3, 8, 8), r"the example of \[0, 3, 8, 8\] is empty: it needs a batch of 2 or more"),
        (torch.empty(2, 3, 8, 8, device="meta"), "the example has a tensor on the meta device, which has no values"),
        (torch.nested.nested_tensor(list(IMAGES), layout=torch.jagged), "the example has a nested tensor"),
    ],
)
def test_an_example_without_values_is_refused(example, line):
    net = Body(lambda y, m: y.relu())
    spaces = csgd.find_spaces(net, IMAGES)
    with pytest.raises(csgd.InputError, match=line):
        csgd.find_spaces(net, example)
    with pytest.raises(csgd.InputError, match=line):
        csgd.prove(net, spaces, random_clusters(spaces), example)


def test_a_network_that_draws_when_it_is_copied_leaves_random_states_alone():
    class Anew(nn.Conv2d):
        def __deepcopy__(self, memo):
            return Anew(12, 12, 1)

    net, before = Body(lambda y, m: m.inner(y).relu(), inner=Anew(12, 12, 1)), torch.get_rng_state()
    free(net)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_that_cannot_be_copied_says_so_in_one_line():
    class Alone(nn.Conv2d):
        def __deepcopy__(self, memo):
            raise TypeError("not twice\nand never")

    net = Body(lambda y, m: m.inner(y).relu(), inner=Alone(12, 12, 1))
    with pytest.raises(csgd.InputError) as error:
        csgd.find_spaces(net, IMAGES)
    assert str(error.value).endswith("its trial (TypeError: not twice); trial=False leaves it out")


@pytest.mark.parametrize(
    "net, example, line",
    [
        (lambda: nn.Sequential(nn.LazyConv2d(8, 1), nn.Conv2d(8, 5, 1)), IMAGES, "0.weight is lazy and has no shape"),
        (lambda: nn.Conv2d(3, 8, 1, device="meta"), IMAGES, "weight is on the meta device and has no values"),
        (
            lambda: Body(lambda y, m: m.fc(y), fc=nn.Linear(7, 3)),
            IMAGES,
            "fc: RuntimeError: mat1 and mat2",
        ),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)),
            IMAGES[:1],
            "2: ValueError: Expected more than 1 value per channel when training.*an example has a batch of 2",
        ),
    ],
)
def test_what_cannot_run_is_refused_in_one_line_that_names_the_module(net, example, line):
    with pytest.raises(csgd.InputError, match=line) as error:
        csgd.find_spaces(net(), example)
    assert "\n" not in str(error.value)


def test_a_network_that_refuses_random_weights_is_tried_with_its_own():
    """A5: a scale that must be large, as a distribution's must be positive."""

    def checked(y, m):
        if float(m.sigma) < 1.5:
            raise ValueError("sigma must be 1.5 or more")
        return y.relu() / m.sigma

    net = Body(checked)
    net.sigma = nn.Parameter(torch.tensor(2.0))
    assert "conv" in free(net)


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(2, 12, 8, 8))])
@pytest.mark.filterwarnings("ignore")
def test_compiled_submodules_do_not_stop_the_analysis(make):
    """A5."""
    net = Body(
        lambda y, m: m.inner(m.compiled(y)).relu(), inner=nn.Conv2d(12, 12, 1), compiled=make(nn.Conv2d(12, 12, 1))
    )
    assert free(net) == {"inner"}


@pytest.mark.parametrize("where", ["network", "layer", "method"])
def test_what_torch_compile_has_wrapped_is_followed_as_it_was_written(where):
    net = Body(lambda y, m: m.inner(y).relu(), inner=nn.Conv2d(12, 12, 1))
    if where == "network":
        net = torch.compile(net, backend="eager")
    elif where == "layer":
        net.inner = torch.compile(net.inner, backend="eager")
    else:
        net.forward = torch.compile(net.forward, backend="eager")
    before, _ = state_of(net)
    assert {name.replace("_orig_mod.", "").replace("._orig_mod", "") for name in free(net)} == {"conv", "inner"}
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    spaces = csgd.find_spaces(net, IMAGES)
    assert csgd.prove(net, spaces, random_clusters(spaces), IMAGES).exact


# attributes of layers without tensors


@pytest.mark.parametrize(
    "norm",
    [
        nn.InstanceNorm2d(12),
        nn.GroupNorm(12, 12, affine=False),
        nn.BatchNorm2d(12, affine=False, track_running_stats=False),
    ],
)
def test_layers_without_tensors_follow_the_cut(norm):
    """A6."""
    net = Body(lambda y, m: m.inner(m.norm(y).relu()).relu(), norm=norm, inner=nn.Conv2d(12, 12, 1))
    spaces = csgd.find_spaces(net, IMAGES)
    assert {"conv", "inner"} <= {space.name for space in spaces if space.trimmable}
    clusters = csgd.cluster(net, spaces, {"conv": 5}, "even")
    csgd.merge_equal(net, spaces, clusters)
    csgd.trim(net, spaces, clusters)
    counts = [getattr(norm, name) for name in ("num_features", "num_channels", "num_groups") if hasattr(norm, name)]
    assert set(counts) == {5}
    net(IMAGES)


# messages


def test_a_space_is_a_line_and_spaces_are_a_table():
    """A7."""
    net = nets.Residual()
    spaces = csgd.find_spaces(net, IMAGES)
    assert str(spaces[0]) == "<ChannelSpace stem: 8 slots in 10 tensors, trimmable>"
    table = csgd.describe(spaces).splitlines()
    assert len(table) == len(spaces) + 1
    assert table[1].split() == ["stem", "8", "outer,", "excite", "free"]
    assert table[-1].endswith("network output")


def test_a_parameter_of_the_network_itself_has_a_name():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.out = nn.Parameter(torch.randn(8, 3, 1, 1)), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            return self.out(F.conv2d(x, self.weight).relu())

    assert free(Bare()) == {"weight"}


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda y, m: y * m.table.view(-1)[:12].view(12, 1, 1), "picks channels by a number that is typed in"),
        (lambda y, m: y + torch.randn(12, 1, 1, dtype=y.dtype), "meets what the network's code makes by randn"),
        (
            lambda y, m: y + torch.linspace(0, 1, 12, dtype=y.dtype).view(12, 1, 1),
            "meets what the network's code makes by linspace",
        ),
    ],
)
def test_what_is_met_is_named(function, reason):
    import re

    net = Body(function)
    net.table = nn.Parameter(torch.randn(12, 64))
    (conv,) = [space for space in csgd.find_spaces(net, IMAGES, trial=False) if space.name == "conv"]
    assert re.search(reason, "; ".join(conv.pinned)), conv.pinned


def test_a_proof_is_cheap_beside_the_passes_it_needs():
    """It runs the wide network three times and the narrow one twice."""
    torch.set_num_threads(1)
    net = nets.Residual()
    spaces = csgd.find_spaces(net, IMAGES)
    calls = []
    copied = copy.deepcopy(net)
    copied.register_forward_pre_hook(lambda m, i: CALLS.append(m.stem.out_channels))
    started = time.perf_counter()
    csgd.prove(copied, spaces, random_clusters(spaces), IMAGES)
    assert time.perf_counter() - started < 5
    assert calls == CALLS == [], "hooks of the twin write into copies of globals"


CALLS: list[int] = []


def chaotic(h, _):
    """The logistic map doubles an error at each turn: the last bit of a float64 becomes 1e-6 in 34 of them."""
    h = torch.sigmoid(h)
    for _ in range(34):
        h = 4 * h * (1 - h)
    return h


def test_a_network_that_makes_rounding_grow_is_judged_by_what_rounding_does():
    net = Body(chaotic)
    spaces = csgd.find_spaces(net, IMAGES)
    assert [space.trimmable for space in spaces] == [True, False]
    proof = csgd.prove(net, spaces, random_clusters(spaces), IMAGES)
    assert 1e-8 < proof.change <= proof.tolerance <= 1e-5
    assert proof.exact
    assert proof.control > 1e-2


def test_what_is_small_but_no_rounding_is_found():
    def leaking(h, _):
        return h + 1e-8 * h.flatten(1).sum(1)[:, None, None, None]

    assert not free(Body(leaking))
    net = Body(leaking)
    spaces = csgd.find_spaces(net, IMAGES, trial=False)
    for space in spaces[:1]:
        space.pinned.clear()
    proof = csgd.prove(net, spaces, {"conv": [list(range(6)), *([slot] for slot in range(6, 12))]}, IMAGES)
    assert not proof.exact
    assert proof.change > proof.tolerance


class Star(nn.Module):
    """x ← norm(mix(relu6(f(x)) · g(x))), some times: what relu6 lets through does not grow with the products."""

    def __init__(self, blocks=12, channels=12):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, channels, 1), nn.ModuleList()
        for _ in range(blocks):
            f, g = (nn.Conv2d(channels, 4 * channels, 1) for _ in "fg")
            last = nn.Sequential(nn.Conv2d(4 * channels, channels, 1), nn.BatchNorm2d(channels))
            self.blocks.append(nn.ModuleList([f, g, last]))
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.stem(x)
        for f, g, last in self.blocks:
            x = last(F.relu6(f(x)) / 4 * g(x))
        return self.head(x.mean((2, 3)))


def of_two_values(layers=16, channels=400):
    """Batch norms over the two images of a batch, which are close in some of the channels."""
    inner = [nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)) for _ in range(layers)]
    return nn.Sequential(nn.Conv2d(3, channels, 8), *inner, nn.Flatten(), nn.Linear(channels, 5))


@pytest.mark.parametrize(
    ("make", "example"), [(Star, 255 * IMAGES), (of_two_values, IMAGES)], ids=["products", "batch norm of two values"]
)
def test_a_twin_does_not_make_rounding_grow(make, example):
    """Its running statistics are as large as what they meet, and the ε of its batch norms is large."""
    net = make()
    spaces = csgd.find_spaces(net, example, trial=False)
    proof = csgd.prove(net, spaces, csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5), "even"), example)
    assert proof.exact
    assert proof.control > 0.1
    assert proof.change < 1e-12
    assert {module.eps for module in net.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-5}


def test_code_that_asks_whether_gradients_are_enabled_is_seen():
    """As in training, and no graph is kept."""

    def looking(h, net):
        assert not h.requires_grad
        return h.sum(1, keepdim=True) + h if torch.is_grad_enabled() else h

    net = Body(looking)
    assert not free(net)
    assert all(p.requires_grad for p in net.parameters())
    spaces = csgd.find_spaces(Body(lambda h, _: h), IMAGES)
    proof = csgd.prove(net, spaces, random_clusters(spaces), IMAGES)
    assert proof.changes["eval"] < 1e-12 < 1e-3 < proof.changes["train"]


def test_the_default_device_is_the_networks_own_affair():
    """As after torch.set_default_device("cuda"): what the library makes for itself lies where it says."""
    net, fresh = nets.Residual(), nets.Residual()
    example = nets.example_of(nets.Residual)
    with torch.device("meta"):
        spaces = csgd.find_spaces(net, example)
        clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5))
        assert csgd.prove(net, spaces, clusters, example).exact
        optimizer = torch.optim.AdamW(net.parameters())
        collapse = csgd.Collapse(optimizer, net, spaces, clusters, stop=2)
        for _ in range(2):
            net(example).square().mean().backward()
            optimizer.step()
        assert collapse.done
        csgd.trim(net, spaces, clusters, optimizer)
        csgd.load_trimmed(fresh, net.state_dict())
    assert torch.equal(fresh.eval()(example), net.eval()(example))
    assert any(space.trimmable for space in spaces)


def test_threads_that_analyse_at_once_leave_the_default_dtype_as_it_was():
    class Count:  # of which a twin has no copy
        inside = most = 0

    def slow(x, net):
        Count.inside += 1
        Count.most = max(Count.most, Count.inside)
        time.sleep(0.02)
        Count.inside -= 1
        return x

    bodies = [Body(slow) for _ in range(3)]
    threads = [threading.Thread(target=csgd.find_spaces, args=(net, IMAGES)) for net in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Count.most == 1
    assert torch.get_default_dtype() is torch.float32
