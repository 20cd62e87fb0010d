import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import csgd
from csgd import InputError
from csgd.clusters import tensor_of
from csgd.outputs import output_rows
from csgd.proof import randomise
from tests import nets


def rows_of(model, spaces, batches):
    live = [space for space in spaces if space.trimmable]
    return output_rows(model, live, [[tensor_of(model, ref) for ref in space.producers] for space in live], batches)


def distances(rows):
    return (rows[:, None] - rows).square().sum(-1)


def measured(outputs):
    """E (y_i − y_j)² of outputs [n, slots, lanes]."""
    return (outputs[:, :, None] - outputs[:, None]).square().sum(-1).mean(0)


def batches_of(net, count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(nets.EXAMPLES[net], generator=generator, dtype=torch.float64) for _ in range(count)]


NORMS = {  # the batch norms that read the outputs of one layer
    nets.Plain: {"conv1": "bn1"},
    nets.Depthwise: {"expand": "bn"},
    nets.Transposed: {"up": "bn"},
    nets.Dense: {"conv1": "bn2"},
    nets.ThreeD: {"conv1": "bn"},
    nets.Mlp: {"layers.1": "layers.2"},
}
SCALES = {nets.Residual: {"outer": "gamma"}, nets.ConvNext: {"down": "scale"}}  # the layer scales


@torch.no_grad()
@pytest.mark.parametrize("net", [n for n in nets.EXAMPLES if n not in (nets.Tied, nets.Transformer)])
def test_the_rows_lie_as_far_apart_as_the_outputs_of_their_channels(net):
    model, batches = net().double().eval(), batches_of(net)
    randomise(model)
    spaces = csgd.find_spaces(model, batches[0])
    rows, seen = rows_of(model, spaces, batches), {}
    behind = {name: model.get_submodule(norm) for name, norm in NORMS.get(net, {}).items()}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, _, out, name=name: seen.setdefault(name, []).append(out))
    for batch in batches:
        model(batch)
    for space in (space for space in spaces if space.trimmable):
        wanted = 0
        for ref in space.producers:
            path, index = ref.owners[0][0], ref.index
            layer = model.get_submodule(path)
            norm = next((n for n, m in model.named_modules() if m is behind.get(path)), path)
            dim = -1 if isinstance(layer, nn.Linear) else 1
            outputs = torch.cat([out.movedim(dim, -1).flatten(0, -2) for out in seen[norm]])
            if scale := SCALES.get(net, {}).get(path):
                outputs = outputs * model.get_parameter(scale).flatten()
            if getattr(layer, "transposed", False) and layer.groups > 1:  # its weight names the first group only
                index = torch.cat([index + group * ref.extent for group in range(layer.groups)], 1)
            wanted = wanted + measured(outputs[:, index])
        assert torch.allclose(distances(rows[space.name]), wanted, rtol=1e-9, atol=1e-9 * float(wanted.max()))


class Frozen(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), norm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.fc((x * torch.sigmoid(x.mean((2, 3), keepdim=True))).mean((2, 3)))


@torch.no_grad()
def test_a_frozen_batch_norm_counts_as_an_ordinary_one_in_eval_mode_and_a_gate_of_one_image_does_not():
    models = [Frozen(norm).double().eval() for norm in (nn.BatchNorm2d, FrozenBatchNorm2d, nn.Identity)]
    randomise(models[0])
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict(), strict=False)
    batches = [torch.randn(1, 3, 8, 8, dtype=torch.float64) for _ in range(3)]
    spaces = csgd.find_spaces(models[0], torch.cat(batches))
    whole, frozen, raw = (distances(rows_of(model, spaces, batches)["conv"]) for model in models)
    outputs = torch.cat([models[0].norm(models[0].conv(batch)).movedim(1, -1).flatten(0, -2) for batch in batches])
    assert torch.allclose(whole, measured(outputs[:, :, None]), rtol=1e-9)
    assert torch.allclose(frozen, whole, rtol=1e-9)
    assert not torch.allclose(raw, whole, rtol=0.1)


class Followed(nn.Module):
    """A function behind a layer."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.fc, self.function = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), function

    def forward(self, x):
        return self.fc(self.function(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "function, factor",
    [
        (lambda y: y, 1),
        (lambda y: 1 - y / 2, 1 / 4),
        (lambda y: torch.div(y, 2, rounding_mode="floor"), 1),
        (lambda y: torch.div(1, y), 1),
        (lambda y: y * y, 1),
    ],
)
def test_what_is_not_affine_behind_a_layer_leaves_its_outputs_as_they_are(function, factor):
    model = Followed(function).double().eval()
    batches = [torch.randn(4, 3, 8, 8, dtype=torch.float64) for _ in range(3)]
    spaces = csgd.find_spaces(model, batches[0], trial=False)
    with torch.no_grad():
        outputs = torch.cat([model.conv(batch).movedim(1, -1).flatten(0, -2) for batch in batches])
        rows = rows_of(model, spaces, batches)["conv"]
    assert torch.allclose(distances(rows), factor * measured(outputs[:, :, None]), rtol=1e-9)


def test_outputs_that_are_no_numbers_are_refused():
    model = nets.Plain()
    spaces = csgd.find_spaces(model, nets.example_of(nets.Plain))
    batch = torch.full_like(nets.example_of(nets.Plain), torch.inf)
    with pytest.raises(InputError, match="the outputs of conv1 hold NaN or infinity"):
        csgd.cluster(model, spaces, {"conv1": 4}, of="outputs", data=[batch])


def test_it_is_the_distance_of_kernels_in_the_metric_of_their_input_patches():
    model, images = nets.Plain().double().eval(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    randomise(model)
    spaces = csgd.find_spaces(model, images)
    patches = F.unfold(images, 3, padding=1).movedim(1, -1).flatten(0, 1)
    patches = torch.cat([patches, patches.new_ones(len(patches), 1)], 1)
    second = patches.T @ patches / len(patches)
    norm, conv = model.bn1, model.conv1
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    beside = scale * (conv.bias - norm.running_mean) + norm.bias
    kernels = torch.cat([scale[:, None] * conv.weight.flatten(1), beside[:, None]], 1).detach()
    values, vectors = torch.linalg.eigh(second)
    expected = distances(kernels @ (vectors * values.clamp(min=0).sqrt()))
    assert torch.allclose(distances(rows_of(model, spaces, [images])["conv1"]), expected, rtol=1e-9)


@torch.no_grad()
def test_the_inertia_of_the_clusters_is_the_measured_squared_distance_of_outputs_to_their_mean():
    model, batches = nets.Plain().double(), batches_of(nets.Plain)
    randomise(model)
    spaces = csgd.find_spaces(model, batches[0])
    clusters = csgd.cluster(model, spaces, {"conv1": 4}, of="outputs", data=batches)["conv1"]
    rows = rows_of(model, spaces, batches)["conv1"]
    inertia = sum(float((rows[part] - rows[part].mean(0)).square().sum()) for part in clusters)
    outputs = torch.cat([model.eval().bn1(model.conv1(batch)).movedim(1, -1).flatten(0, -2) for batch in batches])
    apart = [(outputs[:, part] - outputs[:, part].mean(1, keepdim=True)).square().sum(1).mean() for part in clusters]
    assert inertia == pytest.approx(float(sum(apart)), rel=1e-9)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [1, 24, 24, 32]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:], strict=False))
        self.norms, self.fc = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:]), nn.Linear(32, 10)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.fc(x.mean((2, 3)))


def test_a_merge_in_one_stroke_keeps_more_accuracy_on_outputs_than_on_kernels():
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    kept = {"pacesetter": 0.0, "outputs": 0.0}
    for seed in range(2):
        torch.manual_seed(seed)
        model = Small()
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(60):
            batch = torch.randperm(1400)[:128]
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        spaces = csgd.find_spaces(model, images[:2], trial=False)
        widths, batches = csgd.target_widths(spaces, 0.75), images[:1024].split(128)
        for of in kept:
            merged = copy.deepcopy(model)
            csgd.merge_equal(merged, spaces, csgd.cluster(model, spaces, widths, of=of, data=batches))
            kept[of] += float((merged.eval()(images[1400:]).argmax(1) == labels[1400:]).float().mean()) / 2
    assert kept["outputs"] > kept["pacesetter"] + 0.05


def test_clusters_of_one_size_are_made_on_outputs_too():
    model, batches = nets.UNet().double(), batches_of(nets.UNet)
    spaces = csgd.find_spaces(model, batches[0])
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 0.5), of="outputs", data=batches)
    assert {len(members) for members in clusters["down"]} == {2}
    assert csgd.prove(model, spaces, clusters, batches[0]).exact


def test_the_pass_leaves_the_model_as_it_was_and_says_how_long_it_took(caplog):
    model, batches = nets.Plain(), [batch.float() for batch in batches_of(nets.Plain)]
    model.bn1.eval()
    spaces = csgd.find_spaces(model, batches[0])
    state, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with caplog.at_level("INFO", "csgd.outputs"):
        csgd.cluster(model, spaces, {"conv1": 4}, of="outputs", data=iter(batches))
    assert "outputs of 1 layers measured on 3 batches: 0." in caplog.text
    assert model.training
    assert not model.bn1.training
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "data, message",
    [
        (None, "clustering.of=outputs needs data: a few batches"),
        ([], "clustering.of=outputs needs at least one batch in data"),
        ([torch.randn(2, 4, 8, 8)], "the network cannot run on its example: conv1: RuntimeError"),
    ],
)
def test_bad_batches(data, message):
    model = nets.Plain()
    spaces = csgd.find_spaces(model, nets.example_of(nets.Plain))
    with pytest.raises(InputError, match=message):
        csgd.cluster(model, spaces, {"conv1": 4}, of="outputs", data=data)


def test_a_producer_that_the_batches_do_not_reach_is_named():
    model = nets.Auxiliary()
    spaces = csgd.find_spaces(model, nets.example_of(nets.Auxiliary))
    model.forward = lambda x: model.conv1(x)
    with pytest.raises(InputError, match=r"conv2.weight is not called on the batches in data"):
        csgd.cluster(model, spaces, {"conv2": 3}, of="outputs", data=[nets.example_of(nets.Auxiliary)])
