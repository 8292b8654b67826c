"""PEFT's LoRA on pruned layers: by its default targets, trained, and merged exactly (where PEFT is installed)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from soco_export.checkpoint.load import load_checkpoint
from soco_export.checkpoint.writer import save_checkpoint
from tests.support.models import make_model, make_tokenizer, prune

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("kind", ["stacked", "pivoted"])
def test_default_lora_trains_and_merges_exactly(kind: str, tmp_path: Path) -> None:
    save_checkpoint(prune(make_model("llama-tied"), kind), make_tokenizer(), tmp_path / "hf")
    model = load_checkpoint(tmp_path / "hf").double()  # what a merge loses is then no question of rounding
    tokens = torch.randint(8, (2, 6))
    before = model(input_ids=tokens).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))  # targets: q_proj, v_proj
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    torch.testing.assert_close(adapted(input_ids=tokens).logits, before)
    optimiser = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=5.0)
    for _ in range(3):
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    after = adapted(input_ids=tokens).logits.detach()
    assert (after - before).abs().max() > 1e-4
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tokens).logits, after, atol=1e-10, rtol=1e-10)
    merged.save_pretrained(tmp_path / "merged")
    read = load_checkpoint(tmp_path / "merged").double()(input_ids=tokens).logits
    torch.testing.assert_close(read, after, atol=1e-5 * float(after.abs().max()), rtol=1e-5)


def test_a_second_adapter_is_refused_with_what_to_do(tmp_path: Path) -> None:
    save_checkpoint(prune(make_model("llama-tied"), "stacked"), make_tokenizer(), tmp_path / "hf")
    adapted = peft.get_peft_model(load_checkpoint(tmp_path / "hf"), peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(Exception, match="adapter already"):
        adapted.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM"))
