"""The tables of a recipe, as frozen data. What depends on several keys is in `recipe_rules`."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = ["FailuresTable", "FederatedTable", "ModelTable", "PrivacyTable", "Recipe", "TaskTable", "VariantTable"]

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Width = Annotated[int, Field(ge=1, le=4096)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=16)]
PassTable = dict[str, str | int | float | bool]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Importable = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
Activation = Literal["relu", "relu6", "leaky-relu", "tanh", "sigmoid", "gelu"]
Families = Literal[
    "mlp",
    "cnn",
    "ds-cnn",
    "resnet-8",
    "mobilenet",
    "conv1d",
    "gru",
    "lstm",
    "transformer",
    "vit-tiny",
    "autoencoder",
]
Strategies = Literal["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold", "fedbuff", "q-ffl"]
Rules = Literal["mean", "median", "trimmed-mean", "krum", "multi-krum", "bulyan", "geometric-median", "norm-bounded"]
Optimizers = Literal["auto", "sgd", "momentum", "adam", "yogi", "adagrad", "rmsprop"]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TaskTable(_Table):
    """What is learned: a task by name, or, with a source, one over files of one's own (`files.DataDescription`)."""

    name: str = "digits"
    source: Literal["csv", "parquet", "images", "hub"] | None = None
    path: str | None = None
    owner_column: str | None = None
    label: str | list[str] | None = None
    features: list[str] | None = None
    kind: Literal["classification", "regression", "anomaly"] | None = None
    labels: list[str] | None = None
    shape: Annotated[list[Width], Field(min_length=1, max_length=4)] | None = None
    scale: Positive | None = None
    mean: list[Finite] | None = None
    std: list[Positive] | None = None
    target_mean: list[Finite] | None = None
    target_std: list[Positive] | None = None
    threshold: Positive | None = None
    missing: Literal["refuse", "zero", "drop"] | dict[str, Finite] | None = None
    duplicates: Literal["keep", "drop"] | None = None
    status: Literal["private", "public-benchmark"] | None = None
    test: str | None = None
    public: str | None = None
    delimiter: str | None = None
    augment: list[PassTable] = []


class ModelTable(_Table):
    """The model's family and shape; what is left out is the family's own."""

    family: Families | Importable = "cnn"
    channels: Widths | None = None
    hidden: Widths | None = None
    width: Width | None = None
    depth: Annotated[int, Field(ge=1, le=64)] | None = None
    heads: Annotated[int, Field(ge=1, le=256)] | None = None
    patch: Annotated[int, Field(ge=1, le=256)] | None = None
    groups: Width = 4
    norm: Literal["group", "batch", "none"] = "group"
    activation: Activation | None = None


class FailuresTable(_Table):
    """What goes wrong, in a simulation, by public randomness."""

    dropout: Share = 0.0
    straggler_share: Share = 0.0
    slowdown: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0
    base_seconds: Positive = 1.0
    jitter: NotNegative = 0.2
    deadline_s: Positive | None = None
    corrupt_share: Share = 0.0
    corruption: Literal["nan", "sign-flip", "scale", "random", "zero", "shape", "count", "replay", "keys"] = "nan"
    corruption_scale: Finite = 10.0


class FederatedTable(_Table):
    """Who learns together, and how."""

    owners: Count = 10
    partition: Literal["dirichlet", "iid", "natural", "shards", "pathological", "quantity"] = "dirichlet"
    alpha: Positive = 0.5
    shards_per_owner: Count = 2
    classes_per_owner: Count = 2
    rounds: Count = 80
    cohort: Count | None = None
    over_selection: Annotated[float, Field(ge=1, le=10, allow_inf_nan=False)] = 1.0
    local_steps: Count = 1
    batch_rate: Probability = 0.3
    learning_rate: Positive = 0.25
    local_optimizer: Literal["sgd", "momentum", "adam", "rmsprop", "adagrad"] = "sgd"
    local_momentum: BelowOne = 0.9
    strategy: Strategies | Importable = "fedavgm"
    proximal: Positive = 0.01
    fairness: NotNegative = 1.0
    buffer: Count | None = None
    concurrency: Count | None = None
    aggregation: Rules = "mean"
    hostile: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    trim: Annotated[float, Field(ge=0, lt=0.5, allow_inf_nan=False)] = 0.1
    norm_bound: Positive | None = None
    personal: Literal["none", "fedbn", "local-head", "ditto"] = "none"
    personal_strength: Positive = 1.0
    codec: Literal["none", "top-k", "8-bit"] = "none"
    codec_fraction: Probability = 0.1
    error_feedback: bool = True
    server_optimizer: Optimizers = "auto"
    server_learning_rate: Positive | None = None
    server_momentum: BelowOne = 0.9
    server_second_momentum: BelowOne = 0.99
    server_tau: Positive = 1e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    engine: Literal["auto", "sequential", "vectorised", "workers"] = "auto"
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    checkpoint_s: NotNegative = 0.0
    quorum: Count | None = None
    wait_s: NotNegative = 60.0
    weights: Literal["uniform", "size", "bounded"] = "uniform"
    weight_cap: Count | None = None
    evaluate_every: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    failures: FailuresTable = FailuresTable()


class PrivacyTable(_Table):
    """What is guaranteed."""

    unit: Literal["record", "client", "local", "none"] = "record"
    epsilon: Positive | None = None
    budget: Positive | None = None
    noise_multiplier: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 1e-5
    max_grad_norm: Positive | None = None
    sample_rate: Probability | None = None
    reference_size: Count | None = None
    sizes: Literal["secret", "public"] = "secret"
    min_size: Count = 1
    noise: Literal["auto", "fast", "hardened"] = "auto"
    clip: Literal["fixed", "adaptive"] = "fixed"
    target_quantile: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.5
    evaluation_noise_multiplier: Positive = 10.0


class VariantTable(_Table):
    """One artifact to make."""

    name: Name
    format: Literal["onnx", "tflite", "ort", "micro", "pte"]
    label: str | None = None
    whole: bool = False
    passes: list[PassTable] = []


class CompressionTable(_Table):
    """What is made of the trained model."""

    variants: list[VariantTable] = []


def _device(name: str) -> str:
    from tacit.edge.fleet import check_device

    return check_device(name)


DeviceName = Annotated[str, AfterValidator(_device)]


class DevicesTable(_Table):
    """Where artifacts are measured."""

    names: Annotated[list[DeviceName], Field(max_length=32)] = ["local"]
    mode: Literal["quick", "full"] = "quick"


class ReportTable(_Table):
    """What the report adds."""

    twin: bool = True


class Recipe(_Table):
    """A whole run."""

    task: TaskTable = TaskTable()
    model: ModelTable = ModelTable()
    federated: FederatedTable = FederatedTable()
    privacy: PrivacyTable = PrivacyTable()
    compression: CompressionTable = CompressionTable()
    devices: DevicesTable = DevicesTable()
    report: ReportTable = ReportTable()

    def to_toml(self) -> str:
        """The resolved recipe, every default written out; keys that are not set are left out.

        Example:
            >>> Recipe().to_toml().splitlines()[2:4]
            ['[task]', 'name = "digits"']
        """
        import tomli_w

        return "# Resolved by tacit: every default is written out.\n\n" + tomli_w.dumps(
            self.model_dump(exclude_none=True)
        )

    def digest(self) -> str:
        """SHA-256 of the resolved content; comments and order do not count.

        Example:
            >>> Recipe().digest() == Recipe(task=TaskTable(name="writers")).digest()
            False
        """
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()
