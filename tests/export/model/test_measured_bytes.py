"""Among the candidates for a number of bytes a measurement decides, and no dense model that fits is left out of it."""

from __future__ import annotations

import pytest
import torch

from soco_export.model.file_bytes import FileBytes, in_blocks
from soco_export.model.which import shrink
from soco_export.recipe.load import load_recipe
from soco_export.recipe.recipe import Recipe
from soco_export.run.plans.byte_plan import plan_bytes, plan_bytes_measured
from soco_export.run.plans.measured_bytes import hold_out
from soco_train.plan.bytes import Choice, bytes_of
from soco_train.plan.rank_plan import RankPlan
from soco_train.settings.rounding import TABLE_TYPES, TYPES
from soco_train.store.damage import DENSE, Damage, LayerDamage, StorageKind
from tests.support import fresh

ASKED = 2_000_000
WORTH = {"same": 0.0, "int8": 1e-4, "int4": 1e-2, "int2": 1.0}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("tiny").replace({"keep_bytes": ASKED})


@pytest.fixture(scope="module")
def file(recipe: Recipe) -> FileBytes:
    return FileBytes(recipe)


@pytest.fixture(scope="module")
def damage(file: FileBytes) -> Damage:
    """Random errors that grow with the block and with fewer bits, and with components that are cut."""
    return damage_of(file)


def damage_of(file: FileBytes) -> Damage:
    draw, table = fresh.rng(), (file.architecture.vocab, file.architecture.hidden)

    def layer(shape: tuple[int, int], forms: tuple[str, ...], types: tuple[str, ...]) -> LayerDamage:
        scale, curves = draw.uniform(0.1, 1), dict[StorageKind, torch.Tensor]()
        for form in forms:
            for weights, block in in_blocks(types):
                cut = 0.1 * torch.linspace(1, 0, 1 if form == DENSE else min(shape) + 1).double()
                curves[form, weights, block] = scale * (
                    (cut if form != DENSE else 0) + WORTH[weights] * (1 + block / 64)
                )
        return LayerDamage(shape, {kind: torch.as_tensor(curve).reshape(-1) for kind, curve in curves.items()})

    layers = {name: layer(shape, (DENSE, "stacked", "pivoted"), TYPES) for name, shape in file.linears.items()}
    tables = {file.tables.table: layer(table, (DENSE,), TABLE_TYPES), file.tables.head: layer(table, (DENSE,), TYPES)}
    return Damage({**layers, **tables})


@pytest.fixture(scope="module")
def candidates(file: FileBytes, damage: Damage) -> dict[str, dict[str, Choice]]:
    return file.candidates(damage, ASKED)


def test_the_candidate_of_least_loss_is_taken(recipe: Recipe, damage: Damage) -> None:
    losses: dict[str, float] = {}

    def loss(plan: RankPlan) -> float:
        assert plan.bytes is not None
        assert plan.bytes.written <= ASKED
        losses[plan.bytes.chosen] = float(fresh.rng().uniform(3, 4))
        return losses[plan.bytes.chosen]

    plan = plan_bytes_measured(recipe, damage, loss, tokens=640)
    assert plan.bytes is not None
    assert plan.bytes.measured == losses
    assert plan.bytes.chosen == min(losses, key=lambda name: losses[name])
    assert f"the best of {len(losses)} by KL on 640 held-out tokens" in plan.describe(10**7)
    assert RankPlan.from_json(plan.to_json()) == plan
    for table in ("int8", "int4"):
        assert f"by price, token table in {table}" in losses
        assert any(name.startswith("dense in") and name.endswith(f"token table in {table}") for name in losses)


def test_a_dense_candidate_is_of_one_type_and_block(file: FileBytes, candidates: dict[str, dict[str, Choice]]) -> None:
    for name, choices in candidates.items():
        kinds = {
            (choice.form, choice.weights, choice.block) for layer, choice in choices.items() if layer in file.linears
        }
        if name.startswith("dense"):
            ((form, weights, block),) = kinds
            assert form == DENSE
            assert name.startswith(f"dense in {weights} in blocks of {block}")


def test_a_dense_model_that_nearly_fits_is_there_with_a_few_layers_less(file: FileBytes, damage: Damage) -> None:
    uniform = file._uniform(damage, "int4", 64, 10**9)
    whole = file.plan(uniform, 10**9)[0]
    written, matrices = file.count(whole, damage), bytes_of(file._menus(uniform), whole)
    nearly = file.plan(file._uniform(damage, "int4", 64, matrices), written - 1)[0]
    changed = [layer for layer in file.linears if nearly[layer] != whole[layer]]
    assert file.count(nearly, damage) < written
    assert len(changed) < 5
    assert all(nearly[layer].form == DENSE for layer in changed)


def test_by_price_alone_no_plan_is_better_than_the_first_candidate(
    recipe: Recipe, file: FileBytes, damage: Damage, candidates: dict[str, dict[str, Choice]]
) -> None:
    first = next(iter(candidates))
    assert first.startswith("by price")
    alone = plan_bytes(recipe, damage).bytes
    assert alone is not None
    assert first.endswith(alone.weights[file.tables.table])


def test_nothing_is_measured_on_text_that_prices_come_from() -> None:
    tokens = torch.arange(40 * 16).reshape(40, 16)
    seen, held = hold_out(tokens)
    assert torch.equal(torch.cat([seen, held]), tokens)
    assert len(held) == 5
    assert len(hold_out(torch.zeros(4000, 512))[1]) == 8
    assert torch.equal(*hold_out(tokens[:1]))


def test_experts_have_a_price_each_and_those_without_one_stay_as_they_are() -> None:
    """An expert that the calibration text hardly visits has none; the count is of the whole file all the same."""
    asked = 2_600_000
    recipe = shrink(load_recipe("mixtral-8x7b").replace({"keep_bytes": asked}))
    file = FileBytes(recipe)
    whole = damage_of(file)
    unseen = [name for name in file.linears if ".experts.3." in name]
    plan = plan_bytes(recipe, Damage({name: layer for name, layer in whole.layers.items() if name not in unseen}))
    assert plan.bytes is not None
    assert 0.98 * asked < plan.bytes.written <= asked
    assert plan.layers.keys() == file.linears.keys() - set(unseen)
    assert len({plan.bytes.weights[name] for name in plan.layers if ".experts." in name}) > 1
    assert all("hardly visits" in plan.left_out[f"{name}.weight"].reason for name in unseen)
    assert len(file.candidates(whole, asked)) > 1
