"""Reports on studies: that no effect is told where there is none, that a planted one is found, and what is written."""

import itertools
import json
import math
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightning", reason="the extra [train] is not installed")
pytest.importorskip("matplotlib", reason="the extra [train] is not installed")
pytest.importorskip("markdown_it", reason="the extra [train] is not installed")
pytest.importorskip("scipy", reason="the extra [train] is not installed")

from sfr_ext.cli import main
from sfr_ext.study.page import html_page
from sfr_ext.study.report import report
from sfr_ext.study.results import read_results
from sfr_ext.study.statistics import Difference, against, bootstrap, holm, paired, seeds_needed, sign_flip, smallest_p
from sfr_ext.train.errors import TrainError
from sfr_ext.train.records import read_rows, write_rows

SPREAD = 0.5  # percent, between seeds


def planted(folder, effects, seeds=10, epochs=4, judged_by="test", slow=(), about=""):
    """A study whose arms differ by these percents, as `sfr-ext study` leaves it."""
    random = np.random.default_rng(7)
    outline = {
        "name": "planted",
        "about": about,
        "judged_by": judged_by,
        "references": [arm for arm in ("ce", "ls") if arm in effects],
        "settings": {"one": {"about": "", "arms": list(effects), "seeds": list(range(seeds))}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(outline))
    part = "val" if judged_by == "validation" else "test"
    shared = SPREAD * random.standard_normal(seeds)  # what a seed does to all arms
    for arm, effect in effects.items():
        for seed in range(seeds):
            accuracy = (85 + effect + shared[seed] + SPREAD * random.standard_normal()) / 100
            each = 2.0 if arm in slow else 1.0
            rows = [
                {
                    "epoch": i + 1,
                    f"{part}_accuracy": accuracy - 0.05 * (epochs - 1 - i),
                    "train_accuracy": 0.9,
                    "seconds": each,
                    "emd_seconds": each / 4 if arm in slow else 0.0,
                }
                for i in range(epochs)
            ]
            result = {
                "arm": "ce",
                "seed": seed,
                "data": "digits",
                "train_images": 1438,
                "arch": "resnet8",
                "epochs": epochs,
                "test_accuracy": accuracy if part == "test" else 0.123456,
                "test_loss": 0.4,
                "test_calibration_error": 0.031,
                "probe_accuracy": {"layer1": accuracy - 0.2, "layer3": accuracy},
                "seconds": each * epochs,
                "emd_seconds": each * epochs / 4 if arm in slow else 0.0,
                "options": {"epochs": epochs, "batch_size": 128, "label_noise": 0.2, "out": "elsewhere"},
            }
            if part == "val":
                result["val_accuracy"] = accuracy
            run = folder / "one" / arm / f"seed-{seed}"
            run.mkdir(parents=True)
            (run / "result.json").write_text(json.dumps(result))
            write_rows(run / "metrics.csv", rows)
    return folder


def row_of(text, arm, table=0):
    """Cells of an arm's line in the table of that number."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {arm} |")]
    return [cell.strip() for cell in lines[table].strip("|").split("|")]


# The statistics


def test_no_effect_where_there_is_none():
    """Of 400 nulls, about one in twenty is called one: not more, as it should be, and not none."""
    random = np.random.default_rng(0)
    found = covered = 0
    for _ in range(400):
        difference = paired(*(dict(enumerate(85 + random.standard_normal(10))) for _ in range(2)))
        found += difference.p < 0.05
        covered += difference.interval[0] <= 0 <= difference.interval[1]
    assert 8 <= found <= 33  # binomial of 400 and 0.05: 99.9 % lie there
    assert covered >= 0.86 * 400  # a bootstrap of ten is known to be a little narrow


def test_sign_flips_are_counted_exactly():
    values = np.array([0.3, -0.1, 0.4, 0.2, 0.5, 0.35])
    flips = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    as_extreme = np.abs(flips.T @ values) >= abs(values.sum()) - 1e-12
    assert sign_flip(values) == pytest.approx(as_extreme.mean())
    assert sign_flip(np.full(10, 0.1)) == pytest.approx(smallest_p(10)) == 2 / 1024
    assert sign_flip(np.zeros(10)) == 1
    assert smallest_p(5) > 0.05 > smallest_p(6)


@pytest.mark.parametrize("seeds", range(3, 9))
def test_ties_of_sign_flips_are_counted(seeds):
    """In whole numbers of hits: as floats, sums of other signs that are equal differ by their rounding."""
    random = np.random.default_rng(seeds)
    signs = np.array(list(itertools.product((-1, 1), repeat=seeds)))
    for images in (297, 359, 10_000):
        for spread in (3, 20):
            for _ in range(10):
                arm, reference = random.integers(-spread, spread + 1, (2, seeds)) + int(0.9 * images)
                sums = abs(signs @ (arm - reference))
                wanted = (sums >= abs((arm - reference).sum())).mean()
                found = paired(*(dict(enumerate(100 * (hits / images))) for hits in (arm, reference)))
                assert found.p == pytest.approx(wanted, rel=1e-12), (arm, reference, images)


@pytest.mark.parametrize(
    ("ce", "sfr", "images", "p"),
    [
        ([9012, 9001, 9017, 9040, 9026, 9026, 9044], [9037, 9041, 9022, 9055, 9031, 9051, 9039], 10_000, 0.0625),
        ([269, 267, 271], [272, 268, 268], 297, 1.0),
    ],
)
def test_sign_flips_that_tie(ce, sfr, images, p):
    values = [{seed: 100 * (hits / images) for seed, hits in enumerate(each)} for each in (sfr, ce)]
    assert paired(*values).p == p


def test_holm_is_that_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_differences_are_paired_by_seed():
    arm, reference = {0: 10.0, 1: 20.0, 2: 30.0, 5: 99.0}, {0: 9.0, 1: 18.0, 2: 27.0, 7: 0.0}
    found = paired(arm, reference)
    assert (found.seeds, found.mean, found.deviation) == (3, 2.0, 1.0)
    assert paired({1: 1.0}, {2: 1.0}) is None
    assert paired({1: 1.0}, {1: 0.5}) == Difference(1, 0.5, None, None, None)
    assert bootstrap(np.full(4, 0.25)) == (0.25, 0.25)


def test_more_arms_are_corrected_for():
    random = np.random.default_rng(1)
    arms = {name: dict(enumerate(random.standard_normal(10))) for name in ("ce", "a", "b", "c")}
    found = against(arms, "ce")
    assert set(found) == {"a", "b", "c"}
    assert [d.corrected for d in found.values()] == holm([d.p for d in found.values()])


def test_so_many_seeds_find_it():
    """By simulation: with that many, four of five studies find the difference."""
    n = seeds_needed(0.5, 0.3)
    assert n == 24  # G*Power: two-sided paired t-test, d = 0.6, power 0.8
    random = np.random.default_rng(2)
    values = 0.3 + 0.5 * random.standard_normal((4000, n))
    t = values.mean(1) / values.std(1, ddof=1) * np.sqrt(n)
    assert (np.abs(t) > 2.0687).mean() == pytest.approx(0.8, abs=0.02)
    assert seeds_needed(0, 0.3) == 2
    assert seeds_needed(1e6, 0.3) is None


# The report


def test_a_null_control_and_a_planted_effect(tmp_path):
    folder = planted(tmp_path, {"ce": 0, "ce-again": 0, "ls": 0, "better": 2.0, "worse": -2.0})
    text = report(folder) and (folder / "report.md").read_text()
    for arm, sign in (("better", "+"), ("worse", "-")):
        to_ce, p = row_of(text, arm)[3:5]
        assert to_ce.startswith(f"**{sign}") and p == f"**{4 * 2 / 1024:.2g}**"
        low, high = map(float, re.search(r"\[(.*), (.*)\]", to_ce).groups())
        assert low < (2 if sign == "+" else -2) < high and low * high > 0
    to_ce, p = row_of(text, "ce-again")[3:5]
    assert "**" not in to_ce and float(p) > 0.05
    low, high = map(float, re.search(r"\[(.*), (.*)\]", to_ce).groups())
    assert low < 0 < high
    assert "Better than ce: better." in text and "Worse than ce: worse." in text
    assert "no sign-flip test" not in text


def test_five_seeds_are_too_few(tmp_path):
    text = report(planted(tmp_path, {"ce": 0, "better": 2.0}, seeds=5)) and (tmp_path / "report.md").read_text()
    assert "With 5 seeds no sign-flip test can reach 0.05**: its smallest p is 2/2^5 = 0.0625" in text
    assert "No arm differs from ce by the corrected test." in text and "Better" not in text


def test_six_seeds_are_too_few_for_several_arms(tmp_path):
    text = report(planted(tmp_path, {"ce": 0, "a": 2.0, "b": 2.0}, seeds=6)) and (tmp_path / "report.md").read_text()
    assert "With 6 seeds and 2 arms, the smallest p is 0.0625 after Holm's correction" in text


def test_one_seed_has_no_spread(tmp_path):
    text = report(planted(tmp_path, {"ce": 0, "a": 2.0}, seeds=1)) and (tmp_path / "report.md").read_text()
    assert "With 1 seed no sign-flip test" in text and "With one seed there is no spread" in text
    assert " ± " not in text.split("## one")[1].split("### Seeds")[0]


def test_what_a_report_says(tmp_path):
    folder = planted(tmp_path, {"ce": 0, "ls": 0, "slow": 1.0}, slow=("slow",), about="What for.")
    text = report(folder) and (folder / "report.md").read_text()
    assert text.startswith("# planted\n\nWhat for.\n")
    assert "20 % of the labels wrong" in text and "1438 training images" in text
    results = read_results(folder)
    accuracies = [100 * o.result["test_accuracy"] for o in results.of("one", "slow").values()]
    cells = row_of(text, "slow")
    assert cells[1:3] == ["10", f"{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}"]
    seconds, feature, loss, error, equal = row_of(text, "slow", 2)[1:]
    assert (seconds, feature, loss, error) == ("2", "25 %", "0.400 ± 0.000", "3.10 ± 0.00")
    # In the four seconds of ce it comes to half of its epochs, two of which are worth 10 %.
    assert equal == f"{np.mean(accuracies) - 10:.2f} (2/4)"
    probes = row_of(text, "slow", 3)
    assert probes[1] == f"{np.mean(accuracies) - 20:.2f} ± {np.std(accuracies, ddof=1):.2f}"


def test_the_page_needs_nothing_else(tmp_path):
    folder = planted(tmp_path, {"ce": 0, "ls": 0, "a<b>": 1.0}, seeds=2)
    report(folder)
    page = (folder / "report.html").read_text()
    text = (folder / "report.md").read_text()
    assert page.count("<table>") == text.count("| --- |\n")
    named = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(named) == 3 and all((folder / path).read_text().startswith("<svg") for path in named)
    assert page.count('src="data:image/svg+xml;base64,') == 3
    assert not re.search(r"""(?:src|href)="(?!data:)""", page)
    assert "<b>" not in page and "a&lt;b&gt;" in page
    assert "<script" not in html_page("x", "<script>alert(1)</script>", {})


def test_runs_without_a_folder_are_kept(tmp_path):
    """As in a clone that has the lines of a study and repeats one seed of it."""
    planted(tmp_path / "runs", {"ce": 0, "a": 1.0}, seeds=3)
    kept = tmp_path / "kept"
    report(tmp_path / "runs", kept)
    lines = (kept / "results.jsonl").read_text()
    run = tmp_path / "runs" / "one" / "a" / "seed-1"
    again = kept / "one" / "a" / "seed-1"
    shutil.copytree(run, again)
    result = json.loads((again / "result.json").read_text())
    (again / "result.json").write_text(json.dumps({**result, "test_accuracy": 0.5}))
    assert "of 6 runs, 5 of which results.jsonl had kept" in report(kept)
    found = read_results(kept)
    assert found.of("one", "a")[1].figure("test_accuracy") == 0.5  # its folder wins over its line
    assert len((kept / "results.jsonl").read_text().splitlines()) == 6
    (again / "result.json").write_text(json.dumps(result))
    report(kept)
    assert (kept / "results.jsonl").read_text() == lines  # in the study's order

    # A study that asks for less does not make the others go.
    outline = json.loads((kept / "study.json").read_text())
    outline["settings"]["one"]["seeds"] = [0, 1]
    (kept / "study.json").write_text(json.dumps(outline))
    assert "of 4 runs, 3 of which" in report(kept)
    assert sorted((kept / "results.jsonl").read_text().splitlines()) == sorted(lines.splitlines())

    # Runs of other options are not mixed with them.
    result["options"]["epochs"] = 7
    (again / "result.json").write_text(json.dumps(result))
    with pytest.raises(TrainError, match="got --epochs 7 for seed 1 and 4 for seed 0; take away"):
        report(kept)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_runs_of_other_options_in_one_arm_are_refused(tmp_path):
    folder = planted(tmp_path, {"ce": 0, "a": 1.0}, seeds=3)
    result = folder / "one" / "a" / "seed-2" / "result.json"
    options = json.loads(result.read_text())["options"]
    change(result, options=options | {"batch_size": 64})
    with pytest.raises(TrainError, match="got --batch-size 128 for seed 0 and 64 for seed 2; take away"):
        report(folder)


def kept_lines(folder):
    """The lines of a study of which nothing else is left, and how to change the fourth of them."""
    read_results(folder).save(folder)
    shutil.rmtree(folder / "one")
    path = folder / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]

    def write(where, value):
        changed = json.loads(json.dumps(lines))
        place = changed[3]
        for name in where[:-1]:
            place = place[name]
        if value is MISSING:
            del place[where[-1]]
        else:
            place[where[-1]] = value
        path.write_text("".join(json.dumps(line) + "\n" for line in changed))

    return write


MISSING = object()


def test_lines_of_other_options_in_one_arm_are_refused(tmp_path):
    """As where their folders are there; not those of an arm that the study does not ask for."""
    folder = planted(tmp_path, {"ce": 0, "a": 1.0}, seeds=3)
    write = kept_lines(folder)
    write(("result", "options", "batch_size"), 64)  # of one/a/seed-0
    with pytest.raises(TrainError, match="runs of one/a to have .* got --batch-size 64 for seed 0 and 128 for seed 1"):
        report(folder)
    outline = json.loads((folder / "study.json").read_text())
    outline["settings"]["one"]["arms"] = ["ce"]
    (folder / "study.json").write_text(json.dumps(outline))
    assert "of 3 runs" in report(folder)


def test_metrics_that_lack_epochs_are_named(tmp_path):
    folder = planted(tmp_path, {"ce": 0, "a": 1.0}, seeds=2)
    metrics = folder / "one" / "a" / "seed-1" / "metrics.csv"
    whole = metrics.read_text().splitlines(keepends=True)
    for lines in (whole[:-1], [*whole, whole[-1]], [*whole[:-1], whole[-1].replace(",", ",1,", 1)]):
        metrics.write_text("".join(lines))
        with pytest.raises(TrainError, match="seed-1/metrics.csv is damaged"):
            report(folder)


@pytest.mark.parametrize("diverged", [math.nan, math.inf])
def test_a_run_that_diverged_is_told(tmp_path, diverged):
    """Its loss is no number; its accuracy is one."""
    folder = planted(tmp_path, {"ce": 0, "a": 1.0}, seeds=3)
    results = [folder / "one" / "a" / f"seed-{seed}" / "result.json" for seed in range(3)]
    for result, loss in zip(results, (0.5, diverged, 0.7), strict=True):
        change(result, test_loss=loss, test_calibration_error=0.1)
    metrics = results[1].with_name("metrics.csv")
    write_rows(metrics, [row | {"train_feature_loss": diverged} for row in read_rows(metrics)])
    report(folder)
    kept = [o.result["test_loss"] for o in read_results(folder).of("one", "a").values()]
    assert kept[0] == 0.5 and not math.isfinite(kept[1])
    shutil.rmtree(folder / "one" / "a")
    assert [o.figure("test_loss") for o in read_results(folder).of("one", "a").values()] == [0.5, None, 0.7]
    assert "0.600" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    "values",
    [
        {"test_accuracy": math.nan},
        {"test_accuracy": 85},
        {"seconds": None},
        {"seconds": "x"},
        {"options": {}},
        {"options": []},
        {"test_loss": "low"},
        {"probe_accuracy": {"stem": "x"}},
        {"probe_accuracy": [1]},
        {"probe_accuracy": {"stem": None}},
        {"test_accuracy": True},
        {"seconds": -1},
        {"epochs": 0},
        {"epochs": "4"},
    ],
)
def test_results_that_are_none_are_named(tmp_path, values):
    folder = planted(tmp_path, {"ce": 0, "a": 1.0}, seeds=2)
    change(folder / "one" / "a" / "seed-1" / "result.json", **values)
    with pytest.raises(TrainError, match="a/seed-1/result.json does not hold the result of a run"):
        report(folder)


INFINITY, NONE = math.inf, math.nan
# Where in a result, what stands there, and what is said of it.
NO_FIELDS = [
    (("seconds",), INFINITY, r"seconds must be in \[0, 1e\+10\], got inf"),
    (("emd_seconds",), 9.0, "emd_seconds must be at most the seconds, 4.0, got 9.0"),
    (("test_accuracy",), -INFINITY, r"test_accuracy must be in \[0, 1\], got -inf"),
    (("test_accuracy",), MISSING, "test_accuracy is missing"),
    (("train_accuracy",), INFINITY, r"train_accuracy must be in \[0, 1\], got inf"),
    (("test_calibration_error",), 1e308, r"test_calibration_error must be in \[0, 1\], got 1e\+308"),
    (("test_loss",), 10**400, "test_loss must be a number, got 1000"),
    (("probe_accuracy", "layer1"), NONE, r"probe_accuracy: layer1 must be in \[0, 1\], got nan"),
    (("probe_accuracy",), [], r"probe_accuracy must be a mapping, got \[\]"),
    (("parameters",), INFINITY, "parameters must be finite, got inf"),
    (("versions",), {"torch": [NONE]}, "versions: torch: 0 must be finite, got nan"),
    (("options", "lr"), INFINITY, "options: lr must be finite, got inf"),
    (("options", "batch_size"), MISSING, "options: batch_size is missing"),
    (("options", "batch_size"), "128", "options: batch_size must be a whole number, got '128'"),
    (("options", "label_noise"), [0.2], "options: label_noise must be a number, got"),
    (("threads",), [1], r"threads must be a whole number, got \[1\]"),
    (("data",), None, "data must be a word, got None"),
    (("arch",), "a\n# b", "arch must be a word, got 'a"),
    (("arch",), "\ud800", "arch must be a word, got "),
    (("train_images",), 0, "train_images must be at least 1, got 0"),
    (("options",), None, "options must be a mapping, got None"),
]


@pytest.mark.parametrize(("where", "value", "told"), NO_FIELDS, ids=[" ".join(where) for where, *_ in NO_FIELDS])
def test_fields_of_results_that_no_run_writes_are_named(tmp_path, where, value, told):
    folder = planted(tmp_path, {"ce": 0, "a": 1.0}, seeds=3)
    path = folder / "one" / "a" / "seed-0" / "result.json"
    whole = json.loads(path.read_text())
    *outer, last = where
    place = whole
    for name in outer:
        place = place[name]
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    before = path.read_text()
    path.write_text(json.dumps(whole))
    with pytest.raises(TrainError, match=f"a/seed-0/result.json does not hold the result of a run.*: {told}"):
        report(folder)
    path.write_text(before)
    kept_lines(folder)(("result", *where), value)
    with pytest.raises(TrainError, match=f"results.jsonl: line 4 is not what sfr-ext report writes: {told}"):
        report(folder)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("test_accuracy", INFINITY, r"epoch 2: test_accuracy must be in \[0, 1\], got inf"),
        ("test_accuracy", 1e308, r"epoch 2: test_accuracy must be in \[0, 1\], got 1e\+308"),
        ("train_accuracy", -INFINITY, r"epoch 2: train_accuracy must be in \[0, 1\], got -inf"),
        ("seconds", INFINITY, r"epoch 2: seconds must be in \[0, 1e\+10\], got inf"),
        ("seconds", NONE, r"epoch 2: seconds must be in \[0, 1e\+10\], got nan"),
        ("seconds", -1.0, r"epoch 2: seconds must be in \[0, 1e\+10\], got -1.0"),
        ("epoch", INFINITY, "it does not have the 4 epochs of the result, one a row: 2 is not there"),
    ],
)
def test_numbers_of_epochs_that_no_run_writes_are_named(tmp_path, name, value, told):
    folder = planted(tmp_path, {"ce": 0, "a": 1.0}, seeds=3)
    path = folder / "one" / "a" / "seed-0" / "metrics.csv"
    rows, before = read_rows(path), path.read_text()
    write_rows(path, [row | {name: value} if row["epoch"] == 2 else row for row in rows])
    with pytest.raises(TrainError, match=f"a/seed-0/metrics.csv is damaged: {told}"):
        report(folder)
    path.write_text(before)
    kept_lines(folder)(("curves", name, 1), value)
    with pytest.raises(TrainError, match=f"results.jsonl: line 4 is not what sfr-ext report writes: {told}"):
        report(folder)


def test_lines_that_no_report_writes_are_named(tmp_path):
    write = kept_lines(planted(tmp_path, {"ce": 0, "a": 1.0}, seeds=3))
    cases = [
        (("curves", name, 1), x, f"epoch 2: {name} must be ")
        for name in ("epoch", "test_accuracy", "seconds")
        for x in ("x", "", [1], {}, True)
    ]
    for name in ("setting", "arm"):
        for value in (None, 3, [], ["a"], {"a": 1}, "", "..", "a/b", "a\nb", 256 * "a"):
            cases.append(((name,), value, f"{name} must be the name of a folder, got "))
    cases += [((name,), MISSING, f"{name} is missing") for name in ("setting", "arm", "seed", "result", "curves")]
    cases += [(("seed",), x, "seed must be ") for x in (True, -1, 1.0, "0", None)]
    cases += [(("curves", "seconds"), x, "curves: seconds must be a list, got ") for x in (None, "1234", {"a": 1})]
    cases += [(("curves", "seconds"), x, "curves must be columns of one length") for x in ([], [1.0])]
    cases += [(("curves", "seconds"), MISSING, "epoch 1: seconds is missing")]
    cases += [(("curves",), x, "curves must be a") for x in ([], None)]
    for where, value, told in cases:
        write(where, value)
        with pytest.raises(TrainError, match=f"results.jsonl: line 4 is not what sfr-ext report writes: {told}"):
            report(tmp_path)


def test_a_number_of_epochs_is_no_list_of_them(tmp_path):
    folder = planted(tmp_path, {"ce": 0, "a": 1.0}, seeds=2)
    change(folder / "one" / "a" / "seed-1" / "result.json", epochs=10_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(TrainError, match="metrics.csv is damaged: it does not have the 10000000 epochs"):
            report(folder)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "values",
    [
        {"name": "\ud800"},
        {"settings": {"one": {"about": "", "arms": ["ce"], "seeds": [0, 1.5]}}},
        {"settings": {"one": {"about": "", "arms": ["ce"], "seeds": [True]}}},
        {"settings": {"a/b": {"about": "", "arms": ["ce"], "seeds": [0, 1]}}},
        {"settings": {}},
        {"settings": []},
        {"settings": {"one": {}}},
        {"settings": {"one": {"about": "", "arms": ["ce"], "seeds": ["0"]}}},
        {"judged_by": "taste"},
        {"name": None},
        {"references": None},
        {"references": "ce"},
        {"references": ["nobody"]},
        {"settings": {"one": {"about": "", "arms": ["ce", "ce"], "seeds": [0, 1]}}},
        {"settings": {"one": {"about": "", "arms": ["ce"], "seeds": [0, 0, 1]}}},
    ],
)
def test_outlines_that_are_none_are_named(tmp_path, values):
    folder = planted(tmp_path, {"ce": 0}, seeds=2)
    change(folder / "study.json", **values)
    with pytest.raises(TrainError, match="study.json is not what sfr-ext study writes"):
        report(folder)


def test_a_run_that_is_done_again_is_not_told_by_its_line(tmp_path):
    """As with --overwrite under way: the folder is there, and its result is not."""
    folder = planted(tmp_path, {"ce": 0, "a": 1.0}, seeds=3)
    report(folder)
    lines = sorted((folder / "results.jsonl").read_text().splitlines())
    again = folder / "one" / "a" / "seed-1"
    result = (again / "result.json").read_text()
    (again / "result.json").unlink()
    said = report(folder)
    assert "of 5 runs" in said and "had kept" not in said
    assert set(read_results(folder).of("one", "a")) == {0, 2}
    assert "**1 of 6 runs not finished yet**" in (folder / "report.md").read_text()
    assert sorted((folder / "results.jsonl").read_text().splitlines()) == lines  # not lost

    for seed in (0, 2):
        shutil.rmtree(folder / "one" / "a" / f"seed-{seed}")
    shutil.rmtree(folder / "one" / "ce")
    assert "of 5 runs" in report(folder)
    (again / "result.json").write_text(result)
    assert "of 6 runs, 5 of which results.jsonl had kept" in report(folder)
    assert sorted((folder / "results.jsonl").read_text().splitlines()) == lines
    shutil.rmtree(again)  # and gone: the line speaks for it
    assert set(read_results(folder).of("one", "a")) == {0, 1, 2}


def test_only_drawings_are_replaced(tmp_path):
    """Runs of a setting that an older study called figures, and files of others, stay where they are."""
    folder = planted(tmp_path, {"ce": 0, "a": 1.0}, seeds=2)
    (folder / "one").rename(folder / "figures")
    outline = json.loads((folder / "study.json").read_text())
    outline["settings"]["figures"] = outline["settings"].pop("one")
    (folder / "study.json").write_text(json.dumps(outline))
    (folder / "figures" / "gone-curves.svg").write_text("of a setting that is gone")
    (folder / "figures" / "mine.svg").write_text("kept")
    report(folder)
    assert len(list(folder.glob("figures/*/seed-*/result.json"))) == 4
    drawn = {path.name for path in folder.glob("figures/*.svg")}
    assert drawn == {"mine.svg", "figures-forest.svg", "figures-curves.svg", "figures-probes.svg"}


def test_what_is_kept_gives_the_same_report(tmp_path):
    folder = planted(tmp_path / "runs", {"ce": 0, "a": 1.0}, seeds=6)
    report(folder, tmp_path / "kept")
    assert not (folder / "report.md").exists()
    lines = [json.loads(line) for line in (tmp_path / "kept" / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and all("out" not in line["result"]["options"] for line in lines)
    report(tmp_path / "kept", tmp_path / "again")
    for name in ("report.md", "report.html", "results.jsonl", "study.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()


def test_epochs_between_tests(tmp_path):
    folder = planted(tmp_path / "runs", {"ce": 0, "slow": 1.0}, seeds=2, slow=("slow",))
    for path in folder.glob("one/*/*/metrics.csv"):
        rows = read_rows(path)
        write_rows(path, [{**row, "test_accuracy": math.nan} if row["epoch"] % 2 else row for row in rows])
    text = report(folder, tmp_path / "kept") and (tmp_path / "kept" / "report.md").read_text()
    assert row_of(text, "slow", 2)[-1].endswith(" (2/4)")
    assert "NaN" not in (tmp_path / "kept" / "results.jsonl").read_text()
    report(tmp_path / "kept", tmp_path / "again")
    assert (tmp_path / "again" / "report.html").read_text() == (tmp_path / "kept" / "report.html").read_text()


def test_seconds_of_a_quiet_machine(tmp_path):
    busy = planted(tmp_path / "busy", {"ce": 0, "a": 1.0}, seeds=6, slow=("ce", "a"))
    quiet = planted(tmp_path / "quiet", {"ce": 0, "a": 1.0}, seeds=1)
    assert main(["report", str(busy), "--seconds", str(quiet)]) == 0
    text = (busy / "report.md").read_text()
    assert row_of(text, "a", 2)[1] == "1" and "of a run of its own on a quiet machine" in text
    with pytest.raises(TrainError, match="has no finished run of one/a"):
        report(busy, seconds=planted(tmp_path / "less", {"ce": 0}, seeds=1))


def test_a_sweep_does_not_look_at_the_test_images(tmp_path):
    folder = planted(tmp_path, {"ce": 0, "a": 1.0}, judged_by="validation")
    text = report(folder) and (folder / "report.md").read_text()
    assert "held-out training images" in text and "likelihood" not in text.split("### Time")[1].split("\n\n")[1]
    assert "12.3" not in text and "probe" not in text  # 0.123456 is the accuracy on test images
    assert row_of(text, "a")[3].startswith("**+")


def test_runs_of_different_threads_are_told(tmp_path):
    folder = planted(tmp_path, {"ce": 0, "a": 1.0}, seeds=2)
    for path in folder.glob("one/*/*/result.json"):
        threads = 1 if "seed-0" in str(path) else 2
        path.write_text(json.dumps({**json.loads(path.read_text()), "threads": threads}))
    text = report(folder) and (folder / "report.md").read_text()
    assert "Runs had 1 or 2 threads, by which sums are rounded differently" in text
    for path in folder.glob("one/*/*/result.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "threads": 2}))
    text = report(folder) and (folder / "report.md").read_text()
    assert "threads" not in text


def test_one_is_not_many(tmp_path):
    text = report(planted(tmp_path, {"ce": 0}, seeds=2, epochs=1)) and (tmp_path / "report.md").read_text()
    assert "1 epoch of batches" in text and "1 epochs" not in text


def test_runs_that_are_missing(tmp_path):
    folder = planted(tmp_path, {"ce": 0, "a": 1.0}, seeds=6)
    (folder / "one" / "a" / "seed-2" / "result.json").unlink()
    outline = json.loads((folder / "study.json").read_text())
    outline["settings"]["two"] = {"about": "", "arms": ["ce"], "seeds": [0]}
    (folder / "study.json").write_text(json.dumps(outline))
    text = report(folder) and (folder / "report.md").read_text()
    assert "**1 of 12 runs not finished yet**" in text
    assert row_of(text, "a")[1] == "5" and "pairs" not in row_of(text, "a")[3]
    (folder / "one" / "ce" / "seed-3" / "result.json").unlink()
    (folder / "results.jsonl").unlink()  # which has kept it
    pairs = report(folder) and row_of((folder / "report.md").read_text(), "a")[3]
    assert pairs.endswith(" (4 pairs)")
    assert "No run of this setting has been finished." in text


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("study.json", None, "is .* the --out of a study"),
        ("study.json", "[]", "is not what sfr-ext study writes"),
        ("one/ce/seed-0/result.json", "{}", "ce/seed-0/result.json does not hold the result of a run"),
        ("one/ce/seed-0/metrics.csv", None, "ce/seed-0/metrics.csv cannot be read: No such file"),
        ("one/ce/seed-0/metrics.csv", "", "ce/seed-0/metrics.csv is damaged"),
        ("one/ce/seed-0/metrics.csv", "seconds\n1\n", "ce/seed-0/metrics.csv is damaged"),
        ("one/ce/seed-0/metrics.csv", "epoch,seconds\n1,one\n", "metrics.csv is damaged: row 1: seconds must be a num"),
        ("one/ce/seed-0/metrics.csv", "epoch,seconds\n1\n", "metrics.csv is damaged: row 1 has fewer fields"),
        ("one/ce/seed-0/metrics.csv", "epoch\n1,2\n", "metrics.csv is damaged: row 1 has more fields"),
        ("one/ce/seed-0/metrics.csv", "epoch\n" + 200_000 * "1", "metrics.csv is damaged: field larger than"),
    ],
)
def test_damaged_files_are_named(name, content, told, tmp_path, capsys):
    path = planted(tmp_path, {"ce": 0}, seeds=1) / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    assert main(["report", str(tmp_path)]) == 1
    assert re.search(told, capsys.readouterr().err)


def test_nothing_finished(tmp_path):
    folder = planted(tmp_path, {"ce": 0}, seeds=1)
    Path(folder / "one" / "ce" / "seed-0" / "result.json").unlink()
    with pytest.raises(TrainError, match="holds no finished run yet"):
        report(folder)
