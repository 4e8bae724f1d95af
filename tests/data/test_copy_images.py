"""The decoded copy of an image folder: the same batches as without, made once, and never used when it is not whole."""

import errno
import os
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from training_tools import tiny_config, use_tiny_network

from fp8repro.cache import cache_root
from fp8repro.data import copy_images, image_copy
from fp8repro.data.image_batches import TrainImages, load_batches
from fp8repro.data.image_copy import Damaged, Shard, write_shard
from fp8repro.data.images import load_images
from fp8repro.errors import UserError
from fp8repro.settings.schema import DataConfig
from fp8repro.training.checkpoint import FREE_SETTINGS, list_checkpoints, read_checkpoint
from fp8repro.training.loop import train

GENERATOR = np.random.default_rng(2)
SIZES = [(20, 20), (41, 33), (24, 90), (70, 60), (20, 20), (7, 5), (64, 64)]


@pytest.fixture(autouse=True)
def small_shards(tmp_path, monkeypatch):
    # The engine's compiled products, which a run needs, are not made again.
    compiled = cache_root() / "native"
    compiled.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("FP8REPRO_CACHE", str(tmp_path / "cache"))
    cache_root().mkdir()
    (cache_root() / "native").symlink_to(compiled)
    monkeypatch.setattr(copy_images, "LEAST_IMAGES", 3)


@pytest.fixture
def root(tmp_path):
    """Two classes of 7 images in train/ and val/: 28 images, 10 shards. One image of 16 bits."""
    folder = tmp_path / "photos"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for number, size in enumerate(SIZES):
                save(folder / split / name / f"{number}.png", size)
    Image.fromarray(GENERATOR.integers(0, 65536, (30, 31)).astype(np.uint16)).save(folder / "train" / "b" / "3.png")
    return folder


def save(path, size):
    Image.fromarray(GENERATOR.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def load(root, size=20, cache=True, workers=0, **options):
    return load_images("image_folder", str(root), size, options, seed=4, cache=cache, workers=workers)


def shards():
    return sorted(cache_root().glob("images/*/*.pixels"))


def written():
    """What tells each shard from one that was written again."""
    return {(path.name, path.stat().st_mtime_ns) for path in shards()}


def batches(data, workers=0):
    """Every image of every split in two epochs."""
    found = []
    for dataset in (data.train, data.val, data.train_plain):
        keys = [[(epoch, i) for i in range(start, start + 7)] for epoch in (0, 1) for start in (0, 7)]
        found += [(data.normalized(b.images), b.labels) for b in load_batches(dataset, keys, workers)]
    return found


def assert_same(first, second):
    for (images, labels), (others, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("augmentation", ["imagenet", "small", "none"])
@pytest.mark.parametrize("shorter_side", [None, 32])
def test_batches_are_those_without_a_copy(root, augmentation, shorter_side):
    options = {"augmentation": augmentation, "shorter_side": shorter_side}
    plain = batches(load(root, cache=False, **options))
    assert_same(batches(load(root, **options)), plain)
    made = written()
    assert len(made) == 10
    assert_same(batches(load(root, workers=2, **options), workers=2), plain)
    assert written() == made


def test_a_copy_made_by_several_processes_is_the_same(root):
    load(root)
    alone = {path.name: path.read_bytes() for path in shards()}
    for path in shards():
        path.unlink()
    load(root, workers=2)
    assert {path.name: path.read_bytes() for path in shards()} == alone


def test_a_resume_in_the_middle_of_an_epoch_gives_the_same_batches(root):
    def rest(cache, consumed):
        data = load(root, cache=cache)
        stream = TrainImages(data.train, 4, seed=4)
        stream.load_state_dict({"epoch": 1, "position": consumed})
        return [(data.normalized(batch.images), batch.labels) for batch in stream]

    whole = rest(False, 0)
    assert len(whole) == 4
    assert_same(rest(True, 1), whole[1:])
    # So a run may go on with a copy, or without it.
    assert "data.cache" in FREE_SETTINGS
    assert not any(name.startswith("data.options") for name in FREE_SETTINGS)


def test_a_run_may_begin_without_a_copy_and_go_on_with_one(root, tmp_path, monkeypatch):
    use_tiny_network(monkeypatch)

    def weights(name, cache, **changes):
        data = DataConfig("image_folder", str(root), 20, cache=cache)
        config = tiny_config(tmp_path / name, data=data, batch_size=4, epochs=1, **changes)
        train(replace(config, resume="auto"))
        return read_checkpoint(list_checkpoints(tmp_path / name / "checkpoints")[-1])["model"]

    whole = weights("whole", False)
    weights("parts", False, max_steps=2)
    resumed = weights("parts", True)
    assert len(shards()) == 10
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_another_split_of_a_folder_has_the_same_copy(root):
    for share in (0.3, 0.5):
        options = {"val_fraction": share}
        copied, plain = load(root / "train", **options), load(root / "train", cache=False, **options)
        assert torch.equal(copied.val[0, 1][0], plain.val[0, 1][0])
        assert len(shards()) == 5
    assert len({path.parent for path in shards()}) == 1


def test_shorter_side_shrinks_larger_images_alone(root):
    plain, shrunk = load(root, 28, cache=False), load(root, 28, cache=False, shorter_side=32)
    for index in range(14):
        unchanged = torch.equal(plain.val[0, index][0], shrunk.val[0, index][0])
        assert unchanged == (min(SIZES[index % 7]) <= 32)
    # Where evaluation resizes to that length anyway, it sees the same.
    plain, shrunk = load(root, 112, cache=False), load(root, 112, cache=False, shorter_side=128)
    save(root / "val" / "a" / "0.png", (300, 200))
    assert torch.equal(plain.val[0, 0][0], shrunk.val[0, 0][0])
    source = load(root, 112, shorter_side=128).val.source.image(0)
    assert source.shape == (192, 128, 3)
    with pytest.raises(
        UserError, match=r"^data\.options\.shorter_side: got 100, expected at least data\.image_size \(112\)$"
    ):
        load(root, 112, shorter_side=100)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_copy_goes_on_where_it_was(root, monkeypatch, workers, capsys):
    bad = root / "val" / "a" / "6.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"^data\.root: image '.*val/a/6\.png' cannot be read"):
        load(root, workers=workers)
    made = written()
    assert 0 < len(made) < 10
    (folder,) = cache_root().glob("images/*")
    # What a killed process leaves.
    (folder / f"{'0' * 24}.pixels.1.tmp").write_bytes(b"x")
    bad.write_bytes(whole)
    capsys.readouterr()
    load(root, workers=workers)
    assert made < written()
    assert len(written()) == 10
    assert not list(folder.glob("*.tmp"))
    assert f"(28 images, {10 - len(made)} of 10 shards, about " in capsys.readouterr().out


def test_ctrl_c_leaves_whole_shards(root, monkeypatch):
    write = copy_images.write_shard

    def interrupted(path, images):
        if len(shards()) == 4:
            raise KeyboardInterrupt
        write(path, images)

    monkeypatch.setattr(copy_images, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(root)
    assert len([len(Shard(path)) for path in shards()]) == 4


def test_what_changed_since_is_said_and_made_again(root, capsys):
    load(root)
    made = written()
    save(root / "train" / "a" / "2.png", (24, 24))
    capsys.readouterr()
    assert_same(batches(load(root)), batches(load(root, cache=False)))
    said = capsys.readouterr().out
    assert "data.cache: since the copy was made, 1 changed ('train/a/2.png'); making it again (28 images, 1 of" in said
    assert len(made & written()) == 9
    os.unlink(root / "val" / "b" / "1.png")
    save(root / "val" / "b" / "9.png", (24, 24))
    load(root)
    said = capsys.readouterr().out
    assert "since the copy was made, 1 missing ('val/b/1.png'), 1 new ('val/b/9.png'); making it again" in said
    # Shards of images that are no longer there are removed.
    assert len(shards()) == 10
    load(root)
    assert capsys.readouterr().out == ""


def test_another_decoder_makes_another_copy(root, monkeypatch, capsys):
    load(root)
    made = written()
    monkeypatch.setattr("PIL.__version__", "0.0")
    load(root)
    assert "since the copy was made, other versions of the decoders; making it again" in capsys.readouterr().out
    assert not made & written()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], "it is cut off, or of another version"),
        (lambda data: data[:7], "it is cut off"),
        (lambda data: b"", "it is cut off"),
        (lambda data: data[:-30] + bytes([data[-30] ^ 1]) + data[-29:], "its index has another checksum"),
    ],
)
def test_a_damaged_shard_is_made_again(root, capsys, damage, reason):
    plain = batches(load(root))
    path = shards()[3]
    path.write_bytes(damage(path.read_bytes()))
    capsys.readouterr()
    assert_same(batches(load(root)), plain)
    assert capsys.readouterr().out.count(f"data.cache: {str(path)!r} cannot be used ({reason}") == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_pixels_are_not_used(root, workers):
    load(root)
    path = shards()[0]
    content = bytearray(path.read_bytes())
    content[5] ^= 0x10
    path.write_bytes(content)
    line = (
        r"^data\.cache: '.*\.pixels' is damaged \(its pixels have another checksum than was written\), expected the "
        "file that was written; when it is removed, the next run makes it again$"
    )
    with pytest.raises(UserError, match=line):
        batches(load(root), workers)
    path.unlink()
    assert_same(batches(load(root)), batches(load(root, cache=False)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_is_one_line(root, monkeypatch, workers):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(image_copy.os, "fsync", full)
    with pytest.raises(
        UserError, match=r"^FP8REPRO_CACHE: '.*photos-\w+' cannot be written \(No space left on device\)$"
    ):
        load(root, workers=workers)
    (folder,) = cache_root().glob("images/*")
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_too_little_room_is_said_before_anything_is_made(root, monkeypatch):
    monkeypatch.setattr(copy_images.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"^FP8REPRO_CACHE: '.*' has 1\.0 kB free, expected about \d+\.\d kB for data"):
        load(root)
    assert not shards()


def test_a_whole_copy_needs_no_writing(root, monkeypatch, tmp_path):
    load(root)
    monkeypatch.setattr(copy_images, "writable_cache", None)
    batches(load(root))
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FP8REPRO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"^FP8REPRO_CACHE: '.*' cannot be written"):
        load(root)


def test_two_at_a_time_make_one_copy(root, monkeypatch, capsys):
    calls, write = [], copy_images.write_shard
    first = threading.Event()

    def slow(path, images):
        calls.append(path)
        first.set()
        write(path, images)

    monkeypatch.setattr(copy_images, "write_shard", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(load(root))) for _ in range(2)]
    threads[0].start()
    first.wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(calls) == len(set(calls)) == 10


def test_shards_hold_every_kind_of_pixels(tmp_path):
    images = [
        GENERATOR.integers(0, 256, (3, 5, 3), dtype=np.uint8),
        GENERATOR.random((4, 2), dtype=np.float32),
        GENERATOR.integers(0, 256, (1, 1, 3), dtype=np.uint8),
    ]
    path = tmp_path / "a.pixels"
    write_shard(path, images)
    shard = Shard(path)
    for position, image in enumerate(images):
        assert shard.image(position).dtype == image.dtype
        assert np.array_equal(shard.image(position), image)
    with pytest.raises(ValueError, match="read-only"):
        shard.image(0)[0, 0, 0] = 1
    # Every bit counts.
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(Damaged):
            [Shard(path).image(position) for position in range(3)]
