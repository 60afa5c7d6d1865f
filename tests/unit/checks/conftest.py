"""One set of checks for all tests: their schemas are read from Ray once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fmray.checks.files import family_of
from fmray.checks.findings import Finding, Report
from fmray.checks.kuberay import ManifestCheck
from fmray.checks.launcher import LauncherCheck
from fmray.checks.marked import parse
from fmray.checks.serve import ServeCheck
from fmray.cli import DOORS

Check = Callable[[str], list[Finding]]


@pytest.fixture(scope="session")
def check() -> Check:
    """The findings of a text, as `fmray check` has them, without reading a file."""
    serve = ServeCheck()
    manifests, launcher = ManifestCheck(serve, tuple(DOORS)), LauncherCheck()

    def run(text: str) -> list[Finding]:
        report, parsed = Report("x.yaml"), parse(text)
        report.slips(parsed.slips)
        for document in parsed.documents:
            family = family_of(document)
            assert family is not None, text[:80]
            {"serve": serve.check, "kubernetes": manifests.check, "launcher": launcher.check}[family](
                document, report
            )
        return report.findings

    return run
