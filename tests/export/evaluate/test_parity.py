import math

import numpy as np
import pytest
import torch

from soco_export.evaluate.decoders.decoder import TorchDecoder
from soco_export.evaluate.decoders.session import OnnxDecoder
from soco_export.evaluate.parity import common_prefix, compare_logits, compare_observations, observe
from soco_export.evaluate.settings import ParitySettings
from soco_train.errors import DataError
from tests.support import fresh
from tests.support.graphs import VOCABULARY, ToyModel, save_toy

SETTINGS = ParitySettings(blocks=3, prompt=10, decode_steps=4, greedy_prompts=2, greedy_tokens=5)


@pytest.fixture
def rng():
    return fresh.rng()


def noisy(rng, n, v=VOCABULARY, scale=3.0):
    return rng.normal(scale=scale, size=(n, v)).astype(np.float32)


def test_figures_equal_torch_in_double(rng):
    ref, cand = noisy(rng, 70), noisy(rng, 70)
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (ref, cand))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    figures = compare_logits(ref, cand)
    assert figures.positions == 70
    assert figures.mean_kl == pytest.approx(kl.mean().item(), rel=1e-12)
    assert figures.max_kl == pytest.approx(kl.max().item(), rel=1e-12)
    assert figures.max_logit_difference == pytest.approx(float(np.abs(ref.astype(float) - cand).max()))
    assert figures.token_agreement == pytest.approx((ref.argmax(-1) == cand.argmax(-1)).mean())


def test_equal_logits_have_no_distance_and_a_shift_is_no_divergence(rng):
    ref = noisy(rng, 5)
    same = compare_logits(ref, ref)
    assert (same.mean_kl, same.max_kl, same.max_logit_difference, same.token_agreement) == (0, 0, 0, 1)
    shifted = compare_logits(ref, ref + 2)
    assert shifted.max_kl < 1e-12
    assert shifted.max_logit_difference == pytest.approx(2, rel=1e-5)


def test_kl_is_taken_from_the_reference_and_resolves_tiny_differences(rng):
    ref, cand = noisy(rng, 8), noisy(rng, 8)
    assert compare_logits(ref, cand).mean_kl != pytest.approx(compare_logits(cand, ref).mean_kl, rel=1e-3)
    near = compare_logits(ref, ref + rng.normal(scale=1e-5, size=ref.shape).astype(np.float32))
    assert 0 < near.mean_kl < 1e-9


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_one_sick_logit_makes_the_figures_nan_and_no_agreement(rng, poison, side):
    pair = [noisy(rng, 40), None]
    pair[1] = pair[0].copy()
    pair[side][33, 7] = poison
    figures = compare_logits(*pair)
    assert math.isnan(figures.mean_kl)
    assert math.isnan(figures.max_kl)
    assert math.isnan(figures.max_logit_difference)
    assert figures.token_agreement == pytest.approx(39 / 40)


def test_a_masked_vocabulary_entry_is_fine_if_both_mask_it(rng):
    ref = noisy(rng, 4)
    ref[:, 3] = -np.inf
    cand = ref.copy()
    assert compare_logits(ref, cand).max_kl == 0
    assert compare_logits(ref, cand).max_logit_difference == 0
    cand[:, 5] = -np.inf
    assert compare_logits(ref, cand).max_kl == math.inf


def test_shapes_must_agree(rng):
    with pytest.raises(ValueError, match="agree in shape"):
        compare_logits(noisy(rng, 3), noisy(rng, 4))


def test_export_parity_is_tiny_and_another_model_is_far(rng, tmp_path):
    seed = int(rng.integers(2**31))
    model = ToyModel(seed)
    blocks = rng.integers(0, VOCABULARY, (5, 20))
    dense = observe(TorchDecoder(model), blocks, SETTINGS)
    onnx = observe(OnnxDecoder(save_toy(model, tmp_path), threads=1), blocks, SETTINGS)
    other = observe(TorchDecoder(ToyModel(seed + 1)), blocks, SETTINGS)
    step = compare_observations(dense, onnx)
    assert step.prefill.positions == 30
    assert step.decode.positions == 12
    assert max(step.prefill.max_kl, step.decode.max_kl) < 1e-6
    assert step.greedy_agreement == 1.0
    far = compare_observations(dense, other)
    assert min(far.prefill.mean_kl, far.decode.mean_kl) > 0.1
    assert far.greedy_agreement < 1


def test_decode_steps_go_on_where_the_prefill_ends_with_the_blocks_own_tokens(rng):
    decoder = TorchDecoder(ToyModel(int(rng.integers(2**31))))
    blocks = rng.integers(0, VOCABULARY, (3, 20))
    seen = observe(decoder, blocks, SETTINGS)
    for index, block in enumerate(blocks):
        whole = decoder.logits(block[None, :14])[0]
        np.testing.assert_allclose(seen.prefill[index], whole[:10], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(seen.decode[index], whole[10:], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(seen.greedy[1], decoder.generate(blocks[1:2, :10], 5)[0])


def test_a_fault_in_the_cache_alone_shows_in_decode_alone(rng):
    class Forgetful(TorchDecoder):
        def _forward(self, ids, mask, positions, past):
            return super()._forward(ids, mask, positions + (past is not None), past)

    model = ToyModel(int(rng.integers(2**31)))
    blocks = rng.integers(0, VOCABULARY, (3, 20))
    step = compare_observations(
        observe(TorchDecoder(model), blocks, SETTINGS), observe(Forgetful(model), blocks, SETTINGS)
    )
    assert step.prefill.max_kl == 0
    assert step.decode.mean_kl > 1e-3


def test_last_token_graphs_are_compared_on_the_last_token(rng, tmp_path):
    model = ToyModel(int(rng.integers(2**31)))
    blocks = rng.integers(0, VOCABULARY, (3, 20))
    decoder = OnnxDecoder(save_toy(model, tmp_path, last_only=True), threads=1)
    step = compare_observations(observe(TorchDecoder(model), blocks, SETTINGS), observe(decoder, blocks, SETTINGS))
    assert step.prefill.positions == 3
    assert step.prefill.max_kl < 1e-6


def test_logits_on_disk_give_the_same_figures(rng, tmp_path):
    models = [ToyModel(int(rng.integers(2**31))) for _ in range(2)]
    blocks = rng.integers(0, VOCABULARY, (3, 20))
    in_memory = [observe(TorchDecoder(m, n), blocks, SETTINGS) for m, n in zip(models, "ab", strict=True)]
    on_disk = [observe(TorchDecoder(m, n), blocks, SETTINGS, tmp_path) for m, n in zip(models, "ab", strict=True)]
    assert compare_observations(*on_disk) == compare_observations(*in_memory)
    assert isinstance(on_disk[0].prefill[0], np.memmap)


def test_short_blocks_shrink_the_prefill_and_too_short_ones_are_refused(rng):
    model = ToyModel(1)
    seen = observe(TorchDecoder(model), rng.integers(0, VOCABULARY, (2, 7)), SETTINGS)
    assert seen.prefill[0].shape[0] == 3
    with pytest.raises(DataError, match="blocks of 4 tokens"):
        observe(TorchDecoder(model), rng.integers(0, VOCABULARY, (2, 4)), SETTINGS)


def test_common_prefix():
    assert common_prefix(np.array([1, 2, 3]), np.array([1, 2, 3])) == 3
    assert common_prefix(np.array([1, 2, 3]), np.array([1, 9, 3])) == 1
