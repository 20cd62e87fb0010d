"""Small networks, one for each way in which channels can be tied."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain(nn.Module):
    """Conv, batch norm, PReLU, flatten to linear."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(6 * 4 * 4, 10), nn.Linear(10, 5)

    def forward(self, x):
        x = F.max_pool2d(self.act(self.bn1(self.conv1(x))), 2)
        return self.fc2(F.relu(self.fc1(self.conv2(x).flatten(1))))


class Residual(nn.Module):
    """A stem and two blocks that share one space, a squeeze-and-excitation gate on it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 6, 3, padding=1)
        self.outer = nn.Conv2d(6, 8, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.gamma * self.outer(F.relu(self.inner(x)))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.fc((x + y).mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual: expand, depthwise (with a multiplier), project."""

    def __init__(self):
        super().__init__()
        self.expand, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.widen = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.project = nn.Conv2d(16, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.depthwise(F.relu6(self.bn(self.expand(x))))
        return self.fc(F.relu(self.project(F.relu(self.widen(x)))).mean((2, 3)))


class Dense(nn.Module):
    """Concatenations of earlier features, normalised at offsets."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        self.bn3, self.conv3 = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 3, padding=1)
        self.bn4, self.fc = nn.BatchNorm2d(14), nn.Linear(14, 5)

    def forward(self, x):
        x = self.conv1(x)
        x = torch.cat([x, self.conv2(F.relu(self.bn2(x)))], 1)
        x = torch.cat([x, self.conv3(F.relu(self.bn3(x)))], 1)
        return self.fc(F.relu(self.bn4(x)).mean((2, 3)))


class Grouped(nn.Module):
    """Grouped convs, whose groups are lanes, and a chunk of the channels."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 1)
        self.grouped = nn.Conv2d(12, 16, 3, padding=1, groups=2)
        self.conv3 = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        a, b = self.grouped(F.relu(self.conv1(x))).chunk(2, 1)
        return self.fc(F.relu(self.conv3(a * torch.sigmoid(b))).mean((2, 3)))


class Transposed(nn.Module):
    """Transposed convs, a grouped one among them, and a pixel shuffle."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.up, self.bn = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.BatchNorm2d(6)
        self.up2 = nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2)
        self.shuffle = nn.Conv2d(8, 16, 1)
        self.conv = nn.Conv2d(4, 5, 1)

    def forward(self, x):
        x = F.relu(self.up2(F.relu(self.bn(self.up(F.relu(self.down(x)))))))
        return self.conv(F.relu(F.pixel_shuffle(self.shuffle(x), 2)))


class OneD(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv1d(3, 8, 3), nn.InstanceNorm1d(8, affine=True)
        self.conv2, self.fc = nn.Conv1d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(F.elu(self.conv2(F.elu(self.norm(self.conv1(x))))).amax(2))


class ThreeD(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.conv2, self.fc = nn.Conv3d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool3d(F.relu(self.conv2(F.relu(self.bn(self.conv1(x))))), 1).flatten(1))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(48, 20),
            nn.BatchNorm1d(20),
            nn.ReLU(),
            nn.Linear(20, 12),
            nn.GELU(),
            nn.Linear(12, 5),
        )

    def forward(self, x):
        return self.layers(x)


class Transformer(nn.Module):
    """A pre-norm transformer block: its hidden width is free, its model width is normalised over."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.norm1, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm2, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(x)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class Tied(nn.Module):
    """One conv called twice, and two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1, bias=False)
        self.right.weight = self.left.weight
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.stem(x))))))
        return self.fc(torch.cat([F.relu(self.left(x)), torch.tanh(self.right(x))], 1).mean((2, 3)))


class Auxiliary(nn.Module):
    """A second head that exists in train mode only."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.aux, self.fc = nn.Linear(8, 5), nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        out = self.fc(F.relu(self.conv2(x)).mean((2, 3)))
        return (out, self.aux(x.mean((2, 3)))) if self.training else out


class GlobalResponse(nn.Module):
    """The norm of ConvNeXt V2, channels last."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        size = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return self.gamma * (x * size / (size.mean(-1, keepdim=True) + 1e-6)) + self.beta + x


class ConvNext(nn.Module):
    """A residual stream with layer norm, whose hidden channels have a global response norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 2, stride=2)
        self.depthwise, self.norm = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.LayerNorm(12)
        self.up, self.response, self.down = nn.Linear(12, 16), GlobalResponse(16), nn.Linear(16, 12)
        self.scale, self.last, self.fc = nn.Parameter(torch.full((12,), 0.1)), nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(self.response(F.gelu(self.up(y))))
        return self.fc(self.last((x + y.permute(0, 3, 1, 2)).mean((2, 3))))


class UNet(nn.Module):
    """Group norms, one of them over a concatenation: it ties two spaces, and one of its groups has channels of both."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.down, self.norm2 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16)
        self.norm3, self.merge = nn.GroupNorm(2, 24), nn.Conv2d(24, 6, 3, padding=1)
        self.leave = nn.Conv2d(6, 3, 1)

    def forward(self, x):
        x = self.enter(x)
        y = self.norm2(self.down(F.silu(self.norm1(x))))
        y = torch.cat([x, F.interpolate(F.silu(y), scale_factor=2.0)], 1)
        return self.leave(F.silu(self.merge(self.norm3(y))))


IMAGES = (2, 3, 8, 8)
EXAMPLES: dict[type[nn.Module], tuple[int, ...]] = {
    Plain: IMAGES,
    Residual: IMAGES,
    Depthwise: IMAGES,
    Dense: IMAGES,
    Grouped: IMAGES,
    Transposed: IMAGES,
    OneD: (2, 3, 16),
    ThreeD: (2, 3, 4, 4, 4),
    Mlp: (2, 3, 4, 4),
    Transformer: (2, 7, 3),
    Tied: IMAGES,
    Auxiliary: IMAGES,
    ConvNext: IMAGES,
    UNet: IMAGES,
}


def example_of(net: type[nn.Module], dtype=torch.float32) -> Tensor:
    return torch.randn(EXAMPLES[net], generator=torch.Generator().manual_seed(0), dtype=dtype)
