"""Exports of networks, read back by other programs; sizes and latencies beside them."""

import onnxruntime
import pytest
import torch
from torch import nn

import csgd
from csgd import InputError
from csgd.card import export_table
from csgd.checkpoint import save_weights
from csgd.export import export, latency, weight_bytes
from csgd.models import resnet20, torchvision
from csgd.proof import randomise
from csgd.trial import random_clusters
from tests import nets


def cut(model, example):
    randomise(model)
    spaces = csgd.find_spaces(model, example, trial=False)
    clusters = random_clusters(spaces)
    csgd.merge_equal(model, spaces, clusters)
    csgd.trim(model, spaces, clusters)
    return model.eval()


def answers(kind, path, images):
    if kind == "torch":
        return torch.export.load(path).module()(images)
    session = onnxruntime.InferenceSession(path)
    assert [end.name for end in session.get_inputs() + session.get_outputs()] == ["images", "logits"]
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize(
    "make, size",
    [
        (lambda: resnet20(10), 16),
        (lambda: torchvision("squeezenet1_1", 10), 32),
        (nets.Depthwise, 8),
        (nets.Grouped, 8),
        (nets.Auxiliary, 8),
    ],
    ids=["resnet20", "squeezenet", "depthwise", "grouped", "auxiliary"],
)
def test_an_exported_network_answers_as_pytorch_does_at_every_batch_size(tmp_path, kind, make, size):
    torch.set_num_threads(1)
    example = torch.randn(2, 3, size, size)
    model, path = cut(make(), example), tmp_path / "pruned.file"
    assert export(kind, model, example, path) <= 1e-5
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(answers(kind, path, images), model(images), rtol=1e-4, atol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["pruned.file"]


class TwoFaced(nn.Module):
    """The second of its answers is another one once it is exported."""

    def __init__(self):
        super().__init__()
        self.net = nets.Plain()

    def forward(self, x):
        logits = self.net(x)
        return logits, logits * (1.001 if torch.compiler.is_exporting() else 1.0)


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_file_that_answers_otherwise_is_refused_and_removed(tmp_path, kind):
    path = tmp_path / "pruned.file"
    with pytest.raises(InputError, match=r"pruned.file answers a batch of 1 otherwise than PyTorch: .* \d\.\de-0[34]"):
        export(kind, TwoFaced().eval(), torch.randn(2, 3, 8, 8), path)
    assert not path.exists()


class Sleeper(nn.Module):
    def __init__(self, milliseconds, slow_every=1000):
        super().__init__()
        self.seconds, self.slow_every, self.calls = milliseconds / 1000, slow_every, 0

    def forward(self, x):
        from time import sleep

        self.calls += 1
        sleep(self.seconds * (10 if self.calls % self.slow_every == 0 else 1))
        return x


def test_latency_is_a_median_with_quartiles():
    measured = latency({"dense": Sleeper(4), "pruned": Sleeper(2, slow_every=5)}, torch.zeros(1))
    assert measured["dense"]["median_ms"] == pytest.approx(4, rel=0.4)
    assert measured["pruned"]["median_ms"] == pytest.approx(2, rel=0.4), "a fifth of slow calls does not move it"
    for timed in measured.values():
        assert timed["lower_quartile_ms"] <= timed["median_ms"] <= timed["upper_quartile_ms"]
        assert timed["rounds"] == 31


def test_a_slow_network_is_timed_in_fewer_rounds():
    slow = Sleeper(1)
    assert latency({"dense": slow}, torch.zeros(1), seconds=0.0)["dense"]["rounds"] == 5
    assert slow.calls == 7, "two rounds warm up"


def test_the_table_holds_both_networks():
    spread = {"lower_quartile_ms": 1.0, "upper_quartile_ms": 1.5, "rounds": 31}
    table = export_table(
        {
            "files": {"pruned.onnx": {"bytes": 2_500_000, "relative_change": 3e-7}},
            "weight_bytes": {"dense": 4_000_000, "pruned": 1_000_000},
            "latency": [{"batch": 8, "dense": spread | {"median_ms": 3.0}, "pruned": spread | {"median_ms": 1.2}}],
            "device": "cpu, 1 threads",
        }
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0] == ["cpu, 1 threads", "dense", "pruned", ""]
    assert cells[2:] == [
        ["weights", "4.00 MB", "1.00 MB", "75.0% less"],
        ["latency, batch 8", "3.00 ± 0.25 ms", "1.20 ± 0.25 ms", "2.50 times as fast, 31 rounds"],
        ["pruned.onnx", "", "2.50 MB", "differs from PyTorch by 3.0e-07 of an image's spread"],
    ]


def test_weight_bytes_are_those_of_the_file(tmp_path):
    model = resnet20(10)
    save_weights(tmp_path / "model.safetensors", model.state_dict())
    with (tmp_path / "model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert weight_bytes(model) == (tmp_path / "model.safetensors").stat().st_size - header
