"""The tables of the page and of the README about MiniLM say what the committed rows give."""

import re
import statistics
from pathlib import Path

from harness.report import read_rows

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_says_what_was_measured():
    rows = read_rows(ROOT / "benchmarks" / "results" / "compression-cpu.csv")
    page = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    assert len(methods) == 11
    for method in methods:
        line = re.search(rf"^\| (\*\*)?{re.escape(method)}(\*\*)? \| (.*) \|$", page, re.MULTILINE)
        assert line, f"the page has no row of {method}"
        cells = line[3].replace("*", "").split(" | ")
        for metric, cell in zip(("lee", "wordsim", "simlex"), cells, strict=True):
            values = [row["value"] for row in rows if (row["method"], row["metric"]) == (method, metric)]
            expected = f"{statistics.mean(values):.3f}"
            if len(values) > 1 and statistics.stdev(values) > 0:
                expected += f" ± {statistics.stdev(values):.3f}"
            assert cell == expected, (method, metric)
    best = [row["value"] for row in rows if (row["method"], row["metric"]) == ("Monarch, allocated", "lee")]
    text = f"{statistics.mean(best):.3f} ± {statistics.stdev(best):.3f}"
    assert text in (ROOT / "README.md").read_text(encoding="utf-8")
