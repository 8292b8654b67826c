import json
from pathlib import Path

import pytest

from benchmarks import genai_builder

RECORDED = Path(genai_builder.__file__).parent / "results" / "genai-builder.json"


def test_the_recorded_graphs_say_what_the_builders_say_where_those_are_right() -> None:
    families = json.loads(RECORDED.read_text(encoding="utf-8"))["families"]
    assert set(families) == set(genai_builder.FAMILIES)
    right = {name for name, found in families.items() if found.get("builder_to_transformers", 1) < 1e-5}
    assert {"llama", "qwen2", "qwen3", "gemma", "phi3", "granite"} <= right
    assert all(families[name]["builder_to_ours"] < 1e-5 for name in right)
    assert all(found["ours_to_transformers"] < 1e-5 for found in families.values())


@pytest.mark.slow
def test_the_builder_itself_says_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    found = genai_builder.compare("qwen3", tmp_path)
    assert found["builder_to_ours"] < 1e-5
