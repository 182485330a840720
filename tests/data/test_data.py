# SPDX-License-Identifier: Apache-2.0
"""MVTec with the paper's validation protocol, and the generated demo data."""

from pathlib import Path

import numpy as np
import pytest
from anomalib.data.utils import ValSplitMode
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from anomalib_intra import MVTec, TextureDemo
from anomalib_intra.data.demo import _TEXTURES, generate
from anomalib_intra.data.normal_images import NormalImages, held_out_indices


def paths(dataset: object) -> set[str]:
    return set(dataset.samples.image_path)


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (14, 1), (60, 6), (209, 20), (391, 20)])
def test_ten_percent_and_at_most_twenty_are_held_out(count: int, held_out: int) -> None:
    chosen = held_out_indices(count)
    assert len(chosen) == len(set(chosen)) == held_out
    assert set(chosen) <= set(range(count))
    assert chosen == held_out_indices(count)
    assert count < 20 or chosen != held_out_indices(count, seed=1)


def test_one_image_is_too_few() -> None:
    with pytest.raises(ValueError, match=r"at least 2 normal training images.*found 1"):
        held_out_indices(1)


def test_validation_images_are_training_images_and_never_test_images(demo: TextureDemo) -> None:
    demo.prepare_data()
    demo.setup()
    train, val, test = paths(demo.train_data), paths(demo.val_data), paths(demo.test_data)
    assert (len(train), len(val), len(test)) == (54, 6, 52)
    assert not train & val
    assert not test & (train | val)
    assert all("/train/good/" in path for path in val)


def test_other_split_modes_still_work(demo_root: Path) -> None:
    datamodule = TextureDemo(demo_root, val_split_mode=ValSplitMode.SAME_AS_TEST)
    datamodule.setup()
    assert paths(datamodule.val_data) == paths(datamodule.test_data)


def test_anomalies_among_the_training_images_are_left_out_before_anything_is_counted(demo_root: Path) -> None:
    demo = TextureDemo(demo_root)
    demo.setup()
    labelled = demo.train_data + demo.test_data
    images = NormalImages.of(DataLoader(labelled, batch_size=4), DataLoader(demo.val_data), None)
    assert len(labelled) > len(images.training.dataset) == int((labelled.samples.label_index == 0).sum())


@pytest.mark.parametrize(
    "choice",
    [
        {"sampler": SubsetRandomSampler([0, 1])},
        {"sampler": WeightedRandomSampler([1.0] * 54, 54)},
        {"sampler": RandomSampler(range(54), num_samples=10)},
        {"sampler": RandomSampler(range(54), replacement=True)},
        {"batch_sampler": BatchSampler(RandomSampler(range(54)), 4, drop_last=False)},
    ],
)
def test_a_loader_that_chooses_among_its_images_is_refused(choice: dict, demo: TextureDemo) -> None:
    demo.setup()
    chosen, all_of_them = DataLoader(demo.train_data, **choice), DataLoader(demo.val_data)
    for loaders in ((chosen, all_of_them), (all_of_them, chosen)):
        with pytest.raises(ValueError, match=r"the choice of images: give it a torch.utils.data.Subset"):
            NormalImages.of(*loaders, None)


def test_misspelt_category_lists_the_right_ones() -> None:
    with pytest.raises(ValueError, match=r"no category 'scrw'.*pill, screw, tile"):
        MVTec(category="scrw")
    with pytest.raises(ValueError, match="weave, speckle"):
        TextureDemo(category="bottle")


def test_missing_folder_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        msg = "no route to host"
        raise OSError(msg)

    monkeypatch.setattr("anomalib.data.datamodules.image.mvtecad.download_and_extract", offline)
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*nowhere/bottle.*no route to host.*set the datamodule's root"
    ):
        MVTec(tmp_path / "nowhere", category="bottle").prepare_data()


def test_demo_is_the_same_for_a_seed_and_another_for_another(demo_root: Path, tmp_path: Path) -> None:
    def read(root: Path) -> np.ndarray:
        return np.array(Image.open(root / "weave/test/hole/003.png"))

    TextureDemo(tmp_path / "same").prepare_data()
    TextureDemo(tmp_path / "other", generator_seed=1).prepare_data()
    assert np.array_equal(read(demo_root), read(tmp_path / "same"))
    assert not np.array_equal(read(demo_root), read(tmp_path / "other"))


@pytest.mark.parametrize("category", ["weave", "speckle"])
def test_demo_masks_are_exact(category: str) -> None:
    draw, defects = _TEXTURES[category]
    rng = np.random.default_rng(0)
    for spoil in defects.values():
        for _ in range(20):
            image = draw(rng)
            spoiled, mask = spoil(image, rng)
            changed = np.abs(spoiled - image).max(axis=-1) > 0
            assert not (changed & ~mask).any()
            # Nearly all of a mask is changed: chance may leave a pixel as it was.
            assert changed[mask].mean() > 0.95
            assert 20 < mask.sum() < 0.1 * mask.size


def test_demo_does_not_overwrite_a_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "weave").mkdir()
    (tmp_path / "weave/mine.png").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="was not generated by TextureDemo"):
        TextureDemo(tmp_path).prepare_data()
    assert (tmp_path / "weave/mine.png").read_bytes() == b"precious"


def test_two_processes_that_generate_the_same_do_not_get_into_each_others_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, defects = _TEXTURES["weave"]
    other = []

    def drawn_while_another_generates(rng: np.random.Generator) -> np.ndarray:
        if not other:
            other.append(True)
            generate(tmp_path, "weave")
            other.append((tmp_path / "weave/train/good/000.png").stat().st_mtime_ns)
        return draw(rng)

    monkeypatch.setitem(_TEXTURES, "weave", (drawn_while_another_generates, defects))
    generate(tmp_path, "weave")
    assert (tmp_path / "weave/train/good/000.png").stat().st_mtime_ns == other[1]  # which the other may be reading
    assert [path.name for path in tmp_path.iterdir()] == ["weave"]
