# SPDX-License-Identifier: Apache-2.0
"""One run of the benchmark: a model is built, trained, tested and timed."""

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import ValSplitMode
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from anomalib.models.components import TimmFeatureExtractor
from jsonargparse import ArgumentParser
from lightning import seed_everything
from torch.utils.data import DataLoader

from anomalib_intra.benchmark.evaluation import METRICS, evaluator
from anomalib_intra.benchmark.machine import device_name, peak_memory_mib, wait_for
from anomalib_intra.data.image_files import check_image_files, fingerprint
from anomalib_intra.data.normal_images import SPLITS_FROM_TEST

#: Keys of a model's entry beside those of every anomalib config.
MODEL_KEYS = {"class_path", "init_args", "name", "trainer", "backbone_weights", "pretrained"}
_MOST_TIMED, _TIMED_SECONDS = 10, 5.0


def parse(kind: type, entry: dict[str, Any]) -> tuple[type, Callable[[], Any]]:
    """Check a ``class_path`` / ``init_args`` entry without building anything.

    Args:
        kind (type): Base class, ``AnomalibModule`` or ``AnomalibDataModule``.
        entry (dict): The entry.

    Returns:
        tuple[type, Callable]: The class, and what builds the object.

    Raises:
        ValueError: If the class or one of its arguments does not exist.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "it")
    try:
        parsed = parser.parse_object({"it": {key: entry[key] for key in ("class_path", "init_args") if key in entry}})
    except Exception as error:  # jsonargparse raises several kinds
        msg = f"The benchmark's entry {entry.get('class_path', entry)} cannot be used: {error}"
        raise ValueError(msg) from error
    module, _, name = parsed.it.class_path.rpartition(".")
    return getattr(import_module(module), name), lambda: parser.instantiate_classes(parsed).it


def model_class(entry: dict[str, Any]) -> type[AnomalibModule]:
    """Check a model's entry.

    Args:
        entry (dict): As for :func:`build_model`.

    Returns:
        type: Its class.

    Raises:
        ValueError: If the class or one of its arguments does not exist, or the model would get images of its own.

    Example:
        >>> model_class({"class_path": "anomalib.models.Padim"}).__name__
        'Padim'
    """
    for name in ("image_size", "pre_processor", "post_processor"):
        if name in entry.get("init_args", {}):
            msg = (
                f"The benchmark's entry {entry['class_path']} has its own {name}, but all models get images of the "
                "same size and give raw scores: take it out, and set the benchmark's image_size."
            )
            raise ValueError(msg)
    return parse(AnomalibModule, entry)[0]


def _instantiate(kind: type, arguments: dict[str, Any], **objects: Any) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "it", instantiate=False, skip=set(objects))
    parsed = parser.instantiate_classes(parser.parse_object({"it": arguments}))
    return kind(**parsed.it.as_dict(), **objects)


def build_model(entry: dict[str, Any], image_size: tuple[int, int]) -> AnomalibModule:
    """Build a model as all models of a benchmark are built: one image size, raw scores, the same metrics.

    Args:
        entry (dict): ``class_path`` and ``init_args`` as in any anomalib config; ``backbone_weights`` names a file
            with weights of the pretrained backbone, which is then not downloaded.
        image_size (tuple[int, int]): Height and width to which the model's images are resized.

    Returns:
        AnomalibModule: The model.

    Raises:
        ValueError: If the entry is wrong.

    Example:
        >>> entry = {"class_path": "anomalib.models.Padim", "init_args": {"pre_trained": False}}
        >>> build_model(entry, (64, 64)).post_processor.enable_normalization
        False
    """
    kind = model_class(entry)
    arguments = dict(entry.get("init_args", {}))
    weights = entry.get("backbone_weights")
    if weights is not None:
        arguments["pre_trained"] = False
    if "image_size" in signature(kind).parameters:
        arguments["image_size"] = list(image_size)
    # Several models ask their pre-processor for the size while they are built.
    model = _instantiate(kind, arguments, pre_processor=kind.configure_pre_processor(image_size))
    size = tuple(model.pre_processor.transform(torch.zeros(1, 3, 8, 8)).shape[-2:])
    if size != tuple(image_size):
        msg = (
            f"{model.name} takes images of {size[0]} x {size[1]} pixels only: leave it out, or set the benchmark's "
            "image_size to that."
        )
        raise ValueError(msg)
    model.evaluator = evaluator()
    model.visualizer = None
    if model.post_processor is not None:
        # Normalization of most models clamps scores to [0, 1], and the ties move AUROC.
        model.post_processor.enable_normalization = False
    if weights is not None:
        _load_backbone(model, Path(weights))
    return model


def build_datamodule(entry: dict[str, Any], seed: int) -> AnomalibDataModule:
    """Build a datamodule that splits its images the same way for every model.

    Args:
        entry (dict): ``class_path`` and ``init_args`` as in any anomalib config.
        seed (int): Seed of random splits, for datamodules that would otherwise split differently each time.

    Returns:
        AnomalibDataModule: The datamodule.

    Raises:
        ValueError: If the entry is wrong, or there are no validation images but test images.

    Example:
        >>> entry = {"class_path": "anomalib.data.MVTecAD", "init_args": {"val_split_mode": "from_train"}}
        >>> build_datamodule(entry, seed=7).seed
        7
    """
    arguments = dict(entry.get("init_args", {}))
    asks = signature(parse(AnomalibDataModule, entry)[0]).parameters.get("seed")
    if asks is not None and arguments.get("seed", asks.default) is None:
        arguments["seed"] = seed
    datamodule = parse(AnomalibDataModule, {**entry, "init_args": arguments})[1]()
    if getattr(datamodule, "val_split_mode", None) in (*SPLITS_FROM_TEST, ValSplitMode.NONE):
        msg = (
            f"{entry['class_path']} validates on test images or on none, so some models would hold out training images "
            "and others not: set val_split_mode to from_train, or use anomalib_intra.MVTec."
        )
        raise ValueError(msg)
    return datamodule


def _load_backbone(model: AnomalibModule, path: Path) -> None:
    extractors = [module for module in model.modules() if isinstance(module, TimmFeatureExtractor)]
    if len(extractors) != 1:
        msg = f"backbone_weights can be used with models of one timm backbone; {model.name} has {len(extractors)}."
        raise ValueError(msg)
    if not path.is_file():
        msg = f"There is no file {path} with backbone weights: take backbone_weights out to download pretrained ones."
        raise FileNotFoundError(msg)
    backbone = extractors[0].feature_extractor
    given = torch.load(path, map_location="cpu", weights_only=True)
    needed = backbone.state_dict()
    wrong = [key for key in needed if key not in given or given[key].shape != needed[key].shape]
    if wrong:
        msg = (
            f"{path} does not hold the backbone of {model.name}: {len(wrong)} of its weights differ, {wrong[0]} first."
        )
        raise ValueError(msg)
    backbone.load_state_dict({key: given[key] for key in needed})


def look_at_images(config: dict[str, Any]) -> None:
    """Refuse images that would give wrong figures, as a training of this package does, whatever the model.

    Args:
        config (dict): As for :func:`measure`.

    Raises:
        ValueError: If files cannot be used, or the test has no normal or no anomalous image.
    """
    datamodule = build_datamodule(config["data"], config["seed"])
    datamodule.prepare_data()
    datamodule.setup()
    splits = _splits(datamodule)
    check_image_files([DataLoader(split) for split in splits])
    test = splits[-1]
    if not (test.has_normal and test.has_anomalous):
        msg = (
            f"The test images of {datamodule.name} are all {'normal' if test.has_normal else 'anomalous'}, so there is "
            "nothing to measure: a benchmark needs some of both (of a Folder, in normal_dir and abnormal_dir)."
        )
        raise ValueError(msg)


@cache
def images_of(data: str, seed: int) -> str | None:
    """Tell the images of a run from others, by their names, sizes and splits.

    Args:
        data (str): The entry of the datamodule, as JSON.
        seed (int): Seed of random splits.

    Returns:
        str | None: Hexadecimal digits; None where they are not on this machine, or are generated anew each time.
    """
    try:
        datamodule = build_datamodule(json.loads(data), seed)
        if ValSplitMode.SYNTHETIC in (getattr(datamodule, f"{split}_split_mode", None) for split in ("val", "test")):
            return None
        datamodule.setup()
        splits = _splits(datamodule)
        bad = int(splits[-1].samples["label_index"].sum())
        return hashlib.sha256(repr([bad, *map(fingerprint, splits)]).encode()).hexdigest()
    except Exception:  # datamodules have many ways to say that there are none
        return None


def _splits(datamodule: AnomalibDataModule) -> list[AnomalibDataset]:
    return [getattr(datamodule, f"{split}_data") for split in ("train", "val", "test")]


def measure(
    config: dict[str, Any], folder: Path, accelerator: str = "auto", devices: str | list[int] = "auto"
) -> dict[str, Any]:
    """Train and test one model on one category with one seed.

    Args:
        config (dict): ``model``, ``data``, ``seed`` and ``image_size``.
        folder (Path): Folder for checkpoints and logs.
        accelerator (str): As Lightning's.
        devices (str | list[int]): As Lightning's.

    Returns:
        dict: The metrics in 0 .. 1 (None where the model gives no map), ``fit_s``, ``test_s``, ``ms_per_image`` (one
        resized image at a time, from pixels to score and map), ``peak_memory_mib`` (of the process without
        workers or, on CUDA, of the device), ``parameters``, ``epochs``, ``steps`` and ``device`` (the name of card or
        processor).
    """
    look_at_images(config)
    seed_everything(config["seed"], workers=True)
    model = build_model(config["model"], tuple(config["image_size"]))
    datamodule = build_datamodule(config["data"], config["seed"])
    trainer = {"logger": False, "enable_model_summary": False, **config["model"].get("trainer", {})}
    engine = Engine(**{"accelerator": accelerator, "devices": devices, **trainer}, default_root_dir=folder)

    started = time.perf_counter()
    engine.fit(model, datamodule=datamodule)
    fitted = time.perf_counter()
    epochs, steps = engine.trainer.current_epoch, engine.trainer.global_step
    results = engine.test(model, datamodule=datamodule, verbose=False)[0]
    tested = time.perf_counter()

    device = engine.trainer.strategy.root_device
    return {
        **{name: results.get(name) for name in METRICS},
        "fit_s": fitted - started,
        "test_s": tested - fitted,
        "ms_per_image": _ms_per_image(model, datamodule, engine, device),
        "peak_memory_mib": peak_memory_mib(device),
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "epochs": epochs,
        "steps": steps,
        "device": device_name(device),
    }


@torch.inference_mode()
def _ms_per_image(model: AnomalibModule, datamodule: AnomalibDataModule, engine: Engine, device: torch.device) -> float:
    model = model.to(device).eval()  # Lightning moves models to the CPU when it is done
    image = next(iter(datamodule.test_dataloader())).image[:1].to(device)
    times: list[float] = []
    while len(times) <= _MOST_TIMED and sum(times[1:]) < _TIMED_SECONDS:
        started = time.perf_counter()
        with engine.trainer.precision_plugin.forward_context():
            model(image)
        wait_for(device)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[1:])  # the first run also sets things up
