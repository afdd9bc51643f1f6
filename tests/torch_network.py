"""The published network once more, in torch, to compare ours with.

Written from the papers' description and the names of the published state dict,
not from our modules: a mistake there is not repeated here.
"""

import torch
import torch.nn.functional as F
from torch import nn


def conv(inputs, outputs, size=1, stride=1, dilation=1, bias=False):
  pad = dilation * (size - 1) // 2
  return nn.Conv2d(inputs, outputs, size, stride, pad, dilation, bias=bias)


class Bottleneck(nn.Module):
  def __init__(self, inputs, planes, stride, dilation, project):
    super().__init__()
    self.conv1, self.bn1 = conv(inputs, planes), nn.BatchNorm2d(planes)
    self.conv2 = conv(planes, planes, 3, stride, dilation)
    self.bn2 = nn.BatchNorm2d(planes)
    self.conv3 = conv(planes, 4 * planes)
    self.bn3 = nn.BatchNorm2d(4 * planes)
    self.downsample = None
    if project:
      self.downsample = nn.Sequential(
        conv(inputs, 4 * planes, 1, stride), nn.BatchNorm2d(4 * planes)
      )

  def forward(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    y = F.relu(self.bn2(self.conv2(y)))
    y = self.bn3(self.conv3(y))
    return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Encoder(nn.Module):
  """Output stride 8; dilations 1, 1, 2, 4, the last stage times 2, 2, 4."""

  def __init__(self, blocks, deep):
    super().__init__()
    width = 128 if deep else 64
    self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    if deep:
      self.conv1 = nn.Sequential(
        conv(3, 64, 3, 2), nn.BatchNorm2d(64), nn.ReLU(),
        conv(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU(),
        conv(64, 128, 3),
      )  # fmt: skip
    self.bn1 = nn.BatchNorm2d(width)
    # Of the first block and of the others: the first one keeps the dilation
    # of the stage before.
    dilations = [
      [1] * blocks[0],
      [1] * blocks[1],
      [1] + [2] * (blocks[2] - 1),
      [2 * 2, 4 * 2, 4 * 4],
    ]
    for i, stage in enumerate(dilations):
      planes, layers = 64 * 2**i, []
      for j, dilation in enumerate(stage):
        stride = 2 if i == 1 and j == 0 else 1
        layers.append(Bottleneck(width, planes, stride, dilation, j == 0))
        width = 4 * planes
      setattr(self, f"layer{i + 1}", nn.Sequential(*layers))

  def forward(self, x):
    x = F.relu(self.bn1(self.conv1(x)))
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    low = self.layer1(x)
    aux = self.layer3(self.layer2(low))
    return low, aux, self.layer4(aux)


def unit(inputs, outputs, size, dilation=1, bias=True):
  return [
    conv(inputs, outputs, size, 1, dilation, bias),
    nn.BatchNorm2d(outputs),
    nn.ReLU(),
  ]


class ASPP(nn.Module):
  def __init__(self):
    super().__init__()
    self.conv1 = nn.Sequential(
      nn.AdaptiveAvgPool2d(1), *unit(2048, 256, 1, bias=False)
    )
    self.conv2 = nn.Sequential(*unit(2048, 256, 1, bias=False))
    self.conv3 = nn.Sequential(*unit(2048, 256, 3, 12, False))
    self.conv4 = nn.Sequential(*unit(2048, 256, 3, 24, False))
    self.conv5 = nn.Sequential(*unit(2048, 256, 3, 36, False))

  def forward(self, x):
    pooled = self.conv1(x).expand(-1, -1, *x.shape[2:])
    others = (self.conv2, self.conv3, self.conv4, self.conv5)
    return torch.cat([pooled, *(branch(x) for branch in others)], 1)


class Decoder(nn.Module):
  def __init__(self, num_classes):
    super().__init__()
    self.low_conv = nn.Sequential(*unit(256, 256, 1))
    self.aspp = ASPP()
    self.head = nn.Sequential(*unit(1280, 256, 3, bias=False), nn.Dropout2d())

    def branch(outputs):
      return nn.Sequential(
        *unit(512, 256, 3), nn.Dropout2d(),
        *unit(256, 256, 3), nn.Dropout2d(),
        conv(256, outputs, bias=True),
      )  # fmt: skip

    self.classifier, self.representation = branch(num_classes), branch(256)

  def forward(self, low, high):
    low = self.low_conv(low)
    high = self.head(self.aspp(high))
    high = F.interpolate(
      high, size=low.shape[2:], mode="bilinear", align_corners=True
    )
    x = torch.cat([low, high], 1)
    return self.classifier(x), self.representation(x)


class Auxiliary(nn.Module):
  def __init__(self, num_classes):
    super().__init__()
    self.aux = nn.Sequential(
      *unit(1024, 256, 3), nn.Dropout2d(), conv(256, num_classes, bias=True)
    )

  def forward(self, x):
    return self.aux(x)


class Network(nn.Module):
  """[b, 3, h, w] -> (logits, reps, auxiliary logits)."""

  BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}

  def __init__(self, backbone, stem, num_classes):
    super().__init__()
    self.encoder = Encoder(self.BLOCKS[backbone], stem == "deep")
    self.decoder = Decoder(num_classes)
    self.auxor = Auxiliary(num_classes)

  def forward(self, x):
    low, aux, high = self.encoder(x)
    return *self.decoder(low, high), self.auxor(aux)


def random_network(backbone, stem, num_classes, seed=0):
  """With running statistics and scales that are not those of a new network."""
  torch.manual_seed(seed)
  network = Network(backbone, stem, num_classes).eval()
  with torch.no_grad():
    for module in network.modules():
      if isinstance(module, nn.BatchNorm2d):
        module.running_mean.normal_(0, 0.1)
        module.running_var.uniform_(0.8, 1.2)
        module.weight.uniform_(0.5, 1.0)
        module.bias.normal_(0, 0.1)
      elif isinstance(module, nn.Conv2d):
        # Keeps the scale through hundreds of layers.
        fan_in = module.weight[0].numel()
        module.weight.normal_(0, (1.5 / fan_in) ** 0.5)
  return network
