# SPDX-License-Identifier: Apache-2.0
"""Muon and AdamW in one optimizer, against torch's own."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer

from anomalib_intra import OnePassInTra
from anomalib_intra.one_pass.optimizer import Muon, orthogonal
from tests.conftest import TINY_ONE_PASS

SHAPES = [(32, 8), (8, 32), (16, 16)]


def weights(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def descend(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_a_matrix_made_orthogonal_keeps_its_singular_vectors(shape: tuple[int, int], size: float) -> None:
    matrix = size * torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    in_the_same_directions = u.T @ orthogonal(matrix) @ v.T
    off = in_the_same_directions - torch.diag(in_the_same_directions.diag())
    assert off.abs().max() < 1e-9
    large = values > 0.01 * values.norm()
    assert large.sum() >= len(values) - 1
    assert ((in_the_same_directions.diag()[large] > 0.6) & (in_the_same_directions.diag()[large] < 1.25)).all()


def test_no_gradient_is_no_step() -> None:
    assert torch.equal(orthogonal(torch.zeros(4, 8)), torch.zeros(4, 8))


def test_what_is_no_matrix_changes_as_by_torchs_adamw() -> None:
    ours, theirs = weights(), weights()
    descend(Muon([{"params": ours}], lr=0.01, betas=(0.9, 0.98), weight_decay=0.1), ours)
    descend(torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.98), weight_decay=0.1), theirs)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_matrices_change_as_by_torchs_muon_but_for_its_bfloat16() -> None:
    ours, theirs, before = weights(), weights(), weights()
    descend(Muon([{"params": ours, "matrices": True}], lr=0.01, momentum=0.9, weight_decay=0.1), ours)
    muon = torch.optim.Muon(theirs, lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    descend(muon, theirs)
    for one, other, start in zip(ours, theirs, before, strict=True):
        assert (one - other).norm() < 0.02 * (one - start).norm()


def test_a_stopped_optimizer_goes_on_bit_for_bit() -> None:
    at_once, in_two = weights(), weights()
    groups = [{"params": at_once[:2], "matrices": True}, {"params": at_once[2:], "lr": 0.02}]
    descend(first := Muon(groups, lr=0.01), at_once)
    saved = copy.deepcopy(first.state_dict())
    for one, other in zip(in_two, at_once, strict=True):
        one.data.copy_(other.data)
    second = Muon([{"params": in_two[:2], "matrices": True}, {"params": in_two[2:]}], lr=1.0)
    second.load_state_dict(saved)
    descend(first, at_once)
    descend(second, in_two)
    assert all(torch.equal(*pair) for pair in zip(at_once, in_two, strict=True))


def test_weights_without_a_gradient_stay() -> None:
    parameters, before = weights(), weights()
    optimizer = Muon([{"params": parameters[:2], "matrices": True}, {"params": parameters[2:]}], lr=0.01)
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(parameters, before, strict=True))


def test_the_model_gives_it_every_weight_once_and_matrices_between_tokens_as_such() -> None:
    model = OnePassInTra(**TINY_ONE_PASS)
    configured = model.configure_optimizers()
    groups = configured["optimizer"].param_groups
    given = [id(weight) for group in groups for weight in group["params"]]
    assert len(given) == len(set(given))
    assert set(given) == {id(weight) for weight in model.parameters()}
    names = {id(weight): name for name, weight in model.model.named_parameters()}
    assert [group["initial_lr"] for group in groups] == [model.learning_rate * share for share in (0.5, 1, 0.5)]
    matrices = {names[id(weight)] for group in groups if group["matrices"] for weight in group["params"]}
    assert {"content_blocks.0.mlp.fc1.weight", "near_key_value.weight", "blocks.1.attention.query.weight"} <= matrices
    assert not any(name.startswith(("patch_embedding", "to_pixels", "comparison")) for name in matrices)
    assert not any("bias" in name or "norm" in name or "position" in name for name in matrices)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_muon_computes_in_the_precision_of_the_training(precision: str, dtype: torch.dtype) -> None:
    model = OnePassInTra(**TINY_ONE_PASS)
    model.trainer = Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False)
    assert model.configure_optimizers()["optimizer"].dtype == dtype
    model.trainer = None
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        optimizer = model.configure_optimizers()["optimizer"]
    assert optimizer.dtype == copy.deepcopy(optimizer).dtype == dtype
