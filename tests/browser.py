"JupyterLab and voila in processes of their own, on copies of notebooks; and Debian's chromium, driven by playwright, which looks at them."

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from prune_nb.experiment.params import PruneParams
from prune_nb.experiment.pruning import Experiment

ROOT = Path(__file__).parents[1]
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


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
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


def bring_browser():
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
        bring_browser()
        found = installed_browser()
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(NO_BROWSER, pytrace=False)
        pytest.skip(NO_BROWSER)
    return found


def workspace(folder, notebooks) -> Path:
    "A project of its own in `folder`, with copies of `notebooks`: whatever is run, saved or trained there stays there."
    (folder / "nbs").mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", folder)
    for n in notebooks:
        shutil.copy(n, folder / "nbs")
    for name, values in SETTINGS.items():
        path = folder / "home/settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    return folder


def small_run(folder, method, ratio, name="", **given) -> Experiment:
    "A real experiment of a moment, in `folder/runs`, dense network included."
    e = Experiment(
        PruneParams(
            **dict(
                method=method,
                ratio=ratio,
                of="macs",
                model="lenet",
                pretrain_epochs=2,
                epochs=3,
                samples=256,
                runs_dir=str(folder / "runs"),
                run_name=name or f"{method}-{ratio}",
            )
            | given
        ).validated()
    )
    e.baseline(), e.prune(), e.finetune(), e.finish()
    return e


def environment(folder) -> dict:
    home = {
        k: str(folder / "home" / v)
        for k, v in dict(
            HOME="",
            IPYTHONDIR="ipython",
            JUPYTER_CONFIG_DIR="config",
            JUPYTER_RUNTIME_DIR="runtime",
            JUPYTERLAB_SETTINGS_DIR="settings",
            JUPYTERLAB_WORKSPACES_DIR="workspaces",
        ).items()
    }
    return (
        os.environ
        | home
        | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", JUPYTER_PREFER_ENV_PATH="1")
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def serving(folder, *command, seconds=60):
    "A server for `folder`; gives its address and ends it afterwards."
    port = free_port()
    with open(folder / f"server-{port}.log", "w") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                *command,
                "--ip=127.0.0.1" if "voila" not in command else "--Voila.ip=127.0.0.1",
                f"--port={port}",
            ],
            cwd=folder,
            env=environment(folder),
            stdout=log,
            stderr=log,
        )
    try:
        for _ in range(10 * seconds):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert server.poll() is None, Path(log.name).read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def lab(folder):
    return serving(folder, "jupyterlab", *LAB, f"--ServerApp.root_dir={folder}")


def voila(folder, notebook):
    return serving(folder, "voila", "--no-browser", str(folder / "nbs" / notebook))


@contextlib.contextmanager
def browsing():
    "A browser that finds nothing but this machine."
    path = chromium()
    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=path,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ],
        )
        yield browser
        browser.close()


class Seen:
    "A page, what went wrong on it, and whom it asked."

    def __init__(self, browser, width=1280, height=1000):
        self.page = browser.new_page(viewport=dict(width=width, height=height))
        self.errors, self.asked = [], []
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("request", lambda r: self.asked.append(r.url))

    @property
    def strangers(self) -> list:
        "Requests that leave the machine."
        return [
            u
            for u in self.asked
            if not u.startswith(
                ("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:", "about:")
            )
        ]

    def open_in_lab(self, address, notebook):
        "Open a notebook alone in JupyterLab, without running it."
        self.page.goto(f"{address}/doc/tree/nbs/{notebook}?reset")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        self.page.wait_for_function(
            "window.jupyterapp && window.jupyterapp.shell.currentWidget?.sessionContext?.isReady",
            timeout=60_000,
        )
        self.page.evaluate("window.jupyterapp.shell.collapseLeft?.()")

    def run_all(self, timeout=180):
        "Run all cells and wait for the last."
        self.page.evaluate(
            """async seconds => {
            const done = window.jupyterapp.commands.execute('notebook:run-all-cells');
            await Promise.race([done, new Promise((_, fail) => setTimeout(() => fail(new Error('the cells have not ended')), 1000 * seconds))]);
        }""",
            timeout,
        )

    def python(self, code) -> str:
        "What `code` prints in the kernel of the notebook."
        return self.page.evaluate(
            """async code => {
            const request = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({ code, store_history: false });
            let text = "";
            request.onIOPub = m => { text += m.header.msg_type === "stream" ? m.content.text : m.header.msg_type === "error" ? m.content.traceback.join("\\n") : ""; };
            await request.done;
            return text;
        }""",
            code,
        ).strip()

    def view(self, title):
        "The dashboard below the heading `title`."
        return self.page.locator(
            f"xpath=//div[contains(@class, 'jp-MarkdownCell') or contains(@class, 'jp-MarkdownOutput') or self::body][.//h2[starts-with(normalize-space(.), '{title}')]]/following::div[contains(concat(' ', @class, ' '), ' prune-nb ')][1]"
        )

    def theme(self, name):
        "Light or Dark."
        self.page.evaluate(
            "name => window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab ' + name })",
            name,
        )

    def shot(self, path, element=None):
        "A picture of the page, or of an element."
        path.parent.mkdir(parents=True, exist_ok=True)
        (element or self.page).screenshot(path=str(path))
