"""A task's metric in words and numbers: accuracy as a percentage, R², AUROC and a user's own as they are."""

from collections.abc import Mapping

from tacit.edge.wording import UNMEASURED, finite, percent, plain

__all__ = [
    "apart",
    "metric_meaning",
    "metric_name",
    "metric_phrase",
    "metric_text",
    "metric_title",
    "metric_value",
    "of_spread",
    "points",
]

_SPACE = "\u00a0"  # between a number and its unit: never breaks the line
_NAMES = {"R2": "R²"}
_MEANINGS = {
    "accuracy": "Float model, test split",
    "R2": "How much of the differences between records the float model explains: 1 is all, 0 is no better than one "
    "guess for everybody",
    "AUROC": "How often the float model ranks an anomalous record above a normal one: 1 is always, 0.5 is chance",
}


def metric_name(metric: object) -> str:
    """Return a metric's name within a sentence.

    Example:
        >>> metric_name("accuracy"), metric_name("R2"), metric_name(None)
        ('accuracy', 'R²', 'accuracy')
    """
    name = metric if isinstance(metric, str) and metric else "accuracy"
    return _NAMES.get(name, name)


def metric_title(metric: object) -> str:
    """Return a metric's name at the head of a card or a column.

    Example:
        >>> metric_title("accuracy"), metric_title("AUROC")
        ('Accuracy', 'AUROC')
    """
    name = metric_name(metric)
    return "Accuracy" if name == "accuracy" else name


def metric_meaning(metric: object) -> str:
    """Return what a metric says, for a layperson, or that it is the user's own.

    Example:
        >>> metric_meaning("hit rate")
        "The task's own metric of the float model, test split; higher is better"
    """
    own = "The task's own metric of the float model, test split; higher is better"
    return _MEANINGS.get("accuracy" if metric is None else str(metric), own)


def metric_value(value: object, metric: object = "accuracy") -> str:
    """Return a metric's value: a percentage of accuracy, else a number of which only 1.0 itself reads "1".

    Example:
        >>> metric_value(0.94).replace("\u00a0", " "), metric_value(0.8314, "R2"), metric_value(0.9996, "AUROC")
        ('94 %', '0.831', '0.999')
        >>> metric_value(-2.5, "R2"), metric_value(None, "R2")
        ('\N{MINUS SIGN}2.5', 'not measured')
    """
    number = finite(value)
    if number is None or metric_name(metric) == "accuracy":
        return percent(value)
    if abs(number) >= 1000:
        return plain(number, 4).replace("-", "\N{MINUS SIGN}", 1)
    rounded = round(number, 3)
    shown = 0.999 if rounded == 1 and number < 1 else rounded + 0.0  # no minus before a zero
    return f"{shown:g}".replace("-", "\N{MINUS SIGN}")


def metric_text(value: object, metric: object = "accuracy") -> str:
    """Return a metric's value as a terminal shows it.

    Example:
        >>> metric_text(0.9361), metric_text(0.8298, "R2"), metric_text(None)
        ('93.6%', '0.830', 'not measured')
    """
    number = finite(value)
    if number is None:
        return metric_value(value, metric)
    return f"{number:.1%}" if metric_name(metric) == "accuracy" else f"{number:.3f}"


def metric_phrase(value: object, metric: object = "accuracy") -> str:
    """Return what a model reaches, to stand after "with" or "reaches".

    Example:
        >>> [metric_phrase(0.94, name).replace("\u00a0", " ") for name in ("accuracy", "R2", "F1")]
        ['94 % accuracy', 'an R² of 0.94', '0.94 by F1']
    """
    name, reached = metric_name(metric), metric_value(value, metric)
    if name == "accuracy":
        return f"{reached} accuracy"
    return f"an {name} of {reached}" if str(metric) in _MEANINGS else f"{reached} by {name}"


def points(value: object, reference: object, metric: object = "accuracy") -> str:
    """Return the difference of two values of a metric with its sign, or an empty string; shares in percentage points.

    Example:
        >>> points(0.97, 0.95).replace("\u00a0", " "), points(0.97, None), points(0.812, 0.831, "R2")
        ('+2 pt', '', '\N{MINUS SIGN}0.019')
    """
    share, other = finite(value), finite(reference)
    if share is None or other is None:
        return ""
    counted = metric_name(metric) == "accuracy"
    difference = round(100 * (share - other), 1) if counted else round(share - other, 3)
    sign = "±" if not difference else "+" if difference > 0 else "\N{MINUS SIGN}"
    return f"{sign}{abs(difference):g}{f'{_SPACE}pt' if counted else ''}"


def apart(with_noise: object, without_noise: object, metric: object = "accuracy") -> str:
    """Return how far two values of a metric are apart, and which of them is higher, or an empty string.

    Example:
        >>> apart(0.94, 0.967).replace("\u00a0", " "), apart(0.94, 0.94).replace("\u00a0", " "), apart(0.94, None)
        ('2.7 pt apart, higher without noise', 'less than 0.1 pt apart', '')
        >>> apart(0.812, 0.831, "R2")
        '0.019 apart, higher without noise'
    """
    difference = points(without_noise, with_noise, metric)
    if not difference:
        return ""
    if difference.startswith("±"):
        return f"less than 0.1{_SPACE}pt apart" if metric_name(metric) == "accuracy" else "less than 0.001 apart"
    return f"{difference[1:]} apart, higher {'without' if difference.startswith('+') else 'with'} noise"


def of_spread(parity: Mapping[str, object]) -> str:
    """Return the largest difference of two values over the spread of the model's own.

    Example:
        >>> of_spread({"max_abs": 0.03, "spread": 2.0}).replace("\u00a0", " ")
        "1.5 % of the outputs' spread"
        >>> of_spread({"max_abs": 1e-6, "spread": 2.0}).replace("\u00a0", " ")
        "less than 0.1 % of the outputs' spread"
    """
    difference, spread = finite(parity.get("max_abs")), finite(parity.get("spread"))
    if difference is None or not spread:
        return f"spread {UNMEASURED}"
    share = difference / spread
    shown = f"less than 0.1{_SPACE}%" if 0 < share < 1e-3 else percent(share)
    return f"{shown} of the outputs' spread"
