"""Hand the metadata of settings.ini to setuptools.

Runs in an isolated build, so with the standard library and setuptools only.
"""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("export", "openvino", "dashboard")}
dev = cfg["dev_requirements"].split()
for requirements in extras.values():
    dev += requirements

setup(
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    install_requires=cfg["requirements"].split(),
    extras_require=extras | {"dev": dev},
    packages=[*find_packages(include=["prune_nb*"]), "prune_nb.presets"],
    package_dir={"prune_nb.presets": "presets"},
    package_data={"prune_nb": ["py.typed"], "prune_nb.presets": ["*.toml"]},
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    entry_points={"nbdev": [f"{cfg['lib_name']} = {cfg['lib_path']}._modidx:d"]},
)
