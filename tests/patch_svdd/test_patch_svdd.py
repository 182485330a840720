# SPDX-License-Identifier: Apache-2.0
"""Patch SVDD's encoder, memory banks, anomaly maps, training pairs and loss against loops over the paper's words."""

import math
from collections import Counter
from dataclasses import fields

import pytest
import torch

from anomalib_intra.patch_svdd import torch_model as torch_model_module
from anomalib_intra.patch_svdd.loss import PatchSVDDLoss
from anomalib_intra.patch_svdd.pairs import DIRECTIONS, LevelPairs, PairBatch, Pairs, cut_pairs, sample_pairs
from anomalib_intra.patch_svdd.torch_model import PatchSVDDModel, nearest_distances, spread

SIDES = {"small": 32, "big": 64}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_of(image_size, seed=0, banks=True):
    torch.manual_seed(seed)
    model = PatchSVDDModel(image_size).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.mean_image.uniform_(0.3, 0.7)
    if banks:
        model.bank_small, model.bank_big = torch.rand(30, 64) * 2 - 1, torch.rand(7, 64) * 2 - 1
    return model


# ---- encoder ---------------------------------------------------------------------------------------------------------


def test_architecture_is_the_papers():
    model = PatchSVDDModel((64, 64))
    convolutions = [module for module in model.small_encoder.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [32, 64, 128, 128, 64, 32, 32, 64]
    assert [c.in_channels for c in convolutions] == [3, 32, 64, 128, 128, 64, 32, 32]
    assert all(c.kernel_size == (3, 3) and c.padding == (0, 0) and c.bias is not None for c in convolutions)
    assert convolutions[0].stride == (2, 2)
    assert sum(p.numel() for p in model.parameters()) == 401_984


@pytest.mark.parametrize("side", [32, 64])
def test_features_of_patches_use_the_whole_range_of_tanh_and_no_more(side):
    features = model_of((64, 64)).encode_all(torch.randn(8, 3, side, side))[0]
    assert features.shape == (8, 64)
    assert features.abs().max() <= 1
    assert features.min() < -0.5
    assert features.max() > 0.5


def test_big_patches_are_encoded_quadrant_by_quadrant():
    model = model_of((64, 64))
    patches = torch.randn(3, 3, 64, 64)
    for number, patch in enumerate(patches):
        quadrants = {}
        for i in range(2):
            for j in range(2):
                crop = patch[:, 32 * i : 32 * i + 32, 32 * j : 32 * j + 32]
                quadrants[i, j] = model.encode_all(crop[None])[0][0]
        joined = model.big_head.join.bias.clone()
        for (i, j), feature in quadrants.items():
            joined += model.big_head.join.weight[:, :, i, j] @ feature
        joined = torch.where(joined > 0, joined, 0.1 * joined)
        expected = (model.big_head.project.weight[:, :, 0, 0] @ joined + model.big_head.project.bias).tanh()
        torch.testing.assert_close(model.encode_all(patches)[0][number], expected, rtol=0, atol=1e-5)


def test_features_of_different_patches_differ_from_the_start():
    torch.manual_seed(0)
    model = PatchSVDDModel((64, 64))
    for side in (32, 64):
        # Noise as strong as the contrast of images.
        assert model.encode_all(0.2 * torch.randn(16, 3, side, side))[0].std(dim=0).mean() > 0.02


def test_groups_encoded_at_once_come_back_in_order_and_each_encoder_runs_once():
    model = model_of((64, 64))
    groups = [torch.randn(count, 3, side, side) for count, side in ((2, 64), (3, 32), (1, 64), (4, 32))]
    calls = Counter()
    model.small_encoder.register_forward_hook(lambda *_: calls.update(["small"]))
    model.big_head.register_forward_hook(lambda *_: calls.update(["big"]))
    together = model.encode_all(*groups)
    assert calls == {"small": 1, "big": 1}
    for got, group in zip(together, groups, strict=True):
        torch.testing.assert_close(got, model.encode_all(group)[0], rtol=0, atol=1e-5)


def test_pairs_encoded_at_once_keep_their_places():
    model = model_of((128, 128))
    pairs = cut_pairs(sample_pairs(torch.rand(2, 3, 128, 128), 2, seeded()), model.mean_image)
    features = model.encode_pairs(pairs)
    for level in ("small", "big"):
        patches, got = getattr(pairs, level), getattr(features, level)
        assert torch.equal(got.label, patches.label)
        for name in ("first", "second", "near_first", "near_second"):
            torch.testing.assert_close(
                getattr(got, name), model.encode_all(getattr(patches, name))[0], rtol=0, atol=1e-5
            )


@pytest.mark.parametrize(
    "size", [(64, 64), (64, 80), (96, 64), (67, 82), (65, 99), (83, 71), (127, 66)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_whole_images_are_encoded_as_patch_by_patch(size):
    model = model_of(size)
    images = torch.rand(2, 3, *size)
    features = model.encode(images)
    for side, stride, got in ((32, 4, features.small), (64, 16, features.big)):
        rows, columns = range(0, size[0] - side + 1, stride), range(0, size[1] - side + 1, stride)
        assert got.shape == (2, 64, len(rows), len(columns))
        patches = torch.stack(
            [(images - model.mean_image)[..., y : y + side, x : x + side] for y in rows for x in columns]
        )
        expected = model.encode_all(patches.flatten(0, 1))[0].unflatten(0, (len(rows), len(columns), 2))
        torch.testing.assert_close(got, expected.permute(2, 3, 0, 1), rtol=0, atol=1e-5)


def test_grids_of_the_usual_size():
    with torch.device("meta"):
        model = PatchSVDDModel((256, 256))
        small = model.small_encoder(torch.empty(1, 3, 256, 256))
        assert small.shape[-2:] == (57, 57)
        assert model.big_head(small, 4, 8).shape[-2:] == (13, 13)


@pytest.mark.parametrize("size", [(63, 64), (64, 63), (32, 256)])
def test_images_that_hold_no_big_patch_are_refused(size):
    with pytest.raises(ValueError, match=f"Images of {size[0]} x {size[1]} pixels.*at least 64"):
        PatchSVDDModel(size)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 80, 64), torch.zeros(1, 1, 64, 80), torch.zeros(3, 64, 80)],
    ids=lambda x: str(tuple(x.shape)),
)
def test_images_of_another_shape_are_refused(images):
    with pytest.raises(ValueError, match=r"\(B, 3, 64, 80\): resize"):
        model_of((64, 80))(images)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_images_out_of_range_are_refused(value):
    images = torch.rand(2, 3, 64, 64)
    images[1, 2, 5, 7] = value
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        model_of((64, 64)).encode(images)


# ---- nearest neighbours ----------------------------------------------------------------------------------------------


@pytest.fixture
def blocks(monkeypatch):
    """Sizes in bytes of the blocks of similarities."""
    sizes = []
    original = torch.addmm

    def spy(*args, **kwargs):
        result = original(*args, **kwargs)
        sizes.append(result.numel() * result.element_size())
        return result

    monkeypatch.setattr(torch, "addmm", spy)
    return sizes


@pytest.mark.parametrize("block_bytes", [4, 100, 4 * 7 * 5, 4 * 512, 4 * 512 * 3, 10**6, None])
@pytest.mark.parametrize(("count", "entries"), [(1, 1), (13, 1), (7, 50), (600, 47), (1, 50)])
def test_distances_are_those_of_cdist_in_blocks_no_larger_than_told(blocks, count, entries, block_bytes):
    queries, bank = torch.rand(count, 8, generator=seeded()), torch.rand(entries, 8, generator=seeded(1))
    if block_bytes in (4, 100):
        queries = queries[:30]
    expected = torch.cdist(queries.double(), bank.double()).amin(dim=1)
    got = nearest_distances(queries, bank, *([] if block_bytes is None else [block_bytes]))
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-6)
    limit = torch_model_module.CPU_BLOCK_BYTES if block_bytes is None else block_bytes
    assert max(blocks) <= limit
    assert sum(blocks) == len(queries) * entries * 4


def test_default_blocks_of_many_queries_and_entries_are_bounded_and_not_tiny(blocks):
    nearest_distances(torch.rand(1300, 2), torch.rand(9000, 2))
    assert max(blocks) == torch_model_module.CPU_BLOCK_BYTES


@pytest.mark.parametrize("block_bytes", [200, 10**6])
def test_a_query_in_the_bank_has_distance_zero_far_from_the_origin_too(block_bytes):
    bank = 1000 + 100 * torch.rand(40, 64, generator=seeded())
    assert torch.equal(nearest_distances(bank.flip(0), bank, block_bytes), torch.zeros(40))


def test_a_short_distance_far_from_the_origin_is_not_cancelled():
    bank = torch.full((1, 64), 100.0)
    queries = bank + 2**-10 * torch.eye(64)
    assert torch.equal(nearest_distances(queries, bank), torch.full((64,), 2.0**-10))


def test_ties_within_and_across_chunks():
    bank = torch.tensor([[5.0, 5.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    for block_bytes in (4, 8, 12, 1000):
        assert torch.equal(nearest_distances(torch.zeros(3, 2), bank, block_bytes), torch.ones(3))


@pytest.mark.parametrize("position", range(9))
def test_the_nearest_is_found_in_every_chunk(position):
    bank = torch.full((9, 3), 10.0)
    bank[position] = 1.0
    assert nearest_distances(torch.ones(1, 3), bank, 4 * 2).item() == 0


def test_autocast_and_half_precision_change_nothing():
    queries, bank = torch.rand(20, 64, generator=seeded()), torch.rand(300, 64, generator=seeded(1))
    expected = nearest_distances(queries, bank)
    with torch.autocast("cpu", torch.bfloat16):
        got = nearest_distances(queries, bank)
        rounded = nearest_distances(queries.bfloat16(), bank)
    assert got.dtype == rounded.dtype == torch.float32
    assert torch.equal(got, expected)
    assert torch.equal(rounded, nearest_distances(queries.bfloat16().float(), bank))


# ---- anomaly maps ----------------------------------------------------------------------------------------------------


def reference_spread(distances, side, stride, height, width):
    """Mean over the patches that hold a pixel, for nested lists of one map."""
    reach_y, reach_x = (len(distances) - 1) * stride + side, (len(distances[0]) - 1) * stride + side
    result = []
    for y in range(height):
        row = []
        for x in range(width):
            near_y, near_x = min(y, reach_y - 1), min(x, reach_x - 1)
            held = [
                value
                for i, values in enumerate(distances)
                for j, value in enumerate(values)
                if i * stride <= near_y < i * stride + side and j * stride <= near_x < j * stride + side
            ]
            row.append(sum(held) / len(held))
        result.append(row)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("size", [(64, 64), (64, 80), (79, 66), (67, 97)])
@pytest.mark.parametrize(("side", "stride"), [(32, 4), (64, 16)])
def test_every_pixel_gets_the_mean_of_the_patches_that_hold_it(size, side, stride):
    shape = [(length - side) // stride + 1 for length in size]
    distances = torch.rand(2, 1, *shape, generator=seeded(), dtype=torch.float64)
    got = spread(distances, side, stride, size)
    assert got.shape == (2, 1, *size)
    for number in range(2):
        expected = reference_spread(distances[number, 0].tolist(), side, stride, *size)
        torch.testing.assert_close(got[number, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(64, 80), (70, 81)])
def test_map_is_the_product_of_both_levels_and_score_its_maximum(size):
    model = model_of(size)
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        result = model(images)
        features = model.encode(images)
    for number in range(2):
        expected = torch.ones(size, dtype=torch.float64)
        for side, stride, grid, bank in (
            (32, 4, features.small, model.bank_small),
            (64, 16, features.big, model.bank_big),
        ):
            queries = grid[number].double().permute(1, 2, 0)
            distances = [[min((entry - query).norm().item() for entry in bank) for query in row] for row in queries]
            expected *= reference_spread(distances, side, stride, *size)
        torch.testing.assert_close(result.anomaly_map[number, 0].double(), expected, rtol=1e-5, atol=0)
        assert result.pred_score[number] == result.anomaly_map[number].max()
    assert result.pred_score.shape == (2,)


@pytest.mark.parametrize("empty", [("bank_small",), ("bank_big",), ("bank_small", "bank_big")])
def test_without_banks_images_are_refused(empty):
    model = model_of((64, 64))
    assert model.has_memory_bank
    for name in empty:
        setattr(model, name, torch.empty(0, 64))
    assert not model.has_memory_bank
    with pytest.raises(RuntimeError, match=r"has no memory bank.*go on with its training"):
        model(torch.rand(1, 3, 64, 64))


def test_banks_and_mean_image_travel_in_the_state_dict_and_empty_ones_do():
    model = model_of((64, 80))
    images = torch.rand(1, 3, 64, 80)
    fresh = model_of((64, 80), seed=1, banks=False)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images).anomaly_map, model(images).anomaly_map)
    model.load_state_dict(PatchSVDDModel((64, 80)).state_dict())
    assert model.bank_small.shape == model.bank_big.shape == (0, 64)


def test_exported_graph_scores_alike_for_every_batch_size(monkeypatch):
    monkeypatch.setattr(torch_model_module, "_EXPORTED_CHUNK", 12)
    model = model_of((64, 80))
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (torch.rand(2, 3, 64, 80),), dynamic_shapes=shapes)
    for batch in (1, 2, 3):
        images = torch.rand(batch, 3, 64, 80)
        got, expected = program.module()(images), model(images)
        torch.testing.assert_close(got.anomaly_map, expected.anomaly_map)
        torch.testing.assert_close(got.pred_score, expected.pred_score)


def test_maps_under_autocast_are_in_float32_and_close():
    model = model_of((64, 64))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images).anomaly_map
        with torch.autocast("cpu", torch.bfloat16):
            got = model(images).anomaly_map
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0)


# ---- drawing pairs ---------------------------------------------------------------------------------------------------


def pairs_drawn(size=(128, 160), images=4, pairs_per_image=3000, seed=0):
    return sample_pairs(torch.zeros(images, 3, *size), pairs_per_image, seeded(seed))


def fields_of(batch, level):
    names = ("position", "label", "offset", "near_position", "near_offset")
    return tuple(getattr(batch, f"{level}_{name}") for name in names)


@pytest.mark.parametrize("level", ["small", "big"])
def test_neighbours_lie_where_their_label_says_at_three_quarters_of_a_patch_or_more(level):
    K = SIDES[level]
    _, label, offset, _, _ = fields_of(pairs_drawn(), level)
    for number, (dy, dx) in enumerate(DIRECTIONS):
        chosen = offset[label == number]
        # 1500 expected, with a standard deviation of 36.
        assert 1300 < len(chosen) < 1700
        assert (chosen.sign() == torch.tensor((dy, dx))).all()
        for axis in range(2):
            if (dy, dx)[axis]:
                assert set(chosen[:, axis].abs().tolist()) == set(range(3 * K // 4, K))
        if dy and dx:
            assert len(set(map(tuple, chosen.abs().tolist()))) > (K // 4) ** 2 / 2
    assert sorted(set(DIRECTIONS)) == [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


@pytest.mark.parametrize("level", ["small", "big"])
def test_near_patches_are_shifted_by_every_small_vector_alike_but_not_by_zero(level):
    reach = SIDES[level] // 16
    offset = fields_of(pairs_drawn(), level)[4]
    seen = Counter(map(tuple, offset.tolist()))
    side = range(-reach, reach + 1)
    assert set(seen) == {(y, x) for y in side for x in side} - {(0, 0)}
    expected = len(offset) / len(seen)
    assert max(seen.values()) < expected + 5 * math.sqrt(expected)
    assert min(seen.values()) > expected - 5 * math.sqrt(expected)


@pytest.mark.parametrize("size", [(128, 128), (128, 160), (141, 130)])
@pytest.mark.parametrize("level", ["small", "big"])
def test_both_patches_lie_inside_and_reach_every_margin(level, size):
    K = SIDES[level]
    position, _, offset, near_position, near_offset = fields_of(pairs_drawn(size), level)
    for start, shift in ((position, offset), (near_position, near_offset)):
        for patches in (start, start + shift):
            assert patches.amin(dim=0).tolist() == [0, 0]
            assert (patches + K).amax(dim=0).tolist() == list(size)


def test_first_patches_are_drawn_uniformly():
    position, _, offset, _, _ = fields_of(pairs_drawn((128, 128), images=40), "small")
    for axis in range(2):
        still = position[offset[:, axis] == 0, axis]
        seen = torch.bincount(still, minlength=97)
        expected = len(still) / 97
        assert (seen - expected).abs().max() < 5 * math.sqrt(expected)


def test_every_image_gets_exactly_its_number_of_draws_in_mixed_order():
    batch = pairs_drawn(images=7, pairs_per_image=30)
    assert len(batch) == 210
    assert Counter(batch.index.tolist()) == dict.fromkeys(range(7), 30)
    assert len(set(batch.index[:32].tolist())) >= 6
    assert len(set(batch.index[:7].tolist())) < 7
    assert batch.index[:7].tolist() != batch.index[7:14].tolist()


def test_all_fields_are_cut_into_steps_alike():
    batch = pairs_drawn(images=2, pairs_per_image=5)
    for field in fields(PairBatch):
        if field.name != "image":
            assert len(getattr(batch, field.name)) == 10


def test_draws_depend_on_the_generator_alone():
    names = [field.name for field in fields(PairBatch) if field.name != "image"]
    first = pairs_drawn(pairs_per_image=20, seed=5)
    torch.manual_seed(99)
    again, other = pairs_drawn(pairs_per_image=20, seed=5), pairs_drawn(pairs_per_image=20, seed=6)
    for name in names:
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_levels_and_tasks_are_drawn_independently():
    batch = pairs_drawn(pairs_per_image=100)
    assert not torch.equal(batch.small_label, batch.big_label)
    assert not torch.equal(batch.small_position, batch.small_near_position)


@pytest.mark.parametrize("size", [(127, 128), (128, 127), (64, 256)])
def test_images_too_small_for_two_big_patches_are_refused(size):
    with pytest.raises(ValueError, match=f"Images of {size[0]} x {size[1]} pixels.*at least 128"):
        pairs_drawn(size)


# ---- cutting pairs ---------------------------------------------------------------------------------------------------


def test_patches_are_slices_of_the_image_less_its_mean():
    images, mean = torch.rand(3, 3, 128, 150, generator=seeded()), torch.rand(3, 128, 150, generator=seeded(1))
    batch = sample_pairs(images, 4, seeded(2))
    pairs = cut_pairs(batch, mean, noise=0)
    for level, K in SIDES.items():
        position, label, offset, near_position, near_offset = fields_of(batch, level)
        got = getattr(pairs, level)
        assert torch.equal(got.label, label)
        corners = {
            "first": position,
            "second": position + offset,
            "near_first": near_position,
            "near_second": near_position + near_offset,
        }
        for name, corner in corners.items():
            for number, (y, x) in enumerate(corner.tolist()):
                expected = (images - mean)[batch.index[number], :, y : y + K, x : x + K]
                assert torch.equal(getattr(got, name)[number], expected), (level, name, number)


def test_neighbours_as_cut_lie_in_the_direction_of_their_label():
    # Pixels hold their own place, so patches do too.
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    images = torch.stack((y, x, y))[None]
    pairs = cut_pairs(sample_pairs(images, 200, seeded()), torch.zeros(3, 128, 128), noise=0)
    for level in pairs:
        shift = (level.second - level.first)[:, :2].mean(dim=(-2, -1))
        for number, direction in enumerate(DIRECTIONS):
            assert (shift[level.label == number].sign() == torch.tensor(direction)).all()


@pytest.mark.parametrize("level", ["small", "big"])
def test_noise_is_a_shift_and_pixel_noise_on_the_position_task_alone(level):
    torch.manual_seed(0)
    mean = torch.zeros(3, 128, 128)
    got = getattr(cut_pairs(sample_pairs(torch.full((2, 3, 128, 128), 0.5), 150, seeded()), mean), level)
    for patches in (got.near_first, got.near_second):
        assert torch.equal(patches, torch.full_like(patches, 0.5))
    for patches in (got.first, got.second):
        noise = patches - 0.5
        shift = noise.mean(dim=(-2, -1))
        assert shift.std().item() == pytest.approx(0.02, rel=0.1)
        assert abs(shift.mean().item()) < 0.004
        pixels = noise - shift[..., None, None]
        assert pixels.std().item() == pytest.approx(0.02, rel=0.02)
        # Each channel has noise of its own.
        for values in (shift.T, pixels.transpose(0, 1).flatten(1)):
            correlation = torch.corrcoef(values)
            assert correlation[~torch.eye(3, dtype=torch.bool)].abs().max() < 0.25
    assert torch.corrcoef(torch.stack((got.first.flatten(), got.second.flatten())))[0, 1].abs() < 0.1


def test_noise_comes_from_the_global_source():
    batch = sample_pairs(torch.rand(1, 3, 128, 128), 2, seeded())
    torch.manual_seed(1)
    first = cut_pairs(batch, torch.zeros(3, 128, 128)).small.first
    assert not torch.equal(cut_pairs(batch, torch.zeros(3, 128, 128)).small.first, first)
    torch.manual_seed(1)
    assert torch.equal(cut_pairs(batch, torch.zeros(3, 128, 128)).small.first, first)


# ---- loss ------------------------------------------------------------------------------------------------------------


def features_of(seed, batch=5):
    def level(generator):
        a, b, c, d = torch.rand(4, batch, 64, generator=generator, dtype=torch.float64) * 2 - 1
        return LevelPairs(a, b, torch.randint(8, (batch,), generator=generator), c, d)

    return Pairs(level(seeded(seed)), level(seeded(seed + 1)))


def reference_terms(features, loss):
    position = svdd = 0.0
    for level, classifier in ((features.small, loss.classifier_small), (features.big, loss.classifier_big)):
        layers = [(m.weight.tolist(), m.bias.tolist()) for m in classifier if isinstance(m, torch.nn.Linear)]
        assert [len(bias) for _, bias in layers] == [128, 128, 8]
        for first, second, label, near, nearer in zip(*(x.tolist() for x in level), strict=True):
            x = [a - b for a, b in zip(first, second, strict=True)]
            for n, (weight, bias) in enumerate(layers):
                x = [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
                if n < 2:
                    x = [v if v > 0 else 0.1 * v for v in x]
            position += (math.log(sum(math.exp(v) for v in x)) - x[label]) / len(level.label)
            svdd += math.dist(near, nearer) / len(level.label)
    return position, svdd


@pytest.mark.parametrize("svdd_weight", [0.0, 1e-3, 0.7])
def test_loss_is_position_plus_lambda_times_svdd(svdd_weight):
    torch.manual_seed(0)
    loss = PatchSVDDLoss(svdd_weight).double()
    features = features_of(seed=3)
    position, svdd = reference_terms(features, loss)
    got = loss(features)
    assert got.position.item() == pytest.approx(position, abs=1e-9)
    assert got.svdd.item() == pytest.approx(svdd, abs=1e-9)
    assert got.total.item() == pytest.approx(position + svdd_weight * svdd, abs=1e-9)


def test_default_lambda():
    assert PatchSVDDLoss().svdd_weight == 1e-3


def test_near_features_are_drawn_together_and_never_give_nan():
    features = features_of(seed=0)
    equal = features.small.near_first.float().requires_grad_()
    apart = features.big.near_first.float().requires_grad_()
    small = LevelPairs(features.small.first.float(), features.small.second.float(), features.small.label, equal, equal)
    small = small._replace(near_second=equal.detach().clone())
    target = features.big.near_second.float()
    big = LevelPairs(features.big.first.float(), features.big.second.float(), features.big.label, apart, target)
    terms = PatchSVDDLoss(svdd_weight=1.0)(Pairs(small, big))
    terms.total.backward()
    assert torch.equal(equal.grad, torch.zeros_like(equal))
    # The gradient of the unsquared norm is a unit vector, of the mean over the batch.
    torch.testing.assert_close(apart.grad.norm(dim=1), torch.full((5,), 0.2))
    assert ((apart - target) * apart.grad).sum() > 0


def test_bf16_features_are_compared_in_float32():
    features = Pairs(
        *(LevelPairs(*(x.bfloat16() if x.is_floating_point() else x for x in level)) for level in features_of(0))
    )
    with torch.autocast("cpu", torch.bfloat16):
        got = PatchSVDDLoss()(features)
    assert {term.dtype for term in got} == {torch.float32}
    wide = Pairs(*(LevelPairs(*(x.float() if x.is_floating_point() else x for x in level)) for level in features))
    assert torch.equal(got.svdd, PatchSVDDLoss()(wide).svdd)


# ---- a training step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16 autocast"])
def test_every_parameter_is_trained(bf16):
    torch.manual_seed(0)
    model, loss = PatchSVDDModel((128, 128)), PatchSVDDLoss()
    pairs = cut_pairs(sample_pairs(torch.rand(2, 3, 128, 128), 4, seeded()), model.mean_image)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss(model.encode_pairs(pairs)).total.backward()
    for name, parameter in [*model.named_parameters(), *loss.named_parameters()]:
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_each_term_trains_both_encoders():
    torch.manual_seed(0)
    model, loss = PatchSVDDModel((128, 128)), PatchSVDDLoss()
    pairs = cut_pairs(sample_pairs(torch.rand(2, 3, 128, 128), 4, seeded()), model.mean_image)
    for term in ("position", "svdd"):
        model.zero_grad()
        getattr(loss(model.encode_pairs(pairs)), term).backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters()), term


def test_training_learns_positions():
    y, x = torch.meshgrid(torch.linspace(0, 1, 128), torch.linspace(0, 1, 128), indexing="ij")
    images = torch.stack((y, x, y * x))[None]
    torch.manual_seed(0)
    model, loss = PatchSVDDModel((128, 128)), PatchSVDDLoss()
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=1e-3)
    model.mean_image.fill_(0.5)
    history = []
    for step in range(12):
        terms = loss(model.encode_pairs(cut_pairs(sample_pairs(images, 16, seeded(step)), model.mean_image)))
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        history.append(terms.position.item())
    assert history[0] > 2 * math.log(8) - 0.5
    assert min(history[-3:]) < 0.75 * history[0]


def test_draws_are_where_the_images_are():
    draws = sample_pairs(torch.rand(2, 3, 128, 128, device="meta"), 3, torch.Generator().manual_seed(0))
    assert all(value.device.type == "meta" for value in vars(draws).values() if value is not None)


def test_images_are_encoded_in_float32_also_where_training_is_in_bf16():
    torch.manual_seed(0)
    model = PatchSVDDModel((128, 128)).eval()
    images = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        expected = model.encode(images)
        with torch.autocast("cpu", torch.bfloat16):
            got = model.encode(images)
    assert torch.equal(got.small, expected.small)
    assert torch.equal(got.big, expected.big)
