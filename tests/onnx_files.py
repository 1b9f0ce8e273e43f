"""Tiny ONNX files of a DINOv2 encoder with a head behind it, exported by torch from modules that are written here.

The modules have the names of published files and share no code with transformers, so their graph is another
implementation of the encoder.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from transformers.utils import torch_int

from offsite.model_owner.base_model import open_base
from offsite.protocol.artifacts import Base
from tiny import tiny_vision_base


class _Scale(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(hidden))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        return stream * self.lambda1


class _SelfAttention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        parts = (layer(stream) for layer in (self.query, self.key, self.value))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


class _Output(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)

    def forward(self, read: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.dense(read)
        return found


class _Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention, self.output = _SelfAttention(hidden, heads), _Output(hidden)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.output(self.attention(stream))
        return found


class _Mlp(nn.Module):
    def __init__(self, hidden: int, inner: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1, self.activation, self.fc2 = nn.Linear(hidden, inner), activation, nn.Linear(inner, hidden)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.fc2(self.activation(self.fc1(stream)))
        return found


class _Block(nn.Module):
    def __init__(self, config: Any, heads: int, activation: nn.Module, eps: float) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.norm1, self.norm2 = nn.LayerNorm(hidden, eps=eps), nn.LayerNorm(hidden, eps=eps)
        self.attention = _Attention(hidden, heads)
        self.mlp = _Mlp(hidden, int(hidden * config.mlp_ratio), activation)
        self.layer_scale1, self.layer_scale2 = _Scale(hidden), _Scale(hidden)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        stream = self.layer_scale1(self.attention(self.norm1(stream))) + stream
        found: torch.Tensor = self.layer_scale2(self.mlp(self.norm2(stream))) + stream
        return found


class _Patches(nn.Module):
    def __init__(self, channels: int, hidden: int, patch: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, hidden, patch, patch)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.projection(pixels).flatten(2).transpose(1, 2)
        return found


class _Embeddings(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, patch = config.hidden_size, config.patch_size
        self.patch = patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden))
        self.position_embeddings = nn.Parameter(torch.zeros(1, (config.image_size // patch) ** 2 + 1, hidden))
        self.patch_embeddings = _Patches(config.num_channels, hidden, patch)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embeddings(pixels)
        stream = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), 1)
        first, table = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        side = torch_int((self.position_embeddings.shape[1] - 1) ** 0.5)  # not a constant of the graph
        table = table.reshape(1, side, side, stream.shape[-1]).permute(0, 3, 1, 2)
        size = (pixels.shape[2] // self.patch, pixels.shape[3] // self.patch)
        table = F.interpolate(table, size=size, mode="bicubic", align_corners=False)
        return stream + torch.cat((first, table.permute(0, 2, 3, 1).reshape(1, -1, stream.shape[-1])), 1)


class _Encoder(nn.Module):
    def __init__(self, blocks: list[_Block]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(blocks)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        for block in self.layer:
            stream = block(stream)
        return stream


class _Backbone(nn.Module):
    def __init__(self, config: Any, heads: int, activation: nn.Module, eps: float) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder([_Block(config, heads, activation, eps) for _ in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=eps)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layernorm(self.encoder(self.embeddings(pixels)))
        return found


class _Decoder(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.final_conv = nn.Conv1d(hidden, 1, 1, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.final_conv(tokens.transpose(1, 2))
        return found


class _Model(nn.Module):
    def __init__(self, backbone: _Backbone, decoder: _Decoder) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.decoder(self.backbone(pixels))
        return found


def tiny_dinov2(folder: Path, **config: Any) -> Path:
    """A tiny DINOv2 whose attention heads are as wide as those of published ones, and without a mask token."""
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "use_mask_token": False, **config}
    return tiny_vision_base(folder, "dinov2", 2, **sizes)


def exported(
    folder: Path,
    file: Path,
    *,
    heads: int | None = None,
    activation: nn.Module | None = None,
    eps: float = 1e-6,
    side: int = 16,
    any_size: bool = True,
    half: bool = False,
) -> Path:
    """Export the encoder in a folder to an ONNX file, with a head behind it.

    Args:
        folder: a tiny DINOv2.
        file: the file to write.
        heads: attention heads of the graph; None: those of the config.
        activation: of the graph's MLPs; None: GELU.
        eps: of the graph's norms.
        side: side in pixels of the picture that is traced.
        any_size: whether the graph accepts pictures of any size and number.
        half: whether the graph computes in fp16.
    """
    pytest.importorskip("onnx")
    config = AutoConfig.from_pretrained(folder)
    backbone = _Backbone(config, heads or config.num_attention_heads, activation or nn.GELU(), eps)
    family = open_base(Base(folder)).family
    weights = AutoModel.from_pretrained(folder).state_dict()
    backbone.load_state_dict({family.name_of(name) or name: tensor for name, tensor in weights.items()})
    dtype = torch.float16 if half else torch.float32
    model = _Model(backbone, _Decoder(config.hidden_size)).to(dtype).eval()
    axes = {"pixels": {0: "n", 2: "y", 3: "x"}} if any_size else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself, and about what it traces
        torch.onnx.export(
            model, (torch.zeros(1, 3, side, side, dtype=dtype),), str(file), dynamo=False, opset_version=17,
            input_names=["pixels"], dynamic_axes=axes,
        )  # fmt: skip
    return file
