"""What an estimate of cost starts from: the sizes of a dense model, and what is assumed of the machine and its host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from soco_export.recipe.recipe import Recipe
from soco_train.cost import DENSE_BYTES, ModelShape, ValueShape
from soco_train.settings.refine import ValueSettings
from soco_train.spectra.statistics import EXPERT

# interpreter, torch and ONNX Runtime before any weight
BASE_HOST = 900 * 2**20
BASE_DEVICE = 600 * 2**20
# what trains on a CPU: interpreter, torch and transformers (benchmarks.gpu measures what is there beside it)
BASE_CPU = 400 * 2**20
# sustained FLOP/s of one H100 (SXM): 40 % of 989 TFLOP/s dense bf16, 60 % of 67 TFLOP/s fp32; eigh in float64 is slow
SUSTAINED = {"bfloat16": 0.4 * 989e12, "float32": 0.6 * 67e12, "float64": 2e12}
ASSUMPTION = "one H100: bf16 at 40 % of 989 TFLOP/s, fp32 at 60 % of 67 TFLOP/s, eigendecomposition at 2 TFLOP/s"
# sustained fp32 FLOP/s of one core: the training stages of benchmarks/results/smollm2-135m.keep-0.8.json, on two cores
# of a Xeon, give 39 to 53 GFLOP/s for each
CORE = 45e9
# where the host streams weights, in fp32: as read, as computed, as written, and the one before; measured: 1.9 to 3.1
WEIGHTS_AT_ONCE = 4


def measure(recipe: Recipe) -> ModelShape:
    """Return the sizes of the recipe's dense model without its weights.

    Raises RecipeError if transformers does not know the architecture or no layer takes part.
    """
    from soco_export.model.load import dense_skeleton
    from soco_train.modules.sites import open_sites
    from soco_train.modules.values import ranked_linears

    model, values = dense_skeleton(recipe), recipe.refine.values
    config = model.config
    open_sites(model)
    linears = ranked_linears(model, recipe.layers, values)
    sharing = _sharing(config, [name for name, _ in model.named_parameters()])
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embedding=embedding.numel(),
        tied=head is embedding,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        blocks=config.num_hidden_layers,
        linears=tuple((linear.out_features, linear.in_features) for linear in linears.values()),
        context=getattr(config.get_text_config(), "max_position_embeddings", None),
        shares=tuple(sharing(name) for name in linears),
        idle=int(sum(weight.numel() * (1 - sharing(name)) for name, weight in model.named_parameters())),
        values=_value_shapes(model, values),
        cached=_cached(config) if values.narrows or recipe.export.cache != "same" else 0,
    )


def _cached(config: Any) -> int:
    """Return the numbers of keys and values that the described model caches of a token, 0 if it is not described."""
    from soco_export.onnx.describe.config import as_config
    from soco_export.onnx.families import describe

    description = describe(as_config(config, where="config.json"))
    return description.cached if description else 0


def _value_shapes(model: Any, values: ValueSettings) -> tuple[ValueShape, ...]:
    """Return the sizes of each attention whose values get fewer numbers."""
    from soco_train.modules.values import narrowed_sites

    def shape(site: Any) -> ValueShape:
        inputs, outputs = model.get_submodule(site.value).in_features, model.get_submodule(site.output).out_features
        return ValueShape(site.groups, site.heads, site.size, values.numbers(site.size), inputs, outputs)

    return tuple(map(shape, narrowed_sites(model, values)))


def _sharing(config: Any, names: Iterable[str]) -> Callable[[str], float]:
    """Return which share of the tokens goes through a layer: of experts those that are chosen, of all others all."""
    inside = [found for name in names if (found := EXPERT.search(name))]
    experts = max((int(found[1]) + 1 for found in inside), default=1)
    chosen = min(1.0, getattr(config, "num_experts_per_tok", experts) / experts)
    return lambda name: chosen if EXPERT.search(name) else 1.0


def participation_notes(recipe: Recipe) -> list[str]:
    """Return which weights of the blocks the recipe leaves out, and the share that takes part; errors as `measure`."""
    from soco_export.model.load import dense_skeleton
    from soco_train.modules.participation import left_out
    from soco_train.modules.sites import open_sites
    from soco_train.modules.values import ranked_linears
    from soco_train.plan.left_out import notes

    model, values = dense_skeleton(recipe), recipe.refine.values
    open_sites(model)
    linears = ranked_linears(model, recipe.layers, values)
    selected = sum(linear.weight.numel() for linear in linears.values())
    keep = None if recipe.keep_bytes else recipe.keep_params
    return [*_others(recipe), *notes(selected, left_out(model, linears, recipe.layers, values), keep)]


def _others(recipe: Recipe) -> list[str]:
    """Return what stays behind of a folder that holds several models."""
    from soco_export.files.json import read_config
    from soco_export.files.wrapped import left_behind
    from soco_export.model.source import find_folder

    folder = find_folder(recipe) if recipe.model.weights != "random" else None
    return left_behind(read_config(folder) if folder else {})


def host(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes of a host that passes weights on: a few at a time, for all others are pages of their files.

    Random weights have no file.
    """
    model = DENSE_BYTES * shape.parameters if recipe.model.weights == "random" else 0
    return BASE_HOST + model + WEIGHTS_AT_ONCE * DENSE_BYTES * shape.largest


def hours(flops: float, dtype: str) -> float:
    """Return how long an H100 takes."""
    return flops / SUSTAINED[dtype] / 3600
