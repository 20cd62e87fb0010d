"""LeNet-300-100 and LeNet-5 (LeCun et al., 1998), as networks for pruning have them: ReLU, and 20 and 50 filters."""

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet300(nn.Module):
    """Two hidden layers of 300 and 100 neurons, on the mean of an image's colours."""

    def __init__(self, num_classes: int, image_size: int):
        super().__init__()
        self.fc1 = nn.Linear(image_size**2, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(images.mean(1).flatten(1))))))


class LeNet5(nn.Module):
    """Two convs of 5×5, a hidden layer of 500 neurons; images of 20 pixels and more."""

    def __init__(self, num_classes: int, image_size: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * (((image_size - 4) // 2 - 4) // 2) ** 2, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def lenet300(num_classes: int, image_size: int) -> LeNet300:
    return LeNet300(num_classes, image_size)


def lenet5(num_classes: int, image_size: int) -> LeNet5:
    return LeNet5(num_classes, image_size)
