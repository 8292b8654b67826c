"""Statistics against plain float64 sums over stored activations, on a tiny grouped-query Llama."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

from soco_train.errors import DataError
from soco_train.events import Event
from soco_train.modules.layers import select_linears
from soco_train.settings.data import LayerSettings
from soco_train.spectra.statistics import LayerStatistics, collect_statistics, groups, sums_bytes
from tests.support.models import small_llama

pytestmark = pytest.mark.transformers

ALL = frozenset(
    {"input_covariance", "input_magnitude", "output_curvature", "row_fisher", "column_fisher", "weight_fisher"}
)


def tiny_llama() -> LlamaForCausalLM:
    return small_llama(hidden_size=16, intermediate_size=24, initializer_range=0.3).train()


def tiny_opt() -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=64,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        dropout=0.1,
    )
    return OPTForCausalLM(config)


def run(model: nn.Module, tokens: torch.Tensor, needs: frozenset[str] = ALL) -> dict[str, LayerStatistics]:
    return collect_statistics(model, select_linears(model, LayerSettings()), tokens, needs)


def reference(model: nn.Module, linears: Mapping[str, nn.Linear], tokens: torch.Tensor) -> dict[str, LayerStatistics]:
    """Store everything, in float64, one block at a time."""
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    deltas: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    outputs: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def listen(module, args, output):
            inputs[name].append(args[0].detach().flatten(0, -2))
            output.retain_grad()
            outputs[name] = output

        return listen

    model = model.double().eval()
    handles = [linear.register_forward_hook(hook(name)) for name, linear in linears.items()]
    for block in tokens:
        logits = model(input_ids=block[None]).logits[0]
        nn.functional.cross_entropy(logits[:-1], block[1:], reduction="sum").backward()
        for name, output in outputs.items():
            deltas[name].append(output.grad.flatten(0, -2))
    for handle in handles:
        handle.remove()
    result = {}
    for name in linears:
        x, d = torch.cat(inputs[name]), torch.cat(deltas[name])
        fisher = torch.einsum("ti,tj->tij", d, x).square().mean(0)
        sides = fisher.sum(1), fisher.sum(0), fisher
        result[name] = LayerStatistics(x.T @ x / len(x), x.abs().mean(0), d.T @ d / len(d), *sides, len(x))
    return result


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_matches_sums_over_stored_activations(make):
    model, tokens = make(), torch.randint(64, (7, 33))
    linears = select_linears(model, LayerSettings())
    found = collect_statistics(model, linears, tokens, ALL)
    expected = reference(model, linears, tokens)
    assert list(found) == list(linears)
    for name, statistics in found.items():
        assert statistics.tokens == 7 * 33
        for field in ALL:
            value, target = getattr(statistics, field), getattr(expected[name], field)
            assert value.dtype == torch.float64
            torch.testing.assert_close(
                value, target, rtol=1e-4, atol=1e-5 * float(target.abs().max()), msg=name + field
            )


def test_survivors_are_the_half_that_first_order_pruning_keeps():
    """Counted by sorting every number of the weight by what losing it costs; a number that no token reads is lost."""
    model, tokens = tiny_llama(), torch.randint(64, (5, 33))
    linears = select_linears(model, LayerSettings())
    expected = reference(model, linears, tokens)
    weights = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    found = collect_statistics(model, linears, tokens, frozenset({"column_survivors"}))
    for name, statistics in found.items():
        assert statistics.weight_fisher is None
        saliency = expected[name].weight_fisher * weights[name].square()
        best = saliency.flatten().argsort(descending=True)[: saliency.numel() // 2]
        kept = torch.zeros(saliency.numel()).index_fill(0, best, 1).view_as(saliency)
        assert statistics.column_survivors.sum() == saliency.numel() // 2
        torch.testing.assert_close(statistics.column_survivors, kept.sum(0).double(), rtol=0, atol=1)


def test_outer_products_wider_than_a_strip():
    """Sums of any width are whole and symmetric."""
    linear, x = nn.Linear(700, 3), torch.randn(4, 50, 700)
    model = nn.Module()
    model.linear = linear
    model.forward = lambda input_ids, use_cache: linear(x[: len(input_ids)])
    found = collect_statistics(model, {"linear": linear}, torch.zeros(4, 50), frozenset({"input_covariance"}))
    rows = x.flatten(0, 1).double()
    torch.testing.assert_close(found["linear"].input_covariance, rows.T @ rows / 200, rtol=1e-4, atol=1e-5)
    assert torch.equal(found["linear"].input_covariance, found["linear"].input_covariance.T)


def test_many_batches_add_up():
    model, tokens = tiny_llama(), torch.randint(64, (5, 1100))
    whole = run(model, tokens)
    parts = [run(model, block[None]) for block in tokens]
    for name, statistics in whole.items():
        for field in ALL:
            mean = torch.stack([getattr(part[name], field) for part in parts]).mean(0)
            torch.testing.assert_close(getattr(statistics, field), mean, rtol=1e-4, atol=1e-6 * float(mean.abs().max()))


def test_layers_that_read_one_tensor_share_one_object():
    found = run(tiny_llama(), torch.randint(64, (2, 16)))
    covariances = {name: id(statistics.input_covariance) for name, statistics in found.items()}
    assert len(set(covariances.values())) == 8  # per block: attention input, o, gate/up, down
    for layer in (0, 1):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        assert (
            covariances[attention + "q_proj"] == covariances[attention + "k_proj"] == covariances[attention + "v_proj"]
        )
        assert covariances[mlp + "gate_proj"] == covariances[mlp + "up_proj"]


def test_a_tensor_changed_in_place_between_two_readers_is_not_shared():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            x = input_ids[..., None] * torch.ones(4)
            first = self.first(x)
            return first + self.second(x.mul_(2))

    model = InPlace()
    found = collect_statistics(
        model, dict(model.named_children()), torch.randint(1, 9, (3, 5)), frozenset({"input_covariance"})
    )
    torch.testing.assert_close(found["second"].input_covariance, 4 * found["first"].input_covariance)


def test_only_what_is_needed_is_there():
    found = run(tiny_llama(), torch.randint(64, (2, 16)), frozenset({"input_covariance"}))
    for statistics in found.values():
        assert statistics.input_covariance is not None
        assert statistics.input_magnitude is None
        assert statistics.output_curvature is None
        assert statistics.row_fisher is None
        assert statistics.column_fisher is None
    assert run(tiny_llama(), torch.randint(64, (2, 16)), frozenset())["model.layers.0.mlp.up_proj"] == LayerStatistics()


@pytest.mark.parametrize("needs", [ALL, frozenset({"input_covariance"})])
def test_leaves_the_model_as_it_was(needs):
    model = tiny_opt().train()
    model.model.decoder.layers[0].eval()
    model.model.decoder.layers[1].fc1.weight.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    flags = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    run(model, torch.randint(64, (2, 16)), needs)
    assert [(module.training, len(module._forward_hooks)) for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.state_dict().items())


def test_same_numbers_in_eval_mode_whatever_the_mode_before():
    model, tokens = tiny_opt(), torch.randint(64, (2, 16))
    first, second = run(model.train(), tokens), run(model.eval(), tokens)
    for name in first:
        assert torch.equal(first[name].input_covariance, second[name].input_covariance)


def test_bfloat16_models_are_summed_in_higher_precision():
    model, tokens = tiny_llama().bfloat16(), torch.randint(64, (4, 512))
    exact = run(model.float(), tokens, frozenset({"input_covariance"}))
    rounded = run(model.bfloat16(), tokens, frozenset({"input_covariance"}))
    for name in exact:
        error = (rounded[name].input_covariance - exact[name].input_covariance).norm()
        assert error < 0.03 * exact[name].input_covariance.norm()


def test_nan_names_the_layer_it_first_reaches():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(DataError) as caught:
        run(model, torch.randint(64, (2, 16)), frozenset({"input_covariance"}))
    assert caught.value.where == "model.layers.0.mlp.down_proj"


def test_broken_gradients_name_the_layer_they_first_reach():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3, 5] = torch.inf
    with pytest.raises(DataError, match="gradient") as caught:
        run(model, torch.randint(64, (2, 16)))
    assert caught.value.where == "model.layers.1.mlp.down_proj"


def test_a_layer_no_token_reaches_is_named():
    model = tiny_llama()
    linears = {**select_linears(model, LayerSettings()), "stray": nn.Linear(4, 4)}
    with pytest.raises(DataError, match="no calibration token") as caught:
        collect_statistics(model, linears, torch.randint(64, (2, 16)), ALL)
    assert caught.value.where == "stray"


def test_reports_progress():
    model, events = tiny_llama(), list[Event]()
    linears = select_linears(model, LayerSettings())
    collect_statistics(model, linears, torch.randint(64, (5, 1024)), frozenset({"input_covariance"}), events.append)
    assert [(event.stage, event.step, event.total) for event in events] == [("statistics", s, 3) for s in (1, 2, 3)]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=12),
    needs=st.frozensets(st.sampled_from(sorted(ALL))),
    budget=st.integers(1, 60_000),
)
def test_groups_are_as_few_as_the_budget_allows_and_keep_the_order(shapes, needs, budget):
    linears = {str(i): nn.Linear(n, m, device="meta") for i, (m, n) in enumerate(shapes)}
    found = groups(linears, needs, budget)
    assert [name for group in found for name in group] == list(linears)
    sizes = [[sums_bytes((layer.out_features, layer.in_features), needs) for layer in g.values()] for g in found]
    assert all(sum(group) <= budget or len(group) == 1 for group in sizes)
    assert all(sum(one) + two[0] > budget for one, two in pairwise(sizes))


def test_the_sums_of_one_layer_take_the_bytes_that_are_counted():
    model, fields = tiny_llama(), sorted(ALL)
    name, linear = "model.layers.1.mlp.down_proj", model.model.layers[1].mlp.down_proj
    for count in range(len(fields) + 1):
        needs = frozenset({"input_magnitude", *fields[:count]})
        found = collect_statistics(model, {name: linear}, torch.randint(64, (1, 16)), needs)[name]
        kept = [part for part in vars(found).values() if isinstance(part, torch.Tensor)]
        assert sum(part.nbytes for part in kept) == sums_bytes((16, 24), needs)
