"""What a flow puts on its run's page."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.finetune import finetune
from flows.support.publishing import show_report
from tasks.engine.artifacts import Artifact, reference
from tasks.engine.errors import UserError


@pytest.fixture
def report(tmp_path: Path) -> Artifact:
    (tmp_path / "report.md").write_text("# A little better", encoding="utf-8")
    return reference("report", tmp_path, ["report.md"], {})


@pytest.mark.usefixtures("prefect_server")
def test_the_page_shows_the_short_report(report: Artifact) -> None:
    assert show_report(report, "of-this-test") == f"Full report: {report.path / 'report.html'}"
    with get_client(sync_client=True) as client:
        (shown,) = (artifact for artifact in client.read_artifacts() if artifact.key == "of-this-test")
    assert shown.data == "# A little better"


def test_a_server_that_is_gone_costs_the_page_and_not_the_run(
    report: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{nobody.getsockname()[1]}/api"}):
            assert show_report(report, "report") == f"Full report: {report.path / 'report.html'}"
    assert "cannot show the report" in caplog.text


@pytest.mark.usefixtures("prefect_server")
def test_saved_parameters_of_an_earlier_version_end_a_run_with_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("prefect.flow_runs")
    monkeypatch.setattr(log, "filters", [])  # of runs before
    former = {"overrides": {"training": {"steps": 3}}}
    line = "overrides: training.steps: unknown setting (got 3). `--help` lists every setting."
    with pytest.raises(UserError) as error:
        run_flow(finetune, parameters=former, error_logger=log)  # as a worker runs it
    assert str(error.value) == line
    assert line in caplog.text and "Traceback" not in caplog.text
    state = finetune(**former, return_state=True)
    assert state.is_failed() and str(state.message).endswith(f"UserError: {line}")
