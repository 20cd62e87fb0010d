"""A wide network takes the widths of a trimmed one, or stays as it was."""

import copy

import pytest
import torch
from torch import nn

import csgd
from csgd import InputError, load_trimmed
from csgd.models import resnet20, torchvision
from csgd.proof import randomise
from csgd.trial import random_clusters
from tests import nets


def cut(model, example, seed=0):
    """The state_dict of a copy that is cut at random."""
    model = copy.deepcopy(model)
    randomise(model)
    spaces = csgd.find_spaces(model, example)
    csgd.trim(model, spaces, random_clusters(spaces, seed), tolerance=None)
    return model.state_dict()


def picture(model):
    """What must not change where a state_dict is refused."""
    tensors = {key: (id(t), t.clone()) for key, t in model.state_dict(keep_vars=True).items()}
    return tensors, [module.extra_repr() for module in model.modules()], [m.training for m in model.modules()]


def refused(model, state, **example):
    """The message; the model is as it was."""
    before, texts, modes = picture(model)
    with pytest.raises(InputError) as caught:
        load_trimmed(model, state, **example)
    after = picture(model)
    assert (texts, modes) == after[1:]
    for key, (which, tensor) in before.items():
        assert after[0][key][0] == which
        assert torch.equal(after[0][key][1], tensor)
    message = str(caught.value)
    assert "\n" not in message
    return message


def narrowed(state, **rows):
    """The state with fewer rows in some tensors; dots are written as two underscores."""
    return state | {key.replace("__", "."): state[key.replace("__", ".")][:n].clone() for key, n in rows.items()}


def chain():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))


def test_five_channels_out_and_eight_read_are_refused_with_and_without_an_example():
    wide = chain()
    state = narrowed(wide.state_dict(), **{"0__weight": 5, "0__bias": 5})
    for example in ({}, {"example": torch.randn(2, 3, 9, 9)}):
        assert refused(wide, state, **example) == (
            "weights that do not fit together: 0.weight of [5, 3, 3, 3] keeps 5, 2.weight of [6, 8, 3, 3] keeps 8 of "
            "the 8 channels of '0'"
        )
    state["2.weight"] = state["2.weight"][:, :5].clone()
    assert load_trimmed(wide, state)(torch.randn(2, 3, 9, 9)).shape == (2, 6, 5, 5)


def test_an_example_with_keywords_is_run_too():
    class Typed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x, *, shape):
            return self.head(self.conv(x).view(-1, *shape))

    state = narrowed(Typed().state_dict(), conv__weight=6, conv__bias=6)
    state["head.weight"] = state["head.weight"][:, :6].clone()
    example = csgd.Inputs(torch.randn(2, 3, 5, 5), shape=(8, 5, 5))
    assert "fit together: shape '[-1, 8, 5, 5]' is invalid" in refused(Typed(), state, example=example)


@pytest.mark.parametrize("net", nets.EXAMPLES)
def test_any_one_tensor_that_keeps_a_channel_too_many_or_too_few_is_refused(net):
    wide, example = net(), nets.example_of(net)
    state = cut(wide, example)
    tried = 0
    for key, tensor in state.items():
        for dim in range(min(tensor.dim(), 2)):
            wanted = [
                n for n in (tensor.size(dim) - 1, tensor.size(dim) + 1) if 1 <= n <= wide.state_dict()[key].size(dim)
            ]
            for n in wanted:
                index = torch.arange(n).clamp(max=tensor.size(dim) - 1)
                message = refused(wide, state | {key: tensor.index_select(dim, index)}, example=example)
                assert key in message or "one tensor in the model" in message
                tried += 1
    assert tried > 10
    load_trimmed(wide, state, example=example)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_the_networks_of_torchvision_are_held_to_their_shapes(name):
    wide = torchvision(name, 10).eval()
    spaces = csgd.find_spaces(wide, torch.randn(2, 3, 64, 64), trial=False)
    narrow = copy.deepcopy(wide)
    csgd.trim(narrow, spaces, random_clusters(spaces), tolerance=None)
    state = narrow.state_dict()
    refs = [ref for space in spaces if space.trimmable for ref in space.refs if ref.role == "in"]
    path, attribute = refs[len(refs) // 2].owners[0]
    key = f"{path}.{attribute}"
    missing = state | {key: state[key][:, : state[key].size(1) - 1].clone()}
    if state[key].size(1) > 1:
        for example in ({}, {"example": torch.randn(2, 3, 64, 64)}):
            assert key in refused(wide, missing, **example)
    for fresh in (copy.deepcopy(wide), wide):
        given = {"example": torch.randn(2, 3, 64, 64)} if fresh is wide else {}
        load_trimmed(fresh, state, **given)
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(fresh.eval()(x), narrow.eval()(x))


def test_a_broadcast_that_torch_allows_is_refused():
    """One channel added to eight runs, and means something else."""
    wide, example = nets.Residual(), nets.example_of(nets.Residual)
    state = wide.state_dict() | {key: wide.state_dict()[key][:1].clone() for key in ("outer.weight", "outer.bias")}
    message = refused(wide, state, example=example)
    assert "outer." in message
    assert "keeps 1" in message
    for net, key in ((nets.Residual, "gamma"), (nets.Plain, "act.weight")):
        state = net().state_dict()
        assert f"{key} of {[1] * state[key].dim()} keeps 1" in refused(net(), state | {key: state[key][:1].clone()})


@pytest.mark.parametrize(
    "layer, change, message",
    [
        (nn.Conv2d(4, 8, 3), {"weight": (6, 4, 3, 3)}, "0.bias is [8], its layer takes [6] where 0.weight is [6, 4, 3"),
        (nn.Conv2d(4, 8, 3), {"weight": (8, 4, 3, 2)}, "0.weight is [8, 4, 3, 2], its layer takes [8, 4, 3, 3]"),
        (nn.Conv2d(4, 8, 3, groups=2), {"weight": (7, 2, 3, 3), "bias": (7,)}, "0.weight is [7, 2, 3, 3], its layer"),
        (nn.Conv2d(4, 8, 3, groups=4), {"weight": (5, 1, 3, 3), "bias": (5,)}, "0.weight is [5, 1, 3, 3], its layer"),
        (nn.Conv2d(4, 8, 3, groups=4), {"weight": (1, 1, 3, 3), "bias": (1,)}, "0.weight is [1, 1, 3, 3], its layer"),
        (nn.ConvTranspose2d(4, 8, 3, groups=2), {"weight": (3, 4, 3, 3)}, "0.weight is [3, 4, 3, 3], its layer takes"),
        (nn.ConvTranspose2d(4, 8, 3, groups=2), {"bias": (6,)}, "0.bias is [6], its layer takes [8]"),
        (nn.Linear(4, 8), {"bias": (7,)}, "0.bias is [7], its layer takes [8] where 0.weight is [8, 4]"),
        (nn.BatchNorm1d(8), {"running_var": (7,)}, "0.running_var is [7], its layer takes [8] where"),
        (nn.BatchNorm1d(8, affine=False), {"running_var": (7,)}, "0.running_var is [7], its layer takes [8] where"),
        (nn.InstanceNorm2d(8, affine=True), {"weight": (7,)}, "0.bias is [8], its layer takes [7] where 0.weight is"),
        (nn.GroupNorm(4, 8), {"weight": (6,), "bias": (6,)}, "0.weight is [6], its layer takes [4]"),
        (nn.GroupNorm(8, 8), {"weight": (6,)}, "0.bias is [8], its layer takes [6] where 0.weight is [6]"),
        (nn.LayerNorm(8), {"weight": (6,)}, "0.bias is [8], its layer takes [6] where 0.weight is [6]"),
        (nn.Embedding(8, 4), {"weight": (6, 4)}, "0.weight is [6, 4], its layer takes [8, 4]"),
        (nn.Linear(4, 8), {"weight": (8, 0)}, "of another architecture: 0.weight is [8, 0], at most [8, 4] fit"),
    ],
)  # fmt: skip
def test_the_tensors_of_one_layer_are_held_to_each_other(layer, change, message):
    wide = nn.Sequential(layer)
    state = wide.state_dict() | {f"0.{name}": torch.zeros(shape) for name, shape in change.items()}
    assert message in refused(wide, state)


def test_other_kinds_of_tensors_and_what_is_no_tensor_are_refused():
    wide = chain()
    for other, message in (
        (torch.zeros(8, dtype=torch.int64), "0.bias is of torch.int64, torch.float32 is wanted"),
        (torch.zeros(8, dtype=torch.complex64), "0.bias is of torch.complex64, torch.float32 is wanted"),
        ([0.0] * 8, "0.bias is a list, a tensor of [8] is wanted"),
        (torch.zeros(8, 1), "0.bias is [8, 1], at most [8] fit"),
        (torch.zeros(8, device="meta"), "0.bias is on the meta device, a dense tensor with values is wanted"),
        (torch.zeros(8).to_sparse(), "0.bias is sparse, a dense tensor with values is wanted"),
    ):
        assert message in refused(wide, wide.state_dict() | {"0.bias": other})
    for other in (None, [1], wide):
        with pytest.raises(InputError, match=f"a state_dict maps names to tensors, got a {type(other).__name__}"):
            load_trimmed(wide, other)
    lazy = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(InputError, match="0.weight of the model has no shape yet; call the model once on an example"):
        load_trimmed(lazy, nn.Sequential(nn.Linear(3, 4)).state_dict())


def test_tied_tensors_have_one_value():
    wide = nets.Tied()
    state = wide.state_dict()
    other = state | {"right.weight": state["right.weight"] + 1}
    assert "left.weight and right.weight are one tensor in the model, and two" in refused(wide, other)
    assert load_trimmed(wide, cut(wide, nets.example_of(nets.Tied))).left.weight is wide.right.weight


def test_what_is_computed_from_parameters_cannot_be_narrowed():
    class Summed(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "sum"] = self.weight.sum(1)

    wide = nn.Sequential(Summed(4, 8))
    state = wide.state_dict() | {"0.sum": torch.zeros(5)}
    with pytest.raises(InputError, match=r"0.sum is computed by the model and cannot be narrowed to \[5\]"):
        load_trimmed(wide, state)


def test_a_module_that_refuses_to_be_loaded_leaves_the_model_as_it_was():
    class Refusing(nn.Linear):
        def _load_from_state_dict(self, *args):
            raise ValueError("of version 7\nonly")

    wide = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Refusing(8, 3))
    state = narrowed(wide.state_dict(), **{"0__weight": 5, "0__bias": 5})
    state["2.weight"] = state["2.weight"][:, :5].clone()
    assert refused(wide, state) == "the weights cannot be loaded: of version 7"


def test_parameters_stay_the_objects_that_they_are():
    wide = nets.Plain()
    state = cut(wide, nets.example_of(nets.Plain))
    wide.conv1.weight.no_decay = True
    wide.conv1.weight.requires_grad_(False)
    calls = []
    wide.conv2.weight.register_hook(lambda grad: calls.append(grad.shape))
    held = {key: tensor for key, tensor in wide.state_dict(keep_vars=True).items()}
    optimizer = torch.optim.SGD(wide.parameters(), 0.1)
    wide(nets.example_of(nets.Plain)).sum().backward()
    load_trimmed(wide, state)
    for key, tensor in wide.state_dict(keep_vars=True).items():
        assert tensor is held[key]
        assert tensor.shape == state[key].shape
        assert tensor.grad is None or tensor.grad.shape == tensor.shape
    assert wide.conv1.weight.no_decay
    assert not wide.conv1.weight.requires_grad
    wide(nets.example_of(nets.Plain)).sum().backward()
    assert calls[-1] == wide.conv2.weight.shape == wide.conv2.weight.grad.shape
    optimizer.step()


def test_a_graph_that_is_still_alive_does_not_keep_the_old_shape():
    wide = nets.Plain()
    state = cut(wide, nets.example_of(nets.Plain))
    alive = wide(nets.example_of(nets.Plain)).sum()
    load_trimmed(wide, state)
    wide(nets.example_of(nets.Plain)).sum().backward()
    assert wide.conv1.weight.grad.shape == state["conv1.weight"].shape
    assert alive.requires_grad


def test_hooks_of_the_model_are_not_called_where_no_example_is_given():
    wide, seen = chain(), []
    wide[0].register_forward_hook(lambda module, args, out: seen.append(out))
    state = narrowed(wide.state_dict(), **{"0__weight": 5, "0__bias": 5})
    state["2.weight"] = state["2.weight"][:, :5].clone()
    load_trimmed(wide, state)
    assert seen == []


def test_a_network_that_no_guessed_input_fits_is_loaded_all_the_same():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 9 * 15, 5)

        def forward(self, x):
            return self.fc(torch.relu(self.conv(x)).flatten(1))

    wide, example = Odd(), torch.randn(2, 3, 11, 17)
    state = cut(wide, example)
    narrow = load_trimmed(Odd(), state)
    assert narrow(example).shape == (2, 5)
    wrong = state | {"fc.weight": state["fc.weight"][:, :-135].clone()}
    assert "fc.weight" in refused(wide, wrong, example=example)


def test_random_states_are_left_alone():
    wide = resnet20(10)
    state = cut(wide, torch.randn(2, 3, 16, 16))
    before = torch.get_rng_state()
    load_trimmed(wide, state)
    assert torch.equal(torch.get_rng_state(), before)


def test_integers_that_may_count_channels_ask_for_an_example_where_no_input_is_found():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv, self.last = 6, nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x, scale):
            y = self.conv(x) * scale
            return self.last(torch.cat([y[:, : self.first].relu(), y[:, self.first :]], 1))

    wide, example = Two(), (torch.randn(2, 3, 5, 5), torch.ones(2, 1, 1, 1))
    spaces = csgd.find_spaces(wide, example)
    widths = csgd.target_widths(spaces, 0.5)
    narrow = copy.deepcopy(wide)
    csgd.trim(narrow, spaces, csgd.cluster(narrow, spaces, widths), tolerance=None)
    assert narrow.first == 3
    message = refused(wide, narrow.state_dict(), widths=widths)
    assert "first = 6 may count channels" in message
    assert "give an example" in message
    loaded = load_trimmed(wide, narrow.state_dict(), example=example, widths=widths)
    assert torch.equal(loaded(*example), narrow(*example))


class Placed(nn.Module):
    """Adds places that it makes anew, and that its state_dict does not hold."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4, 1)
        self.register_buffer("places", torch.linspace(0, 9, 12 * 64).view(12, 8, 8).sin(), persistent=False)
        self.register_buffer("grey", torch.full((12, 1, 1), 0.5), persistent=False)

    def forward(self, x):
        return self.last((self.grey * self.conv(x) + self.places).tanh()).mean((2, 3))


def test_a_buffer_that_is_not_saved_is_once_it_is_cut():
    """And goes into a network that makes it anew at its full width; a network that is not cut has its old keys."""
    example, net = torch.randn(2, 3, 8, 8), Placed()
    keys = [*net.state_dict()]
    spaces = csgd.find_spaces(net, example)
    assert [space.trimmable for space in spaces] == [True, False]
    clusters = random_clusters(spaces)
    assert csgd.prove(net, spaces, clusters, example).exact
    assert [*net.state_dict()] == keys
    csgd.merge_equal(net, spaces, clusters)
    merged = copy.deepcopy(net)
    csgd.trim(net, spaces, clusters)
    torch.testing.assert_close(net(example), merged(example))
    state = net.state_dict()
    assert {key: len(state[key]) for key in ("places", "grey")} == {"places": 6, "grey": 6}
    for how in ({}, {"example": example}):
        loaded = load_trimmed(Placed(), state, **how)
        assert torch.equal(loaded(example), net(example))
        assert [*loaded.state_dict()] == [*state]
    fresh = Placed()
    assert "places" in refused(fresh, narrowed(state, places=5), example=example)
    assert [*fresh.state_dict()] == keys, "nothing of it has changed"
    wide = load_trimmed(Placed(), merged.state_dict())
    assert torch.equal(wide(example), merged(example)), "equal members are no longer what it makes"
    again = random_clusters(found := csgd.find_spaces(loaded, example))
    csgd.merge_equal(loaded, found, again)
    csgd.trim(loaded, found, again)
    assert len(loaded.state_dict()["places"]) == 3
    assert torch.equal(load_trimmed(Placed(), loaded.state_dict())(example), loaded(example))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("scale", torch.ones(8, 1, 1), persistent=False)

    def forward(self, x):
        return self.norm(x).relu() * self.scale


class HoldsScripted(nn.Module):
    """A scripted module takes no hooks, and its buffers are in no dict."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix, self.last = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 4, 1)
        self.scaled = torch.jit.script(Scaled())

    def forward(self, x):
        return self.last(self.scaled(self.mix(self.conv(x).relu()))).mean((2, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning", "ignore:The .grad attribute:UserWarning")
def test_a_network_with_a_scripted_module_is_cut_beside_it_and_loaded():
    example, net = torch.randn(2, 3, 8, 8), HoldsScripted().eval()
    spaces = csgd.find_spaces(net, example)
    assert [space.trimmable for space in spaces] == [True, False, False]
    clusters = random_clusters(spaces)
    assert csgd.prove(net, spaces, clusters, example).exact
    csgd.merge_equal(net, spaces, clusters)
    csgd.trim(net, spaces, clusters)
    loaded = load_trimmed(HoldsScripted(), net.state_dict(), example=example).eval()
    assert torch.equal(loaded(example), net(example))


class OneHead(nn.Module):
    """An attention of one head, whose queries, keys and values are rows of one layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.head = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(x + ((q @ k.mT * q.size(-1) ** -0.5).softmax(-1) @ v).reshape(x.shape))


@pytest.mark.parametrize("told", [{}, {"example": torch.randn(2, 5, 6)}])
def test_one_head_whose_values_lie_beside_its_keys_is_loaded(told):
    model = OneHead()
    state = cut(model, torch.randn(2, 5, 6))
    assert state["qkv.weight"].size(0) < 48
    load_trimmed(model, state, **told)
    assert model.qkv.weight.shape == state["qkv.weight"].shape
    assert refused(OneHead(), {**state, "qkv.weight": state["qkv.weight"][1:]}, **told)
