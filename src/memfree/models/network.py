"""The U-Net of a pixel model: its options, and the diffusers network built from them."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DModel

from memfree.models.options import NetworkOptions


def build_network(
    options: NetworkOptions, image_shape: tuple[int, int, int], num_classes: int | None = None
) -> Any:
    """Build the U-Net with fresh weights from torch's global generator.

    Args:
        options: size and shape.
        image_shape: (C, H, W) of the images.
        num_classes: None for an unconditional network. Otherwise the network knows
            ``num_classes + 1`` labels, the last of which is the null label "no class".

    Returns:
        A diffusers UNet2DModel (diffusers gives type checkers no nn.Module to see).

    Raises:
        ValueError: the options do not fit together or to the image.
    """
    _check(options, image_shape)
    channels, height, width = image_shape
    levels = range(len(options.block_out_channels))
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(options.block_out_channels),
        down_block_types=tuple(
            "AttnDownBlock2D" if options.attention[level] else "DownBlock2D" for level in levels
        ),
        up_block_types=tuple(
            "AttnUpBlock2D" if options.attention[level] else "UpBlock2D"
            for level in reversed(levels)
        ),
        layers_per_block=options.layers_per_block,
        norm_num_groups=options.norm_num_groups,
        attention_head_dim=options.attention_head_dim,
        resnet_time_scale_shift=options.time_scale_shift,
        dropout=options.dropout,
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )


def _check(options: NetworkOptions, image_shape: tuple[int, int, int]) -> None:
    channels = options.block_out_channels
    if not channels or len(channels) != len(options.attention):
        raise ValueError(
            f"--model.network.attention has {len(options.attention)} entries and "
            f"--model.network.block_out_channels {len(channels)}: give one for each resolution"
        )
    uneven = [count for count in channels if count % options.norm_num_groups]
    if uneven:
        raise ValueError(
            f"--model.network.norm_num_groups {options.norm_num_groups} does not divide "
            f"{uneven[0]} of --model.network.block_out_channels"
        )
    divisor = 2 ** (len(channels) - 1)
    if image_shape[1] % divisor or image_shape[2] % divisor:
        raise ValueError(
            f"images of {image_shape[1]}x{image_shape[2]} pixels cannot be halved "
            f"{len(channels) - 1} times: shorten --model.network.block_out_channels or prepare "
            f"the data at a multiple of {divisor}"
        )
    if options.dropout >= 1:
        raise ValueError(f"--model.network.dropout is {options.dropout}, but must be below 1")
