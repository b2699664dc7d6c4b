"""Images a second of the loader against cv2 decoding + the same albumentations pipeline, normalised to float tensors.

Both resize the longest side, flip, jitter the colours and pad; the toolkit hands over uint8 and leaves the
normalisation to the device, decodes large files at a fraction of their size, and does the colours by one matrix.
Run: python -m tools.bench.loader --out tools/bench/results/loader.jsonl
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy import ndarray
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detection.data.dataset import DetectionDataset
from detection.data.loader import LoaderConfig, build_loader
from detection.data.sampler import BatchOrder
from detection.data.transforms import TransformConfig
from detection.types import Records
from tools.bench.harness import arguments, compare, report

# isort: split
import albumentations  # after the toolkit's own import, which keeps it from asking a server for updates

PEER = "cv2+albumentations"
OURS = "detection"
SIZE = 640
BATCH = 8
JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# (height, width) of the files and how many of them an epoch has
FILES = (((480, 640), 96), ((960, 1280), 64), ((3000, 4000), 16))


class PeerDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """What a project without the toolkit would write."""

    def __init__(self, records: Records, augment: bool) -> None:
        self.records = records
        steps = [
            albumentations.LongestMaxSize(SIZE),
            albumentations.HorizontalFlip(p=0.5 if augment else 0.0),
            albumentations.ColorJitter(**JITTER, p=1.0 if augment else 0.0),
            albumentations.PadIfNeeded(
                None, None, pad_height_divisor=32, pad_width_divisor=32, position="top_left", border_mode=0
            ),
            albumentations.Normalize(MEAN, DEVIATION),
            albumentations.ToTensorV2(),
        ]
        boxes = albumentations.BboxParams("pascal_voc", label_fields=["labels"], min_area=1)
        self.pipeline = albumentations.Compose(steps, bbox_params=boxes)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        record = self.records[index]
        pixels = cv2.imread(record.path)
        assert pixels is not None
        image = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        done = self.pipeline(image=image, bboxes=record.boxes, labels=record.labels)
        return done["image"], torch.as_tensor(done["bboxes"]).float(), torch.as_tensor(done["labels"]).long()


def peer_collate(samples: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return torch.stack([s[0] for s in samples]), [s[1] for s in samples], [s[2] for s in samples]


def peer_worker(_: int) -> None:
    cv2.setNumThreads(0)


def write_files(folder: Path, size: tuple[int, int], count: int) -> Records:
    """JPEG files made of the two bundled photographs, resized, with fresh sensor noise, and 10 boxes each."""
    rng = np.random.default_rng(0)
    height, width = size
    paths = []
    for i in range(count):
        photograph = cv2.resize(load_photographs()[i % 2], (width, height), interpolation=cv2.INTER_CUBIC)
        noise = rng.normal(0, 4, (height, width, 1))
        path = folder / f"{height}_{i}.jpg"
        cv2.imwrite(str(path), (photograph + noise).clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
        paths.append(str(path).encode())
    corners = rng.uniform(0, 0.6, (count * 10, 2))
    fractions = np.concatenate([corners, corners + rng.uniform(0.05, 0.4, (count * 10, 2))], axis=1)
    return Records(
        class_names=("thing",),
        category_ids=(1,),
        paths=np.array(paths),
        image_ids=np.arange(count),
        sizes=np.tile([[height, width]], (count, 1)),
        offsets=np.arange(count + 1) * 10,
        boxes=fractions * [width, height, width, height],
        labels=np.zeros(count * 10, np.int64),
        crowd=np.zeros(count * 10, np.bool_),
        area=np.ones(count * 10),
    )


def load_photographs() -> list[ndarray]:
    return [image[:, :, ::-1].astype(np.float64) for image in load_sample_images().images]


def make_ours(records: Records, workers: int) -> Callable[[], int]:
    """A function that reads one epoch and returns the number of images in it."""
    config = TransformConfig(mode="longest", size=SIZE, **JITTER)
    order = BatchOrder(records.sizes, BATCH, seed=0)
    dataset = DetectionDataset(records, config.build(train=True), seed=0)
    loader = build_loader(dataset, order, LoaderConfig(workers=workers))
    return lambda: sum(len(batch.images) for batch in loader)


def make_peer(records: Records, workers: int) -> Callable[[], int]:
    loader = DataLoader(
        PeerDataset(records, augment=True),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=peer_collate,
        worker_init_fn=peer_worker,
    )
    return lambda: sum(len(images) for images, _, _ in loader)


def check_same_picture(records: Records) -> None:
    """Raises where the two do not make the same tensor and boxes of an image, augmentation off."""
    dataset = DetectionDataset(records, TransformConfig(mode="longest", size=SIZE).build(train=False), seed=0)
    peer = PeerDataset(records, augment=False)
    for index in range(2):
        sample = dataset[index]
        pixels = (sample.image / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
        image, boxes, _ = peer[index]
        assert pixels.shape == image.shape, (pixels.shape, image.shape)
        assert (pixels - image).abs().mean() < 0.15, (pixels - image).abs().mean()
        assert torch.allclose(sample.target.boxes, boxes, atol=1e-2)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of worker processes")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size, count in FILES:
            records = write_files(Path(folder), size, count)
            check_same_picture(records)
            for workers in options.workers:
                candidates = {OURS: make_ours(records, workers), PEER: make_peer(records, workers)}
                for row in compare(candidates, PEER, repeats=options.repeats):
                    place = {"file": f"{size[1]}x{size[0]}", "workers": workers, "network_size": SIZE, "batch": BATCH}
                    rows.append(row | place | {"images_per_s": count / row["median_s"]})
    report("loader", rows, options.out)


if __name__ == "__main__":
    main()
