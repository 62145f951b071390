"""What drills share: how often to try, and a tally of what was tried, survived and lost that ends in a table."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

LONG = os.environ.get("D3LIB_LONG", "") not in ("", "0")  # make drill LONG=1


class Drill:
    """Counts trials; one that raises is lost, and any lost one fails the test in the end."""

    def __init__(self):
        self.tally = {"tried": 0, "survived": 0, "lost": 0}
        self.losses = []

    def times(self, quick, long):
        return long if LONG else quick

    @contextlib.contextmanager
    def trial(self, what, seconds=60):
        """One trial; taking longer than `seconds` is a loss too."""

        def late(*arguments):
            raise TimeoutError(f"still busy after {seconds} s")

        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(seconds)
        self.tally["tried"] += 1
        try:
            yield
            self.tally["survived"] += 1
        except (Exception, pytest.fail.Exception) as error:
            self.tally["lost"] += 1
            self.losses.append(f"{what}: {type(error).__name__}: {error}"[:500])
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    def note(self, word):
        """Count a way of surviving."""
        self.tally[word] = self.tally.get(word, 0) + 1


@pytest.fixture
def drill(record_property):
    found = Drill()
    record_property("drill", found.tally)
    yield found
    assert found.tally["tried"], "nothing was tried"
    if found.losses:
        pytest.fail("\n".join([f"{len(found.losses)} of {found.tally['tried']} lost", *found.losses[:20]]))


def pytest_terminal_summary(terminalreporter):
    reports = [r for found in terminalreporter.stats.values() for r in found if getattr(r, "when", "") == "call"]
    tallies = {r.nodeid: tally for r in reports for name, tally in r.user_properties if name == "drill"}
    if not tallies:
        return
    drills = [
        {"name": name.rpartition("::test_")[2], "file": Path(name.partition("::")[0]).name, **count_words(tally)}
        for name, tally in sorted(tallies.items())
    ]
    terminalreporter.section("drills, long" if LONG else "drills, short")
    terminalreporter.write_line(f"{'tried':>7}{'survived':>10}{'lost':>6}  drill")
    for row in drills:
        also = f" ({row['also']})" if row["also"] else ""
        words = row["name"].replace("_", " ")
        terminalreporter.write_line(f"{row['tried']:>7}{row['survived']:>10}{row['lost']:>6}  {words}{also}")
    if record := os.environ.get("D3LIB_DRILLS"):  # make drill RECORD=...
        from d3lib.artefacts import write_json
        from d3lib.provenance import TRAINING_CODE, collect

        content = {"long": LONG, "drills": drills, "provenance": collect(*TRAINING_CODE)}
        write_json(Path(record), content, format="d3lib-drills")


def count_words(tally):
    """A tally with whatever it holds beside the three counts as words."""
    counts = {name: tally[name] for name in ("tried", "survived", "lost")}
    return counts | {"also": ", ".join(f"{n} {word}" for word, n in tally.items() if word not in counts)}
