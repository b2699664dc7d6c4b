"""Image files: what loads, how it is turned upright, and what every bad file's error says."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy import ndarray
from PIL import Image

from detection.data.dataset import DetectionDataset, ImageConfig, jpeg_is_complete, read_image, sample_seed
from detection.data.transforms import TransformConfig
from detection.types import DataError, Records

HEIGHT, WIDTH = 48, 64


def photograph(height: int = HEIGHT, width: int = WIDTH) -> ndarray:
    """A smooth picture without symmetry, so that JPEG keeps it and every rotation shows."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x / width, 255 * y / height
    return np.stack([red, green, (red + green) / 4], axis=2).astype(np.uint8)


def jpeg(pixels: ndarray, orientation: int | None = None) -> bytes:
    image, exif = Image.fromarray(pixels), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, subsampling=0, exif=exif)
    return out.getvalue()


def make_records(paths: Sequence[Path], sizes: Sequence[tuple[int, int]], counts: Sequence[int]) -> Records:
    """Records with `counts[i]` boxes on image i."""
    total = sum(counts)
    corners = np.tile(np.array([4.0, 6.0, 24.0, 30.0]), (total, 1))
    return Records(
        class_names=("a", "b"),
        category_ids=(1, 2),
        paths=np.array([str(p).encode() for p in paths]),
        image_ids=np.arange(1, len(paths) + 1),
        sizes=np.array(sizes).reshape(-1, 2),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=corners,
        labels=np.arange(total, dtype=np.int64) % 2,
        crowd=np.zeros(total, np.bool_),
        area=np.full(total, 480.0),
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_pillow_does(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    path = tmp_path / "turned.jpg"
    path.write_bytes(jpeg(photograph(), orientation))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    found = read_image(path, upright.shape[:2])
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= 3


def test_png_orientation_follows_the_same_policy(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photograph()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(photograph(), -1))


def test_size_is_checked_after_turning(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    path.write_bytes(jpeg(photograph(), 6))
    assert read_image(path, (WIDTH, HEIGHT)).shape == (WIDTH, HEIGHT, 3)
    with pytest.raises(DataError, match=r"turned.jpg: the file is 48 x 64 .* says 64 x 48.*turned upright.*EXIF.* 6"):
        read_image(path, (HEIGHT, WIDTH))
    with pytest.raises(DataError, match=r"says 50 x 40$"):
        read_image(path, (40, 50))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm", "gif"])
def test_formats_load(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(photograph()).save(path, **({"lossless": True} if suffix == "webp" else {}))
    found = read_image(path, (HEIGHT, WIDTH))
    assert np.abs(found.astype(int) - photograph()).mean() < (10 if suffix == "gif" else 1e-9)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1", "CMYK", "I;16"])
def test_pixel_kinds_load_as_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    grey = photograph()[:, :, 0]
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(np.repeat(grey[:, :, None], 3, 2)).convert(mode).save(path)
    found = read_image(path, (HEIGHT, WIDTH))
    assert found.shape == (HEIGHT, WIDTH, 3)
    assert found.flags.c_contiguous
    assert found.flags.writeable
    if mode != "1":
        assert np.abs(found.astype(int) - grey[:, :, None]).max() == 0


@pytest.mark.parametrize("transparency", [None, 3])
def test_palettes_load(tmp_path: Path, transparency: int | None) -> None:
    image = Image.fromarray(photograph()).quantize(32)
    image.save(tmp_path / "a.png", transparency=transparency)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_that_are_not_rgb_load(tmp_path: Path, mode: str) -> None:
    Image.fromarray(photograph()).convert(mode).save(tmp_path / "a.jpg", quality=95)
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB")).astype(int)
    assert np.abs(read_image(tmp_path / "a.jpg") - expected).max() <= 3


def test_transparency_is_dropped_not_blended(tmp_path: Path) -> None:
    pixels = np.dstack([photograph(), np.zeros((HEIGHT, WIDTH), np.uint8)])
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), photograph())


@pytest.mark.parametrize("cut", [1, 2, 50, 400])
def test_truncated_jpeg_is_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(jpeg(photograph())[:-cut])
    with pytest.raises(DataError, match=r"cut.jpg: truncated"):
        read_image(path)


def test_truncation_is_seen_behind_a_thumbnail_and_trailing_bytes_are_fine() -> None:
    plain, thumbnail = jpeg(photograph()), jpeg(photograph(8, 8))
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    whole = plain[:2] + segment + plain[2:]
    assert jpeg_is_complete(whole)
    assert jpeg_is_complete(whole + b"\0\0vendor data \xff\xda")
    assert not jpeg_is_complete(whole[:-2])
    assert not jpeg_is_complete(whole[: len(segment) + 40])
    assert not jpeg_is_complete(b"\xff\xd8")
    out = io.BytesIO()
    Image.fromarray(photograph()).save(out, "JPEG", progressive=True)
    assert jpeg_is_complete(out.getvalue())
    assert not jpeg_is_complete(out.getvalue()[:-2])


def test_truncated_png_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(DataError, match=r"cut.png: truncated or damaged"):
        read_image(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.jpg", b"hello"),
        ("empty.png", b""),
        ("page.jpg", b"<html></html>"),
        ("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: not an image"):
        read_image(tmp_path / name)


def test_missing_folder_pipe_and_float_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jpg: no such file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match="not a regular file"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: not a regular file"):
        read_image(tmp_path / "pipe")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="floating-point"):
        read_image(tmp_path / "a.tif")


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_enormous_images_are_refused_from_the_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b""))
    with pytest.raises(DataError, match=r"bomb.png: 13000 x 13000 pixels; at most 150,000,000"):
        read_image(path)
    Image.new("L", (200, 100)).save(path)
    with pytest.raises(DataError, match=r"bomb.png: 200 x 100 pixels; at most 10,000"):
        read_image(path, max_pixels=10_000)


def test_random_bytes_behind_real_headers_never_escape_as_another_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP"):
        out = io.BytesIO()
        Image.fromarray(photograph(16, 16)).save(out, kind)
        for i in range(40):
            data = bytearray(out.getvalue())
            for at in rng.integers(0, len(data), 4):
                data[at] = int(rng.integers(256))
            path = tmp_path / f"{i}.{kind}"
            path.write_bytes(data)
            with contextlib.suppress(DataError):
                read_image(path, (16, 16))


@pytest.mark.parametrize("reduce", [2, 4, 8])
@pytest.mark.parametrize(("suffix", "orientation"), [("jpg", 1), ("jpg", 6), ("png", 1)])
def test_reduced_decoding_averages_blocks_of_the_file(
    tmp_path: Path, reduce: int, suffix: str, orientation: int
) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "jpg":
        path.write_bytes(jpeg(photograph(), orientation))
    else:
        Image.fromarray(photograph()).save(path)
    full = read_image(path).astype(float)
    h, w = full.shape[0] // reduce, full.shape[1] // reduce
    blocks = full.reshape(h, reduce, w, reduce, 3).mean(axis=(1, 3))
    assert np.abs(read_image(path, reduce=reduce) - blocks).max() <= 4
    Image.fromarray(photograph(49, 63)).save(path)
    with pytest.raises(ValueError, match="does not divide"):
        read_image(path, reduce=reduce)


def test_sample_maps_file_pixels_to_network_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(photograph()).save(path)
    config = TransformConfig(mode="longest", size=96)
    sample = DetectionDataset(make_records([path], [(HEIGHT, WIDTH)], [2]), config.build(train=False), seed=0)[0]
    assert sample.image.shape == (3, 72, 96)
    assert sample.image.permute(1, 2, 0).is_contiguous()
    assert sample.frame.scale == (1.5, 1.5)
    assert sample.frame.padding == (0.0, 0.0)
    assert sample.frame.image_id == 1
    assert torch.equal(sample.target.boxes, torch.tensor([[6.0, 9.0, 36.0, 45.0]] * 2))
    assert sample.target.labels.tolist() == [0, 1]


def test_image_without_objects_gives_empty_typed_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(photograph()).save(path)
    config = TransformConfig(size=32, crop=1.0, horizontal_flip=1.0)
    for train in (False, True):
        target = DetectionDataset(make_records([path], [(HEIGHT, WIDTH)], [0]), config.build(train), seed=0)[0].target
        assert target.boxes.shape == (0, 4)
        assert target.boxes.dtype == torch.float32
        assert target.labels.dtype == torch.int64
        assert target.crowd.dtype == torch.bool


def test_samples_depend_on_seed_epoch_and_index_alone() -> None:
    seeds = {sample_seed(s, e, i) for s in range(3) for e in range(3) for i in range(50)}
    assert len(seeds) == 450
    assert sample_seed(1, 2, 3) == sample_seed(1, 2, 3)


def test_bad_images_stop_or_are_left_out_by_option(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.fromarray(photograph()).save(good)
    bad.write_bytes(b"nothing")
    records = make_records([bad, good, bad], [(HEIGHT, WIDTH)] * 3, [1, 1, 1])
    transform = TransformConfig(size=32).build(train=True)
    with pytest.raises(DataError, match=r"bad.png: not an image"):
        DetectionDataset(records, transform, 0).read([(0, 0), (0, 1)])
    lenient = DetectionDataset(records, transform, 0, ImageConfig(on_bad_image="skip"))
    samples, problems = lenient.read([(0, 0), (0, 1), (0, 2)])
    assert [s.frame.image_id for s in samples] == [2]
    assert len(problems) == 2
    assert "bad.png" in problems[0]
    with pytest.raises(DataError, match=r"no image of a batch of 2 can be read; the first: .*bad.png"):
        lenient.read([(0, 0), (0, 2)])
