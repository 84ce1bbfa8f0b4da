"""The numbers behind the pictures, and how much each parameter of a search mattered."""

from utils.reports.dots import bar_strip
from utils.reports.formats import count, decimals_for, number, percent
from utils.reports.scale import Scale
from utils.reports.tables import MOST_ROWS, Column, Row, Table
from utils.reports.values import Front, Heatmap, History, Importance, is_known


def heatmap_table(heatmap: Heatmap) -> Table:
    """A heatmap's numbers."""
    rows = [
        Row(label, tuple(number(value, 3) for value in cells))
        for label, cells in zip(heatmap.layers, heatmap.cells, strict=True)
    ]
    columns = tuple(Column(component) for component in heatmap.components)
    return Table(f"{heatmap.title}: {heatmap.quantity}", "layer", columns, tuple(rows))


def history_table(history: History) -> Table:
    """The trials of a search; the last ones where there are very many."""
    decimals = decimals_for([trial.value for trial in history.trials])
    rows = [
        Row(
            str(trial.number),
            (
                percent(trial.value) if history.percent else number(trial.value, decimals),
                trial.state + (", known by hand" if trial.known else ""),
                count(trial.rows),
                trial.what,
            ),
        )
        for trial in history.trials[-MOST_ROWS:]
    ]
    columns = (Column("value"), Column("state", "text"), Column("rows"), Column("what was tried", "text"))
    left_out = max(0, len(history.trials) - MOST_ROWS)
    return Table(f"Trials: {history.objective}", "trial", columns, tuple(rows), left_out=left_out)


def importance_table(importance: Importance) -> Table:
    """The parameters with a bar each, the one that mattered most first."""
    shares = sorted((pair for pair in importance.shares if is_known(pair[1])), key=lambda pair: -pair[1])
    scale = Scale(0.0, max((share for _, share in shares), default=0.0) or 1.0, 1.0, 99.0)
    rows = [Row(name, (bar_strip(scale, share), percent(share))) for name, share in shares]
    columns = (Column("", "strip"), Column("share"))
    return Table(f"Importance by {importance.method}", "parameter", columns, tuple(rows))


def front_table(front: Front) -> Table:
    """The points between two tasks, those on the front first."""
    decimals = decimals_for([value for point in front.points for value in (point.x, point.y)])

    def shown(value: float | None) -> str:
        return percent(value) if front.percent else number(value, decimals)

    edge = front.unbeaten
    points = sorted(front.points, key=lambda point: point not in edge)
    rows = [
        Row(point.name, (shown(point.x), shown(point.y), "not beaten on both" if point in edge else ""))
        for point in points[:MOST_ROWS]
    ]
    columns = (Column(front.x_name), Column(front.y_name), Column("on the front", "text"))
    left_out = max(0, len(points) - MOST_ROWS)
    return Table(f"{front.x_name} and {front.y_name}", "model or recipe", columns, tuple(rows), left_out=left_out)
