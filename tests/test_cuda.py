"""On a fake CUDA device, everywhere: a tensor left on the CPU is an error.  With `-m cuda`: on a GPU."""

import json

import pytest
import torch
from commandline import run_fresh
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

import csgd
from csgd.centripetal import Segments
from csgd.clusters import ClusteredTensor
from csgd.models import resnet20, vgg16_bn
from csgd.proof import randomise
from csgd.trial import random_clusters
from tests import nets

CUDA = torch.device("cuda", 0)
FOUND = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")


class FakeCuda(FakeTensorMode):
    """Tensors on the CPU are real, those on CUDA devices have a shape and no values.

    Operators that mix the two raise what they raise on a GPU.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func is torch.ops.aten._fused_sgd_.default:  # torch knows no shapes of it
            assert {tensor.device for tensor in tensors} == {CUDA}
            return None
        to_cuda = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if to_cuda or any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs)


@pytest.fixture
def _fake_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: None)  # a fake device has no random state
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: a.device == b.device != CUDA and equal(a, b))  # nor values
    with FakeCuda(allow_non_fake_inputs=True):
        yield


NETS = {
    "resnet20": (lambda: resnet20(10), (2, 3, 16, 16)),
    "vgg16_bn": (lambda: vgg16_bn(10, 32, 0.25), (2, 3, 32, 32)),
    **{net.__name__: (net, nets.EXAMPLES[net]) for net in (nets.Depthwise, nets.Dense, nets.Grouped, nets.Transformer)},
}


def on_cuda(name):
    build, shape = NETS[name]
    with CUDA:
        return build(), torch.randn(shape)


def random_gradients(model):
    for p in model.parameters():
        p.grad = torch.randn_like(p)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.usefixtures("_fake_cuda")
def test_spaces_steps_cut_and_carry_over_leave_nothing_on_the_cpu(name):
    model, example = on_cuda(name)
    spaces = csgd.find_spaces(model, example, trial=False)
    build, shape = NETS[name]
    there = csgd.find_spaces(build(), torch.randn(shape), trial=False)
    assert [(s.name, s.size, s.pinned) for s in spaces] == [(s.name, s.size, s.pinned) for s in there]
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 0.5), "even")
    groups = csgd.param_groups(model, spaces, clusters, centri_strength=1.0)
    optimizer = csgd.CSGD(groups, 0.01)
    random_gradients(model)
    optimizer.step()
    assert optimizer.deviation().device == CUDA
    before = sum(p.numel() for p in model.parameters())
    csgd.trim(model, spaces, clusters, optimizer, tolerance=None)
    random_gradients(model)
    optimizer.step()
    optimizer.unscale()
    optimizer.step()
    assert sum(p.numel() for p in model.parameters()) < before
    kept = [*model.parameters(), *model.buffers(), *(state["momentum_buffer"] for state in optimizer.state.values())]
    assert {tensor.device for tensor in kept} == {CUDA}
    assert len(optimizer.state) == len(list(model.parameters()))
    assert model(example).device == CUDA


@pytest.mark.parametrize("name", NETS)
@pytest.mark.usefixtures("_fake_cuda")
def test_a_collapse_and_its_cut_leave_nothing_on_the_cpu(name, monkeypatch):
    monkeypatch.setattr(ClusteredTensor, "relative_deviation", lambda self: 0.0)  # a number, which is not there
    model, example = on_cuda(name)
    spaces = csgd.find_spaces(model, example, trial=False)
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 0.5), "even")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, foreach=False)
    collapse = csgd.Collapse(optimizer, model, spaces, clusters, start=1, stop=3)
    for _ in range(3):
        random_gradients(model)
        optimizer.step()
        assert collapse.deviation().device == CUDA
    csgd.trim(model, spaces, clusters, optimizer, tolerance=None)
    random_gradients(model)
    optimizer.step()
    kept = [*model.parameters(), *model.buffers(), *(state["momentum_buffer"] for state in optimizer.state.values())]
    assert {tensor.device for tensor in kept} == {CUDA}


@pytest.mark.usefixtures("_fake_cuda")
def test_a_checkpoint_read_on_the_cpu_goes_on_there():
    model, example = on_cuda("resnet20")
    spaces = csgd.find_spaces(model, example, trial=False)
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 0.5), "even")
    optimizer = csgd.CSGD(csgd.param_groups(model, spaces, clusters, centri_strength=1.0), 0.01)
    csgd.trim(model, spaces, clusters, optimizer, tolerance=None)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["gradient_scales"] = [
            factors and [(dim, torch.ones(vector.shape)) for dim, vector in factors]
            for factors in group["gradient_scales"]
        ]
    resumed = csgd.CSGD([{"params": group["params"]} for group in optimizer.param_groups], 0.0)
    resumed.load_state_dict(saved)
    random_gradients(model)
    resumed.step()


@pytest.mark.usefixtures("_fake_cuda")
def test_a_tensor_left_on_the_cpu_is_an_error(monkeypatch):
    model, example = on_cuda("resnet20")
    spaces = csgd.find_spaces(model, example, trial=False)
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 0.5), "even")
    optimizer = csgd.CSGD(csgd.param_groups(model, spaces, clusters, centri_strength=1.0), 0.01)
    random_gradients(model)
    own = Segments.of.__func__
    monkeypatch.setattr(Segments, "of", classmethod(lambda cls, segments, device=None, dtype=None: own(cls, segments)))
    with pytest.raises(RuntimeError, match="same device"):
        optimizer.step()


@FOUND
@pytest.mark.cuda
@pytest.mark.parametrize("net", nets.EXAMPLES)
def test_a_gpu_takes_the_steps_of_the_cpu(net):
    torch.manual_seed(0)
    model, example = net().double(), nets.example_of(net, torch.float64)
    randomise(model)
    outputs = []
    for device in ("cpu", "cuda"):
        twin = net().double()
        twin.load_state_dict(model.state_dict())
        twin, images = twin.to(device), example.to(device)
        spaces = csgd.find_spaces(twin, images)
        clusters = random_clusters(spaces)
        csgd.merge_equal(twin, spaces, clusters)
        optimizer = csgd.CSGD(csgd.param_groups(twin, spaces, clusters, centri_strength=0.5, vector_ratio=1.0), 1e-3)
        for step in range(20):
            if step == 10:
                csgd.trim(twin, spaces, clusters, optimizer)
            out = twin.train()(images)
            (out if isinstance(out, torch.Tensor) else out[0]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        out = twin.eval()(images)
        outputs.append((out if isinstance(out, torch.Tensor) else out[0]).cpu())
    torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-8)


@FOUND
@pytest.mark.cuda
def test_f10_rows_of_a_cluster_are_the_same_bits_on_a_gpu_and_on_every_run():
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        model, example = vgg16_bn(10, 32, 0.5).cuda(), torch.randn(8, 3, 32, 32).cuda()
        spaces = csgd.find_spaces(model, example)
        clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 0.5))
        csgd.merge_equal(model, spaces, clusters)
        optimizer = csgd.CSGD(csgd.param_groups(model, spaces, clusters, centri_strength=0.5, vector_ratio=1.0), 1e-2)
        generator = torch.Generator("cuda").manual_seed(0)
        for _ in range(20):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            optimizer.step()
        for space in spaces:
            for members in clusters.get(space.name, ()):
                kernel = model.get_submodule(space.name).weight
                assert all(torch.equal(kernel[members[0]], kernel[slot]) for slot in members)
        ends.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*ends)


@FOUND
@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_whole_run_on_a_gpu(tmp_path, precision):
    arguments = ["experiment=smoke", "device=cuda", f"precision={precision}", "wandb=disabled", "hydra.run.dir=out"]
    run_fresh(tmp_path, *arguments)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["verdict"]["lossless"]
    assert summary["device"] == torch.cuda.get_device_name(0)
