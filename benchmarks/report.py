"""The record of a run into figures: a table in Markdown, and a bar chart."""

import math
from statistics import median

# and the item that measures it
RESOURCES = {"flops": "sgemm", "bytes": "matvec", "stream": "scale", "disk": "copy"}


def find_limits(record):
    """Return {resource: amount a second}, by the median of whoever was fastest in this run."""
    limits = {}
    for resource, name in RESOURCES.items():
        for item in record["items"]:
            times = [result["seconds"] for result in item["results"].values() if result["seconds"]]
            if item["name"] == name and times:
                limits[resource] = item["phases"][0][resource] / min(map(median, times))
    return limits


def limit_seconds(phases, limits):
    """Return the least time that the phases take; None if there are none or a limit is unknown.

    Of what a phase needs the slowest counts, since one need not wait for the other; phases do.
    """
    if not phases or any(resource not in limits for phase in phases for resource in phase):
        return None
    return sum(max(phase[name] / limits[name] for name in phase) for phase in phases)


def figures(item, seconds):
    """Return times (s) in the item's unit."""
    if item["unit"] in ("s", "ms"):
        scale = {"s": 1, "ms": 1e3}[item["unit"]]
        return [scale * time for time in seconds]
    return [item["amount"] / time for time in seconds]


def make_rows(record):
    """Return the rows of the table, dicts: those of the times, then those of the memory.

    letter, title, who, unit; values and their median (a rate's is that of the median time); ratio,
    how many times better ours is; limit, the fraction of it; same, whether the results agree. Where
    a party has no figures, `values` is empty and `same` says why.
    """
    return [*time_rows(record), *memory_rows(record)]


def time_rows(record):
    """Yield the rows of all items."""
    limits = find_limits(record)
    for item in record["items"]:
        least = limit_seconds(item["phases"], limits)
        for who, result in item["results"].items():
            middle = median(result["seconds"] or [math.nan])
            row = {"letter": item["letter"], "title": item["title"], "unit": item["unit"]}
            row |= {"who": who, "values": figures(item, result["seconds"])}
            row |= {"median": figures(item, [middle])[0], "ratio": ratio(item, who, "seconds")}
            yield row | {"limit": least and least / middle, "same": compare(item, who)}


def memory_rows(record):
    """Yield the rows of the peak of memory, of the items that report it."""
    for item in record["items"]:
        for who, result in item["results"].items():
            if item["memory"] and result["peak_bytes"]:
                values = [peak / 1e6 for peak in result["peak_bytes"]]
                row = {"letter": "j", "title": f"peak memory: {item['title']}", "unit": "MB"}
                row |= {"who": who, "values": values, "median": median(values)}
                yield row | {"ratio": ratio(item, who, "peak_bytes"), "limit": None, "same": ""}


def ratio(item, who, key):
    """Return how many times as much time or memory `who` takes as we do, by the medians."""
    ours, theirs = item["results"]["ours"][key], item["results"][who][key]
    return median(theirs) / median(ours) if ours and theirs and who != "ours" else None


def compare(item, who):
    """Return in words whether a peer's work came to the same as ours; or why there is none."""
    result, ours = item["results"][who], item["results"]["ours"]["check"]
    theirs = result["check"]
    if result["problem"]:
        return result["problem"]
    if who == "ours" or not ours or not theirs:
        return ""
    if isinstance(ours[0], float):
        error = max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / max(map(abs, ours))
        return f"{'yes' if error < item['job'].get('tolerance', 1e-3) else 'NO'}, to {error:.1g}"
    if ours == theirs:
        return "yes"
    n_same = [a == b for a, b in zip(ours, theirs, strict=True)].index(False)
    return f"NO: the first {n_same} of {len(ours)}"


def significant(value):
    """Return a figure with three significant digits, 12,345 with all of its own."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{max(0, digits)}f}"


def make_table(record):
    """Return the Markdown of all rows."""
    head = ("", "work", "who", "median", "lowest to highest", "ours is better by", "of the limit",
            "same result")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    last = None
    for row in make_rows(record):
        first, last = row["title"] != last, row["title"]
        cells = [row["letter"], row["title"]] if first else ["", ""]
        cells += [record["labels"][row["who"]], *describe(row), row["same"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(row):
    """Return the cells of median, spread, ratio and fraction of the limit."""
    values = row["values"]
    if not values:
        return ["-", "", "", ""]
    return [
        f"{significant(row['median'])} {row['unit']}",
        f"{significant(min(values))} to {significant(max(values))} ({len(values)})",
        f"{row['ratio']:.2f} x" if row["ratio"] else "",
        f"{row['limit']:.0%}" if row["limit"] else "",
    ]


def make_report(record):
    """Return the whole report in Markdown: machine, settings, table."""
    facts = record["machine"] | record["settings"] | record["taken"]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    return "\n".join(lines) + "\n\n" + make_table(record)


MACHINE = ("CPU", "cores", "memory", "AVX-512", "BLAS kernels", "NumPy", "BLAS", "torch",
           "transformers", "ctranslate2", "load before", "repeats", "minutes")  # fmt: skip


def compare_machines(records):
    """Return the Markdown of several runs {name: record}, a column each: machines, then figures."""
    head = "| | " + " | ".join(records) + " |\n|---" + "|---" * len(records) + "|"
    facts = [record["machine"] | record["settings"] for record in records.values()]
    machines = [line(name, [str(each.get(name, "")) for each in facts]) for name in MACHINE]
    columns = [machine_cells(record) for record in records.values()]
    titles = dict.fromkeys(title for column in columns for title in column)
    works = [line(title, [column.get(title, "") for column in columns]) for title in titles]
    return "\n".join([head, *machines]) + "\n\n" + "\n".join([head, *works])


def line(name, cells):
    return f"| {name} | " + " | ".join(cells) + " |"


def machine_cells(record):
    """Return {title: our median, the fraction of the limit, how many times better than whom}."""
    cells = {}
    for row in make_rows(record):
        if not row["values"]:
            continue
        if row["who"] == "ours":
            limit = f", {row['limit']:.0%}" if row["limit"] and row["letter"] != "limit" else ""
            cells[row["title"]] = f"{significant(row['median'])} {row['unit']}{limit}"
        elif row["who"] != "naive" and row["ratio"] and row["title"] in cells:
            cells[row["title"]] += f"; {row['ratio']:.2f} x {record['labels'][row['who']]}"
    return cells


def plot(record, path):
    """Draw how many times better ours is than each peer, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    rows = [row for row in make_rows(record) if row["ratio"] and row["letter"] != "limit"][::-1]
    peers = [who for who in record["labels"] if any(row["who"] == who for row in rows)]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.24 * len(rows)), dpi=120)
    for i, who in enumerate(peers):
        bars = [(at, row["ratio"] - 1) for at, row in enumerate(rows) if row["who"] == who]
        axes.barh(*zip(*bars, strict=True), left=1, color=f"C{i}", label=record["labels"][who])
    for at, row in enumerate(rows):
        axes.annotate(f" {row['ratio']:.2f}", (row["ratio"], at), va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="ours is better by this factor (1: equal), in time or memory")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.legend(fontsize=7)
    figure.savefig(path, format="png", bbox_inches="tight")
    plt.close(figure)
