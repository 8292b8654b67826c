"""What ONNX Runtime's MoE and QMoE compute on the CPU, as docs/onnx.md says why exports do without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from packaging import version

from benchmarks.mixture_operators import TYPES, Case, error, fused, plain, random_weights, rounded, stacks
from tests.support import fresh

SEEN = (1, 32)  # another version may compute otherwise: measure again and correct docs/onnx.md
pytestmark = pytest.mark.skipif(
    version.parse(onnxruntime.__version__).release[:2] != SEEN, reason="what was found is of one version"
)
TINY = Case(8, 2, 64, 96)


@pytest.mark.parametrize("normalised", [True, False])
def test_the_operators_are_right_but_for_weights_of_experts_that_do_not_sum_to_one(normalised, tmp_path) -> None:
    case = Case(8, 2, 64, 96, normalised)
    found = {kind: error(case, kind, tmp_path, fresh.rng()) for kind in TYPES}
    assert found["fp32"] < 1e-5
    if normalised:
        assert found["int4"] < 1e-5
        assert 1e-3 < found["int8"] < 0.05  # it rounds what it multiplies
    else:
        assert min(found["int4"], found["int8"]) > 0.1  # normalize_routing_weights 0 is not heard


def test_gates_and_ups_one_after_the_other_are_refused(tmp_path: Path) -> None:
    both, down = stacks(TINY, random_weights(TINY, fresh.rng()))
    with pytest.raises(Exception, match=r"(?i)swiglu|fusion|interleaved"):
        fused(TINY, {"both": both, "down": down}, 0, tmp_path, fusion=2)


def test_both_sides_of_the_benchmark_compute_the_same(tmp_path: Path) -> None:
    random = fresh.rng()
    weights = random_weights(TINY, random)
    both, down = stacks(TINY, weights)
    x = random.standard_normal((9, TINY.hidden)).astype(np.float32)
    feed = {"x": x, "scores": x @ weights["m.router.weight"].T}
    theirs = fused(TINY, {"both": both, "down": down}, 0, tmp_path).run(None, feed)[0]
    ours = plain(TINY, weights, "fp32", tmp_path).run(None, {"x": x[None]})[0][0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    packed, scales, numbers = rounded(down, 4)
    assert packed.shape[-1] * 2 == down.shape[-1]
    assert np.abs(numbers - down).max() <= 0.51 * scales.max()
