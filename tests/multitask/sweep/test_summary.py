"""The report of a sweep: its numbers in words and tables, in one file."""

import re
from pathlib import Path

import pytest

from multitask.report.pages import write_sweep_report
from multitask.sweep.figures import draw, series
from multitask.sweep.final import Verdict
from multitask.sweep.outcomes import TrialOutcome, choices, choose
from multitask.sweep.summary import headline, method_rows, section, trial_rows
from tests.multitask.sweep.conftest import MakeOutcome

VERDICT = Verdict(
    trial=0, directory="runs/s/trials/0000", version="best", tasks={"pets": {"top1": 77.5, "top5": 99.25, "loss": 0.5}}
)


@pytest.fixture
def outcomes(make_outcome: MakeOutcome) -> list[TrialOutcome]:
    return [
        make_outcome(0, 81.25, rate=0.1),
        make_outcome(1, 60.0, rate=0.01),
        make_outcome(2, 70.0, method="last_layer", rate=0.1, trained_parameters=1234),
        make_outcome(3, 0.0, rate=1.0, state="failed", error="<b>not finite</b>", seconds=None),
    ]


def test_the_headline_names_the_setting_and_both_accuracies(outcomes: list[TrialOutcome]) -> None:
    choice = choose(outcomes)

    words = headline(4, choice, VERDICT)

    assert words == (
        "Best of 4 settings: method=full, rate=0.1, with 81.2 % validation top-1 and 100 trained parameters. Its "
        "trial, measured once: 77.5 % top-1 on test images."
    )
    assert headline(4, None, None) == "None of 4 settings has finished all its trials."


def test_each_method_has_its_best_rate_and_what_the_rate_costs(outcomes: list[TrialOutcome]) -> None:
    found = series(choices(outcomes))

    assert method_rows(found) == [
        ("full", "0.1", "81.2", "60.0", "2", "100"),
        ("last_layer", "0.1", "70.0", "70.0", "1", "1,234"),
    ]


def test_finished_trials_stand_first_by_accuracy(outcomes: list[TrialOutcome]) -> None:
    assert [line[0] for line in trial_rows(outcomes)] == ["0", "2", "1", "3"]
    assert trial_rows(outcomes)[3] == ("3", "full", "1", "0", "failed", "0.00", "4", "100", "–")


def test_the_report_is_one_file_with_figures_tables_and_failures(outcomes: list[TrialOutcome], tmp_path: Path) -> None:
    found = series(choices(outcomes))

    path = write_sweep_report("rates", section(outcomes, found, draw(found), choose(outcomes), VERDICT), tmp_path)

    html = path.read_text()
    assert path == tmp_path / "report.html"
    assert [len(re.findall(text, html)) for text in ("<img", "data:image/png;base64")] == [2, 4]
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert "<td>81.25</td>" in html
    assert "<td>77.50</td>" in html
    assert "&lt;b&gt;not finite&lt;/b&gt;" in html
    assert re.findall(r'<tr class="ours"><td>(\d+)</td>', html) == ["0"]


def test_a_sweep_in_which_nothing_finished_has_a_report_too(make_outcome: MakeOutcome, tmp_path: Path) -> None:
    outcomes = [make_outcome(0, 0.0, state="failed", error="no room", curve=())]

    path = write_sweep_report("rates", section(outcomes, {}, [], None, None), tmp_path)

    assert "no room" in path.read_text()
    assert "<img" not in path.read_text()
