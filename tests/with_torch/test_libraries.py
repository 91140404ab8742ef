"""Models of timm and diffusers, tiny and random, under `cuflash.torch.use()`: torch's numbers, and all of their attention on cuflash. Skipped without them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from cuflash.torch import report, use


def imported(name: str) -> Any:
    """The library; skipped without it, or where torchvision, which timm needs, is built for another torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name}: {error}")


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * (1.0 + float(want.detach().abs().max())))


def test_a_vision_transformer_of_timm_trains(device: Any) -> None:
    timm = imported("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).to(device)
    images = torch.randn(1, 3, 64, 64, device=device)

    def step() -> list[Any]:
        out = model(images)
        return [out, *torch.autograd.grad(out.square().mean(), list(model.parameters()))]

    want = step()
    with use("raise", simulate=True):
        got = step()
    assert (report().calls, report().others) == (2, {})
    for a, b in zip(got, want, strict=True):
        same(a, b)


def test_a_unet_of_diffusers(device: Any) -> None:
    """Attention of pixels to each other and to a text of which some tokens are hidden."""
    diffusers = imported("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"), cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8,
    ).to(device).eval()  # fmt: skip
    given = {
        "sample": torch.randn(1, 4, 8, 8, device=device), "timestep": torch.tensor(3, device=device),
        "encoder_hidden_states": torch.randn(1, 7, 32, device=device),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]], device=device),
    }  # fmt: skip
    with torch.no_grad():
        want = model(**given).sample
        with use("raise", simulate=True):
            got = model(**given).sample
    assert report().calls == 4
    same(got, want)
