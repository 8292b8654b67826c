"""Method × size × seed on one model, at equal tokens: what each pruning method costs in perplexity.

python -m benchmarks.quality --model tiny --keep 0.8,0.6,0.4 --seeds 0,1,2 --out benchmarks/quality/results/tiny

run.py          the command line, and the loop over cells
cells.py        what a cell is, the grid of them, and their files
laboratory.py   one cell's work, by the calls of soco_train; spectra and scores are shared between cells
table.py        cells → means, spreads, excess over dense; JSON, Markdown
plot.py         perplexity against stored parameters as SVG

A method is a recipe of recipes/methods/ laid over the model's own.
"""
