"""JupyterLab and voila in processes of their own, and a browser, driven by playwright.

The tests of the dashboards and the scripts that take their pictures share this module.
"""

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from prune_nb.experiment.params import PruneParams
from prune_nb.experiment.pruning import Experiment

ROOT = Path(__file__).resolve().parents[1]
LOCALHOST = "127.0.0.1"
LAB = [
    "--allow-root",
    "--no-browser",
    "--expose-app-in-browser",
    "--IdentityProvider.token=",
    "--ServerApp.password=",
    "--ServerApp.terminals_enabled=False",
    "--ServerApp.log_level=ERROR",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.news_url=None",
    "--LabApp.extension_manager=readonly",
]
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker": dict(windowingMode="none"),
    "@jupyterlab/apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False),
}
HOME = dict(
    HOME="",
    IPYTHONDIR="ipython",
    JUPYTER_CONFIG_DIR="config",
    JUPYTER_RUNTIME_DIR="runtime",
    JUPYTERLAB_SETTINGS_DIR="settings",
    JUPYTERLAB_WORKSPACES_DIR="workspaces",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {LOCALHOST}",
]
NO_BROWSER = (
    "NO BROWSER: the dashboards were NOT tested. Install Chromium or Chrome, or run "
    "`uv run playwright install chromium`."
)


def installed_browser() -> str | None:
    """Return the path of a Chromium or Chrome: the system's, or playwright's own."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    with sync_playwright() as p:
        own = p.chromium.executable_path
    return own if Path(own).exists() else None


def succeeds(*command: str) -> bool:
    """Run a command; return whether it was found, ended within ten minutes and did not fail."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def install_browser():
    """Install a browser: playwright's own, or Debian's where this process may."""
    if succeeds(sys.executable, "-m", "playwright", "install", "chromium"):
        return
    if hasattr(os, "geteuid") and os.geteuid() == 0 and succeeds("apt-get", "update", "-qq"):
        packages = ("chromium", "fonts-dejavu-core")
        succeeds("apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages)


@functools.cache
def chromium() -> str:
    """Return the path of a browser, installing one where there is none.

    Where none can be had, fail in CI; elsewhere skip the test with one loud line.
    """
    found = installed_browser()
    if found is None:
        install_browser()
        found = installed_browser()
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(NO_BROWSER, pytrace=False)
        pytest.skip(NO_BROWSER)
    return found


def workspace(folder: Path, notebooks: list[Path]) -> Path:
    """Make a project in `folder` with copies of `notebooks`; all that they write stays there."""
    (folder / "nbs").mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", folder)
    for notebook in notebooks:
        shutil.copy(notebook, folder / "nbs")
    for name, values in SETTINGS.items():
        path = folder / "home/settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    return folder


def small_run(folder: Path, method: str, ratio: float, name: str = "", **given) -> Experiment:
    """Run a real experiment of a few seconds in `folder/runs`, dense network included."""
    defaults = dict(of="macs", model="lenet", pretrain_epochs=2, epochs=3, samples=256)
    defaults |= dict(refit=False, round_to="1", runtime="eager")
    where = dict(runs_dir=str(folder / "runs"), run_name=name or f"{method}-{ratio}")
    params = PruneParams(method=method, ratio=ratio, **(defaults | where | given))
    experiment = Experiment(params.validated())
    experiment.baseline()
    experiment.prune()
    experiment.finetune()
    experiment.finish()
    return experiment


def environment(folder: Path) -> dict:
    """Return the environment of a server that keeps its settings in `folder/home`."""
    home = {name: str(folder / "home" / part) for name, part in HOME.items()}
    ours = dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", JUPYTER_PREFER_ENV_PATH="1")
    return os.environ | home | ours


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as s:
        s.bind((LOCALHOST, 0))
        return s.getsockname()[1]


def wait_for_server(server: subprocess.Popen, port: int, log: Path, seconds: int):
    """Return once the server listens; fail with its log where it ends before."""
    for _ in range(10 * seconds):
        with contextlib.suppress(OSError), socket.create_connection((LOCALHOST, port), 1):
            return
        assert server.poll() is None, log.read_text()
        time.sleep(0.1)


@contextlib.contextmanager
def serving(folder: Path, *command: str, seconds: int = 60) -> Iterator[str]:
    """Start a server for `folder`, yield its address, and end it afterwards."""
    port = free_port()
    log = folder / f"server-{port}.log"
    ip = f"--Voila.ip={LOCALHOST}" if "voila" in command else f"--ip={LOCALHOST}"
    line = [sys.executable, "-m", *command, ip, f"--port={port}"]
    with open(log, "w") as f:
        server = subprocess.Popen(line, cwd=folder, env=environment(folder), stdout=f, stderr=f)
    try:
        wait_for_server(server, port, log, seconds)
        yield f"http://{LOCALHOST}:{port}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def lab(folder: Path):
    """Serve `folder` by JupyterLab."""
    return serving(folder, "jupyterlab", *LAB, f"--ServerApp.root_dir={folder}")


def voila(folder: Path, notebook: str):
    """Serve a notebook of `folder` as a page."""
    return serving(folder, "voila", "--no-browser", str(folder / "nbs" / notebook))


@contextlib.contextmanager
def browsing() -> Iterator:
    """Yield a browser that can reach this machine and nothing else."""
    path = chromium()
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


RUN_ALL = """async seconds => {
    const done = window.jupyterapp.commands.execute('notebook:run-all-cells');
    const late = new Error('the cells have not ended');
    const limit = new Promise((_, fail) => setTimeout(() => fail(late), 1000 * seconds));
    await Promise.race([done, limit]);
}"""
RUN_PYTHON = """async code => {
    const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
    const request = kernel.requestExecute({ code, store_history: false });
    let text = "";
    request.onIOPub = message => {
        const kind = message.header.msg_type;
        if (kind === "stream") text += message.content.text;
        if (kind === "error") text += message.content.traceback.join("\\n");
    };
    await request.done;
    return text;
}"""
KERNEL_IS_READY = (
    "window.jupyterapp && window.jupyterapp.shell.currentWidget?.sessionContext?.isReady"
)
CHANGE_THEME = """name => {
    const theme = 'JupyterLab ' + name;
    return window.jupyterapp.commands.execute('apputils:change-theme', { theme });
}"""
LOCAL_ADDRESSES = (f"http://{LOCALHOST}:", f"ws://{LOCALHOST}:", "data:", "blob:", "about:")


class Seen:
    """A page, the errors on it, and the addresses that it asked for."""

    def __init__(self, browser, width: int = 1280, height: int = 1000):
        self.page = browser.new_page(viewport=dict(width=width, height=height))
        self.errors = []
        self.asked = []
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("console", self._note_console)
        self.page.on("request", lambda r: self.asked.append(r.url))

    def _note_console(self, message):
        if message.type == "error":
            self.errors.append(message.text)

    @property
    def strangers(self) -> list[str]:
        """Return the requests that left the machine."""
        return [url for url in self.asked if not url.startswith(LOCAL_ADDRESSES)]

    def open_in_lab(self, address: str, notebook: str):
        """Open a notebook alone in JupyterLab, without running it."""
        self.page.goto(f"{address}/doc/tree/nbs/{notebook}?reset")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        self.page.wait_for_function(KERNEL_IS_READY, timeout=60_000)
        self.page.evaluate("window.jupyterapp.shell.collapseLeft?.()")

    def run_all(self, timeout: int = 180):
        """Run all cells and wait for the last, at most `timeout` seconds."""
        self.page.evaluate(RUN_ALL, timeout)

    def python(self, code: str) -> str:
        """Return what `code` prints in the kernel of the notebook."""
        return self.page.evaluate(RUN_PYTHON, code).strip()

    def view(self, title: str):
        """Return the dashboard below the heading `title`."""
        cell = (
            "contains(@class, 'jp-MarkdownCell') or contains(@class, 'jp-MarkdownOutput') "
            "or self::body"
        )
        heading = f".//h2[starts-with(normalize-space(.), '{title}')]"
        dashboard = "contains(concat(' ', @class, ' '), ' prune-nb ')"
        path = f"xpath=//div[{cell}][{heading}]/following::div[{dashboard}][1]"
        return self.page.locator(path)

    def theme(self, name: str):
        """Switch JupyterLab to its `Light` or `Dark` theme."""
        self.page.evaluate(CHANGE_THEME, name)

    def shot(self, path: Path, element=None):
        """Save a picture of the page, or of an element of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        (element or self.page).screenshot(path=str(path))
