"""A zoo of trained models: how well do the estimates foresee the true gap?

    python -m benchmarks.zoo.train       trains and registers every cell of the grid
    python -m benchmarks.zoo.measure     true gap and all estimates of every registered model
    python -m benchmarks.zoo.baselines   what else can be asked of the same models
    python -m benchmarks.zoo.rivals      what other libraries say of them
    python -m benchmarks.zoo.scores      how well each ranks and foresees the gap

Each takes --quick (a subset of the grid) and can be stopped and started again.
"""
