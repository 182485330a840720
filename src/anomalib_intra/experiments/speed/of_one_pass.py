# SPDX-License-Identifier: Apache-2.0
"""The work of OnePassInTra: images, painted with one radius in training and with all in a reconstruction."""

import copy
from functools import cached_property, partial
from itertools import product

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from anomalib_intra.experiments.speed.ceiling import Product
from anomalib_intra.experiments.speed.workload import Task, Workload
from anomalib_intra.one_pass.attention import CrossAttention
from anomalib_intra.one_pass.lightning_model import OnePassInTra
from anomalib_intra.one_pass.torch_model import OnePassTransformer


class OnePassWorkload(Workload):
    """The work of OnePassInTra; plainly, it attends by the formula that its attention for a CPU is another form of.

    Args:
        module (OnePassInTra): The model, on a device.
    """

    unit = "images"
    ratio = "times_plain"

    def __init__(self, module: OnePassInTra) -> None:
        self.module = module
        self._model = module.model
        self._plain = plain(module.model)

    @property
    def products(self) -> set[Product]:
        """Those of all linear layers, for the patches of a training step and of an image with all radii."""
        patches = self._model.grid.inside.numel()
        layers = {layer.weight.shape for layer in self._model.modules() if isinstance(layer, nn.Linear)}
        paintings = {self.module.images_per_step, len(self._model.radii)}
        return {Product(number * patches, inputs, outputs) for (outputs, inputs), number in product(layers, paintings)}

    @cached_property
    def flops_of_a_sample(self) -> int:
        """Operations of an image painted with one radius."""
        return flops_of_an_image(self._model, self._model.radii[:1])

    @cached_property
    def flops_of_an_image(self) -> int:
        """Operations of an image painted with all radii."""
        return flops_of_an_image(self._model, self._model.radii)

    def reconstruct(self, images: torch.Tensor) -> Task:
        """Paint images ``(B, 3, H, W)`` with all radii, and compare them by the head."""
        return Task("reconstruct", len(images), len(images) * self.flops_of_an_image, partial(self._model, images))

    def plainly(self) -> Task:
        """The same with an image and plain attention."""
        image = torch.rand(1, 3, *self._model.image_size, device=self._model.inpaint_embedding.device)
        return Task("plain attention", 1, self.flops_of_an_image, partial(self._plain, image))


def plain(model: OnePassTransformer) -> OnePassTransformer:
    """Copy a model, for it to attend plainly on any device.

    Args:
        model (OnePassTransformer): The transformer.

    Returns:
        OnePassTransformer: A copy with the same results.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, CrossAttention):
            module.plainly = True
    return model


def flops_of_an_image(model: OnePassTransformer, radii: tuple[int, ...]) -> int:
    """Count the work of an image with plain attention, what is masked in it included.

    Args:
        model (OnePassTransformer): The transformer.
        radii (tuple[int, ...]): Radii of the holes.

    Returns:
        int: Floating-point operations.
    """
    image = torch.rand(1, 3, *model.image_size, device=model.inpaint_embedding.device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        plain(model).paint(image, radii)
    return counter.get_total_flops()
