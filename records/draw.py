"""Draws the charts of records/README.md as SVG files: one function a chart, from plain data.

Data are points, a list of them for each track, in the order of the records:
{"number", "date", "loss", "minutes", "label", "verified", "efficiency" (as scoring.data_efficiency gives it)}.

An SVG says in its metadata what it was drawn from: `digest`. So a chart that is out of date is found without drawing.
"""

import hashlib
import json
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path

from slowrun.folder import write_atomically

WIDTH = 9.4  # inches: 900 pixels on GitHub
STYLES = {  # track -> colour (Okabe and Ito's, which colour-blind readers tell apart), marker
    "limited": ("#0072B2", "o"),
    "tiny": ("#D55E00", "s"),
    "two_hour": ("#009E73", "^"),
    "unlimited": ("#AA4499", "D"),
}
INK, FAINT = "#333333", "#BBBBBB"
SEED_NOISE = 0.002  # nats between seeds
SETTINGS = {"svg.hashsalt": "records", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
SETTINGS |= {
    "axes.edgecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "text.parse_math": False,
}


def digest(chart: partial) -> str:
    """SHA-256 of this file, the chart's function and the data that it draws."""
    drawn = json.dumps([chart.func.__name__, chart.keywords], sort_keys=True)
    return hashlib.sha256(Path(__file__).read_bytes() + drawn.encode()).hexdigest()


def save(chart: partial, path: Path) -> None:
    """Draw a chart and write it; the same data give the same bytes, with the same matplotlib."""
    import matplotlib  # takes a second
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(layout="constrained")
        chart(figure)
        metadata = {"Date": None, "Description": f"drawn from {digest(chart)}"}
        write_atomically(path, partial(figure.savefig, format="svg", metadata=metadata))


def spread(wanted: list[float], gap: float) -> list[float]:
    """Falling heights, not above 1, near the wanted ones and `gap` apart or more (less, if that leaves no room).

    The last one is as wanted and the others make room upwards: lines from falling points then rise and cross nothing.
    """
    gap = min(gap, (1 - wanted[-1]) / max(1, len(wanted) - 1))
    heights = [wanted[-1]]
    for height in reversed(wanted[:-1]):
        heights.append(max(height, heights[-1] + gap))
    for i in reversed(range(len(heights))):
        ceiling = 1.0 - gap * (len(heights) - 1 - i)
        heights[i] = min(heights[i], ceiling)
    return heights[::-1]


def scatter(axes, track: str, points: list[dict], x: list, y: list[float]) -> None:
    """A marker for each record: the track's, filled if published; a star, if verified here."""
    colour, marker = STYLES[track]
    for verified, style in ((False, {"marker": marker, "s": 32}), (True, {"marker": "*", "s": 150})):
        chosen = [(a, b) for a, b, point in zip(x, y, points, strict=True) if point["verified"] == verified]
        if chosen:
            edge = INK if verified else "white"
            axes.scatter(*zip(*chosen, strict=True), color=colour, edgecolors=edge, linewidths=0.7, zorder=3, **style)


def explain_markers(axes, histories: dict[str, list[dict]], **place) -> None:
    """A legend of the markers, if there are records of both kinds."""
    if any(point["verified"] for points in histories.values() for point in points):
        for marker, label in (("o", "published"), ("*", "verified here")):
            axes.scatter([], [], marker=marker, s=32 if marker == "o" else 150, color="gray", label=label)
        axes.legend(frameon=False, **place)


def by_date(points: list[dict]) -> list[date]:
    return [date.fromisoformat(point["date"]) for point in points]


def named(point: dict) -> str:
    return f"{point['number']:\N{FIGURE SPACE}>2}"  # as wide as a digit


def format_dates(axes) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(minticks=3, maxticks=9)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def progress(figure, track: str, points: list[dict]) -> None:
    """The loss of a track by date: a step line of the best so far, each record with a line to its name."""
    colour, _ = STYLES[track]
    height = max(3.4, 0.9 + 0.25 * len(points))
    figure.set_size_inches(WIDTH, height)
    axes = figure.subplots()
    days, losses = by_date(points), [point["loss"] for point in points]
    margin = 0.06 * (max(losses) - min(losses) or 0.1)
    low, high = min(losses) - margin, max(losses) + margin
    axes.step(days, losses, where="post", color=colour, linewidth=1.5)
    scatter(axes, track, points, days, losses)
    rows = spread([(loss - low) / (high - low) for loss in losses], gap=0.22 / (height - 0.8))
    for point, day, row in zip(points, days, rows, strict=True):
        style = {"textcoords": "axes fraction", "va": "center", "color": INK}
        line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 4}
        text = f"{named(point)}  {point['loss']:.3f}  {point['label']}"
        axes.annotate(text, (day, point["loss"]), (1.03, row), arrowprops=line, **style)
    axes.set(ylim=(low, high), ylabel="validation loss, nats per token", title=f"{track}: the records by date")
    axes.grid(axis="y", alpha=0.3)
    format_dates(axes)
    explain_markers(axes, {track: points}, loc="lower left")


def training_time(figure, histories: dict[str, list[dict]], caps: dict[str, float]) -> None:
    """Loss against minutes of training, all tracks; caps in minutes, 0 for none."""
    figure.set_size_inches(WIDTH, 5)
    axes = figure.subplots()
    for track, points in histories.items():
        colour, _ = STYLES[track]
        minutes, losses = [point["minutes"] for point in points], [point["loss"] for point in points]
        axes.plot(minutes, losses, color=colour, linewidth=0.8, alpha=0.5)
        scatter(axes, track, points, minutes, losses)
        if caps[track]:
            axes.axvline(caps[track], color=colour, linewidth=0.8, linestyle=":")
        style = {"textcoords": "offset points", "ha": "center", "va": "top", "color": colour, "weight": "bold"}
        style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        best = points[-1]
        axes.annotate(f"{track} {best['loss']:.3f}", (best["minutes"], best["loss"]), (0, -8), **style)
    axes.set_xscale("log")
    ticks = {15: "15 min", 60: "1 h", 120: "2 h", 480: "8 h", 1440: "1 day", 4320: "3 days", 10080: "7 days"}
    axes.set_xticks(list(ticks), ticks.values())
    axes.minorticks_off()
    axes.margins(y=0.09)
    axes.set(xlabel="training time on the record's hardware; dotted: a track's cap")
    axes.set(ylabel="validation loss, nats per token", title="Loss against training time")
    axes.grid(alpha=0.3)
    explain_markers(axes, histories, loc="upper right")


def contributions(figure, track: str, points: list[dict]) -> None:
    """By how much each record of a track lowered the loss of the one before, the largest first."""
    from matplotlib.patches import Rectangle

    colour, _ = STYLES[track]
    gains = [(before["loss"] - point["loss"], point) for before, point in pairwise(points)]
    gains.sort(key=lambda gain: (-gain[0], gain[1]["number"]))
    figure.set_size_inches(WIDTH, max(2.2, 0.9 + 0.23 * len(gains)))
    axes = figure.subplots()
    axes.axvspan(0, SEED_NOISE, color="#DDDDDD", linewidth=0, label=f"noise between seeds, {SEED_NOISE} nats")
    bars = axes.barh(
        [f"{point['label']}  {named(point)}" for _, point in gains],
        [gain for gain, _ in gains],
        color=[colour if not point["verified"] else "white" for _, point in gains],
        edgecolor=colour,
        hatch=["" if not point["verified"] else "///" for _, point in gains],
        height=0.7,
    )
    axes.bar_label(bars, [f"{gain:.3f}" for gain, _ in gains], padding=3, color=INK)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08, y=0.01)
    axes.set(xlabel="nats below the record before", title=f"{track}: what each record brought")
    axes.grid(axis="x", alpha=0.3)
    if any(point["verified"] for _, point in gains):
        axes.add_patch(Rectangle((0, 0), 0, 0, fill=False, edgecolor=colour, hatch="///", label="verified here"))
    axes.legend(frameon=False, loc="lower right")


def efficiency(figure, histories: dict[str, list[dict]]) -> None:
    """Data efficiency by date, all tracks. A bound is drawn at its number."""
    figure.set_size_inches(WIDTH, 4.6)
    axes = figure.subplots()
    for track, points in histories.items():
        colour, _ = STYLES[track]
        days, values = by_date(points), [float(str(point["efficiency"]).strip("<> x")) for point in points]
        axes.step(days, values, where="post", color=colour, linewidth=1.5)
        scatter(axes, track, points, days, values)
        said = points[-1]["efficiency"]
        text = f"{track} {said if isinstance(said, str) else f'{said:.2f}x'}"
        style = {"textcoords": "offset points", "va": "center", "color": colour, "weight": "bold"}
        axes.annotate(text, (days[-1], values[-1]), (8, 0), annotation_clip=False, **style)
    axes.set(ylabel="times 100M tokens", title="Data efficiency: tokens that a standard run needs for the same loss")
    axes.set_ylim(bottom=2)
    axes.margins(x=0.02)
    axes.grid(axis="y", alpha=0.3)
    format_dates(axes)
    explain_markers(axes, histories, loc="upper left")
