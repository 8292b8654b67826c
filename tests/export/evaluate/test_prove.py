"""The proof compares what it names: what ships with the dense model, on the same text, and asks each only once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soco_export.evaluate.decoders.decoder import Decoder, TorchDecoder
from soco_export.evaluate.figures import DENSE, LOW_RANK, SHIPPED
from soco_export.evaluate.perplexity import read_windows
from soco_export.evaluate.prove import Questions, prove
from soco_export.evaluate.settings import ParitySettings, ValidateSettings
from soco_train.data.corpus import Blocks
from soco_train.events import silent
from tests.support import fresh
from tests.support.graphs import VOCABULARY, ToyModel

FORMS = (DENSE, LOW_RANK, SHIPPED)
SETTINGS = ValidateSettings(
    parity=ParitySettings(blocks=2, prompt=8, decode_steps=2, greedy_prompts=2, greedy_tokens=7)
)


class Counted(TorchDecoder):
    """Counts the tokens that it is asked about in whole windows."""

    asked = 0

    def logits(self, ids, mask=None):  # type: ignore[no-untyped-def]
        Counted.asked += ids.size
        return super().logits(ids, mask)


@pytest.fixture
def models() -> dict[str, ToyModel]:
    seed = int(fresh.rng().integers(2**31))
    return {form: ToyModel(seed + index) for index, form in enumerate(FORMS)}


@pytest.fixture
def questions(tmp_path: Path) -> Questions:
    tokens = torch.from_numpy(fresh.rng().integers(0, VOCABULARY, (4, 20)))
    blocks = Blocks(tokens, "two texts", "ab", ("prose", "code", "prose", "code"))
    return Questions(SETTINGS, blocks, None, tmp_path, silent)


def openers(models: dict[str, ToyModel], *forms: str) -> dict[str, Callable[[], Decoder]]:
    return {form: lambda form=form: Counted(models[form], form) for form in forms}  # type: ignore[misc]


def test_what_was_forgotten_is_of_what_ships_beside_dense(models: dict[str, ToyModel], questions: Questions) -> None:
    found = prove(openers(models, *FORMS), questions)["forgetting"]
    blocks = questions.blocks.tokens.numpy()
    read = {form: read_windows(TorchDecoder(models[form], form), blocks) for form in FORMS}
    right = {form: read[form].top == blocks[:, 1:] for form in FORMS}
    assert found["accuracy_dense"] == right[DENSE].mean()
    assert found["accuracy_compressed"] == right[SHIPPED].mean()
    assert found["lost"] == (right[DENSE] & ~right[SHIPPED]).mean()
    assert found["domains"]["code"]["tokens"] == 2 * 19
    assert found["domains"]["code"]["dense"] == pytest.approx(
        torch.from_numpy(read[DENSE].loss[1::2]).mean().exp().item()
    )
    assert (found["generation"]["prompts"], found["generation"]["tokens"]) == (2, 7)


def test_without_a_third_form_it_is_of_the_low_rank_model(models: dict[str, ToyModel], questions: Questions) -> None:
    found = prove(openers(models, DENSE, LOW_RANK), questions)
    read = read_windows(TorchDecoder(models[LOW_RANK], ""), questions.blocks.tokens)
    assert found["forgetting"]["accuracy_compressed"] == (read.top == questions.blocks.tokens[:, 1:].numpy()).mean()
    assert found["perplexity"][LOW_RANK]["value"] == pytest.approx(torch.from_numpy(read.loss).mean().exp().item())


def test_a_proof_that_goes_on_reads_no_text_again(models: dict[str, ToyModel], questions: Questions) -> None:
    prove(openers(models, DENSE, LOW_RANK), questions)
    before = Counted.asked
    whole = prove(openers(models, *FORMS), questions)
    assert Counted.asked - before == questions.blocks.tokens.numel()  # the third form
    assert prove(openers(models, *FORMS), questions) == whole
