"""One run, from its configuration to its verdict: the only module that reads the configuration."""

import hashlib
import inspect
import json
import logging
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from hydra.utils import get_object
from torch import nn

from csgd import report
from csgd.checkpoint import load_weights, save_checkpoint, save_weights, write_json
from csgd.clusters import cluster
from csgd.data import Data
from csgd.errors import InputError
from csgd.graph import ChannelSpace
from csgd.models import published_weights
from csgd.optim import CSGD, check_stability, param_groups
from csgd.plan import Plan, plan
from csgd.schedule import learning_rate
from csgd.tracking import Tracker
from csgd.train import Epoch, accuracy, logits_of, predict, train
from csgd.trial import find_spaces
from csgd.trim import statistics_momentum, trim
from csgd.verify import Verdict, count_macs, count_params, statistics_spread, verdict
from csgd.widths import target_widths

log = logging.getLogger(__name__)

LOOK_EVERY = 10  # steps between two looks at the deviation, once the collapse is due


def run(cfg: Any, output_dir: Path) -> Verdict:
    """Trains, prunes and judges as `cfg` (an object of the schema in conf/) says; leaves its files in `output_dir`."""
    seconds, started = {}, time.perf_counter()
    device = _device(cfg)
    _check_strengths(cfg)
    data = _build("dataset", cfg.dataset, batch_size=cfg.schedule.batch_size, seed=cfg.seed, device=device)
    torch.manual_seed(cfg.seed)
    model = _build("model", cfg.model, num_classes=data.num_classes, image_size=data.example.size(-1))
    model = _placed(model, device)
    _check_fit(model, data)
    name = f"{_label(cfg.model)}-{_label(cfg.dataset)}-{cfg.deps.fraction:g}-s{cfg.seed}"
    settings = dict(project=cfg.wandb.project, entity=cfg.wandb.entity, group=cfg.wandb.group, tags=cfg.wandb.tags)
    with Tracker(output_dir, mode=cfg.wandb.mode, config=asdict(cfg), settings=settings | {"name": name}) as tracker:
        with _clocked(seconds, "cluster"):
            spaces = find_spaces(model, data.example)
            widths = _widths(cfg, spaces)
            _tell_spaces(spaces, widths)
        with _clocked(seconds, "base"):
            base = _base(cfg, model, data, tracker)
        with _clocked(seconds, "cluster"):
            clusters = cluster(model, spaces, widths, cfg.clustering.method, cfg.seed)
        write_json(output_dir / "clusters.json", clusters)
        pull = _Pull.of(cfg, model, data, spaces, clusters)
        _tell_plan(pull.ahead)
        with _clocked(seconds, "csgd_wide"):
            cut_step = _until_collapse(cfg, model, data, clusters, pull, tracker, output_dir)
        cost = {"macs_before": count_macs(model, data.example), "params_before": count_params(model)}
        with _clocked(seconds, "trim"):
            judged = _cut(cfg, model, data, spaces, clusters, pull.optimizer)
        cost |= {"macs_after": count_macs(model, data.example), "params_after": count_params(model)}
        with _clocked(seconds, "csgd_trimmed"):
            rest = range(cut_step, pull.phase["steps"].stop)
            _train_csgd(cfg, model, data, clusters, pull, tracker, output_dir, rest)
            judged = replace(judged, accuracy=accuracy(*predict(model, data)))
        seconds["csgd"] = seconds["csgd_wide"] + seconds["csgd_trimmed"]
        seconds["total"] = time.perf_counter() - started
        summary = {
            "base": base,
            "verdict": asdict(judged),
            "cost": cost,
            "seconds": seconds,
            "collapse": {
                "step": cut_step,
                "predicted_step": pull.ahead.collapse_step,
                "fraction": cut_step / pull.phase["steps"].stop,
            },
            "widths": widths,
            "seed": cfg.seed,
            "device": _device_name(device),
            "commit": _commit(),
            "versions": _versions(),
            "config": asdict(cfg),
        }
        _leave(model, data, summary, output_dir)
        _report(summary, pull.curves(), tracker, output_dir)
    return judged


# stages


def _widths(cfg: Any, spaces: list[ChannelSpace]) -> dict[str, int]:
    deps, options = cfg.deps.fraction, {}
    if cfg.deps.widths is not None:
        deps = cfg.deps.widths
    elif cfg.deps.layers:
        deps, options = cfg.deps.layers, {"rest": cfg.deps.fraction}
    options |= dict(min_width=cfg.deps.min_width, round_to=cfg.deps.round_to, keep=cfg.deps.keep)
    widths = target_widths(spaces, deps, **options)
    if all(widths.get(space.name, space.size) == space.size for space in spaces):
        raise InputError("deps: nothing is left to trim, every layer keeps its width")
    return widths


def _tell_spaces(spaces: list[ChannelSpace], widths: dict[str, int]) -> None:
    log.info("%d channel spaces, %d of them can be trimmed", len(spaces), len(widths))
    for space in spaces:
        if space.pinned:
            log.info("  %s stays whole: %s", space.name, "; ".join(space.pinned))


def _base(cfg: Any, model: nn.Module, data: Data, tracker: Tracker) -> dict[str, Any]:
    """Loads the base network, from the file or the cache if it is there, or trains it."""
    pretrained = cfg.base.weights and _load_base(cfg, model)
    if pretrained:
        source = cfg.base.weights
    else:
        key = _base_key(cfg, model)
        path = Path(cfg.base.cache) / f"{_label(cfg.model)}-{_label(cfg.dataset)}-s{cfg.seed}-{key}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # the jobs of a parallel sweep wait for the first one
            if path.exists():
                model.load_state_dict(load_weights(path))
                log.info("base network: from the cache, %s", path)
            else:
                _train_base(cfg, model, data, tracker)
                save_weights(path, model.state_dict())
        source = str(path)
    measured = accuracy(*predict(model, data))
    log.info("base network: test accuracy %.4f", measured)
    return {"accuracy": measured, "source": source}


def _train_base(cfg: Any, model: nn.Module, data: Data, tracker: Tracker) -> None:
    schedule = cfg.schedule
    constants = dict(lr=schedule.base.lr, weight_decay=schedule.weight_decay, fused=True)
    if schedule.base.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), **constants)
    else:
        inertia = dict(momentum=schedule.momentum, nesterov=schedule.nesterov)
        optimizer = torch.optim.SGD(model.parameters(), **constants, **inertia)
    for epoch in train(model, optimizer, data, **_phase(cfg, data, "base")):
        _log_epoch("base", epoch, accuracy(*predict(model, data)), tracker, {"epoch": epoch.epoch})


def _load_base(cfg: Any, model: nn.Module) -> bool:
    """Loads base.weights; True if they are all the network needs, False if its head has to be trained first."""
    weights, path = cfg.base.weights, Path(cfg.base.weights)
    published = not path.exists() and path.suffix == "" and path.parent == Path()
    state = published_weights(_label(cfg.model), weights) if published else load_weights(path)
    own = model.state_dict()
    other = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    odd = sorted(own.keys() ^ state.keys())
    if not other and not odd:
        model.load_state_dict(state)
        return True
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not published or not all(
        any(key.startswith(f"{layer.split('.')[0]}.") for layer in head) for key in other + odd
    ):
        key = (other + odd)[0]
        raise InputError(f"base.weights '{weights}' are of another architecture than the model: '{key}' does not fit")
    fitting = {key: value for key, value in state.items() if key in own and key not in other}
    model.load_state_dict(fitting, strict=False)
    log.info(
        "base network: the head of %s does not fit %d classes and is trained anew", weights, own[other[-1]].size(0)
    )
    return False


@dataclass(frozen=True)
class _Pull:
    """What the C-SGD phase is made of: its optimizer, its schedule, and what that will do to the deviation."""

    optimizer: CSGD
    phase: dict[str, Any]
    ahead: Plan
    start: dict[str, float]  # deviation per group before the first step

    @classmethod
    def of(cls, cfg: Any, model: nn.Module, data: Data, spaces: list[ChannelSpace], clusters) -> "_Pull":
        schedule = cfg.schedule
        groups = param_groups(
            model,
            spaces,
            clusters,
            centri_strength=cfg.centri_strength,
            vector_ratio=cfg.vector_ratio,
            weight_decay=schedule.weight_decay,
            weight_decay_vectors=schedule.weight_decay_vectors,
            bias_lr_factor=schedule.bias_lr_factor,
        )
        optimizer = CSGD(groups, schedule.csgd.lr, schedule.momentum, schedule.nesterov)
        phase = _phase(cfg, data, "csgd")
        rates = [phase["lr_at"](step) for step in phase["steps"]]
        ahead = plan(optimizer, rates, cfg.tolerance.deviation, statistics_momentum(model))
        start = {group["name"]: float(optimizer.deviation(group)) for group in optimizer.clustered_groups()}
        return cls(optimizer, phase, ahead, start)

    def foreseen(self, name: str, step: int) -> float:
        """The forecast deviation of a group after `step` steps."""
        return self.start[name] * self.ahead.factors[name][step - 1] ** 2

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        return {
            name: [(step + 1, self.foreseen(name, step + 1)) for step in self.phase["steps"]] for name in self.start
        }


def _until_collapse(cfg: Any, model: nn.Module, data: Data, clusters, pull: _Pull, tracker, output_dir: Path) -> int:
    """Trains the wide network up to the step at which it is to be cut, and returns that step."""
    end = pull.phase["steps"].stop
    foreseen = pull.ahead.collapse_step if cfg.trim_at == "collapse" else None
    done = foreseen or end
    _train_csgd(cfg, model, data, clusters, pull, tracker, output_dir, range(done))
    while foreseen and done < end and pull.optimizer.relative_deviation() > cfg.tolerance.deviation:
        more = range(done, min(done + LOOK_EVERY, end))  # float32 was slower than the forecast
        _train_csgd(cfg, model, data, clusters, pull, tracker, output_dir, more)
        done = more.stop
    return done


def _train_csgd(cfg, model, data, clusters, pull: _Pull, tracker: Tracker, output_dir: Path, steps: range) -> None:
    """Some steps of the C-SGD phase, wide or trimmed; a row of metrics and a checkpoint after each epoch of them."""
    optimizer = pull.optimizer
    for epoch in train(model, optimizer, data, **pull.phase | {"steps": steps, "random_state": torch.get_rng_state()}):
        row = {"epoch": cfg.schedule.base.epochs + epoch.step / pull.phase["steps_per_epoch"]}
        for group in optimizer.clustered_groups():
            row[f"deviation/{group['name']}"] = float(optimizer.deviation(group))
            row[f"forecast/{group['name']}"] = pull.foreseen(group["name"], epoch.step)
        _log_epoch("csgd", epoch, accuracy(*predict(model, data)), tracker, row)
        state = {"epoch": epoch.epoch, "step": epoch.step, "model": model.state_dict(), "clusters": clusters}
        save_checkpoint(output_dir / "checkpoints" / "last.pt", state | {"optimizer": optimizer.state_dict()})


def _tell_plan(ahead: Plan) -> None:
    log.info("%s", ahead.describe())
    if not ahead.collapses:
        log.warning(
            "the filters will not collapse: %.1e of their deviation is left at the end, the cut needs %.0e and will "
            "not be lossless; %s would do",
            ahead.left,
            ahead.tolerance,
            ahead.advice,
        )


def _cut(cfg: Any, model: nn.Module, data: Data, spaces, clusters, optimizer: CSGD) -> Verdict:
    """Trims the model and the optimizer in place, and measures what that did to the logits."""
    before, labels = predict(model, data)
    measured = dict(
        deviation=float(optimizer.deviation()),
        relative_deviation=optimizer.relative_deviation(),
        statistics_spread=statistics_spread(model, spaces, clusters),
    )
    trim(model, spaces, clusters, optimizer)
    after, _ = predict(model, data)
    tolerances = dict(deviation_tolerance=cfg.tolerance.deviation, logit_tolerance=cfg.tolerance.logits)
    return verdict(before, after, labels, **measured, **tolerances)


def _leave(model: nn.Module, data: Data, summary: dict[str, Any], output_dir: Path) -> None:
    """The pruned network as safetensors and JSON, and the summary."""
    save_weights(output_dir / "pruned.safetensors", model.state_dict())
    described = {
        "model": summary["config"]["model"],
        "num_classes": data.num_classes,
        "image_size": data.example.size(-1),
        **{key: summary[key] for key in ("widths", "verdict", "cost", "versions", "commit")},
    }
    write_json(output_dir / "pruned.json", described)
    write_json(output_dir / "summary.json", summary)


def _report(summary: dict[str, Any], foreseen, tracker: Tracker, output_dir: Path) -> None:
    judged = summary["verdict"]
    tracker.summarise({f"{part}/{key}": value for part in ("verdict", "cost") for key, value in summary[part].items()})
    try:
        tracker.log_image("report/curves", report.draw_curves(output_dir, foreseen, summary["collapse"]["step"]))
    except Exception as error:  # a picture never loses a run
        log.warning("report/curves.png could not be drawn: %s", error)
    layers = report.table(("layer", "width before", "width after"), _layer_rows(output_dir, summary["widths"]))
    log.info("widths\n\n%s\n", layers)
    log.info("%s\n\n%s\n", "LOSSLESS" if judged["lossless"] else "NOT LOSSLESS", report.verdict_table(summary))
    if not judged["lossless"]:
        lost = judged["accuracy_before_trim"] - judged["accuracy_after_trim"]
        why = "the cut changed the logits" if judged["collapsed"] else "the filters have not collapsed"
        log.warning("NOT LOSSLESS: %s; the cut cost %.4f of accuracy", why, lost)
    log.info("files: %s", output_dir)
    if tracker.offline_dir:
        log.info(
            "W&B, offline: look with `wandb beta leet %s`, upload with `wandb sync %s`", *[tracker.offline_dir] * 2
        )


def _layer_rows(output_dir: Path, widths: dict[str, int]) -> list[tuple[str, int, int]]:
    clusters = json.loads((output_dir / "clusters.json").read_text())
    return [(name, sum(map(len, clusters[name])), width) for name, width in widths.items()]


# parts of a stage


def _phase(cfg: Any, data: Data, name: str) -> dict[str, Any]:
    """The arguments of `train` for schedule.base or schedule.csgd."""
    phase = getattr(cfg.schedule, name)
    steps_per_epoch = min(data.steps_per_epoch, phase.max_steps or data.steps_per_epoch)
    return dict(
        steps=range(phase.epochs * steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        clip_norm=phase.clip_norm,
        lr_at=partial(_lr_at(phase), steps_per_epoch=steps_per_epoch),
        seed=cfg.seed,
        label={"base": "base", "csgd": "C-SGD"}[name],
        progress=cfg.progress,
    )


def _lr_at(phase: Any) -> Callable[..., float]:
    return partial(
        learning_rate,
        epochs=phase.epochs,
        lr=phase.lr,
        warmup_epochs=phase.warmup_epochs,
        decay=phase.decay,
        milestones=phase.milestones,
        gamma=phase.gamma,
    )


def _check_strengths(cfg: Any) -> None:
    """F6, before anything is built: the strengths under the highest learning rate of the schedule."""
    schedule = cfg.schedule
    inertia = (schedule.momentum, schedule.nesterov)
    check_stability(schedule.csgd.lr, cfg.centri_strength, schedule.weight_decay, *inertia)
    vectors = schedule.csgd.lr * max(1.0, schedule.bias_lr_factor), cfg.vector_ratio * cfg.centri_strength
    check_stability(*vectors, schedule.weight_decay_vectors, *inertia)


def _log_epoch(phase: str, epoch: Epoch, test_accuracy: float, tracker: Tracker, row: dict[str, Any]) -> None:
    values = {
        "loss": epoch.loss,
        "train_accuracy": epoch.train_accuracy,
        "test_accuracy": test_accuracy,
        "lr": epoch.lr,
        "seconds": epoch.seconds,
    }
    tracker.log({"phase": phase, "step": epoch.step} | {f"{phase}/{k}": v for k, v in values.items()} | row)
    deviations = "".join(
        f", deviation of {k.split('/')[1]} {v:.1e}" for k, v in row.items() if k.startswith("deviation/")
    )
    log.info(
        "%s epoch %d: loss %.4f, test accuracy %.4f, lr %.2g%s, %.1f s",
        phase,
        epoch.epoch,
        epoch.loss,
        test_accuracy,
        epoch.lr,
        deviations,
        epoch.seconds,
    )


def _base_key(cfg: Any, model: nn.Module) -> str:
    """A hash of everything that determines the base network."""
    import csgd.data
    import csgd.schedule
    import csgd.train

    sources = [csgd.data, csgd.schedule, csgd.train, type(model)]
    schedule = {
        k: v for k, v in asdict(cfg.schedule).items() if k in ("batch_size", "momentum", "nesterov", "weight_decay")
    }
    weights = cfg.base.weights
    parts = [cfg.model, cfg.dataset, schedule, asdict(cfg.schedule.base), cfg.seed, weights, _versions()["torch"]]
    parts += [str(next(model.parameters()).device.type), *map(inspect.getsource, sources)]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:12]


def _build(group: str, settings: dict[str, Any], **offered: Any) -> Any:
    """Calls settings._target_ with its own settings, and with what is offered as far as it takes it."""
    target = settings["_target_"]
    try:
        made = get_object(target)
    except Exception as error:  # whatever importing a user's module raises
        raise InputError(f"{group}._target_ '{target}' cannot be imported: {error}") from None
    own = {key: value for key, value in settings.items() if key != "_target_"}
    parameters = inspect.signature(made).parameters
    arguments = {key: value for key, value in offered.items() if key in parameters} | own
    try:
        inspect.signature(made).bind(**arguments)
    except TypeError as error:
        raise InputError(f"{group}: '{target}' does not fit its settings: {error}") from None
    return made(**arguments)


def _check_fit(model: nn.Module, data: Data) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model._target_ must make a torch.nn.Module, got {type(model).__name__}")
    try:
        with torch.no_grad():
            outputs = logits_of(model.eval()(data.example))
        shape = list(outputs.shape)
    except Exception as error:  # whatever a network raises on images that it cannot take
        raise InputError(f"the model cannot take images of {list(data.example.shape[1:])}: {error}") from None
    if len(shape) != 2 or shape[1] < data.num_classes:
        raise InputError(f"the model must return logits [n, {data.num_classes}], got {shape}")


def _label(settings: dict[str, Any]) -> str:
    return str(settings.get("name") or settings["_target_"].rsplit(".", 1)[-1])


def _placed(model: nn.Module, device: torch.device) -> nn.Module:
    # On a CPU convs run about 1.4 times faster in channels-last layout.
    return model.to(device, memory_format=torch.channels_last) if device.type == "cpu" else model.to(device)


def _device(cfg: Any) -> torch.device:
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: torch sees no CUDA device here; device=auto or device=cpu runs on the CPU")
    return torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "scikit-learn", "numpy", "hydra-core", "wandb")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _commit() -> str | None:
    """The commit of the checkout that holds this package, None outside of one."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None if done.returncode == 0 else None


@contextmanager
def _clocked(seconds: dict[str, float], stage: str):
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started
