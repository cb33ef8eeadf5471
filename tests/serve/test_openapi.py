"""Whatever a client makes of the OpenAPI document is answered as the document says, and never by a failure."""

from collections import Counter
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from models.explaining import Explainer
from models.torch_engine import load_torch_engine
from serve.settings import ServeSettings
from tests.serve.endpoint import running
from tests.small_classifiers import SENTIMENT, TOPICS, make_classifier

_CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
_MODES = {"post": list(schemathesis.GenerationMode)}
"""What the document allows, and what it does not; where nothing is taken, nothing is wrong."""
_POSTED, _READ = 250, 20
"""Cases of an operation that takes a body, and of one that takes nothing, in each mode."""


@pytest.mark.slow
def test_no_case_of_thousands_fails_the_server(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "model", (SENTIMENT, TOPICS))
    engine = load_torch_engine(folder, precision="fp32")
    limits = ServeSettings(max_texts=16, explain_queue=64)
    made: Counter[str] = Counter()
    with running(engine, limits, explainer=lambda: Explainer(folder, {}, threads=1)) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        for found in schema.get_all_operations():
            operation = found.ok()
            for mode in _MODES.get(operation.method, [schemathesis.GenerationMode.POSITIVE]):

                @settings(
                    max_examples=_POSTED if operation.method == "post" else _READ,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                )
                @given(case=operation.as_strategy(generation_mode=mode))
                def ask(case: schemathesis.Case) -> None:
                    made[case.operation.label] += 1
                    case.call_and_validate(checks=_CHECKS)

                ask()
    assert {"POST /v1/classify", "POST /predict", "POST /", "POST /v1/explain"} <= made.keys()
    assert sum(made.values()) >= 2000, made
