"""Text → token blocks, with a fingerprint: from files, a Hugging Face data set, or the texts inside the package.

The text is tokenised without special tokens and cut into consecutive blocks; a rest shorter than a block is dropped.
Nothing is shuffled, so that the same text and tokenizer give the same blocks, and `blocks: 24` means the first 24. The
blocks of several texts take turns in proportion to their number: whoever uses only the first few (a covariance, a
saliency) then sees a bit of every text and not the whole of one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from soco_train.data.reading import READ_AT_ONCE, decoded, kind_of, read_objects, text_of
from soco_train.errors import DataError, PanicError, RecipeError, panics_as_errors
from soco_train.installed import install_command
from soco_train.settings.data import SHORTEST_BLOCK, DataSettings

Purpose = Literal["calibration", "evaluation"]
BUILTIN = Path(__file__).parents[1] / "builtin"
PARAGRAPH = "\n\n"
EXAMPLE = '{"text": "…"}'
_SPARE = 256  # tokens
Take = Callable[[Iterator[str]], str]  # how much of a continuous text is taken


@dataclass(frozen=True)
class Blocks:
    """Token blocks [n, block] int64, where they come from, and the sha256 over their shape and values.

    `domains`: the name of the text that each block is of, [n]; empty where there is one text.
    """

    tokens: torch.Tensor
    source: str
    fingerprint: str
    domains: tuple[str, ...] = ()


def load_blocks(tokenizer: Any, settings: DataSettings, purpose: Purpose) -> Blocks:
    """Return the blocks of a data section; `purpose` chooses between the two halves of a built-in text.

    Raises RecipeError (no such file or data set, `datasets` missing) and DataError (not UTF-8, less than one block).
    """
    source = describe_source(settings, purpose)
    # Texts that take turns do so in proportion to their whole length, so only a single one is read in part.
    wanted = settings.blocks if len(_paths(settings, purpose)) < 2 else None
    tokens_wanted = None if wanted is None else wanted * settings.block
    sources = _texts(settings, purpose, lambda pieces: _take(tokenizer, pieces, tokens_wanted))
    texts = [_cut(tokenizer, documents, settings.blocks, settings.block) for documents in sources]
    order = turns([len(blocks) for blocks, _ in texts])[: settings.blocks]
    tokens = torch.cat([blocks for blocks, _ in texts])[order]
    if len(tokens) == 0:
        count = max(tokens for _, tokens in texts)
        raise DataError(
            f"the {purpose} text has {count} tokens, and one block needs {settings.block}",
            fix="give more text"
            + (f", or set {_section(purpose)}.block to {count} or less" if count >= SHORTEST_BLOCK else ""),
            where=source,
        )
    names = _names(settings, purpose)
    of = [name for name, (blocks, _) in zip(names, texts, strict=True) for _ in blocks]
    return Blocks(tokens, source, fingerprint(tokens), tuple(of[i] for i in order) if len(names) > 1 else ())


def _cut(tokenizer: Any, documents: Iterator[str], wanted: int | None, block: int) -> tuple[torch.Tensor, int]:
    """Return the blocks [n, block] of one text, `wanted` or what there is, and how many tokens were read."""
    ids: list[int] = []
    for document in documents:
        ids += _ids(tokenizer, document)
        if wanted is not None and len(ids) >= wanted * block:
            break
    count = len(ids) // block
    return torch.tensor(ids[: count * block], dtype=torch.int64).view(count, block), len(ids)


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Return a text's tokens; DataError where the tokenizer's library gives up, as on an expression without end."""
    try:
        with panics_as_errors():
            found = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    except PanicError as error:
        fix = "look at pre_tokenizer in its tokenizer.json, or take the one that was published"
        raise DataError(f"the tokenizer cannot take the text apart: {error}", fix=fix, where="tokenizer.json") from None
    return list(found)


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + READ_AT_ONCE] for start in range(0, len(text), READ_AT_ONCE))


def _take(tokenizer: Any, pieces: Iterator[str], tokens: int | None) -> str:
    return "".join(pieces) if tokens is None else _beginning(tokenizer, pieces, tokens)


def _beginning(tokenizer: Any, pieces: Iterator[str], tokens: int) -> str:
    """Return as much of a continuous text as gives `tokens` tokens, with some to spare.

    The end of a text is tokenised differently when more follows, so the tokens that are used keep away from it.
    """
    found, need = "", tokens + _SPARE
    for piece in pieces:
        found += piece
        if len(found) < need:
            continue
        ids = _ids(tokenizer, found)
        if len(ids) >= tokens + _SPARE:
            break
        need = 2 * len(found)
    return found


def turns(counts: Sequence[int]) -> torch.Tensor:
    """Return the order in which the blocks of several texts take turns: indices [n] into all of them.

    Each text is spread evenly over the whole; the order within a text stays.
    """
    places = torch.cat([(torch.arange(count, dtype=torch.float64) + 0.5) / count for count in counts])
    return places.sort(stable=True).indices


def fingerprint(tokens: torch.Tensor) -> str:
    """Return the sha256 over shape and little-endian int64 values of token blocks."""
    digest = hashlib.sha256(json.dumps(list(tokens.shape)).encode())
    digest.update(tokens.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def describe_source(settings: DataSettings, purpose: Purpose) -> str:
    """Return one line naming the text, as reports and errors show it."""
    return (" + " if settings.builtin is not None else ", ").join(_names(settings, purpose))


def _names(settings: DataSettings, purpose: Purpose) -> tuple[str, ...]:
    """Return what each text of a data section is called."""
    if settings.builtin is not None:
        return tuple(f"built-in text {name}.{purpose}" for name in _builtin(settings))
    if settings.hub is not None:
        return (f"hub data set {settings.hub}",)
    return tuple(str(path) for path in _files(settings))


def describe_join(settings: DataSettings, purpose: Purpose) -> str:
    """Return how the parts of a text are put together before it is cut, in one line."""
    if settings.hub is not None:
        return "rows joined by an empty line"
    kinds = {settings.format if settings.format != "auto" else _kind(path) for path in _paths(settings, purpose)}
    names = {"jsonl": "documents, each ended by an empty line", "wikitext": "rows joined by an empty line"}
    parts = [names.get(kind, "the text as it is") for kind in sorted(kinds)]
    return "; ".join(parts) + ("; windows of several texts take turns" if len(_paths(settings, purpose)) > 1 else "")


def check_source(settings: DataSettings, purpose: Purpose) -> None:
    """Raise RecipeError for an address of no data set, or where `datasets` is missing; nothing is downloaded.

    Files are checked as they are read, as far as they are used: by `load_blocks`.
    """
    if settings.hub is not None:
        _hub_address(settings.hub, _section(purpose))
        _import_datasets(settings.hub, _section(purpose))


def _section(purpose: Purpose) -> str:
    return "data" if purpose == "calibration" else "evaluation"


def _files(settings: DataSettings) -> tuple[Path, ...]:
    if settings.path is None:
        return ()
    return settings.path if isinstance(settings.path, tuple) else (settings.path,)


def _paths(settings: DataSettings, purpose: Purpose) -> tuple[Path, ...]:
    if settings.builtin is not None:
        return tuple(BUILTIN / f"{name}.{purpose}.txt" for name in _builtin(settings))
    return _files(settings)


def _texts(settings: DataSettings, purpose: Purpose, take: Take) -> Iterator[Iterator[str]]:
    """Yield each text, as documents to tokenise one after the other; those of a collection end with an empty line."""
    if settings.hub is not None:
        yield iter([take(_hub_text(settings.hub, _section(purpose)))])
        return
    for path in _paths(settings, purpose):
        yield _documents(path, settings, take)


def _documents(path: Path, settings: DataSettings, take: Take) -> Iterator[str]:
    """Yield a file's documents: each JSON line's that is not blank, else one for the file, or what is taken of it."""
    kind = settings.format if settings.format != "auto" else _kind(path)
    if kind == "jsonl":
        for where, row in read_objects(path, EXAMPLE):
            if (text := text_of(row, "text", where)).strip():
                yield f"{take(_pieces(text))}{PARAGRAPH}"
        return
    text = take(decoded(path))
    if not text.strip():
        raise DataError(f"{path.name} is blank", fix="give a file with text", where=str(path))
    yield join_wikitext(text) if kind == "wikitext" else text


def _kind(path: Path) -> Literal["text", "jsonl", "wikitext"]:
    if kind_of(path) in (".jsonl", ".ndjson", ".json"):
        return "jsonl"
    return "wikitext" if kind_of(path) == ".raw" else "text"


def join_wikitext(text: str) -> str:
    """Join the rows of a `wiki.*.raw` file by an empty line, as joining the data set's `text` column does.

    A row is a line with its line end; the lines that are a single space are the data set's empty rows. Source: the
    evaluation of GPTQ and SparseGPT, which published perplexities follow.
    """
    lines = text.split("\n")
    rows = lines[:-1] if lines[-1] == "" else lines
    return PARAGRAPH.join("" if line == " " else line + "\n" for line in rows)


def _hub_address(address: str, section: str) -> tuple[str, str | None, str]:
    """Split "owner/name:config:split" (or "owner/name:split")."""
    parts = address.split(":")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise RecipeError(
            f"cannot read the data set address {address!r}",
            fix="write owner/name:config:split, for example Salesforce/wikitext:wikitext-2-raw-v1:train",
            where=f"{section}.hub",
        )
    return parts[0], parts[1] if len(parts) == 3 else None, parts[-1]


def _import_datasets(address: str, section: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise RecipeError(
            f"the hub data set {address} needs the package datasets",
            fix=f"{install_command('data')}, or give a local file: --set {section}.path=text.txt",
            where=f"{section}.hub",
        ) from None
    return datasets


def _hub_text(address: str, section: str) -> Iterator[str]:
    """Yield a data set's texts with an empty line between them, as published perplexities have it."""
    name, config, split = _hub_address(address, section)
    datasets = _import_datasets(address, section)
    try:
        rows = datasets.load_dataset(name, config, split=split)["text"]
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            f"cannot load the data set {address}: {error}",
            fix=f"check the address and the connection, or give a local file: --set {section}.path=…",
            where=f"{section}.hub",
        ) from error
    for number, row in enumerate(rows):
        yield (PARAGRAPH if number else "") + text_of({"text": row}, "text", f"{address}, row {number}")


def _builtin(settings: DataSettings) -> tuple[str, ...]:
    return (settings.builtin,) if isinstance(settings.builtin, str) else settings.builtin or ()
