"""The encoder with fewer operations and less memory traffic: the same features, by exact changes of the network.

- BatchNorm is folded into the convolution before it, and so is a factor of its output (the scales of
  Inception-ResNet's residuals). timm's BatchNorm with an activation is taken apart for that.
- 1x1 convolutions that read the same feature map are merged, so that it is read once.
- Normalisation is folded into the first convolution, so that the input is bytes.

Knows nothing of devices, dtypes or how operations are launched; `network.py` does.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from etenet.model.config import Preprocessing, crop_start
from etenet.model.encoder import Encoder


class FusedEncoder(nn.Module):
    """Frames (N, resize_px, resize_px, 3) uint8 RGB -> features (N, D), in the dtype of its weights up to the mean."""

    def __init__(self, encoder: Encoder, preprocessing: Preprocessing) -> None:
        """`torch.fx.proxy.TraceError` if the network cannot be traced."""
        super().__init__()
        self._start, self._size = crop_start(preprocessing), preprocessing.crop_px
        self.name = encoder.name
        plain = copy.deepcopy(encoder).cpu().eval()
        _take_activations_out_of_batch_norms(plain)
        graph = fx.GraphModule(plain, _Tracer().trace(plain))
        _fold_batch_norms(graph)
        _fold_scales(graph)
        _merge_siblings(graph)
        normalise = _Normalise(preprocessing)
        first = _first_convolution(graph)
        if first:
            _fold_normalisation(first, normalise)
        self.normalise = nn.Identity() if first else normalise
        graph.delete_all_unused_submodules()
        graph.recompile()
        self.network = graph.requires_grad_(False)

    def forward(self, frames: Tensor) -> Tensor:
        inside = slice(self._start, self._start + self._size)
        pixels = frames[:, inside, inside].permute(0, 3, 1, 2)  # (N, 3, crop_px, crop_px), channels last in memory
        features: Tensor = self.network(self.normalise(pixels.to(self._type)))
        return features

    @property
    def _type(self) -> torch.dtype:
        return next(self.parameters()).dtype


class _Tracer(fx.Tracer):
    """timm's convolutions and poolings that pad by the size of their input cannot be traced through."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) or super().is_leaf_module(
            m, module_qualified_name
        )


def _take_activations_out_of_batch_norms(encoder: Encoder) -> None:
    for name, norm in list(encoder.named_modules()):
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(activation := getattr(norm, "act", None), nn.Module):
            continue
        plain = nn.BatchNorm2d(norm.num_features, eps=norm.eps, affine=norm.affine).eval()
        plain.load_state_dict(norm.state_dict())
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, nn.Sequential(plain, activation))


class _Normalise(nn.Module):
    """The arithmetic of `model/preprocess.py` on RGB pixels: x -> x * scale + shift, then the order of the channels."""

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.swaps = preprocessing.channels == "BGR"
        mean, std = torch.tensor(preprocessing.mean).double(), torch.tensor(preprocessing.std).double()
        self.register_buffer("scale", preprocessing.input_max / 255 / std)
        self.register_buffer("shift", -mean / std)

    def forward(self, pixels: Tensor) -> Tensor:
        ordered = pixels.flip(1) if self.swaps else pixels
        return ordered * self.scale[:, None, None].to(pixels) + self.shift[:, None, None].to(pixels)


def _modules(graph: fx.GraphModule, kind: type[nn.Module]) -> dict[fx.Node, Any]:
    """The calls of modules of a kind that are called only once."""
    called = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    return {
        node: module
        for node in graph.graph.nodes
        if node.op == "call_module"
        and called[node.target] == 1
        and isinstance(module := graph.get_submodule(str(node.target)), kind)
    }


def _replace(graph: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    parent, _, name = str(node.target).rpartition(".")
    setattr(graph.get_submodule(parent), name, module)


def _remove(graph: fx.GraphModule, node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    graph.graph.erase_node(node)


def _fold_batch_norms(graph: fx.GraphModule) -> None:
    convolutions = _modules(graph, nn.Conv2d)
    for node, norm in _modules(graph, nn.BatchNorm2d).items():
        match node.args:
            case (fx.Node() as before,) if before in convolutions and len(before.users) == 1:
                _replace(graph, before, fuse_conv_bn_eval(convolutions[before], norm))
                _remove(graph, node, before)


def _fold_scales(graph: fx.GraphModule) -> None:
    convolutions = _modules(graph, nn.Conv2d)
    for node in list(graph.graph.nodes):
        match node.op, node.target, node.args:
            case "call_function", operator.mul, (fx.Node() as before, int() | float() as scale) if (
                before in convolutions and len(before.users) == 1
            ):
                for parameter in convolutions[before].parameters():
                    parameter.data.mul_(scale)
                _remove(graph, node, before)


def _merge_siblings(graph: fx.GraphModule) -> None:
    readers: dict[Any, list[fx.Node]] = defaultdict(list)
    convolutions = _modules(graph, nn.Conv2d)
    for node, convolution in convolutions.items():
        if _is_pointwise(convolution):
            readers[node.args[0]].append(node)
    relus = _modules(graph, nn.ReLU)
    for source, siblings in readers.items():
        if len(siblings) < 2:
            continue
        merged = _side_by_side([convolutions[node] for node in siblings])
        name = f"merged_{str(siblings[0].target).replace('.', '_')}"
        graph.add_module(name, merged)
        with graph.graph.inserting_before(siblings[0]):
            whole = graph.graph.call_module(name, (source,))
            ends = siblings
            if all(len(node.users) == 1 and next(iter(node.users)) in relus for node in siblings):
                ends = [next(iter(node.users)) for node in siblings]
                whole = graph.graph.call_function(torch.relu, (whole,))
            sizes = [convolutions[node].out_channels for node in siblings]
            parts = graph.graph.call_function(torch.split, (whole, sizes), {"dim": 1})
            for number, end in enumerate(ends):
                end.replace_all_uses_with(graph.graph.call_function(operator.getitem, (parts, number)))
        for node in (*ends, *siblings):
            if not node.users and node in graph.graph.nodes:
                graph.graph.erase_node(node)


def _is_pointwise(convolution: nn.Conv2d) -> bool:
    return (
        type(convolution) is nn.Conv2d
        and convolution.kernel_size == (1, 1)
        and convolution.stride == (1, 1)
        and convolution.padding == (0, 0)
        and convolution.groups == 1
    )


def _side_by_side(convolutions: list[nn.Conv2d]) -> nn.Conv2d:
    """One 1x1 convolution with the channels of all."""
    merged = nn.Conv2d(convolutions[0].in_channels, sum(one.out_channels for one in convolutions), 1)
    merged.weight = nn.Parameter(torch.cat([one.weight for one in convolutions]), requires_grad=False)
    biases = [one.weight.new_zeros(one.out_channels) if one.bias is None else one.bias for one in convolutions]
    merged.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return merged


def _first_convolution(graph: fx.GraphModule) -> nn.Conv2d | None:
    """The only convolution that reads the input; None if it pads, because folding would shift the padding's value."""
    (pixels,) = (node for node in graph.graph.nodes if node.op == "placeholder")
    convolutions = _modules(graph, nn.Conv2d)
    readers: list[nn.Conv2d | None] = [convolutions.get(node) for node in pixels.users]
    (first, *others) = readers
    is_unpadded = type(first) is nn.Conv2d and first.padding == (0, 0)  # timm's Conv2dSame says so, and pads
    return first if is_unpadded and not others else None


def _fold_normalisation(convolution: nn.Conv2d, normalise: _Normalise) -> None:
    """W (s x + t) + b = (W s) x + (W t + b), with channels in RGB order."""
    weight = convolution.weight.double()
    bias = 0 if convolution.bias is None else convolution.bias.double()
    scaled = weight * normalise.scale[:, None, None]
    shifted = (weight * normalise.shift[:, None, None]).sum(dim=(1, 2, 3)) + bias
    convolution.weight = nn.Parameter((scaled.flip(1) if normalise.swaps else scaled).to(convolution.weight))
    convolution.bias = nn.Parameter(shifted.to(convolution.weight))
