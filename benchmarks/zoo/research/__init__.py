"""Research on the zoo: what was tried to predict the gap better (docs/decisions/0018-research.md).

    python -m benchmarks.zoo.research.recalibrate [--store FOLDER] [--data FOLDER] [--only PATTERN]
    python -m benchmarks.zoo.research.training    [--store FOLDER] [--data FOLDER] [--only PATTERN]
    python -m benchmarks.zoo.research.paths       [--store FOLDER] [--data FOLDER] [--only PATTERN]
    python -m benchmarks.zoo.research.summary     [--store FOLDER] [--draws 400]

The first needs a store that `train` and `measure` have filled; the second trains its own networks,
the third those of the zoo again. They write one row per model as soon as it is known and skip what
is done. The last joins the rows with results.parquet, scores them and writes research.json.
"""
