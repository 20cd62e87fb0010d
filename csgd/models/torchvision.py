"""Any torchvision classifier by name, and the weights that torchvision publishes."""

from difflib import get_close_matches

from torch import Tensor, nn
from torchvision import models

from csgd.errors import InputError


def classifier_names() -> list[str]:
    return models.list_models(module=models)


def torchvision(name: str, num_classes: int) -> nn.Module:
    """torchvision.models.get_model(name) with random weights; InputError on an unknown name."""
    if name not in classifier_names():
        near = get_close_matches(str(name), classifier_names(), 5) or classifier_names()[:5]
        raise InputError(f"model.name '{name}' is no torchvision classifier; names like it: {', '.join(near)}")
    # These two warn, and take a minute, unless told which initialisation is meant.
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, num_classes=num_classes, **options)


def published_weights(architecture: str, weights: str) -> dict[str, Tensor]:
    """The state_dict that torchvision publishes for an architecture under a name such as IMAGENET1K_V1, downloaded
    into torch's cache.  InputError on an unknown name, or if it cannot be fetched."""
    try:
        known = models.get_model_weights(architecture)
    except ValueError:
        raise InputError(f"base.weights: torchvision publishes no weights for the model '{architecture}'") from None
    if weights not in known.__members__:
        names = ", ".join(known.__members__)
        raise InputError(
            f"base.weights '{weights}' is neither a file nor weights of {architecture} (published: {names})"
        )
    try:
        return known[weights].get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise InputError(f"base.weights {weights} of {architecture} could not be downloaded: {error}") from None
