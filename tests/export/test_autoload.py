"""Registration when transformers is imported later, earlier, or is not what we know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.transformers

ROOT = Path(__file__).parents[2]


def python(code: str, *paths: Path) -> str:
    search = f"import sys; sys.path[:0] = {[str(path) for path in (*paths, ROOT)]!r}\n"
    run = subprocess.run([sys.executable, "-c", search + code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def test_import_is_light_and_watches_once() -> None:
    python(
        "import soco_export, soco_export.autoload as a\n"
        "a.install(); a.install()\n"
        "assert sum(isinstance(finder, a._Watch) for finder in sys.meta_path) == 1\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'jinja2', 'yaml', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )


def fake_transformers(folder: Path, table: str) -> Path:
    package = folder / "transformers" / "quantizers"
    package.mkdir(parents=True)
    for part in (package.parent, package):
        (part / "__init__.py").write_text("")
    (package / "auto.py").write_text(table)
    return folder


def test_a_transformers_we_do_not_fit_is_left_working(tmp_path: Path) -> None:
    """Every user of transformers passes through the hook: whatever is wrong with ours, theirs must import."""
    fake = fake_transformers(tmp_path, "answer = 42")
    output = python(
        "import soco_export.autoload as a\n"
        "a.register = lambda table: table.AUTO_QUANTIZER_MAPPING\n"
        "a.install()\n"
        "from transformers.quantizers.auto import answer\n"
        "import transformers.quantizers.auto as table\n"
        "assert answer == 42 and type(table.__loader__).__name__ == 'SourceFileLoader', table.__loader__\n"
        "assert table.__spec__.loader is table.__loader__\n",
        fake,
    )
    assert "soco-export cannot register with transformers" in output


def test_registration_when_the_table_is_what_imports_torch() -> None:
    """PyTorch calls `install` while it is imported, which here is in the middle of the table."""
    pytest.importorskip("transformers")
    python(
        "import transformers.quantizers.auto as table\n"
        "import transformers.modeling_utils\n"
        "import soco_export\n"
        "assert 'soco-export' in table.AUTO_QUANTIZER_MAPPING\n"
    )


def test_an_absent_transformers_stays_absent() -> None:
    python(
        "import soco_export.autoload as a, importlib.util\n"
        "sys.modules['transformers'] = None\n"
        "a.install()\n"
        "assert sys.meta_path[0].find_spec(a.TABLE, ['/nowhere']) is None\n"
        "assert sys.meta_path[0].find_spec('json', None) is None\n"
    )


def test_registration_now_and_twice() -> None:
    table = pytest.importorskip("transformers.quantizers.auto")
    from soco_export.autoload import install
    from soco_export.checkpoint.quantizer import SocoExportConfig

    install()
    install()
    assert table.AUTO_QUANTIZATION_CONFIG_MAPPING["soco-export"] is SocoExportConfig
