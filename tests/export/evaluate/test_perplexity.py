import numpy as np
import pytest
import torch

from soco_export.evaluate.decoders.decoder import TorchDecoder
from soco_export.evaluate.decoders.session import OnnxDecoder
from soco_export.evaluate.perplexity import measure_perplexity, token_losses
from soco_train.errors import DataError
from tests.support import fresh
from tests.support.graphs import VOCABULARY, ToyModel, save_toy


@pytest.fixture
def rng():
    return fresh.rng()


def test_token_losses_equal_cross_entropy_in_double(rng):
    logits = rng.normal(scale=5, size=(300, 41)).astype(np.float32)
    targets = rng.integers(0, 41, 300)
    wanted = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(targets), reduction="none"
    )
    np.testing.assert_allclose(token_losses(logits, targets), wanted.numpy(), rtol=2e-6, atol=2e-6)


def test_losses_survive_logits_that_overflow_exp():
    logits = np.array([[300.0, -300.0], [300.0, -300.0]], dtype=np.float32)
    np.testing.assert_allclose(token_losses(logits, np.array([0, 1])), [0.0, 600.0])


def test_perplexity_leaves_the_first_token_out_and_is_the_same_for_torch_and_onnx(rng, tmp_path):
    model = ToyModel(int(rng.integers(2**31)))
    blocks = torch.from_numpy(rng.integers(0, VOCABULARY, (4, 12)))
    with torch.no_grad():
        positions = torch.arange(12).expand(4, 12)
        logits = model(blocks, torch.ones_like(blocks), positions).logits.double()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()).item()
    dense = measure_perplexity(TorchDecoder(model), blocks)
    onnx = measure_perplexity(OnnxDecoder(save_toy(model, tmp_path), threads=1), blocks)
    assert dense.tokens == onnx.tokens == 44
    assert dense.loss == pytest.approx(loss, rel=1e-6)
    assert dense.value == pytest.approx(np.exp(loss), rel=1e-6)
    assert onnx.loss == pytest.approx(loss, rel=1e-5)


def test_a_sick_block_is_named_and_never_skipped(rng):
    class Sick(TorchDecoder):
        def _forward(self, ids, mask, positions, past):
            logits, past = super()._forward(ids, mask, positions, past)
            if ids[0, 0] == 7:
                logits[0, 4] = np.nan
            return logits, past

    blocks = rng.integers(0, VOCABULARY, (3, 9))
    blocks[:, 0] = [1, 7, 2]
    with pytest.raises(DataError, match="low-rank model's loss on evaluation block 1 is not finite") as caught:
        measure_perplexity(Sick(ToyModel(3), "low-rank"), blocks)
    assert "token 5" in caught.value.where


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_blocks_that_cannot_be_scored_are_refused(shape):
    with pytest.raises(DataError, match="cannot score"):
        measure_perplexity(TorchDecoder(ToyModel(3)), np.zeros(shape, dtype=np.int64))


def test_progress_tells_the_running_perplexity(rng):
    events = []
    figures = measure_perplexity(TorchDecoder(ToyModel(3)), rng.integers(0, VOCABULARY, (3, 9)), events.append)
    assert [(event.step, event.total) for event in events] == [(1, 3), (2, 3), (3, 3)]
    assert events[-1].values["perplexity"] == figures.value
