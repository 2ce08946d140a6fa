"""``sfr-ext report``: what a study has found, as report.md and report.html."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..train.config import counted
from ..train.errors import TrainError
from ..train.files import atomic_write
from . import figures
from .names import FIGURES, LINES, PAGE, TEXT
from .page import html_page
from .results import Outcome, Results, read_results
from .statistics import LEVEL, POWER, Difference, against, seeds_needed, smallest_p

_DRAWN = {
    "forest": "Differences with their intervals",
    "curves": "Accuracy along epochs and seconds",
    "probes": "Accuracy of linear probes",
}  # a file SETTING-KIND.svg each
EFFECT = 0.3  # percent of accuracy: the difference for which the seeds are counted


def report(folder: Path, out: Path | None = None, seconds: Path | None = None) -> str:
    """Write the report on the study in ``folder``; return what was written, in words.

    Args:
        folder: ``--out`` of the study, or of an earlier report.
        out: where to write (default: ``folder``).
        seconds: the folder of a study of the same arms on a quiet machine, whose seconds count.

    Raises:
        TrainError: no finished run there; settings or arms that ``seconds`` does not have.
    """
    results = read_results(folder)
    clock = results if seconds is None else read_results(seconds)
    out = folder if out is None else out
    text, drawn = compose(results, clock)
    results.save(out)
    _remove_drawings(out / FIGURES)
    for name, svg in drawn.items():
        with atomic_write(out / name) as path:
            path.write_text(svg)
    with atomic_write(out / TEXT) as path:
        path.write_text(text)
    with atomic_write(out / PAGE) as path:
        path.write_text(html_page(results.outline["name"], text, drawn))
    kept = (
        f", {results.kept} of which {LINES} had kept" if results.kept and results.kept < len(results.outcomes) else ""
    )
    return f"wrote {out / TEXT}, {PAGE}, {FIGURES}/ and {LINES} of {counted(len(results.outcomes), 'run')}{kept}"


def _remove_drawings(folder: Path) -> None:
    """Those of an earlier report, by their names; whatever else lies there is somebody's."""
    for kind in _DRAWN:
        for path in folder.glob(f"*-{kind}.svg"):
            if path.is_file():
                path.unlink()


def compose(results: Results, clock: Results) -> tuple[str, dict[str, str]]:
    """The report's Markdown, and its figures by their paths beside it."""
    drawn: dict[str, str] = {}
    parts = [f"# {results.outline['name']}", results.outline["about"], _how_to_read(results, clock is not results)]
    done = {setting: _Setting(results, clock, setting) for setting in results.settings if results.arms(setting)}
    if len(done) > 1:
        parts += ["## Overview", _overview(done)]
    for setting in results.settings:
        parts.append(f"## {setting}")
        if setting in done:
            parts += done[setting].parts(drawn)
        else:
            parts.append("No run of this setting has been finished.")
    return "\n\n".join(part for part in parts if part) + "\n", drawn


def _how_to_read(results: Results, quiet: bool) -> str:
    part = "held-out training images, of the best epoch by them" if results.judged_by == "validation" else "test images"
    seconds = (
        "of a run of its own on a quiet machine"
        if quiet
        else "as measured while the study ran, beside other runs if there were any"
    )
    return (
        f"Accuracies are those of the {part}, in percent: the mean over seeds ± the standard deviation between them. "
        "Differences are paired by seed, in percent of accuracy: their mean, in brackets its BCa bootstrap interval "
        f"({100 * (1 - LEVEL):.0f} %), and p of a two-sided sign-flip test, corrected by Holm over the arms of the "
        f"setting; bold where it is below {LEVEL}. Seconds are {seconds}."
    )


def _overview(done: Mapping[str, _Setting]) -> str:
    """The difference to the first reference, for every arm and setting."""
    arms = list(dict.fromkeys(arm for setting in done.values() for arm in setting.arms))
    references = [setting.references[0] for setting in done.values() if setting.references]
    if not references:
        return ""
    reference = references[0]
    rows = []
    for arm in arms:
        cells = []
        for setting in done.values():
            difference = setting.differences.get(reference, {}).get(arm)
            if arm == reference and arm in setting.arms:
                cells.append(_spread(setting.accuracies[arm].values()))
            else:
                cells.append("" if difference is None else _bold(_signed(difference.mean), difference.found))
        rows.append([arm, *cells])
    head = f"Accuracy of {reference}, and the differences of the other arms to it:"
    return head + "\n\n" + _table(["arm", *done], rows)


class _Setting:
    """One setting's figures and words."""

    def __init__(self, results: Results, clock: Results, name: str) -> None:
        self.results, self.name = results, name
        self.arms = results.arms(name)
        self.outcomes = {arm: results.of(name, arm) for arm in self.arms}
        self.accuracies = {arm: _percent(self.outcomes[arm], results.accuracy) for arm in self.arms}
        self.references = [arm for arm in results.outline["references"] if arm in self.arms]
        self.differences = {reference: against(self.accuracies, reference) for reference in self.references}
        self.clock = {arm: _seconds_per_epoch(clock.of(name, arm)) for arm in self.arms}
        without = [arm for arm, seconds in self.clock.items() if seconds is None]
        if without:
            raise TrainError(f"--seconds: that study has no finished run of {name}/{without[0]}")

    def parts(self, drawn: dict[str, str]) -> list[str]:
        """Paragraphs, tables and figures; the figures go into ``drawn``."""
        parts = [
            self.results.settings[self.name]["about"],
            self._what(),
            self._threads(),
            self._unfinished(),
            self._seeds_too_few(),
        ]
        parts += ["### Accuracy", self._accuracy_table(), self._found()]
        if any(self.differences.values()):
            parts.append(self._figure(drawn, "forest", figures.forest(self.arms, self.differences, "% of accuracy")))
            parts += ["### Seeds", self._seeds()]
        parts += ["### Time, likelihood, calibration", self._other_table(), self._equal_time_words()]
        if lines := self._curves():
            parts.append(self._figure(drawn, "curves", figures.curves(lines, "accuracy, %")))
        if found := self._probes():
            parts += ["### Linear probes", self._probe_words(), self._probe_table(found)]
            parts.append(self._figure(drawn, "probes", figures.probes(found)))
        return parts

    def _figure(self, drawn: dict[str, str], kind: str, svg: str) -> str:
        path = f"{FIGURES}/{self.name}-{kind}.svg"
        drawn[path] = svg
        return f"![{_DRAWN[kind]}, {self.name}]({path})"

    def _what(self) -> str:
        """What was trained, from the first arm's first run; an arm may have options of its own."""
        first = next(iter(self.outcomes[self.arms[0]].values())).result
        options = first["options"]
        words = [
            f"{first['data']}, {counted(first['train_images'], 'training image')}",
            f"{100 * options['label_noise']:.0f} % of the labels wrong" if options.get("label_noise") else "",
            first["arch"],
            f"{counted(first['epochs'], 'epoch')} of batches of {options['batch_size']}",
        ]
        return ", ".join(word for word in words if word) + "."

    def _threads(self) -> str:
        """Where runs had different numbers of threads."""
        runs = [o for outcomes in self.outcomes.values() for o in outcomes.values()]
        counts = sorted({o.result["threads"] for o in runs if o.result.get("threads") is not None})
        if len(counts) < 2:
            return ""
        return (
            f"Runs had {', '.join(map(str, counts[:-1]))} or {counts[-1]} threads, by which sums are rounded "
            "differently: the same seed does not give the same numbers with both."
        )

    def _unfinished(self) -> str:
        missing = self.results.missing(self.name)
        total = missing + sum(map(len, self.outcomes.values()))
        return (
            f"**{missing} of {counted(total, 'run')} not finished yet**; what follows is of the others."
            if missing
            else ""
        )

    def _seeds_too_few(self) -> str:
        pairs = [d.seeds for arms in self.differences.values() for d in arms.values()]
        if not pairs:
            return ""
        most = max(pairs)
        if smallest_p(most) >= LEVEL:
            return (
                f"**With {counted(most, 'seed')} no sign-flip test can reach {LEVEL}**: its smallest "
                f"p is 2/2^{most} = {smallest_p(most):.3g}. It takes 6 seeds for one arm and more for several. "
                "Bootstrap intervals of so few are too narrow."
            )
        arms = max(len(found) for found in self.differences.values())
        if smallest_p(most) * arms >= LEVEL:
            return (
                f"With {most} seeds and {arms} arms, the smallest p is {smallest_p(most) * arms:.3g} after Holm's "
                "correction: no difference can be found here by the corrected test."
            )
        return ""

    def _accuracy_table(self) -> str:
        head = ["arm", "seeds", "accuracy, %"]
        for reference in self.references:
            head += [f"to {reference}", "p"]
        rows = []
        for arm in self.arms:
            values = self.accuracies[arm]
            row = [arm, str(len(values)), _spread(values.values())]
            for reference in self.references:
                difference = self.differences[reference].get(arm)
                cells = ["", ""] if difference is None else _cells(difference)
                if difference is not None and difference.seeds != len(values):  # the reference lacks some of them
                    cells[0] += f" ({counted(difference.seeds, 'pair')})"
                row += cells
            rows.append(row)
        return _table(head, rows)

    def _found(self) -> str:
        """Which differences the tests find, in words."""
        sentences = []
        for reference, arms in self.differences.items():
            better = [arm for arm, d in arms.items() if d.found and d.mean > 0]
            worse = [arm for arm, d in arms.items() if d.found and d.mean < 0]
            for found, word in ((better, "better"), (worse, "worse")):
                if found:
                    sentences.append(f"{word.capitalize()} than {reference}: {', '.join(found)}.")
            if arms and not better and not worse:
                sentences.append(f"No arm differs from {reference} by the corrected test.")
        return " ".join(sentences)

    def _seeds(self) -> str:
        """How many a small difference takes, by the spread that was measured."""
        rows = []
        for arm in self.arms:
            row, told = [arm], False
            for reference in self.references:
                difference = self.differences[reference].get(arm)
                if difference is None or difference.deviation is None:
                    row += ["", ""]
                    continue
                needed = seeds_needed(difference.deviation, EFFECT)
                row += [f"{difference.deviation:.2f}", "> 100000" if needed is None else str(needed)]
                told = True
            if told:
                rows.append(row)
        if not rows:
            return "With one seed there is no spread to compute from."
        head = ["arm"]
        for reference in self.references:
            head += [f"deviation of differences to {reference}", "seeds"]
        return (
            f"How many seeds it takes to find a difference of {EFFECT} % with probability {POWER}, by a paired t-test "
            f"at {LEVEL} without correction for several arms, where differences between seeds are spread as here:\n\n"
            + _table(head, rows)
        )

    def _other_table(self) -> str:
        on_test = self.results.judged_by == "test"  # a sweep does not look at the test images
        head = ["arm", "seconds per epoch", "feature loss"]
        head += ["negative log-likelihood", "calibration error, %"] if on_test else []
        reference = self._time_reference()
        head += ["" if reference is None else f"in the time of {reference}, %"]
        rows = []
        for arm in self.arms:
            seconds, feature = self.clock[arm] or (0.0, 0.0)
            row = [arm, f"{seconds:.3g}", f"{100 * feature / seconds:.0f} %" if feature else ""]
            if on_test:
                row.append(_spread(_values(self.outcomes[arm], "test_loss"), 3))
                row.append(_spread((100 * v for v in _values(self.outcomes[arm], "test_calibration_error")), 2))
            row.append("" if reference is None else self._equal_time(arm, reference))
            rows.append(row)
        return _table(head, rows)

    def _time_reference(self) -> str | None:
        return self.references[0] if self.references else None

    def _equal_time(self, arm: str, reference: str) -> str:
        """The mean accuracy after the last epoch that ends within the time of the reference."""
        lengths = {arm: len(next(iter(self.outcomes[arm].values())).epochs) for arm in (arm, reference)}
        (each, _), (of_reference, _) = self.clock[arm] or (1.0, 0), self.clock[reference] or (1.0, 0)
        budget = of_reference * lengths[reference]
        curve = self._curve(arm)
        ended = [epoch for epoch in curve if epoch * each <= budget * (1 + 1e-9)]
        if not ended:
            return "none"
        return f"{statistics.mean(curve[max(ended)]):.2f} ({max(ended)}/{lengths[arm]})"

    def _curve(self, arm: str) -> dict[int, list[float]]:
        """Accuracies over seeds, by the epochs that were tested."""
        found: dict[int, list[float]] = {}
        for o in self.outcomes[arm].values():
            for row in o.epochs:
                if not math.isnan(row.get(self.results.accuracy, math.nan)):
                    found.setdefault(int(row["epoch"]), []).append(100 * row[self.results.accuracy])
        return found

    def _equal_time_words(self) -> str:
        reference = self._time_reference()
        if reference is None:
            return ""
        return (
            f"The feature loss is given as its part of the seconds. The last column is the accuracy of each arm when "
            f"{reference} has ended, and in brackets after how many of its epochs. The learning rate of a "
            "slower arm has not fallen to 0 by then, which costs it more than the time itself: an arm with fewer "
            "epochs among its options is the fairer comparison."
        )

    def _curves(self) -> list[tuple[str, dict[str, figures.Curve]]]:
        by_epoch: dict[str, figures.Curve] = {}
        by_second: dict[str, figures.Curve] = {}
        for arm in self.arms:
            curve = self._curve(arm)
            if not curve:
                continue
            epochs, columns = [float(epoch) for epoch in curve], list(curve.values())
            ends = [statistics.mean(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]
            each, _ = self.clock[arm] or (1.0, 0.0)
            by_epoch[arm] = (epochs, *ends)
            by_second[arm] = ([each * epoch for epoch in epochs], *ends)
        return [("epoch", by_epoch), ("seconds of training", by_second)] if by_epoch else []

    def _probes(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Mean and deviation of the accuracy in percent, by arm and layer."""
        found: dict[str, dict[str, tuple[float, float]]] = {}
        if self.results.judged_by == "validation":
            return found
        for arm in self.arms:
            each = [o.result["probe_accuracy"] for o in self.outcomes[arm].values() if o.result.get("probe_accuracy")]
            if each:
                columns = {layer: [100 * probe[layer] for probe in each if layer in probe] for layer in each[0]}
                found[arm] = {
                    layer: (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
                    for layer, values in columns.items()
                }
        return found

    def _probe_words(self) -> str:
        return (
            "Test accuracy, in percent, of a ridge regression on the pooled features of each layer, and its difference "
            f"to {self.references[0]} with p as above, corrected over arms layer by layer."
            if self.references
            else "Test accuracy, in percent, of a ridge regression on the pooled features of each layer."
        )

    def _probe_table(self, found: Mapping[str, Mapping[str, Any]]) -> str:
        layers = list(dict.fromkeys(layer for probe in found.values() for layer in probe))
        head, columns = ["arm"], []
        for layer in layers:
            values = {
                arm: {
                    seed: 100 * o.result["probe_accuracy"][layer]
                    for seed, o in self.outcomes[arm].items()
                    if layer in (o.result.get("probe_accuracy") or {})
                }
                for arm in found
            }
            reference = self.references[0] if self.references else None
            differences = against(values, reference) if reference in values else {}
            head += [layer, *([f"to {reference}", "p"] if differences else [])]
            columns.append((values, differences))
        rows = []
        for arm in found:
            row = [arm]
            for values, differences in columns:
                row.append(_spread(values[arm].values()) if values[arm] else "")
                if differences:
                    difference = differences.get(arm)
                    row += ["", ""] if difference is None else _cells(difference, interval=False)
            rows.append(row)
        return _table(head, rows)


def _percent(outcomes: Mapping[int, Outcome], name: str) -> dict[int, float]:
    return {seed: 100 * value for seed, o in outcomes.items() if (value := o.figure(name)) is not None}


def _values(outcomes: Mapping[int, Outcome], name: str) -> list[float]:
    return [value for o in outcomes.values() if (value := o.figure(name)) is not None]


def _seconds_per_epoch(outcomes: Mapping[int, Outcome]) -> tuple[float, float] | None:
    """The median over all epochs and seeds, and the mean part of the feature loss in it."""
    each = [row["seconds"] for o in outcomes.values() for row in o.epochs]
    if not each:
        return None
    total = sum(o.result["seconds"] for o in outcomes.values())
    share = sum(o.result["emd_seconds"] for o in outcomes.values()) / total if total else 0.0
    median = statistics.median(each)
    return median, share * median


def _spread(values: Iterable[float], digits: int = 2) -> str:
    values = list(values)
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _cells(difference: Difference, interval: bool = True) -> list[str]:
    between = difference.interval if interval else None
    words = _signed(difference.mean) + (f" [{_signed(between[0])}, {_signed(between[1])}]" if between else "")
    p = "" if difference.corrected is None else f"{difference.corrected:.2g}"
    return [_bold(words, difference.found), _bold(p, difference.found)]


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # no -0.00


def _bold(words: str, yes: bool) -> str:
    return f"**{words}**" if yes and words else words


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    keep = [i for i, title in enumerate(head) if title or any(row[i] for row in rows)]
    lines = [[head[i] for i in keep], ["---" for _ in keep], *([str(row[i]) for i in keep] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
