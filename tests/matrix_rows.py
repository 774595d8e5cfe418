"""The rows of docs/matrix.md: which model of each kind is measured, or must be refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    StackingClassifier,
)
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.linear_model import (
    ElasticNet,
    GammaRegressor,
    HuberRegressor,
    Lasso,
    LinearRegression,
    LogisticRegression,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
    TweedieRegressor,
)
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor, nn

from flataudit.models.flavors import refuse_flavor
from tests.cases import BY_NAME, build
from tests.sklearn_cases import CASES, PAIR, REAL, THREE, TIGHT, TWO, X, fitted, stopped

INVERSE = "1/(C n), intercept free"
STEPS = "alpha times the mean of 1/batch, and 1/T on all"


@dataclass(frozen=True)
class Subject:
    """A model and its data as a caller gives them to the audit, and the network of the definition.

    definition: the network, its x and y that the dense definition is computed on; None: those of
    the torch twin. optimum: the share of |grad NLL| that |grad J| must be within at the fitted
    weights with the audit's own D; None: D is an argument, or training stopped before.
    """

    model: Any
    x: Any
    y: Any
    family: str
    options: Mapping[str, Any]
    definition: tuple[nn.Module, Any, Any] | None = None
    optimum: float | None = None


@dataclass(frozen=True)
class Row:
    """A kind of model; penalty: D in words."""

    kind: str
    penalty: str
    make: Callable[[], Subject]


@dataclass(frozen=True)
class Refused:
    """A kind of model that is refused; part: what the message must say."""

    kind: str
    part: str
    attempt: Callable[[], Any]


# --- scikit-learn -------------------------------------------------------------------------------


def _case(name: str) -> Subject:
    _, y, family, _, _, tolerance = CASES[name]
    # Without a penalty the gradient itself vanishes: to 1e-5, as the tests of the penalty have it.
    # Central differences of a mean loss are good to 1e-9 or so.
    return Subject(fitted(name), X, y, family, {}, optimum=max(tolerance or 1e-5, 1e-8))


def _estimator(name: str, estimator: str, penalty: str) -> Row:
    return Row(estimator, penalty, lambda: _case(name))


def _pipeline() -> Subject:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, **TIGHT)).fit(X * 9 + 4, TWO)
    return Subject(model, X * 9 + 4, TWO, "bernoulli", {}, optimum=1e-5)


def _search() -> Subject:
    inner = make_pipeline(StandardScaler(), LogisticRegression(**TIGHT))
    search = GridSearchCV(inner, {"logisticregression__C": [0.05, 0.5]}, cv=3).fit(X, THREE)
    return Subject(search, X, THREE, "categorical", {}, optimum=1e-5)


def _stochastic(kind: type, solver: str, y: Any, family: str) -> Subject:
    settings = {"hidden_layer_sizes": (4,), "alpha": 0.5, "max_iter": 40, "random_state": 0}
    return Subject(stopped(kind(solver=solver, **settings), X, y), X, y, family, {})


SKLEARN = (
    *(
        _estimator(
            f"logistic_{solver}_{kind}",
            f"LogisticRegression({solver}), {'softmax' if kind == 'softmax' else 'two classes'}",
            INVERSE,
        )
        for solver in ("lbfgs", "newton-cg", "newton-cholesky", "sag", "saga")
        for kind in ("softmax", "binary")
    ),
    _estimator(
        "liblinear",
        "LogisticRegression(liblinear), two classes",
        "1/(C n), intercept 1/(C n intercept_scaling²)",
    ),
    _estimator("logistic_free", "LogisticRegression(C=inf), no intercept", "0"),
    _estimator("logistic_cv", "LogisticRegressionCV", "1/(C_ n), intercept free"),
    _estimator(
        "logistic_cv_liblinear", "LogisticRegressionCV(liblinear)", "1/(C_ n), intercept too"
    ),
    _estimator("sgd", "SGDClassifier(log_loss)", "alpha, intercept free"),
    _estimator("ridge", "Ridge", "alpha/(n s²), intercept free"),
    _estimator("ridge_two_outputs", "Ridge, two targets", "alpha/(n s²), intercept free"),
    _estimator("ridge_cv", "RidgeCV", "alpha_/(n s²), intercept free"),
    _estimator("least_squares", "LinearRegression", "0"),
    _estimator("least_squares_origin", "LinearRegression, two targets, no intercept", "0"),
    _estimator("poisson", "PoissonRegressor", "alpha, intercept free"),
    _estimator("mlp", "MLPClassifier(lbfgs), softmax", "alpha/n, biases free"),
    _estimator("mlp_binary", "MLPClassifier(lbfgs), two classes", "alpha/n, biases free"),
    _estimator("mlp_identity", "MLPClassifier(lbfgs, identity)", "alpha/n, biases free"),
    Row(
        "MLPClassifier(sgd)",
        STEPS,
        lambda: _stochastic(MLPClassifier, "sgd", THREE, "categorical"),
    ),
    Row(
        "MLPClassifier(adam)",
        "alpha times the mean of 1/batch, and sqrt(v)/sum lr",
        lambda: _stochastic(MLPClassifier, "adam", THREE, "categorical"),
    ),
    _estimator("mlp_regressor", "MLPRegressor(lbfgs)", "alpha/(n s²), biases free"),
    _estimator("mlp_counts", "MLPRegressor(lbfgs, poisson)", "alpha/n, biases free"),
    Row(
        "MLPRegressor(sgd), two targets",
        f"({STEPS})/s²",
        lambda: _stochastic(MLPRegressor, "sgd", PAIR, "gaussian"),
    ),
    Row("Pipeline(StandardScaler, LogisticRegression)", INVERSE, _pipeline),
    Row("GridSearchCV(Pipeline(...))", INVERSE, _search),
)


# --- torch --------------------------------------------------------------------------------------


def _built(name: str) -> Subject:
    case = BY_NAME[name]
    made = build(case)
    numbers = {key: float(d.flatten()[0]) for key, d in made.penalty.items()}
    options: dict[str, Any] = {"penalty": numbers, "family": case.family}
    if case.family == "gaussian":
        options["dispersion"] = case.dispersion
    definition = (made.model, made.x, made.y)
    return Subject(made.model, made.x, made.y, case.family, options, definition)


def _network(name: str, kind: str) -> Row:
    return Row(kind, "argument", lambda: _built(name))


class WithHead(nn.Module):
    """A network that ends in probabilities."""

    def __init__(self, network: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.network(x))


def _probabilities(name: str, head: nn.Module) -> Subject:
    made = _built(name)
    penalty = {f"network.{key}": value for key, value in made.options["penalty"].items()}
    model = WithHead(made.model, head)
    return Subject(model, made.x, made.y, made.family, {"penalty": penalty}, made.definition)


def _logged(model: nn.Module, **more: Any) -> nn.Module:
    """The model as mlflow.pytorch gives it back."""
    import logging

    import mlflow.pytorch

    from flataudit.models.registry import load_model, resolve
    from flataudit.store import scratch_folder

    logging.getLogger("mlflow.pytorch").setLevel(logging.ERROR)
    folder = Path(scratch_folder()) / "model"
    mlflow.pytorch.save_model(model, str(folder), pip_requirements=["torch"], **more)
    found: nn.Module = load_model(resolve(str(folder)))
    return found


def _exported(name: str) -> Subject:
    made = _built(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = _logged(
            made.model.float(), serialization_format="pt2", input_example=made.x[:4].float().numpy()
        )
    return Subject(
        graph, made.x, made.y, made.family, made.options, (made.model.double(), made.x, made.y)
    )


def _lightning() -> Subject:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.network = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh())
            self.head = nn.Linear(4, 3)

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.network(x))

    x, y = _data(5, 3)
    model = _seeded(Module)
    with torch.no_grad():
        model(x.float())  # in training mode: gathers running statistics
    found = _logged(model, serialization_format="pickle")
    definition = (model.double().eval(), x, y)
    return Subject(found, x, y, "categorical", {"penalty": 0.02}, definition)


def _bert() -> Any:
    """A sequence classifier built from its configuration: nothing is downloaded."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=11,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        max_position_embeddings=6,
        num_labels=3,
    )
    return _seeded(lambda: BertForSequenceClassification(config)).eval()


def _pipeline_of(model: nn.Module) -> nn.Module:
    """The model as mlflow.transformers gives it back, logged as a pipeline's components."""
    import logging

    import mlflow.transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging as bars

    from flataudit.models.registry import load_model, resolve
    from flataudit.store import scratch_folder

    logging.getLogger("mlflow.transformers").setLevel(logging.ERROR)
    bars.disable_progress_bar()
    words = Tokenizer(WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    folder = Path(scratch_folder()) / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.transformers.save_model(
            {"model": model, "tokenizer": tokenizer},
            str(folder),
            task="text-classification",
            pip_requirements=["transformers"],
        )
        found: nn.Module = load_model(resolve(str(folder)))
    return found


def _transformer(logged: Callable[[nn.Module], nn.Module]) -> Subject:
    model = _bert()
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(1, 11, (10, 5), generator=generator)
    mask = (torch.arange(5) < torch.randint(2, 6, (10, 1), generator=generator)).long()
    x, y = {"input_ids": ids, "attention_mask": mask}, torch.arange(10) % 3
    found = logged(model)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.double()

        def forward(self, **inputs: Tensor) -> Tensor:
            return self.model(**inputs).logits

    return Subject(found, x, y, "categorical", {"penalty": 0.02}, (Logits(), x, y))


def _seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make()


def _data(inputs: int, classes: int, n: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (n,), generator=generator)


@cache
def _to_the_optimum(optimizer: str, loss: str) -> Subject:
    """A layer trained with weight_decay until its gradient is gone."""
    decay = 0.03
    x, y = _data(4, 3)
    if loss != "nll":
        y = x[:, :2] - 0.3 * x[:, 2:].square()
    model = _seeded(lambda: nn.Linear(4, 3 if loss == "nll" else 2)).double()
    kind = getattr(torch.optim, optimizer)
    descent = kind(model.parameters(), lr=0.5 if optimizer == "SGD" else 0.05, weight_decay=decay)
    slower = torch.optim.lr_scheduler.ExponentialLR(descent, 1.0 if optimizer == "SGD" else 0.995)
    measure = nn.functional.cross_entropy if loss == "nll" else nn.functional.mse_loss
    for _ in range(2500):
        descent.zero_grad()
        measure(model(x), y).backward()
        descent.step()
        slower.step()
    record = {"optimizer": "converged", "weight_decay": decay, "loss": loss}
    tolerance = 1e-5 if optimizer == "SGD" else 1e-4  # Adam's steps do not shrink by themselves
    family = "categorical" if loss == "nll" else "gaussian"
    return Subject(model, x, y, family, {"training": record}, (model, x, y), tolerance)


TORCH = (
    _network("mlp_tanh_wide", "Linear, Tanh"),
    _network("mlp_relu_inplace", "Linear, ReLU(inplace)"),
    _network("squeezed", "one output, squeezed"),
    _network("gaussian_outputs", "three real targets"),
    _network("poisson_outputs", "two counts"),
    _network("batchnorm", "BatchNorm1d"),
    _network("batchnorm_2d", "BatchNorm2d, Dropout2d, Conv2d"),
    _network("layernorm", "LayerNorm, its parameters free"),
    _network("groupnorm", "GroupNorm, Conv2d"),
    _network("dropout", "Dropout"),
    _network("weight_norm", "weight_norm"),
    _network("embedding", "Embedding, integer inputs"),
    _network("embedding_bag", "EmbeddingBag"),
    _network("embedding_max_norm", "Embedding(max_norm)"),
    _network("convolution_1d", "Conv1d"),
    _network("convolutions", "Conv2d: stride, padding, dilation"),
    _network("odd_convolutions", "Conv2d: groups, circular padding"),
    _network("convolution_3d", "Conv3d"),
    _network("transposed_1d", "ConvTranspose1d"),
    _network("transposed_2d", "ConvTranspose2d"),
    _network("transposed_3d", "ConvTranspose3d"),
    _network("rnn", "RNN"),
    _network("lstm", "LSTM, two layers, dropout"),
    _network("lstm_bidirectional", "LSTM, bidirectional, projected"),
    _network("gru", "GRU"),
    _network("multihead", "MultiheadAttention"),
    _network("attention", "TransformerEncoderLayer"),
    _network("transformer_encoder", "TransformerEncoder"),
    _network("text_classifier", "small transformer classifier: embeddings, encoder, pooling"),
    _network("text_by_name", "the same, ids and padding mask by name (dict)"),
    _network("text_padding_pooled", "the same, pooling over the padding too"),
    _network("tied", "tied weights"),
    _network("tied_embedding", "tied embedding and output layer"),
    _network("called_twice", "a layer called twice"),
    _network("towers_by_name", "several inputs by name"),
    _network("towers_by_position", "several inputs by position"),
    _network("bilinear", "Bilinear"),
    _network("frozen_weight", "frozen parameters (left out of P)"),
    _network("frozen_batchnorm", "frozen body with BatchNorm, trained head"),
    _network("unused", "unused and detached parameters"),
    _network("data_dependent", "branches on the values of x"),
    Row("softmax head", "argument", lambda: _probabilities("mlp_tanh_wide", nn.Softmax(dim=1))),
    Row("sigmoid head", "argument", lambda: _probabilities("logistic", nn.Sigmoid())),
    Row("pt2 export: Linear, Tanh", "argument", lambda: _exported("mlp_tanh_wide")),
    Row("pt2 export: Conv2d", "argument", lambda: _exported("convolutions")),
    Row("pt2 export: Dropout", "argument", lambda: _exported("dropout")),
    Row("Lightning module, logged by mlflow.pytorch", "argument", _lightning),
    Row(
        "transformers sequence classifier, logged by mlflow.pytorch",
        "argument",
        lambda: _transformer(lambda model: _logged(model, serialization_format="pickle")),
    ),
    Row(
        "transformers sequence classifier, logged by mlflow.transformers",
        "argument",
        lambda: _transformer(_pipeline_of),
    ),
    Row("trained by SGD(weight_decay=w)", "w", lambda: _to_the_optimum("SGD", "nll")),
    Row("trained by Adam(weight_decay=w)", "w", lambda: _to_the_optimum("Adam", "nll")),
    Row(
        "trained by SGD(weight_decay=w), MSELoss over K outputs",
        "w K/(2 s²)",
        lambda: _to_the_optimum("SGD", "mse"),
    ),
)


# --- refused ------------------------------------------------------------------------------------


def _attempt(model: Any, x: Any = X, y: Any = THREE) -> Callable[[], Any]:
    import flataudit

    return lambda: flataudit.audit(model, (x, y), penalty="auto")


class RandomOutputs(nn.Linear):
    """Dropout that eval mode does not switch off."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5))


def _scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(4, 3))


def _training_export() -> Any:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    batch = {"x": torch.export.Dim("n")}
    return torch.export.export(
        model, (torch.randn(5, 4),), dynamic_shapes=({0: batch["x"]},)
    ).module()


REFUSED = (
    Refused(
        "CalibratedClassifierCV",
        "averages models",
        _attempt(CalibratedClassifierCV(LogisticRegression())),
    ),
    Refused("DecisionTreeClassifier", "no gradient", _attempt(DecisionTreeClassifier())),
    Refused("RandomForestClassifier", "no gradient", _attempt(RandomForestClassifier())),
    Refused("GradientBoostingClassifier", "no gradient", _attempt(GradientBoostingClassifier())),
    Refused(
        "HistGradientBoostingClassifier", "no gradient", _attempt(HistGradientBoostingClassifier())
    ),
    Refused("SVC", "margin loss", _attempt(SVC())),
    Refused("KNeighborsClassifier", "keeps the training data", _attempt(KNeighborsClassifier())),
    Refused(
        "GaussianProcessClassifier",
        "one weight per training sample",
        _attempt(GaussianProcessClassifier()),
    ),
    Refused("GaussianNB", "densities of x", _attempt(GaussianNB())),
    Refused("Lasso", "no curvature", _attempt(Lasso())),
    Refused("ElasticNet", "no curvature", _attempt(ElasticNet())),
    Refused("RidgeClassifier", "no likelihood", _attempt(RidgeClassifier())),
    Refused("HuberRegressor", "robust loss", _attempt(HuberRegressor())),
    Refused(
        "StackingClassifier",
        "several models",
        _attempt(StackingClassifier([("one", LogisticRegression())])),
    ),
    Refused("KMeans", "no targets", _attempt(KMeans())),
    Refused("GammaRegressor", "not supported", _attempt(GammaRegressor())),
    Refused("TweedieRegressor", "not supported", _attempt(TweedieRegressor())),
    Refused(
        "SGDClassifier(log_loss), three classes",
        "one model per class",
        _attempt(SGDClassifier(loss="log_loss", random_state=0).fit(X, THREE)),
    ),
    Refused(
        "SGDClassifier(hinge)",
        "no likelihood",
        _attempt(SGDClassifier(random_state=0).fit(X, TWO), y=TWO),
    ),
    Refused(
        "LogisticRegression with an l1 part",
        "no curvature",
        _attempt(LogisticRegression(l1_ratio=0.5, solver="saga", tol=0.1).fit(X, TWO), y=TWO),
    ),
    Refused(
        "LogisticRegression(class_weight)",
        "class_weight",
        _attempt(LogisticRegression(class_weight="balanced").fit(X, TWO), y=TWO),
    ),
    Refused(
        "LinearRegression(positive=True)",
        "constrained",
        _attempt(LinearRegression(positive=True).fit(X, REAL), y=REAL),
    ),
    Refused(
        "Ridge, one alpha per target",
        "one target at a time",
        _attempt(Ridge(alpha=[1.0, 2.0]).fit(X, PAIR), y=PAIR),
    ),
    Refused("an unfitted estimator", "call fit first", _attempt(LogisticRegression())),
    Refused("xgboost flavor", "no gradient", lambda: refuse_flavor("xgboost")),
    Refused("lightgbm flavor", "no gradient", lambda: refuse_flavor("lightgbm")),
    Refused("onnx flavor", "onnx", lambda: refuse_flavor("onnx")),
    Refused("TorchScript", "TorchScript", lambda: _attempt(_scripted())()),
    Refused("pt2 exported in training mode", "eval mode", lambda: _attempt(_training_export())()),
    Refused(
        "BatchNorm without running statistics",
        "own sample alone",
        _attempt(
            nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)), X, THREE
        ),
    ),
    Refused("random outputs in eval mode", "random", _attempt(RandomOutputs(4, 3))),
    Refused("lazy parameters without values", "lazy", _attempt(nn.LazyLinear(3))),
    Refused(
        "every parameter frozen",
        "requires_grad",
        _attempt(nn.Linear(4, 3).requires_grad_(False)),
    ),
)
