"""What a pixel of an image file means."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adderops.distill import load_data


def levels(tmp_path: Path, image: Image.Image, suffix: str, **options) -> torch.Tensor:
    """The (3, 16, 16) grey levels that a file of this image is trained on."""
    folder = tmp_path / "set"
    for part in ("train", "val"):
        (folder / part / "a").mkdir(parents=True, exist_ok=True)
        image.save(folder / part / "a" / f"0.{suffix}", **options)
    test = load_data(str(folder), side=16).test
    return test.transform(test.source[0][0]).float()


RAMP = np.linspace(0, 255, 256).reshape(16, 16).astype(np.uint8).repeat(16, 0).repeat(16, 1)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_grey_is_scaled(tmp_path, suffix):
    expected = levels(tmp_path / "8", Image.fromarray(RAMP), "png")
    image = Image.fromarray(np.minimum(RAMP.astype(np.uint16) * 257.0 + 100, 65535).astype(np.uint16))
    torch.testing.assert_close(levels(tmp_path / "16", image, suffix), expected, rtol=0, atol=1)
    assert expected.min() < 30 and expected.max() > 220


def test_float_grey_is_scaled_or_refused(tmp_path):
    expected = levels(tmp_path / "8", Image.fromarray(RAMP), "png")
    share = RAMP.astype(np.float32) / 255
    torch.testing.assert_close(levels(tmp_path / "f", Image.fromarray(share), "tiff"), expected, rtol=0, atol=1)
    for i, wrong in enumerate((share * 255, share - 0.5, np.where(share > 0.5, np.nan, share).astype(np.float32))):
        with pytest.raises(ValueError, match=r"0\.tiff: expected a whole image file.*expected 0 to 1"):
            levels(tmp_path / str(i), Image.fromarray(wrong), "tiff")
    with pytest.raises(ValueError, match=r"0\.tiff: .*32-bit integers, whose range is not known"):
        levels(tmp_path / "i", Image.fromarray(RAMP.astype(np.int32) * 1000), "tiff")


@pytest.mark.parametrize("mode, suffix", [("1", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg")])
def test_other_modes_are_as_pil_converts_them(tmp_path, mode, suffix):
    """Also torchvision's way: alpha is dropped."""
    image = Image.fromarray(np.stack([RAMP, RAMP.T, 255 - RAMP], 2)).convert(mode)
    if "A" in mode:
        image.putalpha(100)
    image.save(tmp_path / f"x.{suffix}")
    expected = Image.open(tmp_path / f"x.{suffix}").convert("RGB")
    found = levels(tmp_path / "a", image, suffix)
    torch.testing.assert_close(found, levels(tmp_path / "b", expected, "png"), rtol=0, atol=0)


def test_an_animation_gives_its_first_frame_and_exif_does_not_turn(tmp_path):
    frames = [Image.fromarray(frame) for frame in (RAMP, 255 - RAMP)]
    expected = levels(tmp_path / "a", frames[0], "png")
    found = levels(tmp_path / "b", frames[0], "png", save_all=True, append_images=frames[1:])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    exif = Image.Exif()
    exif[0x0112] = 3
    torch.testing.assert_close(levels(tmp_path / "c", frames[0], "png", exif=exif), expected, rtol=0, atol=0)
