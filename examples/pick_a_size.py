"""One training, many sizes: what each size costs in perplexity, so that you can choose.

python examples/pick_a_size.py runs/demo 0.9 0.8 0.6
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from soco_export.run.verbs import Request, export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run that `train` or `train-and-export` has finished")
    parser.add_argument("sizes", type=float, nargs="+")
    arguments = parser.parse_args()

    print("keep   parameters   perplexity   × dense")
    for size in arguments.sizes:
        # Spectrum and scores stay in the run; each size gets a folder of its own.
        out = arguments.run.with_name(f"{arguments.run.name}-{size:g}")
        export(Request(format="hf", keep_params=size, out=out), arguments.run)
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        perplexity = results["perplexity"]
        print(
            f"{size:<5g} {results['sizes']['params_after']:>12,} "
            f"{perplexity['low_rank']['value']:>12.2f} {perplexity['ratio']:>9.2f}"
        )


if __name__ == "__main__":
    main()
