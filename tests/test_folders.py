"""Folders of images as people have them: what is a class, how it is split, and which files are refused by name."""

import json
import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_config import composed

from csgd import InputError, data, folders
from csgd.build import build
from csgd.pipeline import run
from csgd.pipeline.base import cache_path
from csgd.pipeline.spec import RunSpec
from csgd.ranks import Share
from evaluate import evaluate


def picture(path, size=(50, 40), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (*reversed(size), 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def fill(root, **counts):
    for name, count in counts.items():
        for number in range(count):
            picture(root / name / f"{number}.png")
    return root


def image_folder(root, **options):
    settings = dict(image_size=32, batch_size=4, workers=0, test_fraction=0.2, seed=0, device=torch.device("cpu"))
    return data.image_folder(root=str(root), **settings | options)


def refusal(root, **options):
    with pytest.raises(InputError) as error:
        image_folder(root, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def labels_of(batches):
    return torch.cat([labels for _, labels in batches]).bincount().tolist()


def test_a_training_folder_alone_is_split_itself(tmp_path, caplog):
    fill(tmp_path / "train", cat=5, dog=10)
    with caplog.at_level(logging.INFO, "csgd"):
        made = image_folder(tmp_path)
    assert (made.num_classes, made.train_size, made.test_size) == (2, 12, 3)
    assert f"0.2 of each class of '{tmp_path}/train' is held back for the test" in caplog.text
    assert "2 classes (cat, dog), 12 training and 3 test images" in caplog.text
    assert "15 images looked at in" in caplog.text


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Test"])
def test_test_images_lie_under_their_usual_names(tmp_path, name):
    fill(tmp_path / "train", cat=2, dog=2)
    fill(tmp_path / name, cat=1, dog=3)
    assert labels_of(image_folder(tmp_path, test_fraction=0).test_batches()) == [1, 3]


def test_folders_that_tell_no_classes_are_refused(tmp_path):
    fill(tmp_path / "flat", train=3)
    assert "train in '" in refusal(tmp_path / "flat")
    fill(tmp_path / "flat", val=3)
    assert "train, val in '" in refusal(tmp_path / "flat")
    assert refusal(tmp_path / "flat").endswith("hold images, but no folders of classes")
    fill(tmp_path / "untrained" / "val", cat=2, dog=2)
    assert "/val' holds folders of classes, and '" in refusal(tmp_path / "untrained")
    fill(tmp_path / "beside" / "train", cat=2, dog=2)
    fill(tmp_path / "beside", bus=3)
    assert f"images in bus; dataset.root={tmp_path}/beside/train takes it alone" in refusal(tmp_path / "beside")
    fill(tmp_path / "vehicles", bus=5, train=5)
    assert image_folder(tmp_path / "vehicles").num_classes == 2, "a class may be called train"


def test_links_do_not_bring_images_into_training_and_test(tmp_path):
    root = fill(tmp_path / "loop", cat=4, dog=4)
    (root / "cat" / "again").symlink_to(root / "cat")
    _, train, test = folders.labelled(root, 0.25)
    assert (len(train), len(test)) == (6, 2)
    fill(tmp_path / "linked" / "train", cat=2, dog=2)
    (tmp_path / "linked" / "val").symlink_to(tmp_path / "linked" / "train")
    assert refusal(tmp_path / "linked").endswith("/val' are one folder; test images must be others")


def test_a_single_class_is_refused(tmp_path):
    assert "holds one class, cat; 2 are the least" in refusal(fill(tmp_path / "whole", cat=5))
    for part in ("train", "val"):
        fill(tmp_path / "split" / part, cat=5)
    assert "/split/train' holds one class, cat; 2 are the least" in refusal(tmp_path / "split")


@pytest.mark.parametrize("fraction", [-1, 1, 1.5, float("nan"), float("inf")])
def test_a_fraction_that_is_none_is_refused(tmp_path, fraction):
    for part in ("train", "val"):
        fill(tmp_path / part, cat=2, dog=2)
    assert "dataset.test_fraction must be at least 0 and below 1, got" in refusal(tmp_path, test_fraction=fraction)


def test_nothing_held_back_is_refused(tmp_path):
    fill(tmp_path / "train", cat=5, dog=5)
    assert refusal(tmp_path, test_fraction=0).startswith("dataset.test_fraction=0 holds nothing back for a test")
    assert "no class in" in refusal(fill(tmp_path / "ones", cat=1, dog=1))


def test_the_split_is_by_class_and_the_same_for_every_seed(tmp_path, caplog):
    fill(tmp_path, a=40, b=10, c=2, d=1)
    one, other = image_folder(tmp_path), image_folder(tmp_path, seed=1)
    assert labels_of(one.train_batches(0)) == [32, 8, 1, 1]
    assert labels_of(one.test_batches()) == [8, 2, 1]
    assert "classes of one image, which are trained on and not tested: d" in caplog.text
    files = [(f"{label}/{number}", label) for label in range(2) for number in range(50)]
    train, test = folders.split_by_class(files, 0.3)
    assert sorted(train + test) == sorted(files)
    assert [path for path, _ in test] != sorted(path for path, _ in files)[:30], "drawn"
    pairs = zip(one.test_batches(), other.test_batches(), strict=True)
    assert all(torch.equal(a, b) for (a, _), (b, _) in pairs)


def test_hidden_files_and_folders_are_no_classes_and_no_images(tmp_path, caplog):
    fill(tmp_path, cat=5, dog=5)
    fill(tmp_path, **{".ipynb_checkpoints": 2, "__MACOSX": 2, ".git": 1})
    fill(tmp_path / "cat", **{".ipynb_checkpoints": 2, "@eaDir": 1})
    (tmp_path / "cat" / "._0.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "cat" / "notes.txt").write_text("soft")
    picture(tmp_path / "loose.png")
    made = image_folder(tmp_path)
    assert (made.num_classes, made.train_size, made.test_size) == (2, 8, 2)
    assert "left out: 1 beside the folders, 1 .txt" in caplog.text


def test_empty_classes_are_named(tmp_path):
    fill(tmp_path, cat=2, dog=2)
    (tmp_path / "emu").mkdir()
    (tmp_path / "yak").mkdir()
    (tmp_path / "yak" / "0.gif").write_bytes(b"GIF89a")
    assert "no images in 2 of 4 classes of '" in refusal(tmp_path)
    assert "': emu, yak; images are .jpg, " in refusal(tmp_path)


def test_other_classes_in_the_test_are_named(tmp_path):
    fill(tmp_path / "train", cat=2, dog=2)
    fill(tmp_path / "val", cat=2, emu=2)
    assert refusal(tmp_path).endswith("do not hold the same classes; only in one of them: dog, emu")


def cut(path, fraction):
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


BROKEN = {
    "empty.jpg": (lambda path: path.write_bytes(b""), "is empty"),
    "text.png": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "is not an image"),
    "link.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "is a link to nothing"),
    "cut.jpg": (lambda path: cut(picture(path), 0.7), "cannot be read: image file is truncated"),
    "almost.jpg": (lambda path: cut(picture(path, (300, 300)), 0.999), "cannot be read: image file is truncated"),
    "cut.png": (lambda path: cut(picture(path), 0.7), "cannot be read: "),
    "cut.bmp": (lambda path: cut(picture(path), 0.7), "cannot be read: image file is truncated"),
    "cut.webp": (lambda path: cut(picture(path), 0.7), "cannot be read: "),
    "float.tif": (lambda path: save(path, Image.fromarray(np.ones((9, 9), np.float32))), "is of mode F; it must be"),
    "deep.png": (lambda path: save(path, Image.fromarray(np.ones((9, 9), np.uint16))), "is of mode I;16; it must be"),
    "deep.tif": (lambda path: save(path, Image.fromarray(np.ones((9, 9), np.int32))), "is of mode I; it must be"),
    "huge.png": (lambda path: save(path, Image.new("1", (20_000, 10_000))), "has more than 178 megapixels, 89 are"),
    "large.png": (lambda path: save(path, Image.new("1", (10_000, 10_000))), "has 100 megapixels, 89 are the most"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_image_that_cannot_be_used_is_named_before_training(tmp_path, name):
    make, fault = BROKEN[name]
    fill(tmp_path, cat=2, dog=2)
    make(tmp_path / "dog" / name)
    told = refusal(tmp_path)
    assert told.startswith(f"dataset.root: 1 of 5 images cannot be used: '{tmp_path}/dog/{name}' ")
    assert fault in told


def test_a_name_of_two_lines_is_told_in_one(tmp_path):
    fill(tmp_path, cat=2, dog=2)
    (tmp_path / "cat" / "a\nb.png").touch()
    assert "cat/a\\nb.png' is empty" in refusal(tmp_path)


def test_all_bad_images_are_counted_and_five_are_named(tmp_path):
    fill(tmp_path, cat=2, dog=70)
    for number in range(7):
        (tmp_path / "dog" / f"{number}.png").write_bytes(b"")
    told = refusal(tmp_path)
    assert "7 of 72 images cannot be used: " in told
    assert told.count("is empty") == 5
    assert told.endswith("; and 2 more")


def test_images_of_every_usual_kind_pass(tmp_path):
    fill(tmp_path, cat=2, dog=2)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        save(tmp_path / "cat" / f"{mode}.png", Image.new(mode, (9, 9)))
    for mode in ("CMYK", "YCbCr", "L", "RGB"):
        save(tmp_path / "dog" / f"{mode}.jpg", Image.new(mode, (9, 9)))
    for suffix in (".JPEG", ".bmp", ".ppm", ".pgm", ".tif", ".webp"):
        save(tmp_path / "dog" / f"a{suffix}", Image.new("L", (9, 9)))
    with picture(tmp_path / "dog" / "padded.jpg").open("ab") as file:
        file.write(bytes(5000))
    made = image_folder(tmp_path, test_fraction=0.5)
    assert made.train_size + made.test_size == 20
    list(made.train_batches(0)), list(made.test_batches())


def test_each_rank_looks_at_its_share(tmp_path):
    good, bad = str(picture(tmp_path / "good.png")), str(tmp_path / "bad.png")
    folders.check_images([good, bad], Share(0, 2))
    with pytest.raises(InputError, match="1 of 2 images cannot be used"):
        folders.check_images([good, bad], Share(1, 2))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_in_training_is_named(tmp_path, workers):
    fill(tmp_path, cat=4, dog=4)
    made = image_folder(tmp_path, workers=workers)
    for path in tmp_path.rglob("*.png"):
        cut(path, 0.5)
    for batches in (made.train_batches(0), made.test_batches()):
        with pytest.raises(InputError) as error:
            list(batches)
        told = rf"dataset.root: '{tmp_path}/\w+/\d.png' could be read before training, and now cannot: .*"
        assert re.fullmatch(told, str(error.value)), str(error.value)


def test_a_base_network_belongs_to_the_images_it_was_trained_on(tmp_path):
    fill(tmp_path / "images", cat=5, dog=5)

    def kept(*more):
        spec = RunSpec.of(composed("dataset=imagefolder", f"dataset.root={tmp_path}/images", "model=resnet20", *more))
        return cache_path(spec, build("model", spec.model, num_classes=2), image_folder(tmp_path / "images"))

    paths = [kept(), kept()]
    assert paths[0] == paths[1] == kept("dataset.workers=0", "threads=3")
    picture(tmp_path / "images" / "cat" / "new.png")
    paths.append(kept())
    (tmp_path / "images" / "cat" / "new.png").rename(tmp_path / "images" / "dog" / "new.png")
    paths.append(kept())
    picture(tmp_path / "images" / "dog" / "new.png", size=(51, 40))
    paths.append(kept())
    assert len(set(paths)) == 4


def test_a_network_is_tested_by_the_names_of_its_classes(tmp_path):
    fill(tmp_path / "all", ant=5, bee=5, cat=5)
    mine = ["dataset=imagefolder", "dataset.image_size=8", "dataset.workers=0", f"dataset.root={tmp_path}/all"]
    small = ["model._target_=nets.Plain", "schedule=smoke", "schedule.base.max_steps=1", "schedule.csgd.max_steps=1"]
    more = ["wandb=disabled", "report=false", "quiet=true", f"base.cache={tmp_path}/base", "tolerance.logits=1e9"]
    run(composed(*mine, *small, *more), tmp_path / "out")
    described = json.loads((tmp_path / "out" / "pruned.json").read_text())
    assert described["class_names"] == ["ant", "bee", "cat"]
    assert (described["mean"][0], described["std"][0]) == pytest.approx((0.485, 0.229))
    fill(tmp_path / "fewer", bee=5, cat=5)
    fewer = image_folder(tmp_path / "fewer")
    assert labels_of(fewer.test_batches()) == [1, 1]
    assert labels_of(fewer.of_classes(described["class_names"]).test_batches()) == [0, 1, 1]
    assert "2 images" in evaluate(tmp_path / "out", [f"dataset.root={tmp_path}/fewer"], ["nets"])
    fill(tmp_path / "others", bee=5, dog=5)
    with pytest.raises(InputError, match="was not trained on the classes dog; it knows ant, bee, cat"):
        evaluate(tmp_path / "out", [f"dataset.root={tmp_path}/others"], ["nets"])
