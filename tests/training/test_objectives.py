"""DINO on the adapter: the loss, the teacher and the centre against their formulas, and the crops."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from iosr_fast.backbones.adapter import init_adapter
from iosr_fast.backbones.load import LoadedModel
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.config import DinoConfig
from iosr_fast.training.objectives import Dino

SMALL = DinoConfig(out_dim=24, hidden=16, head_bottleneck=8, local_crops=3)


def build(clip: LoadedModel, config: DinoConfig = SMALL, epochs: int = 5) -> Dino:
    torch.manual_seed(0)
    adapter = init_adapter(clip, 4, bottleneck=8, scale=0.5)
    with torch.no_grad():
        for value in adapter.parameters():
            value.copy_(torch.randn_like(value) * 0.2)
    return Dino(AdaptedEncoder(clip, 4), adapter, config, epochs).eval()


def test_loss_and_centre_equal_their_formulas(clip: LoadedModel) -> None:
    """Also: pictures of weight zero count for nothing."""
    dino = build(clip)
    with torch.no_grad():
        dino.center.copy_(torch.randn(24) * 0.1)
        for value in dino.teacher_head.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    centre, count = dino.center.double().numpy().copy(), 5
    stems = [dino.encoder.stem(torch.randn(count * n, 3, size, size)) for n, size in ((2, 64), (3, 32))]
    with torch.no_grad():
        labels = torch.zeros(count, dtype=torch.int64)
        assert [value.item() for value in dino(stems, labels, 0.0)] == [0, 0] and not dino._outputs.any()
        loss, agreement = dino(stems, labels)
        student = [dino.student_head(dino.encoder.tail(dino.student, *stem)).double().numpy() for stem in stems]
        teacher = dino.teacher_head(dino.encoder.tail(dino.teacher, *stems[0])).double().numpy()
    views = np.concatenate(student).reshape(5, count, 24)
    targets = softmax((teacher - centre) / 0.04, axis=-1).reshape(2, count, 24)
    logs = np.log(softmax(views / 0.1, axis=-1))
    terms = [-(targets[g] * logs[v]).sum(-1) for g in range(2) for v in range(5) if v != g]
    expected = np.mean(terms, axis=0).sum()  # the mean over 8 pairs of views, the sum over pictures
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert agreement.item() == (targets[0].argmax(1) == views[1].argmax(1)).sum()
    dino.after_step(0.5, lambda values: values)
    np.testing.assert_allclose(dino.center.numpy(), 0.9 * centre + 0.1 * teacher.mean(0), rtol=1e-4, atol=1e-6)


def test_the_teacher_is_a_moving_average_whose_momentum_rises_to_one(clip: LoadedModel) -> None:
    dino = build(clip, replace(SMALL, momentum=0.9))
    for share, moved in ((0.0, 0.1), (1.0, 0.0)):  # of all steps; of the difference to the student
        before = copy.deepcopy(dino.teacher)
        dino._outputs[-1] = 1.0
        with torch.no_grad():
            for student, teacher in zip(dino.student.parameters(), dino.teacher.parameters(), strict=True):
                student.copy_(teacher + 1.0)
        dino.after_step(share, lambda values: values)
        for old, new in zip(before.parameters(), dino.teacher.parameters(), strict=True):
            torch.testing.assert_close(new, old + moved)


def test_the_teachers_temperature_rises_over_its_warm_up(clip: LoadedModel) -> None:
    dino, temperatures = build(clip), []
    for epoch in range(5):
        dino.begin_epoch(epoch)
        temperatures.append(dino.temperature)
    np.testing.assert_allclose(temperatures, [0.04, 0.055, 0.07, 0.07, 0.07])


def test_crops_have_their_sizes_and_repeat_with_the_seed(clip: LoadedModel) -> None:
    dino = build(clip)
    images = torch.rand(4, 3, 64, 64)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(dino.views(images, None))
    assert [tuple(view.shape) for view in drawn[0]] == [(8, 3, 64, 64), (12, 3, 32, 32)]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert all(view.min() >= 0 and view.max() <= 1 for view in drawn[0])
    crops = drawn[0][1].reshape(3, 4, 3, 32, 32)
    assert not torch.equal(crops[0], crops[1]), "each crop is drawn anew"
    assert tuple(build(clip, DinoConfig(out_dim=8, local_crops=0)).views(images, None)[0].shape) == (8, 3, 64, 64)


@pytest.mark.parametrize("wrong", [30, 72, 4])
def test_local_crops_go_by_patches(clip: LoadedModel, wrong: int) -> None:
    with pytest.raises(ValueError, match="multiple of the patch size 8 up to 64"):
        build(clip, replace(SMALL, local_size=wrong))


@pytest.mark.parametrize("train_head", [True, False])
def test_the_public_codes_frozen_head_is_an_option(clip: LoadedModel, train_head: bool) -> None:
    dino = build(clip, replace(SMALL, train_head=train_head))
    trained = {id(p) for group in dino.parameter_groups() for p in group["params"]}
    assert any(id(p) in trained for p in dino.student_head.parameters()) is train_head
    assert all(group.get("weight_decay") == 0.0 for group in dino.parameter_groups()[1:])
