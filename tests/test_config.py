"""The configuration as code: every option of every group composes, resolves and is checked."""

import itertools
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import schema
from conf.schema import Config, ConfigError, register
from csgd.build import label
from csgd.clusters import METHODS, SOURCES
from csgd.collapse import CURVES
from csgd.export import FORMATS
from csgd.pipeline.spec import PRECISIONS, plain
from csgd.pipeline.watch import widths_label
from csgd.schedule import RAMPS, learning_rate
from run import quote_fractions

CONF = Path(__file__).parents[1] / "conf"
OPTIONS = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name != "__pycache__")


def composed(*overrides) -> Config:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", quote_fractions(list(overrides)))
    OmegaConf.resolve(cfg)
    return OmegaConf.to_object(cfg)


@pytest.mark.parametrize("group, option", OPTIONS)
def test_every_option_composes_and_passes_its_checks(group, option):
    extra = ["dataset.root=somewhere"] if option == "imagefolder" else []
    assert isinstance(composed(f"{group}={option}", *extra), Config)


def test_the_groups_are_the_documented_ones():
    assert {group for group, _ in OPTIONS} == {
        "model", "dataset", "deps", "clustering", "schedule", "wandb", "experiment",
    }  # fmt: skip
    assert [option for group, option in OPTIONS if group == "deps"] == [
        "11_16", "13_16", "1_2", "1_4", "3_4", "3_8", "5_8", "densenet40", "densenet40_3",
        "resnet50_50", "resnet50_60", "resnet50_70", "staged_5_8",
    ]  # fmt: skip


def test_the_fractions_are_what_their_names_say():
    for group, option in OPTIONS:
        if group == "deps" and not option.startswith(("resnet50", "densenet40")):
            above, below = map(int, option.removeprefix("staged_").split("_"))
            assert composed(f"deps={option}").deps.fraction == above / below


def test_the_main_configuration_fits_a_screen():
    assert len((CONF / "config.yaml").read_text().splitlines()) <= 52


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("deps=5_8", "deps='5_8'"),
        ("deps=5_8,13_16", "deps='5_8','13_16'"),
        ("deps.fraction=0.6", "deps.fraction=0.6"),
        ("model=vgg16", "model=vgg16"),
        ("hydra.run.dir=out/5_8", "hydra.run.dir=out/5_8"),
        ("deps='5_8'", "deps='5_8'"),
        ("deps=choice(5_8,3_4)", "deps=choice('5_8','3_4')"),
        ("deps=staged_5_8,5_8", "deps=staged_5_8,'5_8'"),
    ],
)
def test_fractions_are_quoted_for_hydras_grammar(argument, expected):
    assert quote_fractions([argument]) == [expected]


def test_centri_strength_is_a_top_level_number_that_a_schedule_may_set():
    assert composed().centri_strength is None
    assert composed("schedule=paper_cifar").centri_strength == 3e-3
    assert composed("schedule=paper_cifar", "centri_strength=1e-2").centri_strength == 1e-2


def test_the_papers_recipes():
    cifar = composed("experiment=cifar10_resnet56")
    assert (cifar.model["_target_"], cifar.deps.fraction) == ("csgd.models.resnet56", 0.625)
    assert (cifar.schedule.csgd.epochs, cifar.schedule.csgd.lr, cifar.schedule.batch_size) == (600, 3e-2, 64)
    assert (cifar.centri_strength, cifar.vector_ratio, cifar.schedule.weight_decay) == (3e-3, 0.1, 1e-4)
    imagenet = composed("experiment=imagenet_resnet50")
    assert (imagenet.schedule.csgd.epochs, imagenet.schedule.csgd.lr, imagenet.schedule.batch_size) == (70, 3e-3, 256)
    assert (imagenet.centri_strength, imagenet.vector_ratio, imagenet.base.weights) == (5e-2, 0.1, "IMAGENET1K_V1")
    inner = {f"layer{stage}.*.conv[12]": width for stage, width in enumerate((45, 90, 180, 359), 1)}
    assert (imagenet.deps.fraction, imagenet.deps.layers) == (1.0, inner)
    half = composed("experiment=imagenet_resnet50", "deps=1_2").deps
    assert (half.fraction, half.layers) == (0.5, None), "the command line says what the experiment does not"


@pytest.mark.parametrize(
    "override, message",
    [
        ("centri_strength=-1", "centri_strength must be a number of 0 or more, auto, or null, got -1"),
        ("centri_strength=nan", "centri_strength must be a number of 0 or more, auto, or null, got nan"),
        ("centri_strength=strong", "centri_strength must be a number of 0 or more, auto, or null, got 'strong'"),
        ("centri_strength=true", "centri_strength must be a number of 0 or more, auto, or null, got True"),
        ("ramp=steep", "Invalid value 'steep', expected one of [constant, linear, quadratic, cosine]"),
        ("collapse_by=0", "collapse_by must be above 0 and at most 1, or null, got 0.0"),
        ("collapse_by=1.5", "collapse_by must be above 0 and at most 1, or null, got 1.5"),
        ("deps.stages=[0.5,0.6]", "deps.stages must be falling fractions above 0 and at most 1, got [0.5, 0.6]"),
        ("deps.stages=[]", "deps.stages must be falling fractions above 0 and at most 1, got []"),
        ("deps.stages=[1.2,0.5]", "deps.stages must be falling fractions above 0 and at most 1"),
        ("resume=always", "Invalid value 'always', expected one of [auto, never]"),
        ("checkpoint_every=0", "checkpoint_every must be 1 or more, or null, got 0"),
        ("trim_at=once", "Invalid value 'once', expected one of [collapse, end]"),
        ("after_trim=none", "Invalid value 'none', expected one of [same_run, plain]"),
        ("clustering.of=all", "Invalid value 'all', expected one of [pacesetter, producers, outputs]"),
        ("vector_ratio=-0.1", "vector_ratio must be 0 or more, or null, got -0.1"),
        ("deps=9_8", "Could not find 'deps/9_8'"),
        ("deps.fraction=1.2", "deps.fraction must be above 0 and at most 1, got 1.2"),
        ("deps.fraction=0", "deps.fraction must be above 0 and at most 1, got 0.0"),
        ("deps.min_width=0", "deps.min_width must be 1 or more, got 0"),
        ("deps.round_to=0", "deps.round_to must be 1 or more, got 0"),
        ("deps.widths=[a]", "could not be converted to Integer"),
        ("model=alexnot", "Could not find 'model/alexnot'"),
        ("dataset=mnust", "Could not find 'dataset/mnust'"),
        ("dataset=imagefolder", "Missing mandatory value"),
        ("model._target_=net", "model._target_ must be a dotted path to a callable, got 'net'"),
        ("schedule.label_smoothing=1", "schedule.label_smoothing must be at least 0 and below 1, got 1.0"),
        ("schedule.accumulation=17", "schedule.accumulation must be between 1 and 16, half of the batch, got 17"),
        ("clustering.method=random", "Invalid value 'random', expected one of [kmeans, even, imbalanced]"),
        ("export=tflite", "Invalid value 'tflite', expected one of [onnx, torch, all]"),
        ("seed=-1", "seed must be between 0 and 2147483647, got -1"),
        ("seed=one", "could not be converted to Integer"),
        ("device=tpu", "Invalid value 'tpu', expected one of [auto, cpu, cuda]"),
        ("threads=0", "threads must be 1 or more, or null, got 0"),
        ("wandb.mode=loud", "Invalid value 'loud', expected one of [online, offline, disabled]"),
        ("tolerance.logits=0", "tolerance.logits must be above 0, got 0.0"),
        ("schedule.batch_size=1", "schedule.batch_size must be 2 or more, got 1"),
        ("schedule.momentum=1.0", "schedule.momentum must be at least 0 and below 1, got 1.0"),
        ("schedule.momentum=0", "schedule.nesterov must be false without momentum, got True"),
        ("schedule.weight_decay=-1", "schedule.weight_decay must be 0 or more, got -1.0"),
        ("schedule.bias_lr_factor=0", "schedule.bias_lr_factor must be above 0, got 0.0"),
        ("schedule.csgd.epochs=0", "schedule.csgd.epochs must be 1 or more, got 0"),
        ("schedule.base.lr=0", "schedule.base.lr must be above 0, or null, got 0.0"),
        ("schedule.base.decay=linear", "Invalid value 'linear', expected one of [cosine, step, constant]"),
        ("schedule.csgd.warmup_epochs=99", "schedule.csgd.warmup_epochs must be within the epochs, got 99.0"),
        ("schedule.csgd.gamma=0.5", "schedule.csgd.gamma must be null where decay is cosine, got 0.5"),
        ("schedule.csgd.milestones=[2]", "schedule.csgd.milestones must be [] where decay is cosine, got [2.0]"),
        ("schedule.csgd.decay=step", "milestones must be epochs above 0 and below schedule.csgd.epochs=5 where decay"),
        ("schedule.weight_decay_vectors=-1", "schedule.weight_decay_vectors must be 0 or more, or null, got -1.0"),
        ("schedule.csgd.gamma=0", "schedule.csgd.gamma must be above 0 and at most 1, got 0.0"),
        ("schedule.base.optimizer=lion", "Invalid value 'lion', expected one of [sgd, adamw]"),
        ("curve=steep", "Invalid value 'steep', expected one of [cosine, linear]"),
        ("vector_ratio=0.5", "vector_ratio must be null where centri_strength is null, got 0.5"),
        ("ramp=linear", "ramp must be null where centri_strength is null (curve is its key), got 'linear'"),
        ("schedule.csgd.clip_norm=0", "schedule.csgd.clip_norm must be above 0, or null, got 0.0"),
        ("schedule.csgd.max_steps=0", "schedule.csgd.max_steps must be 1 or more, or null, got 0"),
        ("no_such_key=1", "Could not override 'no_such_key'"),
        ("schedule.no_such_key=1", "Could not override 'schedule.no_such_key'"),
        ("dataset.no_such_key=1", "Could not override 'dataset.no_such_key'"),
    ],
)
def test_bad_values_are_refused_with_their_key(override, message):
    with pytest.raises((ConfigError, HydraException, OmegaConfBaseException)) as caught:
        composed(override)
    assert message in f"{caught.value} {caught.value.__cause__}"


def test_the_words_of_the_schema_are_those_that_the_package_knows():
    assert set(schema.Ramp) == set(RAMPS)
    assert set(schema.Method) == set(METHODS)
    assert set(schema.Of) == set(SOURCES)
    assert set(schema.Curve) == set(CURVES)
    assert set(schema.Precision) == set(PRECISIONS)
    assert set(schema.Export) == set(FORMATS)
    how = dict(steps_per_epoch=2, epochs=2, lr=1.0, milestones=[1], gamma=0.1)
    assert [learning_rate(2, decay=decay, **how) for decay in schema.Decay] == [0.5, 0.1, 1.0]
    with pytest.raises(ValueError, match="decay must be"):
        learning_rate(2, decay="linear", **how)


def test_a_configuration_is_left_as_plain_json():
    config = composed("export=onnx", "experiment=smoke")
    left = plain(config)
    assert left == asdict(config)
    kinds, values = set(), [left]
    while values:
        value = values.pop()
        kinds.add(type(value))
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    assert kinds <= {dict, list, str, int, float, bool, type(None)}


NOT_THERE = ("launcher", "mynet", "flowers", "stripes", "key=value")


def documented() -> list[list[str]]:
    """The overrides of every run.py in README.md and docs/, but of launchers, networks and data that are not there."""
    pages = (CONF.parent / "README.md", *sorted((CONF.parent / "docs").glob("*.md")))
    text = re.sub(r"\\\n\s*", "", "\n".join(page.read_text() for page in pages))
    found = re.findall(r"run\.py((?: +(?:-m|'[^'\n]+'|[^\s'`,;:]+=[^\s`]*))+)", text)
    words = [[word for word in shlex.split(line) if "=" in word and "…" not in word] for line in found]
    told = [line for line in words if line and not any(one in word for one in NOT_THERE for word in line)]
    return [list(line) for line in dict.fromkeys(map(tuple, told))]


@pytest.mark.parametrize("overrides", documented(), ids=" ".join)
def test_every_override_that_is_documented_composes(overrides):
    swept = [word.partition("=")[::2] for word in overrides if not word.startswith("hydra.")]
    first = [f"{key}={value if value[:1] in '[{' else value.split(',')[0]}" for key, value in swept]
    composed(*(word.replace("range(3)", "0") for word in first))


def test_overrides_are_documented():
    assert len(documented()) >= 9
    assert ["model=vgg16", "deps=5_8"] in documented()


def test_the_documented_overrides_of_config_yaml_work():
    for overrides in (
        ["model=torchvision", "model.name=resnet18"],
        ["deps.fraction=0.6"],
        ["deps.widths=[40,40]"],
        ["deps.layers={features.0: 0.5, features.*: 0.25}"],
        ["model._target_=mynet.Net"],
        ["base.weights=IMAGENET1K_V1"],
    ):
        composed(*overrides)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["centri_strength=auto", "vector_ratio=1"],
            "vector_ratio must be null where centri_strength is auto, got 1.0",
        ),
        (["centri_strength=auto", "curve=linear"], "curve must be null where centri_strength is auto"),
        (["centri_strength=0.1", "curve=cosine"], "curve must be null where centri_strength is 0.1"),
        (["centri_strength=0.1", "schedule.csgd.optimizer=adamw"], "schedule.csgd.optimizer must be sgd where centri"),
        (
            ["schedule=paper_cifar", "schedule.base.epochs=300"],
            "schedule.base.milestones must be epochs above 0",
        ),
        (["deps.widths=[40]", "deps.layers={a: 0.5}"], "deps.layers must be null beside deps.widths, got {'a': 0.5}"),
        (
            ["clustering=even", "clustering.of=producers"],
            "clustering.of must be pacesetter where clustering",
        ),
        (
            ["schedule.csgd.lr=0.1"],
            "schedule.csgd.optimizer must be given beside schedule.csgd.lr (sgd or adamw) where",
        ),
        (["schedule=paper_cifar", "centri_strength=null"], "vector_ratio must be null where centri_strength is null"),
    ],
)
def test_keys_that_nothing_would_read_are_refused_and_not_ignored(overrides, message):
    with pytest.raises(ConfigError) as error:
        composed(*overrides)
    assert message in str(error.value)


def test_wandb_is_what_the_environment_says_unless_the_command_line_does(monkeypatch):
    assert (composed().wandb.mode, composed().wandb.project) == ("offline", "csgd")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert (composed().wandb.mode, composed().wandb.project) == ("disabled", "mine")
    assert composed("wandb=online", "wandb.project=other").wandb.mode == "online"
    monkeypatch.setenv("WANDB_MODE", "loud")
    with pytest.raises(HydraException, match="Could not find 'wandb/loud'"):
        composed()


def test_names_tell_data_and_widths_apart():
    named = [label(composed(f"dataset={name}").dataset) for name in ("cifar10", "cifar100", "digits")]
    assert named == ["cifar10", "cifar100", "digits"]
    deps = ["deps=5_8", "deps=staged_5_8", "deps.widths=[40,20]", "deps.layers={a: 0.5}"]
    assert [widths_label(composed(one).deps) for one in deps] == [
        "0.625",
        "0.8125to0.6875to0.625",
        "widths60",
        "0.625layers",
    ]


def test_the_learning_rate_is_the_optimizers_usual_one_where_none_is_given():
    def settled(*overrides) -> tuple[str, float]:
        csgd = composed(*overrides).schedule.csgd
        return str(csgd.optimizer), csgd.lr

    assert settled() == ("adamw", 3e-4)
    assert settled("schedule.csgd.optimizer=sgd") == ("sgd", 0.01)
    assert settled("centri_strength=auto") == ("sgd", 0.01)
    assert settled("schedule.csgd.optimizer=adamw", "schedule.csgd.lr=0.1") == ("adamw", 0.1)


def test_sweeps_over_strengths_and_widths_compose():
    assert composed("centri_strength=null", "deps=5_8").centri_strength is None
    for strength, fraction in itertools.product(("1e-3", "3e-3", "1e-2"), ("13_16", "11_16", "5_8")):
        cfg = composed(f"centri_strength={strength}", f"deps={fraction}")
        assert cfg.centri_strength == float(strength)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["deps.macs=1.5"], "deps.macs must be above 0 and at most 1, or null, got 1.5"),
        (["deps.macs=0.5", "deps.params=0.5"], "deps.macs must be null beside deps.params, got 0.5"),
        (["deps.latency=0.5", "deps.params=0.4"], "deps.params must be null beside deps.latency, got 0.4"),
        (["deps.latency=0"], "deps.latency must be above 0 and at most 1, or null, got 0.0"),
        (["deps.allot=sensitivity"], "deps.allot must be uniform without a budget (deps.macs, params or latency), got"),
        (["deps.params=0.5", "deps.stages=[0.75,0.5]"], "deps.params must be null beside deps.stages, got 0.5"),
    ],
)
def test_budgets_that_cannot_be(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        composed(*overrides)
