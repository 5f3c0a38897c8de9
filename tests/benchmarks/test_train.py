"""The benchmark of training: what it reports, and that it times nothing that is wrong."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("lightning_fabric", reason="lightning-fabric comes with the train extra")

from iosr_fast.benchmarks import train as bench  # noqa: E402
from iosr_fast.clip.load import load_clip  # noqa: E402
from iosr_fast.training.adapted_encoder import AdaptedEncoder  # noqa: E402
from iosr_fast.training.train_config import TrainConfig  # noqa: E402

NAMES = ["ours", "ours-unkept", "public-recipe", "pruned-graph"]


@pytest.mark.slow
def test_rows_say_what_was_trained_and_how_fast() -> None:
    rows = bench.run(model="demo", batch=4, first_adapted_block=4, count=10, threads=1, repeats=2)
    assert [(row["case"], row["impl"]) for row in rows] == [
        (case, name) for case in ("first-epoch", "later-epochs") for name in NAMES
    ]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(10 / (row["runtime_ms"] * 1e-3), rel=1e-2)
        assert (row["pictures"], row["held_out_pictures"], row["first_adapted_block"]) == (10, 16, 4)
        expected = {name for name in ("public-recipe", "pruned-graph") if name != row["impl"]}
        assert set(row["ratios"]) == expected


@pytest.mark.slow
def test_public_recipe_trains_what_ours_trains() -> None:
    """With dropout off, one epoch of each from the same start ends at the same weights."""
    from iosr_fast.clip.adapter import init_adapter
    from iosr_fast.training.train import train_adapter

    clip = load_clip("demo")
    train, held_out = bench.pictures(clip, 12, 0), bench.pictures(clip, 16, 1)
    config = TrainConfig(batch=4)
    ours = train_adapter(clip, init_adapter(clip, 4, dropout=0.0), train, config)
    torch.manual_seed(config.seed)
    head = torch.nn.Linear(clip.model.visual.output_dim, bench.CLASSES)
    for everywhere in (True, False):
        adapter = init_adapter(clip, 4, dropout=0.0)
        again = torch.nn.Linear(head.in_features, head.out_features)
        again.load_state_dict(head.state_dict())
        bench.PublicRecipe(clip, adapter, again, everywhere).epoch(train, held_out, config)
        for mine, theirs in zip(ours.parameters(), adapter.parameters(), strict=True):
            torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("everywhere", [True, False])
def test_the_public_recipe_differentiates_all_blocks_and_the_pruned_one_does_not(everywhere: bool) -> None:
    """Adapters begin in block 4 of 6: the gradient passes block 1 only in the public code's way."""
    from iosr_fast.clip.adapter import init_adapter

    clip = load_clip("demo")
    passed: list[int] = []
    blocks = clip.model.visual.transformer.resblocks
    hooks = [
        blocks[i].attn.register_full_backward_hook(lambda module, into, out, i=i: passed.append(i)) for i in (0, 1, 5)
    ]
    pictures = bench.pictures(clip, 4, 0)
    head = torch.nn.Linear(clip.model.visual.output_dim, bench.CLASSES)
    recipe = bench.PublicRecipe(clip, init_adapter(clip, 4).requires_grad_(True), head, everywhere)
    recipe.loss(pictures.images, pictures.labels).backward()
    for hook in hooks:
        hook.remove()
    assert passed == ([5, 1] if everywhere else [5]), "block 0's attention comes before its adapter would"


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    tail = AdaptedEncoder.tail
    monkeypatch.setattr(AdaptedEncoder, "tail", lambda self, adapter, *stem: tail(self, adapter, *stem) * 1.01)
    with pytest.raises(ArithmeticError, match=r"ours is off by .*not timed"):
        bench.run(model="demo", batch=4, first_adapted_block=4, count=8, threads=1, repeats=1)


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch of 16 pictures"):
        bench.run(model="demo", count=8)
