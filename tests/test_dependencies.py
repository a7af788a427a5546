"""The exact set of packages that CI runs (constraints.txt) has no known vulnerability, as pip-audit tells."""

import http.server
import json
import pkgutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

# Advisory -> why it cannot touch this project. Anything else that is found is fixed by a newer release.
LISTED: dict[str, str] = {}


def audit(*options: object, pins: Path = Path("constraints.txt")) -> tuple[int, dict[str, list[str]]]:
    """How many packages pip-audit knows about, and the advisories of those that have some."""
    words = [sys.executable, "-m", "pip_audit", "-r", pins, "--no-deps", "--disable-pip", "-f", "json"]
    words += [word for advisory in LISTED for word in ("--ignore-vuln", advisory)]
    done = subprocess.run([*map(str, [*words, "--progress-spinner", "off", *options])], capture_output=True, text=True)
    if not done.stdout.strip():
        pytest.fail(f"no audit: {done.stderr.strip().splitlines()[-1]}")
    known = [one for one in json.loads(done.stdout)["dependencies"] if "skip_reason" not in one]
    return len(known), {one["name"]: [found["id"] for found in one["vulns"]] for one in known if one["vulns"]}


PRIVATE = [  # names of libraries that begin with _; what the package does where one is gone stands beside its use
    ("torch.cpu", "_is_avx512_bf16_supported"),
    ("torch.ops.mkldnn", "_linear_pointwise"),
    ("accelerate.state.AcceleratorState", "_reset_state"),
    ("kaggle.api.kaggle_api_extended.KaggleApi", "_upload_file"),
]


@pytest.mark.parametrize(("place", "name"), PRIVATE)
def test_a_private_name_is_still_there(place, name):
    assert hasattr(pkgutil.resolve_name(place), name)


@pytest.mark.network
def test_no_package_has_a_known_vulnerability():
    known, found = audit()
    assert known, "pip-audit knows no package; where pypi.org is not reached it then says that nothing was found"
    assert not found, "raise these, or list them in LISTED with the reason"


@pytest.mark.slow
def test_a_vulnerability_is_found(tmp_path):
    """The audit above can fail: here with an advisory of a database of our own."""

    class Database(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name, version = query["package"]["name"], query["version"]
            affected = {"package": {"name": name, "ecosystem": "PyPI"}, "versions": [version], "ranges": []}
            advisory = {"id": "PYSEC-2026-0", "summary": "bad", "details": "bad", "affected": [affected]}
            body = json.dumps({"vulns": [advisory]} if name == "left" else {}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Database)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pins = tmp_path / "pins.txt"
    pins.write_text("left==1.0\nright==2.0\n")
    url = f"http://127.0.0.1:{server.server_port}/v1/query"
    assert audit("--vulnerability-service", "osv", "--osv-url", url, pins=pins) == (2, {"left": ["PYSEC-2026-0"]})
    server.shutdown()
