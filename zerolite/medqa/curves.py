"""`loss.png`: what metrics.jsonl holds as curves against the optimizer step."""

from dataclasses import dataclass
from pathlib import Path

from zerolite.medqa.progress import METRICS, read_metrics

# A report is read about 17 cm (6.7 inches) wide. A picture of that width whose texts are 8 points has the size of the
# text around it, wherever it is shown in full width; at 200 dots an inch it stays sharp on dense screens.
WIDTH_INCHES, ROW_INCHES, FONT_POINTS, DOTS_PER_INCH = 6.7, 2.1, 8, 200
MARKED = 40  # more points than that are a line without marks
MIB = 2**20


@dataclass(frozen=True)
class Curve:
    """Metrics whose name is `key`, or begins with it where it ends in "_*"; in `scale` units of them."""

    key: str
    label: str
    scale: float = 1.0


@dataclass(frozen=True)
class Panel:
    title: str  # with the unit
    curves: tuple[Curve, ...]


PANELS = (
    Panel(
        "loss (nats a label token)",
        (Curve("loss", "training"), Curve("validation_loss", "validation"), Curve("validation_loss_*", "validation")),
    ),
    Panel("learning rate", (Curve("learning_rate", ""),)),
    Panel("gradient norm before clipping", (Curve("grad_norm", ""),)),
    Panel("tokens a second, all ranks", (Curve("tokens_per_second", ""),)),
    Panel(
        "memory (MiB)",
        (
            Curve("peak_memory_bytes", "peak on rank 0's device", MIB),
            Curve("host_memory_bytes", "host, all ranks", MIB),
        ),
    ),
)


def plot(folder: Path) -> None:
    """Draw `loss.png` from the metrics file: the loss over the whole width, the others in two columns below."""
    import matplotlib
    from matplotlib.figure import Figure  # slow to load; without pyplot it needs no display

    records = read_metrics(folder / METRICS)
    with matplotlib.rc_context({"font.size": FONT_POINTS, "axes.titlesize": FONT_POINTS, "lines.markersize": 3}):
        figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES * 3.4), layout="constrained")
        grid = figure.add_gridspec(3, 2, height_ratios=(1.4, 1, 1))
        places = [grid[0, :], *(grid[row, column] for row in (1, 2) for column in (0, 1))]
        for place, panel in zip(places, PANELS, strict=True):
            _draw(figure.add_subplot(place), panel, records)
        figure.savefig(folder / "loss.png", dpi=DOTS_PER_INCH)


def _draw(axes, panel: Panel, records: list[dict]) -> None:
    for curve in panel.curves:
        for key in _keys(curve, records):
            points = [(one["step"], one[key] / curve.scale) for one in records if one.get(key) is not None]
            style = "o-" if len(points) <= MARKED else "-"
            axes.plot(*zip(*points, strict=True), style, linewidth=1, label=_label(curve, key))
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if len(axes.lines) > 1:
        axes.legend(frameon=False)
    if axes.lines and panel.title.startswith(("memory", "tokens")):
        # Amounts: a curve that starts elsewhere makes noise look like growth. Above it is room for the legend.
        axes.set_ylim(0, 1.4 * max(max(line.get_ydata()) for line in axes.lines) or None)


def _keys(curve: Curve, records: list[dict]) -> list[str]:
    """Names of metrics with at least one number."""
    prefix = curve.key.removesuffix("*")
    known = dict.fromkeys(key for one in records for key, value in one.items() if value is not None)
    if not curve.key.endswith("*"):
        return [curve.key] if curve.key in known else []
    groups = [key for key in known if key.startswith(prefix)]
    return groups if len(groups) > 1 else []  # one language alone is the whole


def _label(curve: Curve, key: str) -> str:
    return f"{curve.label} {key.removeprefix(curve.key[:-1])}" if curve.key.endswith("*") else curve.label
