"""JupyterLab in a headless Chromium, used as a person uses it. `make test-ui`; screenshots go to figures/ui.

Needs the extra `ui` (Playwright) and a Chromium of the system's own: nothing is downloaded.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "figures" / "ui"
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
TOKEN = "only-for-this-test"
IMAGES = {"00_quickstart": 1, "40_charts": 4}
# JupyterLab's own console errors, each with why it is none of ours.
HARMLESS: dict[str, str] = {}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium on the PATH: install one (Debian, Ubuntu: apt install chromium) or set CHROMIUM=/path",
    ),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab with settings of its own, on a copy of the notebooks and of what they read."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", home / "notebooks")
    shutil.copytree(ROOT / "results", home / "results")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    private = [*(f"JUPYTER_{x}_DIR" for x in ("CONFIG", "DATA", "RUNTIME")),
               *(f"JUPYTERLAB_{x}_DIR" for x in ("SETTINGS", "WORKSPACES")), "IPYTHONDIR"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **{name: str(home / name) for name in private}}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={home}",
               # Two questions to the internet, which a test must not ask.
               "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # fmt: skip
    with open(home / "lab.log", "wb") as log:
        server = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={TOKEN}", timeout=5)
                break
            assert server.poll() is None and time.monotonic() < deadline, (home / "lab.log").read_text()
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed: pip install -e '.[ui]' (no `playwright install`)"
    )
    with playwright.sync_playwright() as driver:
        # No sandbox: a container run as root has none. /dev/shm is small there.
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"], env={**os.environ, "LANG": "C"}
        )
        yield chromium
        chromium.close()


@pytest.mark.parametrize("name", IMAGES)
def test_run_all_cells_shows_every_chart_and_no_error(name, lab, browser):
    page = browser.new_page(viewport={"width": 1500, "height": 1100})
    complaints = []
    page.on("console", lambda m: complaints.append(f"{m.text} ({m.location['url']})") if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))

    page.goto(f"{lab}/lab/tree/notebooks/{name}.ipynb?token={TOKEN}&reset")
    idle = page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    # The notebook's own sign says idle before there is a kernel, and running then asks which kernel to take.
    page.locator(".jp-StatusBar-TextItem", has_text=re.compile(r"^Python 3.* \| Idle$")).wait_for(timeout=120_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    n_cells = page.locator(".jp-CodeCell").count()
    try:
        page.wait_for_function(
            """([cells, images]) => {
                const all = query => [...document.querySelectorAll(query)];
                const ran = all('.jp-CodeCell .jp-InputPrompt').filter(p => /^\\[\\d+\\]:\\s*$/.test(p.textContent));
                const drawn = all('.jp-OutputArea-output img').filter(image => image.naturalWidth > 0);
                return all('[data-mime-type="application/vnd.jupyter.error"]').length
                    || ran.length === cells && drawn.length >= images;
            }""",
            arg=[n_cells, IMAGES[name]],
            timeout=240_000,
        )
        idle.wait_for(timeout=60_000)
    finally:
        shots(page, name)
    assert page.locator(".jp-OutputArea-output img").count() == IMAGES[name]
    for kind in ("error", "stderr"):
        outputs = page.locator(f'[data-mime-type="application/vnd.jupyter.{kind}"]')
        assert outputs.all_text_contents() == [], kind
    assert [c for c in complaints if not any(harmless in c for harmless in HARMLESS)] == []
    page.close()


def shots(page, name):
    """Screenshots of the notebook from top to bottom, as figures/ui/<name>-1.png and so on."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for old in SCREENSHOTS.glob(f"{name}-*.png"):
        old.unlink()
    scroller = page.locator(".jp-WindowedPanel-outer").first
    height, view = scroller.evaluate("e => [e.scrollHeight, e.clientHeight]")
    for number in range(-(-height // view)):
        scroller.evaluate("(e, top) => e.scrollTo(0, top)", number * view)
        page.wait_for_timeout(500)
        page.screenshot(path=SCREENSHOTS / f"{name}-{number + 1}.png")
