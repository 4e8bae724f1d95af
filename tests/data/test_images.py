"""Image data: splits, folders and their faults, augmentation that knows no worker, exact sampling."""

import os
import re
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from fp8repro.data.folders import stratified_split
from fp8repro.data.image_batches import ImageBatch, TrainImages, load_batches
from fp8repro.data.images import load_images, shifted
from fp8repro.errors import RunFailure, UserError
from fp8repro.models.resnet import make_resnet


class Numbers(Dataset):
    """Sample i is the number i, so that a batch says who is in it."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        return torch.tensor([float(key[0])]), key[1]


def write_folder(root, splits=("train", "val"), classes=("cat", "dog"), count=6, size=(20, 16)):
    generator = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


def labels(batches):
    return [batch.labels.tolist() for batch in batches]


def test_fewer_digits_to_train_are_more_to_validate_and_the_same_images():
    usual, harder = load_images("digits", seed=0), load_images("digits", options={"val_fraction": 0.8}, seed=0)
    assert (len(harder.train), len(harder.val)) == (359, 1438)
    counts = np.bincount([harder.train[0, i][1] for i in range(len(harder.train))])
    assert counts.max() - counts.min() <= 4
    train = torch.stack([harder.train[0, i][0] for i in range(len(harder.train))])
    # Normalized by what is left to train.
    assert abs(train.mean()) < 1e-5
    assert abs(train.std() - 1) < 1e-5
    assert sorted(usual.val_labels + [usual.train[0, i][1] for i in range(1438)]) == sorted(
        harder.val_labels + [harder.train[0, i][1] for i in range(359)]
    )
    with pytest.raises(UserError, match=r"data.options.val_fraction: got 0.99, expected from 0.1 to 0.95"):
        load_images("digits", options={"val_fraction": 0.99}, seed=0)


def test_digits_split_is_fixed_stratified_and_normalized():
    data = load_images("digits", seed=3)
    train = torch.stack([data.train[0, i][0] for i in range(len(data.train))])
    assert (len(data.train), len(data.val)) == (1438, 359)
    assert train.shape == (1438, 1, 8, 8)
    assert abs(train.mean()) < 1e-5
    assert abs(train.std() - 1) < 1e-5
    for dataset, total in ((data.train, 1438), (data.val, 359)):
        counts = np.bincount([dataset[0, i][1] for i in range(len(dataset))])
        assert len(counts) == 10
        assert counts.max() - counts.min() <= 0.1 * total / 10
    # No image is in both, and none is lost.
    pixels = {data.val[0, i][0].numpy().tobytes() for i in range(359)} & {image.numpy().tobytes() for image in train}
    assert not pixels
    again = load_images("digits", seed=4)
    assert torch.equal(again.val[0, 7][0], data.val[0, 7][0])


def test_shift_moves_by_whole_pixels():
    image = torch.arange(12.0).view(1, 3, 4)
    assert torch.equal(shifted(image, 0, 0), image)
    assert shifted(image, 1, -1)[0].tolist() == [[0, 0, 0, 0], [1, 2, 3, 0], [5, 6, 7, 0]]
    for down in (-2, -1, 0, 1, 2):
        for right in (-2, -1, 0, 1, 2):
            expected = torch.zeros(1, 3, 4)
            for y in range(3):
                for x in range(4):
                    if 0 <= y - down < 3 and 0 <= x - right < 4:
                        expected[0, y, x] = image[0, y - down, x - right]
            assert torch.equal(shifted(image, down, right), expected)


def test_digit_augmentation_is_keyed_by_seed_epoch_and_sample():
    data, same, other = (load_images("digits", options={"shift": 1}, seed=seed) for seed in (1, 1, 2))
    first = [data.train[0, i][0] for i in range(200)]
    assert all(torch.equal(a, same.train[0, i][0]) for i, a in enumerate(first))
    changed = [not torch.equal(a, data.train[1, i][0]) for i, a in enumerate(first)]
    assert 0.75 < np.mean(changed) < 1  # 8 of 9 shifts differ
    assert any(not torch.equal(a, other.train[0, i][0]) for i, a in enumerate(first))
    plain = [data.train_plain[e, 5][0] for e in (0, 1)]
    assert torch.equal(*plain)


@pytest.mark.parametrize(("size", "augmentation"), [(32, "auto"), (224, "auto"), (24, "none")])
def test_folder_samples_do_not_depend_on_workers(tmp_path, size, augmentation):
    write_folder(tmp_path)
    data = load_images("image_folder", str(tmp_path), size, options={"augmentation": augmentation}, seed=5)
    keys = [[(3, 0), (3, 4)], [(3, 7), (3, 1)], [(4, 0)]]
    state = torch.random.get_rng_state()
    alone = list(load_batches(data.train, keys))
    assert torch.equal(state, torch.random.get_rng_state())
    assert alone[0].images.shape == (2, 3, size, size)
    workers = list(load_batches(data.train, keys, workers=2))
    for a, b in zip(alone, workers, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    differs = not torch.equal(alone[0].images[0], alone[2].images[0])
    assert differs == (augmentation != "none")


def test_imagenet_transforms_are_torchvisions_reference(tmp_path):
    from torchvision.transforms._presets import ImageClassification

    write_folder(tmp_path, size=(300, 260), count=2)
    data = load_images("imagenet", str(tmp_path), seed=0)
    reference = ImageClassification(crop_size=224, antialias=True)
    path = data.val.files.paths[0]
    assert torch.allclose(data.val[0, 0][0], reference(Image.open(path)), atol=1e-5)
    kinds = [type(step).__name__ for step in data.train.geometry.steps.transforms]
    assert kinds == ["RandomResizedCrop", "RandomHorizontalFlip"]


def test_one_folder_is_split(tmp_path):
    write_folder(tmp_path, splits=(".",), count=10)
    data = load_images("image_folder", str(tmp_path), 16, options={"val_fraction": 0.3}, seed=0)
    assert (len(data.train), len(data.val)) == (14, 6)
    assert not set(data.train.files.paths) & set(data.val.files.paths)
    assert sorted(data.val.files.labels) == [0] * 3 + [1] * 3


def test_files_that_are_left_out_are_counted(tmp_path, capsys):
    write_folder(tmp_path, splits=(".",), count=10)
    names = ("a.gif", "b.heic", "c.JFIF", "._d.png", ".e")
    for name in names:
        (tmp_path / "dog" / name).write_bytes(b"")
    data = load_images("image_folder", str(tmp_path), 16, options={"val_fraction": 0.3}, seed=0)
    # Half a copy of macOS is an image by its name, and named when it is read; torchvision takes it, too.
    assert len(data.train) + len(data.val) == 21
    assert re.fullmatch(
        r"data\.root: left out 3 files of other names than \.jpg, .* \('.*/dog/a\.gif'\)\n", capsys.readouterr().err
    )


def test_any_file_name_will_do(tmp_path):
    root = tmp_path / "a folder" / "größe"
    write_folder(root)
    (root / "train" / "cat").rename(tmp_path / "elsewhere")
    (root / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    odd = os.fsencode(root / "val" / "dog") + b"/\xff\n.PNG"
    os.rename(root / "val" / "dog" / "0.png", odd)
    (root / "train" / "dog" / "notes.txt").write_text("no image")
    data = load_images("image_folder", str(root), 16, seed=0)
    assert (len(data.train), len(data.val)) == (12, 12)
    with open(odd, "wb"):
        pass
    with pytest.raises(UserError) as caught:
        list(load_batches(data.val, [[(0, i)] for i in range(12)]))
    assert "dog/" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_to_folders_are_followed_as_torchvision_does(tmp_path):
    root, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    write_folder(root, classes=("cat", "Cat", "dog"))
    (elsewhere / "deeper").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(elsewhere / "deeper" / f"more{number}.PNG")
    for split in ("train", "val"):
        (root / split / "dog" / "more").symlink_to(elsewhere)
        (root / split / "cat" / "dogs too").symlink_to(root / split / "dog")
    data = load_images("image_folder", str(root), 16, seed=0)
    oracle = ImageFolder(str(root / "train"))
    assert data.classes == oracle.classes == ["Cat", "cat", "dog"]
    assert sorted(zip(data.train.files.paths, data.train.files.labels, strict=True)) == sorted(oracle.samples)
    assert len(oracle.samples) == 6 + (6 + 6 + 3) + (6 + 3)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path)
    own = os.scandir

    def scandir(path):
        if os.path.basename(path) == "dog":
            raise PermissionError(13, "Permission denied", path)
        return own(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"^data\.root: folder '.*train/dog' cannot be read \(Permission denied\)$"):
        load_images("image_folder", str(tmp_path), 16, seed=0)


def test_a_folder_that_is_reached_twice_counts_once(tmp_path):
    write_folder(tmp_path, splits=(".",), count=10)
    within = tmp_path / "cat" / "within"
    within.mkdir()
    Image.new("RGB", (8, 8)).save(within / "10.png")
    (within / "parent").symlink_to(tmp_path / "cat")
    (within / "itself").symlink_to(within / "itself")
    (tmp_path / "cat" / "also within").symlink_to(within)
    (tmp_path / "no class").symlink_to(tmp_path / "no class")
    (tmp_path / "dog" / "twin").symlink_to(tmp_path / "dog")
    data = load_images("image_folder", str(tmp_path), 16, options={"val_fraction": 0.5}, seed=0)
    files = [os.path.realpath(path) for split in (data.train, data.val) for path in split.files.paths]
    assert len(files) == len(set(files)) == 11 + 10


@given(
    st.lists(st.integers(2, 30), min_size=1, max_size=5),
    st.floats(0.2, 0.8),
)
def test_stratified_split_keeps_every_share(sizes, fraction):
    classes = [label for label, size in enumerate(sizes) for _ in range(size)]
    if any(not 0 < round(size * fraction) < size for size in sizes):
        with pytest.raises(UserError, match=r"val_fraction"):
            stratified_split(classes, fraction, "x")
        return
    train, val = stratified_split(classes, fraction, "x")
    assert sorted(train + val) == list(range(len(classes)))
    for label, size in enumerate(sizes):
        assert sum(classes[i] == label for i in val) == round(size * fraction)


def test_faults_of_folders_are_named(tmp_path):
    def load(root=tmp_path, **options):
        return load_images("image_folder", str(root), 16, options=options, seed=0)

    with pytest.raises(UserError, match=r"data\.root: .*nowhere.* is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data\.root: missing"):
        load_images("imagenet", seed=0)
    with pytest.raises(UserError, match=r"no train/ folder"):
        load()
    write_folder(tmp_path)
    (tmp_path / "val" / "bird").mkdir()
    with pytest.raises(UserError, match=r"class folder .*bird.* holds no images"):
        load()
    Image.new("RGB", (4, 4)).save(tmp_path / "val" / "bird" / "0.png")
    with pytest.raises(UserError, match=r"train/ has 2 classes and val/ 3.*'bird'"):
        load()
    with pytest.raises(UserError, match=r"augmentation: got 'strong'"):
        load(augmentation="strong")
    with pytest.raises(UserError, match=r"data\.options\.colour: unknown"):
        load(colour=1)
    with pytest.raises(UserError, match=r"val_fraction: got 1.5"):
        load(val_fraction=1.5)
    with pytest.raises(UserError, match=r"data\.options\.mean\[1\]: got nan, expected a finite number"):
        load(mean=[0.0, float("nan"), 0.0])
    with pytest.raises(UserError, match=r"data\.name: got 'mnist'"):
        load_images("mnist", seed=0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"no image", "truncated"])
def test_corrupt_image_is_named(tmp_path, workers, content):
    write_folder(tmp_path)
    bad = tmp_path / "train" / "dog" / "3.png"
    bad.write_bytes(bad.read_bytes()[:300] if content == "truncated" else content)
    data = load_images("image_folder", str(tmp_path), 16, seed=0)
    keys = [[(0, i), (0, i + 1)] for i in range(0, 12, 2)]
    with pytest.raises(UserError, match=r"^data\.root: image '.*train/dog/3\.png' cannot be read \(.*\)$") as caught:
        list(load_batches(data.train, keys, workers))
    assert "\n" not in str(caught.value)


class Dying(Numbers):
    def __getitem__(self, key):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)


def test_dead_worker_is_one_line():
    with pytest.raises(RunFailure, match=r"data\.workers: a worker process died"):
        list(load_batches(Dying(4), [[(0, 0)]], workers=1))


layouts = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 40), st.integers(12, 150))


@given(layouts, st.integers(0, 2**63 - 1), st.integers(0, 3))
def test_every_example_once_an_epoch(layout, seed, epoch):
    micro_steps, world, batch_size, size = layout
    parts = micro_steps * world
    steps = -(-size // batch_size)
    if size // steps < 2 * parts:
        with pytest.raises(UserError, match=r"trainer\.batch_size"):
            TrainImages(Numbers(size), batch_size, seed, micro_steps, 0, world)
        return
    ranks = [TrainImages(Numbers(size), batch_size, seed, micro_steps, rank, world) for rank in range(world)]
    batches = [rank.epoch_indices(epoch) for rank in ranks]
    assert {len(mine) for mine in batches} == {len(ranks[0])} == {steps * micro_steps}
    assert sorted(np.concatenate([np.concatenate(mine) for mine in batches])) == list(range(size))
    sizes = [len(batch) for mine in batches for batch in mine]
    assert max(sizes) - min(sizes) <= 2
    # The same examples in each update, however many processes share it.
    alone = TrainImages(Numbers(size), batch_size, seed).epoch_indices(epoch)
    for step, whole in enumerate(alone):
        shared = [mine[step * micro_steps : (step + 1) * micro_steps] for mine in batches]
        assert sorted(np.concatenate([b for group in shared for b in group])) == sorted(whole)
        assert len(whole) <= batch_size


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 20), st.sampled_from([0, 0, 0, 2]), st.integers(1, 2))
def test_resume_neither_skips_nor_repeats(consumed, workers, micro_steps):
    def make(count):
        return TrainImages(Numbers(37), 8, seed=1, micro_steps=micro_steps, workers=count)

    def endless(batches):
        while True:
            yield from batches

    whole = labels(islice(endless(make(0)), consumed + 6))
    first = make(workers)
    stream = endless(first)
    got = labels(islice(stream, consumed))
    state = first.state_dict()
    stream.close()
    second = make(workers)
    second.load_state_dict(state)
    got += labels(islice(endless(second), 6))
    assert got == whole


def test_epochs_and_seeds_differ():
    orders = [
        np.concatenate(TrainImages(Numbers(50), 10, seed).epoch_indices(epoch)).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert all(a != b for a, b in pairwise([*orders, orders[0]]))


def test_batches_hold_images_and_labels():
    batch = next(iter(TrainImages(Numbers(8), 4, seed=0)))
    assert isinstance(batch, ImageBatch)
    assert batch.images.shape == (4, 1)
    assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_resnets_are_torchvisions(name):
    from torchvision.models import get_model

    own = make_resnet(name, classes=1000)
    assert {k: v.shape for k, v in own.state_dict().items()} == {
        k: v.shape for k, v in get_model(name, weights=None).state_dict().items()
    }


def test_small_stem_keeps_the_resolution():
    small = make_resnet("resnet18", classes=7, channels=1, image_size=8).eval()
    features = small.maxpool(small.conv1(torch.zeros(2, 1, 8, 8)))
    assert features.shape == (2, 64, 8, 8)
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    large = make_resnet("resnet18", classes=7, channels=1, image_size=8, stem="imagenet").eval()
    assert large.maxpool(large.conv1(torch.zeros(2, 1, 8, 8))).shape == (2, 64, 2, 2)
    for size, stem in ((64, "small"), (65, "imagenet")):
        auto = make_resnet("resnet18", classes=7, image_size=size)
        assert auto.conv1.stride == ((1, 1) if stem == "small" else (2, 2))
    with pytest.raises(UserError, match=r"model.name: got 'resnet19'"):
        make_resnet("resnet19", 10)
    with pytest.raises(UserError, match=r"model.stem: got 'tiny'"):
        make_resnet("resnet18", 10, stem="tiny")
