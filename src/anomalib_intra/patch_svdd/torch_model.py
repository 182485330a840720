# SPDX-License-Identifier: Apache-2.0
"""The hierarchical patch encoder (sec. 3.3) and the anomaly maps from nearest normal patches (sec. 3.4): pure torch."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import DynamicBufferMixin
from einops import rearrange, repeat
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, leaky_relu, pad

from anomalib_intra.components.checkpoint_fit import HOW_TO_CALIBRATE
from anomalib_intra.data.image_range import check_range
from anomalib_intra.patch_svdd.pairs import BIG_PATCH, SMALL_PATCH, LevelPairs, Pairs

#: Distance between the patches of an image at inference, in pixels.
SMALL_STRIDE, BIG_STRIDE = 4, 16

#: Dimension D of a feature.
FEATURE_DIM = 64

#: Bytes of similarities that are computed at a time. The product with 64-dimensional features takes no longer than
#: writing and reading its result, so on the CPU that must stay in the cache; elsewhere starting many small ones costs
#: more.
CPU_BLOCK_BYTES = 4 * 2**20
BLOCK_BYTES = 64 * 2**20
_QUERIES_AT_ONCE = 512
# An exported graph holds one step for each chunk of the bank.
_EXPORTED_CHUNK = 8192

_CHANNELS = (3, 32, 64, 128, 128, 64, 32, 32, FEATURE_DIM)
_SLOPE = 0.1


class Features(NamedTuple):
    """Features of the patches of whole images.

    Args:
        small (torch.Tensor): Features of small patches at stride 4, shape ``(B, 64, h, w)``.
        big (torch.Tensor): Features of big patches at stride 16, shape ``(B, 64, h', w')``.
    """

    small: torch.Tensor
    big: torch.Tensor


class SmallEncoder(nn.Module):
    """Eight 3x3 convolutions that turn a patch of 32 x 32 pixels into one feature.

    The last one has stride 2, which changes nothing for a single patch, and makes the map of a whole image one of
    features at stride 4.
    """

    def __init__(self) -> None:
        super().__init__()
        last = len(_CHANNELS) - 2
        layers: list[nn.Module] = []
        for n, (inputs, outputs) in enumerate(pairwise(_CHANNELS)):
            layers.append(nn.Conv2d(inputs, outputs, kernel_size=3, stride=2 if n in (0, last) else 1))
            layers.append(nn.Tanh() if n == last else nn.LeakyReLU(_SLOPE))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images or patches of shape ``(B, 3, H, W)`` to the features of their patches, ``(B, 64, h, w)``."""
        # Without channels last, training on the CPU takes half as long again.
        features = self.layers(images.contiguous(memory_format=torch.channels_last))
        # The convolutions see 31 of 32 pixels, so there may be one more feature than there are whole patches.
        rows, columns = ((side - SMALL_PATCH) // SMALL_STRIDE + 1 for side in images.shape[-2:])
        return features[..., :rows, :columns]


class BigHead(nn.Module):
    """Turns the features of the four quadrants of a big patch into one feature."""

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Conv2d(FEATURE_DIM, 128, kernel_size=2)
        self.project = nn.Conv2d(128, FEATURE_DIM, kernel_size=1)

    def forward(self, features: torch.Tensor, stride: int = 1, dilation: int = 1) -> torch.Tensor:
        """Join features.

        Args:
            features (torch.Tensor): Features of small patches, shape ``(B, 64, h, w)``.
            stride (int): Distance between big patches, in small features.
            dilation (int): Distance between the quadrants of a big patch, in small features.

        Returns:
            torch.Tensor: Features of big patches, shape ``(B, 64, h', w')``; ``(B, 64, 1, 1)`` from ``2 x 2``.
        """
        joined = conv2d(features, self.join.weight, self.join.bias, stride=stride, dilation=dilation)
        return self.project(leaky_relu(joined, _SLOPE)).tanh()


class PatchSVDDModel(DynamicBufferMixin, nn.Module):
    """Encodes patches of two sizes, and scores images by how far their patches are from those of normal images.

    Args:
        image_size (tuple[int, int]): Height and width of the images in pixels.

    Attributes:
        mean_image (torch.Tensor): Mean of the training images, shape ``(3, H, W)``.
        bank_small (torch.Tensor): Features of the small patches of the training images, shape ``(N, 64)``.
        bank_big (torch.Tensor): Features of their big patches, shape ``(M, 64)``.

    Raises:
        ValueError: If the image size does not hold a big patch.

    Example:
        >>> model = PatchSVDDModel((64, 96)).eval()
        >>> model.bank_small, model.bank_big = torch.rand(2, 5, 64)
        >>> model(torch.rand(2, 3, 64, 96)).anomaly_map.shape
        torch.Size([2, 1, 64, 96])
    """

    mean_image: torch.Tensor
    bank_small: torch.Tensor
    bank_big: torch.Tensor

    def __init__(self, image_size: tuple[int, int] = (256, 256)) -> None:
        super().__init__()
        height, width = image_size
        if min(height, width) < BIG_PATCH:
            msg = (
                f"Images of {height} x {width} pixels do not hold a patch of {BIG_PATCH} x {BIG_PATCH}: height and "
                f"width must be at least {BIG_PATCH}."
            )
            raise ValueError(msg)
        self.small_encoder = SmallEncoder()
        self.big_head = BigHead()
        self.reset_parameters()
        self.register_buffer("mean_image", torch.zeros(3, height, width))
        self.register_buffer("bank_small", torch.empty(0, FEATURE_DIM))
        self.register_buffer("bank_big", torch.empty(0, FEATURE_DIM))

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        self.apply(_initialise)

    def empty_memory_bank(self) -> None:
        """Forget the features of the training images: they belong to weights that are about to change."""
        self.bank_small, self.bank_big = self.mean_image.new_empty(2, 0, FEATURE_DIM)

    # ---- patches -----------------------------------------------------------------------------------------------------

    def encode_pairs(self, pairs: Pairs) -> Pairs:
        """Encode all patches of a training step at once.

        Args:
            pairs (Pairs): Patches, ``(B, 3, K, K)`` each.

        Returns:
            Pairs: Their features, ``(B, 64)`` each, and the labels as they were.
        """
        patches = [x for level in pairs for x in (level.first, level.second, level.near_first, level.near_second)]
        features = self.encode_all(*patches)
        return Pairs(
            small=LevelPairs(features[0], features[1], pairs.small.label, features[2], features[3]),
            big=LevelPairs(features[4], features[5], pairs.big.label, features[6], features[7]),
        )

    def encode_all(self, *groups: torch.Tensor) -> list[torch.Tensor]:
        """Encode groups of patches of either level, running each encoder once.

        Args:
            *groups (torch.Tensor): Patches with the mean image subtracted, shape ``(B, 3, 32, 32)`` or
                ``(B, 3, 64, 64)`` each.

        Returns:
            list[torch.Tensor]: The features of each group in [-1, 1], shape ``(B, 64)``.
        """
        crops = [rearrange(x, "b c (i h) (j w) -> (b i j) c h w", h=SMALL_PATCH, w=SMALL_PATCH) for x in groups]
        features = list(self.small_encoder(torch.cat(crops)).flatten(1).split([len(x) for x in crops]))
        bigs = [n for n, x in enumerate(groups) if x.shape[-1] == BIG_PATCH]
        if bigs:
            quadrants = rearrange(torch.cat([features[n] for n in bigs]), "(b i j) d -> b d i j", i=2, j=2)
            joined = self.big_head(quadrants).flatten(1).split([len(groups[n]) for n in bigs])
            for n, x in zip(bigs, joined, strict=True):
                features[n] = x
        return features

    # ---- images ------------------------------------------------------------------------------------------------------

    def encode(self, images: torch.Tensor) -> Features:
        """Encode all patches of images in float32, each layer once over the whole image.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.

        Returns:
            Features: Features of small and big patches in [-1, 1].

        Raises:
            ValueError: If the images are not of the size of the mean image, or hold values that are not finite or not
                in [0, 1].
        """
        if images.ndim != 4 or images.shape[1:] != self.mean_image.shape:
            height, width = self.mean_image.shape[-2:]
            msg = (
                f"Images of shape {tuple(images.shape)} reached a PatchSVDD for (B, 3, {height}, {width}): resize the "
                "images, or build and train the model with their image_size."
            )
            raise ValueError(msg)
        if not torch.compiler.is_compiling():
            check_range(images)
        stride, dilation = BIG_STRIDE // SMALL_STRIDE, SMALL_PATCH // SMALL_STRIDE
        # Rounded to bf16, equal patches would be as far apart as similar ones; and the search takes longer than this.
        with torch.autocast(images.device.type, enabled=False):
            small = self.small_encoder(images - self.mean_image)
            return Features(small, self.big_head(small, stride, dilation))

    @property
    def has_memory_bank(self) -> bool:
        """Whether both memory banks are filled."""
        return min(len(self.bank_small), len(self.bank_big)) > 0

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        """Score every pixel: product over both levels of the mean distance of the patches that hold it (sec. 3.4).

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.

        Returns:
            torch.Tensor: Anomaly maps in float32, shape ``(B, 1, H, W)``.

        Raises:
            RuntimeError: If there is no memory bank.
            ValueError: If :meth:`encode` refuses the images.
        """
        if not self.has_memory_bank:
            msg = (
                "This PatchSVDD has no memory bank, so it cannot score images: its training was cut off, or it was "
                f"never trained. {HOW_TO_CALIBRATE}"
            )
            raise RuntimeError(msg)
        features = self.encode(images)
        size = (images.shape[-2], images.shape[-1])
        small = _distance_map(features.small, self.bank_small)
        big = _distance_map(features.big, self.bank_big)
        return spread(small, SMALL_PATCH, SMALL_STRIDE, size) * spread(big, BIG_PATCH, BIG_STRIDE, size)

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Score images.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.

        Returns:
            InferenceBatch: Scores ``(B,)``, the maxima of the anomaly maps, and the maps ``(B, 1, H, W)``.
        """
        anomaly_map = self.anomaly_map(images)
        return InferenceBatch(pred_score=anomaly_map.amax(dim=(-3, -2, -1)), anomaly_map=anomaly_map)


def nearest_distances(queries: torch.Tensor, bank: torch.Tensor, block_bytes: int | None = None) -> torch.Tensor:
    """Euclidean distance of each query to the nearest entry of a bank, in float32.

    The nearest entry is searched by ``|b|^2 / 2 - q b``, which takes one matrix product; its distance is then computed
    from the difference, so that it does not suffer from the cancellation in that expression.

    Args:
        queries (torch.Tensor): Queries, shape ``(Q, D)``.
        bank (torch.Tensor): Entries, shape ``(N, D)`` with N of at least 1.
        block_bytes (int | None): Bytes of similarities held at a time (at least 4); by default :data:`CPU_BLOCK_BYTES`
            or :data:`BLOCK_BYTES`. An exported graph takes all queries at once instead.

    Returns:
        torch.Tensor: Distances, shape ``(Q,)``.

    Example:
        >>> nearest_distances(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[3.0, 4.0], [3.0, 0.0]]))
        tensor([3., 0.])
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, bank = queries.float(), bank.float()
        half_norms = bank.square().sum(dim=1) / 2
        if torch.compiler.is_exporting():
            return _nearest_distances(queries, bank, half_norms, _EXPORTED_CHUNK)
        if block_bytes is None:
            block_bytes = CPU_BLOCK_BYTES if queries.device.type == "cpu" else BLOCK_BYTES
        values = block_bytes // torch.float32.itemsize
        at_once = min(_QUERIES_AT_ONCE, values)
        parts = queries.split(at_once)
        return torch.cat([_nearest_distances(part, bank, half_norms, values // at_once) for part in parts])


def _nearest_distances(queries: torch.Tensor, bank: torch.Tensor, half_norms: torch.Tensor, chunk: int) -> torch.Tensor:
    nearest: torch.Tensor | None = None
    smallest = queries.new_empty(0)
    for start, entries, offset in _chunks(bank, half_norms, chunk):
        value, index = torch.addmm(offset, queries, entries.T, alpha=-1).min(dim=1)
        if nearest is None:
            smallest, nearest = value, index
        else:
            nearest = torch.where(value < smallest, index + start, nearest)
            smallest = torch.minimum(value, smallest)
    return (queries - bank[nearest]).norm(dim=1)


def _chunks(
    bank: torch.Tensor, half_norms: torch.Tensor, chunk: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    starts = range(0, len(bank), chunk)
    return zip(starts, bank.split(chunk), half_norms.split(chunk), strict=True)


def spread(distances: torch.Tensor, patch_size: int, stride: int, size: tuple[int, int]) -> torch.Tensor:
    """Give every pixel the mean of the patches that hold it (sec. 3.4).

    Pixels at the lower and right margin that no patch holds get the value of the nearest pixel that one does.

    Args:
        distances (torch.Tensor): One value for each patch, shape ``(B, 1, h, w)``.
        patch_size (int): Side length K of a patch in pixels, a multiple of ``stride``.
        stride (int): Distance between patches in pixels.
        size (tuple[int, int]): Height and width of the images in pixels.

    Returns:
        torch.Tensor: Maps of shape ``(B, 1, H, W)``.

    Example:
        >>> spread(torch.tensor([[[[1.0, 3.0]]]]), patch_size=4, stride=2, size=(4, 7))[0, 0, 0]
        tensor([1., 1., 2., 2., 3., 3., 3.])
    """
    # All pixels of a cell of stride x stride are held by the same patches.
    cells = patch_size // stride

    def pool(x: torch.Tensor) -> torch.Tensor:
        return avg_pool2d(pad(x, [cells - 1] * 4), cells, stride=1)

    means = pool(distances) / pool(torch.ones_like(distances))
    covered = repeat(means, "b c h w -> b c (h k1) (w k2)", k1=stride, k2=stride)
    return pad(covered, (0, size[1] - covered.shape[-1], 0, size[0] - covered.shape[-2]), mode="replicate")


def _distance_map(features: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    height, width = features.shape[-2:]
    distances = nearest_distances(rearrange(features, "b d h w -> (b h w) d"), bank)
    return rearrange(distances, "(b h w) -> b 1 h w", h=height, w=width)


def _initialise(module: nn.Module) -> None:
    # With torch's default the features of different patches differ by 1e-4, less than bf16 can tell.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, a=_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
