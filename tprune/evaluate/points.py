"""From measured points to what is shown of them: groups of one protocol, seeds put together, the best of each cost."""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tprune.evaluate.protocol import key, of_quality

FLOOR = "random"
"""The method that every other one must beat; part of every sweep."""
METRICS = {"accuracy": False, "perplexity": True, "agreement": False}
"""What counts as quality, the first that was measured; and whether less of it is better."""


@dataclass(frozen=True)
class Storage:
    """What pruning saves of memory: the figure's key, and how it is called.

    Attributes:
        figure: in the report's figures, or in its budget.
        short, name: for a column and for an axis.
        note: what the number is and is not.
    """

    figure: str
    short: str
    name: str
    note: str


STORAGE = {
    "vit": Storage(
        "tokens_entering_mean", "tokens", "tokens per sublayer", "patch tokens; activations are in proportion"
    ),
    "vlm": Storage(
        "tokens_entering_mean", "tokens", "image tokens per layer", "their keys and values are in proportion"
    ),
    "llm-context": Storage("cache_mb", "cache", "cache, MB per window", "keys and values of the context"),
    "llm-weights": Storage(
        "weight_mb", "weights", "weights, MB", "those that are not zero, without their places"
    ),
}
"""By family."""


@dataclass(frozen=True)
class Row:
    """One method at one budget, over its seeds. Costs are fractions of the dense model's.

    Attributes:
        method, settings: which method, and its hyperparameters that are not the paper's, as text.
        budget: as asked, as text; `order` sorts budgets from little to much pruning.
        status, reason, reach: "ok", or why there are no figures and what the method can reach.
        quality, spread: mean and sample standard deviation over `seeds` seeds; no spread of one.
        latency, latency_low, latency_high: median and quartiles over rounds of the ratio to the dense call before.
        recipe: YAML of the first seed.
        front: costs for which nothing measured is both better and cheaper.
        kinds: quality on each kind of question, mean over seeds; empty where the data has no kinds.
    """

    method: str
    settings: str
    budget: str
    order: float
    status: str
    reason: str = ""
    reach: tuple[float | None, float | None] = (None, None)
    seeds: int = 0
    achieved: float | None = None
    quality: float | None = None
    spread: float | None = None
    agreement: float | None = None
    flops: float | None = None
    latency: float | None = None
    latency_low: float | None = None
    latency_high: float | None = None
    latency_ms: float | None = None
    storage: float | None = None
    recipe: str = ""
    pictures: tuple[dict[str, str], ...] = ()
    front: tuple[str, ...] = ()
    kinds: dict[str, float] = field(default_factory=dict)

    def cost(self, axis: str) -> str:
        """A cost as it is shown, with its quartiles where it was timed."""
        value = getattr(self, axis)
        if value is None:
            return "-"
        if axis != "latency":
            return f"{value:.1%}"
        return f"{value:.0%} ({100 * self.latency_low:.0f} to {100 * self.latency_high:.0f})"

    @property
    def name(self) -> str:
        """The method and what is set of it."""
        return f"{self.method} {self.settings}".strip()


@dataclass(frozen=True)
class Group:
    """Points of one protocol, and so of one plot.

    Attributes:
        protocol: what they share.
        metric: what quality is; `lower` whether less is better.
        dense: the dense model's figures.
        rows: by budget from little to much pruning, the best first in each.
    """

    protocol: dict[str, Any]
    metric: str
    dense: dict[str, Any]
    rows: tuple[Row, ...] = field(default=())

    @property
    def title(self) -> str:
        """Family, model and data."""
        protocol, data = self.protocol, self.protocol["data"]
        unit = "samples" if "samples" in data else "windows"
        count = data.get(unit)
        unit = unit if count != 1 else unit[:-1]
        return f"{protocol['family']} on {protocol['model']['name']}: {data.get('source')}, {count} {unit}"

    @property
    def lower(self) -> bool:
        """Whether less of the metric is better."""
        return METRICS[self.metric]

    @property
    def measured(self) -> list[Row]:
        """The rows that have figures to draw."""
        return [row for row in self.rows if row.quality is not None]

    @property
    def lines(self) -> list[str]:
        """Names of what is measured, the floor last."""
        return sorted({row.name for row in self.measured}, key=lambda name: (name == FLOOR, name))

    def cost(self, axis: str) -> str | None:
        """Why a cost is not drawn: None where it was measured, and differs from the dense model's."""
        values = [getattr(row, axis) for row in self.measured if getattr(row, axis) is not None]
        if not values:
            return "not measured"
        if axis != "latency" and all(abs(value - 1) < 0.005 for value in values):
            return "every method leaves it as it is"
        return None


def groups(points: list[dict[str, Any]], first: dict[str, Any] | None = None) -> list[Group]:
    """The points by protocol; the group of the protocol `first` leads, the others follow by size."""
    shared: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for point in points:
        shared[key(of_quality(point["protocol"]))].append(point)
    leading = None if first is None else key(of_quality(first))
    order = sorted(shared, key=lambda name: (name != leading, -len(shared[name]), name))
    return [_group(shared[name]) for name in order]


def _group(points: list[dict[str, Any]]) -> Group:
    good = [point for point in points if point["status"] == "ok"]
    dense = dict(good[0]["dense"]) if good else {}
    metric = next((name for name in METRICS if dense.get(name) is not None), "agreement")
    times = [point["dense"]["latency_ms"] for point in good if "latency_ms" in point["dense"]]
    if times:
        dense["latency_ms"] = statistics.median(times)
    storage = STORAGE[points[0]["family"]].figure
    if good:
        dense["storage"] = dense.get(storage) or good[0]["budget"].get("tokens")
    cells: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for point in points:
        given = point["set"] | ({"fit": point["fit_on"]} if point.get("fit_on") else {})
        settings = " ".join(f"{name}={_short(value)}" for name, value in given.items())
        cells[point["method"], settings, _budget(point["asked"]), point["status"]].append(point)
    rows = [_row(place, cell, metric, dense, storage) for place, cell in cells.items()]
    rows = [_with_front(row, rows, METRICS[metric]) for row in rows]
    sign = 1 if METRICS[metric] else -1
    worst = float("inf")
    rows.sort(
        key=lambda row: (
            row.order,
            row.budget,
            worst if row.quality is None else sign * row.quality,
            row.name,
        )
    )
    return Group(of_quality(points[0]["protocol"]), metric, dense, tuple(rows))


def _row(
    place: tuple[str, str, str, str],
    points: list[dict[str, Any]],
    metric: str,
    dense: dict[str, Any],
    storage: str,
) -> Row:
    method, settings, budget, status = place
    points = sorted(points, key=lambda point: point["seed"])
    row = Row(method, settings, budget, _order(points[0]["asked"]), status, recipe=points[0]["recipe"])
    if status != "ok":
        reach = tuple(points[0].get("reach", (None, None)))
        return replace(row, reason=points[0]["reason"], reach=reach, seeds=len(points))

    def mean(value: Callable[[dict[str, Any]], float | None]) -> float | None:
        values = [value(point) for point in points]
        return None if None in values else statistics.fmean(values)

    qualities = [point["pruned"].get(metric) for point in points]
    whole = None not in qualities
    held = (lambda p: p["pruned"].get(storage)) if storage in dense else (lambda p: p["budget"].get(storage))
    return replace(
        row,
        seeds=len(points),
        achieved=mean(lambda point: point["budget"]["achieved"]),
        quality=statistics.fmean(qualities) if whole else None,
        spread=statistics.stdev(qualities) if whole and len(points) > 1 else None,
        agreement=mean(lambda point: point["pruned"]["agreement"]),
        flops=mean(lambda point: _ratio(point["pruned"]["flops"], point["dense"]["flops"])),
        latency=mean(lambda point: point["pruned"].get("latency_ratio")),
        latency_low=mean(lambda point: point["pruned"].get("latency_q1_ratio")),
        latency_high=mean(lambda point: point["pruned"].get("latency_q3_ratio")),
        latency_ms=mean(lambda point: point["pruned"].get("latency_ms")),
        storage=mean(lambda point: _ratio(held(point), dense.get("storage"))),
        pictures=tuple(points[0].get("pictures", ())),
        kinds=_by_kind(points),
    )


def _by_kind(points: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy on each kind of question, mean over the points of a cell."""
    found = [point["pruned"].get("accuracy_by_kind", {}) for point in points]
    return {kind: statistics.fmean(one[kind] for one in found) for kind in found[0]}


def _with_front(row: Row, rows: list[Row], lower: bool) -> Row:
    """The row, with the costs for which no other row is at least as good and cheaper, or better and as cheap."""
    sign = -1 if lower else 1

    def beaten(axis: str) -> bool:
        mine = getattr(row, axis)
        for other in rows:
            cost = getattr(other, axis)
            if other.quality is None or cost is None:
                continue
            gain, saving = sign * (other.quality - row.quality), mine - cost
            if gain >= 0 and saving >= 0 and (gain > 0 or saving > 0):
                return True
        return False

    if row.quality is None:
        return row
    axes = [axis for axis in ("flops", "latency", "storage") if getattr(row, axis) is not None]
    return replace(row, front=tuple(axis for axis in axes if not beaten(axis)))


def _ratio(value: float | None, of: float | None) -> float | None:
    return None if value is None or not of else value / of


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _budget(asked: dict[str, Any]) -> str:
    """As it was asked; a pattern is its own name."""
    told = [str(value) if name == "pattern" else f"{name} {value:g}" for name, value in asked.items()]
    return " ".join(told) or "its own"


def _order(asked: dict[str, Any]) -> float:
    """How much is pruned, 0 to 1."""
    if "pattern" in asked:
        kept, group = map(int, asked["pattern"].split(":"))
        return 1 - kept / group
    return 1 - asked["keep"] if "keep" in asked else asked.get("sparsity", 0.0)


COLUMNS = (
    ("protocol", "status", "method", "settings", "budget", "achieved", "metric", "quality", "spread", "seeds")
    + ("agreement", "flops", "latency", "latency_low", "latency_high", "latency_ms", "storage")
    + (
        "dense_quality",
        "dense_flops",
        "dense_latency_ms",
        "dense_storage",
        "storage_is",
        "front",
        "kinds",
        "reason",
    )
)


def as_rows(found: list[Group]) -> list[dict[str, Any]]:
    """Flat records, one per row, for table.csv and table.json; `protocol` numbers the groups from 1."""
    records = []
    for number, group in enumerate(found, start=1):
        told = {
            "protocol": number,
            "metric": group.metric,
            "dense_quality": group.dense.get(group.metric),
            "dense_flops": group.dense.get("flops"),
            "dense_latency_ms": group.dense.get("latency_ms"),
            "dense_storage": group.dense.get("storage"),
            "storage_is": STORAGE[group.protocol["family"]].name,
        }
        for row in group.rows:
            mine = {name: getattr(row, name) for name in COLUMNS if hasattr(row, name)}
            kinds = " ".join(f"{kind}={value:.4f}" for kind, value in row.kinds.items())
            records.append(
                {name: (told | mine).get(name) for name in COLUMNS}
                | {"front": " ".join(row.front), "kinds": kinds}
            )
    return records


def as_csv(found: list[Group]) -> str:
    """table.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(as_rows(found))
    return text.getvalue()
