"""The data sets: what is read, in which order it is searched, and what happens to broken files."""

import gzip
import hashlib
import io
import os
import shutil
import sys
import types
import urllib.error
from dataclasses import replace

import numpy as np
import pytest
import torch

from sfr_ext.train import fashion_mnist
from sfr_ext.train.augment import crop_and_flip
from sfr_ext.train.classes import differing
from sfr_ext.train.config import TrainConfig
from sfr_ext.train.data import load_data
from sfr_ext.train.errors import TrainError
from sfr_ext.train.files import atomic_write
from sfr_ext.train.folder import Names, centre_box, find_files, random_box
from sfr_ext.train.images import read_image

IMAGES = "train-images-idx3-ubyte.gz"


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A tiny Fashion-MNIST: its files by name, as the checksums want them; no other folder has any."""
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte.gz": rng.integers(0, 256, (6, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte.gz": np.array([0, 1, 2, 3, 9, 9], dtype=np.uint8),
        "t10k-images-idx3-ubyte.gz": rng.integers(0, 256, (2, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte.gz": np.array([4, 9], dtype=np.uint8),
    }
    files = {name: idx(array) for name, array in arrays.items()}
    monkeypatch.setattr(
        fashion_mnist, "SHA256", {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    )
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIR", tmp_path / "system")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", offline)
    return types.SimpleNamespace(arrays=arrays, files=files)


def offline(url, timeout=None):
    raise urllib.error.URLError("no network")


def serve(files):
    return lambda url, timeout=None: io.BytesIO(files[url.rsplit("/", 1)[1]])


def fill(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# Fashion-MNIST


def test_arrays_and_labels(fake, tmp_path):
    folder = fill(tmp_path / "mine", fake.files)
    data = load_data(TrainConfig(data="fashion-mnist", data_dir=folder))
    assert data.source == str(folder)
    assert data.train_images.shape == (6, 1, 28, 28) and data.train_images.dtype == torch.uint8
    assert np.array_equal(data.test_images[:, 0].numpy(), fake.arrays["t10k-images-idx3-ubyte.gz"])
    assert data.train_labels.tolist() == [0, 1, 2, 3, 9, 9] and data.num_classes == 10
    pixels = fake.arrays[IMAGES] / 255
    assert data.mean == pytest.approx([pixels.mean()]) and data.std == pytest.approx([pixels.std()])


def test_search_order(fake, tmp_path, monkeypatch):
    config = TrainConfig(data="fashion-mnist", data_dir=tmp_path / "mine")
    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", serve(fake.files))
    assert load_data(config).source == str(tmp_path / "mine")  # downloaded
    assert names(tmp_path) == sorted(fake.files)

    for path in (tmp_path / "mine").iterdir():
        path.unlink()
    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", offline)
    fill(tmp_path / "system", fake.files)
    assert load_data(config).source == str(tmp_path / "system")
    fill(tmp_path / "mine", fake.files)
    assert load_data(config).source == str(tmp_path / "mine")
    assert load_data(TrainConfig(data="fashion-mnist")).source == str(tmp_path / "system")


def test_download_goes_to_the_cache_and_is_used_again(fake, tmp_path, monkeypatch):
    config = TrainConfig(data="fashion-mnist")
    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", serve(fake.files))
    cache = tmp_path / "cache" / "sfr_ext" / "fashion-mnist"
    assert load_data(config).source == str(cache)
    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", offline)
    assert load_data(config).source == str(cache)


def test_missing_file_is_one_sentence(fake, tmp_path):
    folder = fill(tmp_path / "mine", fake.files)
    (folder / IMAGES).unlink()
    with pytest.raises(TrainError) as caught:
        load_data(TrainConfig(data="fashion-mnist", data_dir=folder))
    message = str(caught.value)
    assert "\n" not in message
    for part in (IMAGES, str(folder), str(tmp_path / "system"), "no network", "dataset-fashion-mnist"):
        assert part in message
    assert IMAGES not in names(tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: data[:50] + b"x" + data[51:]])
def test_corrupt_file_is_named_and_left_alone(fake, tmp_path, damage):
    folder = fill(tmp_path / "mine", fake.files)
    (folder / IMAGES).write_bytes(damage(fake.files[IMAGES]))
    with pytest.raises(TrainError, match=rf"mine/{IMAGES} is corrupt \(SHA-256"):
        load_data(TrainConfig(data="fashion-mnist", data_dir=folder))
    assert (folder / IMAGES).read_bytes() == damage(fake.files[IMAGES])


def test_corrupt_download_leaves_nothing(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", serve({k: b"<html>" for k in fake.files}))
    with pytest.raises(TrainError, match="wrong SHA-256; nothing was kept"):
        load_data(TrainConfig(data="fashion-mnist", data_dir=tmp_path / "mine"))
    assert names(tmp_path) == []


def test_interrupted_download_leaves_nothing(fake, tmp_path, monkeypatch):
    class Breaks(io.BytesIO):
        def read(self, *args):
            raise ConnectionResetError("connection lost")

    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", lambda url, timeout: Breaks())
    with pytest.raises(TrainError, match="cannot be downloaded .connection lost"):
        load_data(TrainConfig(data="fashion-mnist", data_dir=tmp_path / "mine"))
    assert names(tmp_path) == []


def test_the_real_files():
    folder = fashion_mnist.SYSTEM_DIR
    if not all((folder / name).is_file() for name in fashion_mnist.SHA256):
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    data = load_data(TrainConfig(data="fashion-mnist"))
    assert data.train_images.shape == (60000, 1, 28, 28) and data.test_images.shape == (10000, 1, 28, 28)
    assert torch.equal(data.train_labels.bincount(), torch.full((10,), 6000))
    assert data.mean == pytest.approx([0.2860], abs=1e-4) and data.std == pytest.approx([0.3530], abs=1e-4)


# The others


def test_digits_and_limit():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    whole = load_data(TrainConfig(data="digits"))
    assert whole.train_images.shape == (1438, 1, 8, 8) and whole.test_images.shape == (359, 1, 8, 8)
    assert int(whole.train_images.max()) == 255 and whole.num_classes == 10
    some, same, other = (load_data(TrainConfig(data="digits", limit=100, seed=seed)) for seed in (1, 1, 2))
    assert len(some.train_labels) == 100 and len(some.test_labels) == 359
    assert torch.equal(some.train_images, same.train_images)
    assert not torch.equal(some.train_images, other.train_images)


@pytest.fixture
def torchvision(monkeypatch):
    """The part of torchvision that is used, so that these paths run without it."""
    package, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    return datasets


def test_cifar(torchvision, tmp_path):
    def factory(root, train, download):
        assert root == str(tmp_path) and download
        data = np.zeros((3, 32, 32, 3), dtype=np.uint8)
        data[:, 0, 1, 2] = 200
        return types.SimpleNamespace(data=data, targets=[0, 1, 4] if train else [0, 0, 1])

    torchvision.CIFAR100 = factory
    data = load_data(TrainConfig(data="cifar100", data_dir=tmp_path))
    assert data.train_images.shape == (3, 3, 32, 32) and data.train_images[0, 2, 0, 1] == 200
    assert data.num_classes == 5 and (data.padding, data.flip) == (4, True)


def test_cifar_that_cannot_be_downloaded(torchvision, tmp_path):
    def factory(root, train, download):
        raise RuntimeError("Dataset not found or corrupted.")

    torchvision.CIFAR10 = factory
    with pytest.raises(TrainError, match="cifar10: cannot be read .*not found or corrupted"):
        load_data(TrainConfig(data="cifar10", data_dir=tmp_path))


@pytest.fixture
def folders(tmp_path):
    """A function that makes image files: part/class/name, colour, size."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

    def make(path, colour, size=(20, 10)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", size, colour).save(tmp_path / path)

    return make


def batches(config, workers=0, epoch=0, part="train"):
    """The batches of one epoch as the run gets them, before they are normalised."""
    loader = pytest.importorskip("sfr_ext.train.loader", reason="the extra [train] is not installed")
    module = loader.ImageModule(load_data(config), config.batch_size, config.seed, config.augment, workers)
    module.trainer = types.SimpleNamespace(world_size=1, global_rank=0)
    module.first_epoch = epoch
    data = module.train_dataloader() if part == "train" else module.val_dataloader()
    if part == "train":
        data.sampler.set_epoch(0)  # as Lightning does at first, also when it resumes
    return list(data)


def test_image_folder(folders, tmp_path):
    config = TrainConfig(data="imagefolder", data_dir=tmp_path, image_size=8, batch_size=2, augment=False)
    with pytest.raises(TrainError, match="train does not exist"):
        load_data(config)
    for part in ("train", "val"):
        folders(f"{part}/cat/one.png", (255, 0, 0))
        folders(f"{part}/dog/deeper/two.JPG", (0, 0, 255))
        (tmp_path / part / "dog" / "notes.txt").write_text("no image")
    data = load_data(config)
    assert data.class_names == ("cat", "dog") and data.num_classes == 2 and data.channels == 3
    assert data.train_labels.tolist() == data.test_labels.tolist() == [0, 1]
    ((images, labels),) = batches(config, part="test")
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.uint8 and labels.tolist() == [0, 1]
    assert images[0, :, 4, 4].tolist() == [255, 0, 0] and int(images[1, 2].min()) >= 250

    cut = tmp_path / "train" / "dog" / "two.png"
    cut.write_bytes((tmp_path / "train" / "cat" / "one.png").read_bytes()[:50])
    assert any(
        "dog/two.png cannot be read" in batch
        for batch in batches(replace(config, batch_size=1))
        if isinstance(batch, str)
    )
    cut.unlink()
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(TrainError, match="train/eel holds no image"):
        load_data(config)
    folders("train/eel/one.png", (0, 0, 0))
    with pytest.raises(TrainError, match="do not have the same classes: 'eel' in train alone"):
        load_data(config)
    shutil.rmtree(tmp_path / "train" / "eel")
    folders("train/.ipynb_checkpoints/one.png", (0, 0, 0))  # what programs leave
    folders("train/cat/.ipynb_checkpoints/one.png", (0, 0, 0))
    folders("val/dog/._one.png", (0, 0, 0))
    (tmp_path / "train" / "dog" / "again").symlink_to(tmp_path / "train" / "dog")  # without end
    (tmp_path / "train" / "cat" / "all").symlink_to(tmp_path / "train")
    hidden = load_data(config)
    assert hidden.class_names == ("cat", "dog")
    assert hidden.train_labels.tolist() == hidden.test_labels.tolist() == [0, 1]
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "val").mkdir()
    with pytest.raises(TrainError, match="empty/train holds no folders"):
        load_data(TrainConfig(data="imagefolder", data_dir=tmp_path / "empty"))


def test_each_folder_of_a_class_is_walked_once(folders, tmp_path):
    """Twelve classes that link to one another have 1.3e9 ways through them; each is seen from each."""
    classes = "abcdefghijkl"
    for name in classes:
        folders(f"{name}/one.png", (0, 0, 0))
        for other in classes.replace(name, ""):
            (tmp_path / name / f"to-{other}").symlink_to(tmp_path / other)
    files, found = find_files(tmp_path)
    assert found == tuple(classes)
    assert torch.bincount(files.labels).tolist() == [len(classes)] * len(classes)
    names = [files.names[i] for i in range(len(files.names))]
    assert names[:3] == ["a/one.png", "a/to-b/one.png", "a/to-b/to-c/one.png"]  # in order
    assert len({os.path.realpath(tmp_path / name) for name in names}) == len(classes)


def test_folders_may_lie_deep(folders, tmp_path):
    folders("data/a/one.png", (0, 0, 0))
    deepest = tmp_path / "data" / "a"
    depth = 1_000
    below = [f"{deepest}{'/n' * i}" for i in range(1, depth + 1)]
    for place in below:
        os.mkdir(place)
    os.link(deepest / "one.png", f"{below[-1]}/two.png")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(800)
    try:
        files, _ = find_files(tmp_path / "data")
        assert [files.names[i] for i in range(2)] == ["a/one.png", f"a{'/n' * depth}/two.png"]
        assert files.image(1).size == (20, 10)
    finally:  # what removes temporary folders may not go as deep
        sys.setrecursionlimit(limit)
        os.remove(f"{below[-1]}/two.png")
        for place in reversed(below):
            os.rmdir(place)


def test_the_same_images_whoever_reads_them(folders, tmp_path):
    """What is random of an image depends on seed, epoch and place; not on the number of workers."""
    for i in range(12):
        folders(f"train/{'ab'[i % 2]}/{i}.png", (20 * i, 255 - 20 * i, 7 * i), (30, 20))
    folders("test/a/0.png", (0, 0, 0))
    folders("test/b/0.png", (0, 0, 0))
    options = {"data": "imagefolder", "data_dir": tmp_path, "image_size": 16, "batch_size": 4}
    for part in ("a", "b"):  # edges, so that crops and mirroring show
        for path in (tmp_path / "train" / part).iterdir():
            path.write_bytes(striped(path.stem))
    one, two, later, other = (
        batches(TrainConfig(**options, seed=seed), workers, epoch)
        for workers, epoch, seed in ((0, 0, 0), (2, 0, 0), (0, 1, 0), (0, 0, 1))
    )
    assert len(one) == 3 and sorted(int(label) for _, labels in one for label in labels) == [0] * 6 + [1] * 6
    assert all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))
    for another in (later, other):
        assert not all(torch.equal(x[0], y[0]) for x, y in zip(one, another, strict=True))


def striped(name):
    from PIL import Image

    levels = np.zeros((20, 30, 3), dtype=np.uint8)
    levels[:, :, 0] = np.arange(30) * 8
    levels[:, :, 1] = np.arange(20)[:, None] * 12
    levels[:, :, 2] = int(name) * 20
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("size", [(500, 375), (1, 1), (1000, 3), (3, 1000)])
def test_boxes_of_imagenets_crops(size):
    width, height = size
    left, top, right, bottom = centre_box(width, height)
    assert right - left == pytest.approx(min(size) * 224 / 256) == bottom - top
    assert (left + right, top + bottom) == pytest.approx(size)
    random = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        left, top, right, bottom = random_box(width, height, random)
        assert 0 <= left < right <= width + 1e-6 and 0 <= top < bottom <= height + 1e-6
        assert 0.74 < (right - left) / (bottom - top) < 1.34
        shares.append((right - left) * (bottom - top) / (width * height))
    if max(size) < 2 * min(size):
        assert 0.08 <= min(shares) < 0.12 and 0.8 < max(shares) <= 1 and 0.4 < np.mean(shares) < 0.6


def test_many_names_take_little_room():
    names = [f"class/{i:07d}.jpg" for i in range(10000)] + ["class/umlaut-ä.png"]
    packed = Names(names)
    assert len(packed) == 10001 and [packed[i] for i in (0, 7, 10000)] == [names[i] for i in (0, 7, 10000)]
    assert packed.text.nbytes + packed.ends.nbytes < 30 * len(names)
    assert packed.at(torch.tensor([9, 3]))[1] == names[3]


def test_sixteen_bits_of_grey_are_not_white(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    levels = np.array([[0, 255, 256], [4660, 32768, 65535]], dtype=np.uint16)
    wanted = (levels >> 8).astype(np.uint8)
    for suffix in ("png", "tiff"):
        path = tmp_path / f"grey.{suffix}"
        image.fromarray(levels).save(path)
        read = np.asarray(read_image(path))
        assert read.shape == (2, 3, 3) and all(np.array_equal(read[..., c], wanted) for c in range(3))


def test_every_other_kind_of_image(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    grey = image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    wanted = np.asarray(grey)
    for mode, suffix in (("L", "png"), ("RGB", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "tiff")):
        path = tmp_path / f"{mode}.{suffix}"
        (grey.convert("RGB") if mode == "CMYK" else grey).convert(mode).save(path)
        read = np.asarray(read_image(path)).astype(int)
        assert read.shape == (3, 4, 3) and np.abs(read - wanted[..., None]).max() <= 1, mode
    grey.convert("1", dither=0).save(tmp_path / "1.png")
    assert set(np.unique(np.asarray(read_image(tmp_path / "1.png")))) == {0, 255}


def test_images_that_cannot_be_read_are_named(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    noise = image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "bmp", "gif", "tiff", "webp"):
        path = tmp_path / f"cut.{suffix}"
        noise.save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(TrainError, match=rf"cut.{suffix} cannot be read: ") as caught:
            read_image(path)
        assert "\n" not in str(caught.value) and str(caught.value).count(str(path)) == 1
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.png", "empty.png", "nowhere.png"):
        with pytest.raises(TrainError, match=f"{name} cannot be read"):
            read_image(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")  # would be waited for without end
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        with pytest.raises(TrainError, match=f"{name} cannot be read: it is no regular file"):
            read_image(tmp_path / name)
    image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(TrainError, match="float.tiff has levels of no known range"):
        read_image(tmp_path / "float.tiff")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_without_torchvision(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(TrainError, match=f"--data {name} needs torchvision"):
        load_data(TrainConfig(data=name, data_dir=tmp_path))


# Augmentation and files


def test_crops_are_windows_of_the_padded_image():
    images = torch.arange(200 * 2 * 3 * 4).reshape(200, 2, 3, 4) + 1
    out = crop_and_flip(images, 1, True, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (1,) * 4)
    seen = set()
    for i in range(len(images)):
        matches = {
            (y, x, mirror)
            for y in range(3)
            for x in range(3)
            for mirror in (False, True)
            if torch.equal(out[i], (lambda w, m: w.flip(-1) if m else w)(padded[i, :, y : y + 3, x : x + 4], mirror))
        }
        assert len(matches) == 1
        seen |= matches
    assert len(seen) == 18  # every offset, mirrored and not


def test_augmentation_follows_its_generator_and_can_do_nothing():
    images = torch.randint(0, 256, (4, 1, 5, 5), dtype=torch.uint8)
    first, second = (crop_and_flip(images, 2, True, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.uint8
    assert torch.equal(crop_and_flip(images, 0, False, torch.Generator().manual_seed(5)), images)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["result.json"]


def test_classes_that_differ_are_told_a_few_of():
    many = [f"n{i:04}" for i in range(1000)]
    told = differing(many, ["n0001", "x"], "train", "val")
    assert told == "'n0000', 'n0002', 'n0003' and 996 more in train alone; 'x' in val alone"
    assert differing(["a", "b"], ["b", "a"], "train", "val") == "they are in another order"
