import copy
import math

import pytest
import torch
from torch.func import functional_call

import csgd
from csgd import InputError
from csgd.clusters import tensor_of
from csgd.graph.twin import dotted
from csgd.proof import randomise
from tests import nets

NORMALISED = [nets.ConvNext, nets.UNet, nets.Transformer]  # over channels, so that norms see what is dropped


def prepared(net):
    model, example = net().double(), nets.example_of(net, torch.float64)
    randomise(model)
    return model.eval(), csgd.find_spaces(model, example), example


def best(model, spaces, widths, by="l1"):
    return csgd.most_important(spaces, csgd.importance(model, spaces, by), widths)


@torch.no_grad()
def without_reading(model, spaces, kept):
    """The wide network whose layers do not read the channels that are dropped."""
    for space in spaces:
        gone = [slot for slot in range(space.size) if slot not in kept.get(space.name, range(space.size))]
        for ref in space.refs:
            if ref.role == "in":
                tensor_of(model, ref).index_fill_(ref.dim, ref.index[gone].flatten(), 0)
    return model


@torch.no_grad()
@pytest.mark.parametrize("net", [n for n in nets.EXAMPLES if n not in NORMALISED])
def test_the_network_without_some_channels_is_the_one_in_which_nothing_reads_them(net):
    model, spaces, example = prepared(net)
    kept = best(model, spaces, csgd.target_widths(spaces, 0.5))
    wide, narrow = without_reading(copy.deepcopy(model), spaces, kept), copy.deepcopy(model)
    csgd.drop(narrow, spaces, kept)
    torch.testing.assert_close(narrow(example), wide(example), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(narrow(example), model(example), rtol=1e-3), "the function changes"
    fresh = csgd.load_trimmed(net().double(), narrow.state_dict()).eval()
    assert torch.equal(fresh(example), narrow(example))


@pytest.mark.parametrize("net", NORMALISED)
def test_every_group_of_a_norm_keeps_as_many(net):
    model, spaces, example = prepared(net)
    widths = csgd.target_widths(spaces, 0.5)
    trimmed, dropped = copy.deepcopy(model), copy.deepcopy(model)
    csgd.trim(trimmed, spaces, csgd.cluster(model, spaces, widths), tolerance=None)
    kept = best(model, spaces, widths)
    csgd.drop(dropped, spaces, kept)
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (trimmed, dropped)]
    assert shapes[0] == shapes[1]
    assert dropped(example).isfinite().all()
    with pytest.raises(InputError, match="clusters of one size"):
        csgd.drop(model, spaces, {name: {*slots, min({*range(99)} - {*slots})} for name, slots in kept.items()})


def test_parameters_keep_their_values_and_stay_the_objects_that_they_are():
    model, spaces, _ = prepared(nets.Plain)
    conv1, conv2, weight = model.conv1.weight.clone(), model.conv2.weight.clone(), model.conv1.weight
    csgd.drop(model, spaces, {"conv1": [6, 1, 3]})
    assert model.conv1.weight is weight
    assert torch.equal(model.conv1.weight, conv1[[1, 3, 6]])
    assert torch.equal(model.conv2.weight, conv2[:, [1, 3, 6]])
    assert model.bn1.num_features == 3


def test_importance_by_its_formulas():
    model, spaces, example = prepared(nets.Plain)
    model(example).square().sum().backward()
    conv, norm, reads = model.conv1, model.bn1, model.conv2
    whole = [t.flatten(1) for t in (conv.weight, conv.bias[:, None], norm.weight[:, None], norm.bias[:, None])]
    whole += [model.act.weight[:, None], reads.weight.transpose(0, 1).flatten(1)]
    expected = {
        "l1": conv.weight.abs().sum((1, 2, 3)),
        "l2": torch.cat(whole, 1).norm(dim=1),
        "taylor": (reads.weight * reads.weight.grad).sum((0, 2, 3)).abs(),
    }
    for by, scores in expected.items():
        torch.testing.assert_close(csgd.importance(model, spaces, by)["conv1"], scores.detach())
    assert len({tuple(best(model, spaces, {"conv1": 4}, by)["conv1"]) for by in expected}) > 1
    assert best(model, spaces, {"conv1": 4})["conv1"] == sorted(expected["l1"].topk(4).indices.tolist())


@pytest.mark.parametrize("net", [nets.Plain, nets.Residual, nets.Depthwise, nets.Grouped, nets.Dense])
@pytest.mark.parametrize("training", [False, True])
def test_by_taylor_is_the_slope_of_the_loss_as_a_channel_fades_also_before_batch_norm(net, training):
    model, spaces, example = prepared(net)
    model.train(training)(example).square().sum().backward()

    def faded(space, slot, factor):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        for ref in (ref for ref in space.refs if ref.role == "in"):
            weight, lanes = weights[dotted(*ref.owners[0])], ref.index[slot]
            weight.index_copy_(ref.dim, lanes, factor * weight.index_select(ref.dim, lanes))
        return functional_call(model, weights, example).square().sum().item()

    scores = csgd.importance(model, spaces, "taylor")
    for space in (space for space in spaces if space.trimmable):
        for slot, score in enumerate(scores[space.name].tolist()):
            slope = (faded(space, slot, 1 + 1e-5) - faded(space, slot, 1 - 1e-5)) / 2e-5
            assert score == pytest.approx(abs(slope), rel=1e-5, abs=1e-6), (space, slot)


def test_all_producers_of_a_space_count():
    model, spaces, _ = prepared(nets.Residual)
    scores = csgd.importance(model, spaces)["stem"]
    filters = sum(layer.weight.abs().sum((1, 2, 3)) for layer in (model.stem, model.outer, model.excite))
    torch.testing.assert_close(scores, filters.detach())


def test_bad_input():
    model, spaces, _ = prepared(nets.Plain)
    scores = csgd.importance(model, spaces)
    for call, message in (
        (lambda: csgd.importance(model, spaces, "size"), "importance must be by one of l1, l2, taylor, got 'size'"),
        (lambda: csgd.importance(model, spaces, "taylor"), "taylor needs gradients: conv2.weight has none"),
        (lambda: csgd.most_important(spaces, scores, {"conv1": 9}), "widths.conv1 must be between 1 and 8, got 9"),
        (lambda: csgd.most_important(spaces, scores, {"x": 1}), "widths.x: there is no space, or no score, of this"),
        (
            lambda: csgd.drop(model, spaces, {"conv1": [0, 8]}),
            "kept.conv1 must name some of the slots 0 … 7, each once",
        ),
        (lambda: csgd.most_important(spaces, scores, {"conv1": 4.0}), "widths.conv1 must be between 1 and 8, got 4.0"),
        (lambda: csgd.most_important(spaces, {"conv1": [1.0]}, {"conv1": 4}), "scores.conv1 must be 8 numbers"),
        (lambda: csgd.most_important(spaces, {"conv1": [math.nan] * 8}, {"conv1": 4}), "scores.conv1 must be 8 num"),
        (lambda: csgd.drop(model, spaces, [1]), "kept must be a mapping .space name: .slot, ….., got list"),
        *((lambda k=k: csgd.drop(model, spaces, {"conv1": k}), "kept.conv1 must name") for k in (3, None, "12", [1.5])),
        (lambda: csgd.drop(model, spaces, {"conv1": []}), "kept.conv1 must name some"),
        (lambda: csgd.drop(model, spaces, {spaces[-1].name: [0, 1]}), "the space is pinned .network output"),
        (lambda: csgd.drop(model, spaces, {"x": [0]}), "kept: there is no channel space 'x'"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert model.conv1.out_channels == 8, "nothing has changed"
