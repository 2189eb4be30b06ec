"""Page, JSON API and metrics of a running coordinator, as a browser and Prometheus ask for them."""

import asyncio
import gzip
import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from coordinator.operations.studies import create_study
from protos.contract.telemetry import COORDINATOR_METRICS
from protos.muster.v1 import membership_pb2
from tests.coordinator.loopback import RUN_ID, deployed
from tests.coordinator.operations.test_studies import SMALL

STATIC_DIR = Path(__file__).parents[3] / "coordinator" / "web" / "static"


def fetch(url: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers in lower case, body."""
    request = urllib.request.Request(url, headers={"Accept-Encoding": "gzip"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            headers, body = {k.lower(): v for k, v in answer.headers.items()}, answer.read()
            is_packed = headers.get("content-encoding") == "gzip"
            return answer.status, headers, gzip.decompress(body) if is_packed else body
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def test_everything_is_served(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as deployment, deployment.client() as client:
            await client.reach_incarnation_one()
            claims = membership_pb2.PeerClaims(
                state="TRAINING", state_reason="<b>bold</b>", loss_nats=2.5, tokens_per_second=100.0
            )
            await client.heartbeat(claims=claims, incarnation=1)
            await client.acquire(32)
            await deployment.coordinator.perform(create_study, SMALL)
            base = deployment.coordinator.http_address
            await asyncio.to_thread(check_api, base, client.peer_id)
            await asyncio.to_thread(check_metrics, base, client.peer_id)
            await asyncio.to_thread(check_page, base)

    asyncio.run(scenario())


def check_api(base: str, peer_id: str) -> None:
    """Every route of the API."""

    def ask(path: str) -> Any:
        status, headers, body = fetch(base + path)
        assert (status, headers["content-type"]) == (200, "application/json"), path
        return json.loads(body)

    assert [run["run_id"] for run in ask("/api/v1/runs")["runs"]] == [RUN_ID]
    status = ask(f"/api/v1/runs/{RUN_ID}")
    assert status["run_id"] == RUN_ID and status["active_tokens"] == 32
    (peer,) = ask(f"/api/v1/runs/{RUN_ID}/peers")["peers"]
    assert peer["peer_id"] == peer_id and peer["claims"]["state_reason"] == "<b>bold</b>"
    assert ask(f"/api/v1/runs/{RUN_ID}/series") == {
        "run_id": RUN_ID,
        "steps": [],
        "evaluations": [],
        "forecasts": [],
    }
    (study,) = ask(f"/api/v1/runs/{RUN_ID}/studies")["studies"]
    assert study["fit"] is None and "no result of a size yet" in study["fit_reason"]
    assert [size["num_open"] for size in study["sizes"]] == [1, 2, 1]
    assert "pause it to hand them out" in study["waiting_reason"]
    events = ask(f"/api/v1/runs/{RUN_ID}/events")["events"]
    later = ask(f"/api/v1/runs/{RUN_ID}/events?after={events[-1]['event_id']}&max=5")["events"]
    assert events and not later
    assert fetch(f"{base}/api/v1/runs/{RUN_ID}/events?after=x")[0] == 400
    assert fetch(f"{base}/api/v1/runs/none")[0] == 404
    assert fetch(f"{base}/../../etc/passwd")[0] == 404
    assert fetch(f"{base}/healthz")[2] == b"ok\n"


def check_metrics(base: str, peer_id: str) -> None:
    """All declared families are there, and the figures are the store's."""
    status, headers, body = fetch(f"{base}/metrics")
    text = body.decode()
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    for metric in COORDINATOR_METRICS:
        assert f"# TYPE {metric.name}" in text, metric.name
    assert "\nmuster_coordinator_budget_tokens 512.0\n" in text
    assert "\nmuster_coordinator_leased_tokens 32.0\n" in text
    assert "\nmuster_coordinator_loss_nats 2.5\n" in text
    assert 'muster_coordinator_run_state{state="RUNNING"} 1.0' in text
    assert f'peer_claimed_tokens_per_second{{name="client",peer="{peer_id}"}} 100.0' in text
    assert re.search(r'lease_events_total\{event="granted"\} [1-9]', text)
    assert re.search(r'rpc_seconds_count\{method="Heartbeat",status="OK"\} [1-9]', text)


def check_page(base: str) -> None:
    """The page asks nobody else, runs nothing inline and is small."""
    _, headers, body = fetch(base)
    policy = headers["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy
    html = body.decode()
    paths = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert all(path.startswith("/") for path in paths)
    assert "style=" not in html and not re.search(r"<script(?![^>]*src=)", html)
    total_bytes = len(body)
    for path in {"/page.js", "/chart.js", "/studies.js", "/page.css", "/favicon.svg"}:
        status, _, content = fetch(base + path)
        assert status == 200, path
        total_bytes += len(content)
    assert total_bytes < 150_000


def test_page_never_makes_markup_of_text() -> None:
    for path in STATIC_DIR.glob("*.js"):
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text), (
            path
        )
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", ""), path
