"Package metadata comes from settings.ini, which nbdev reads too: one place to state a requirement."
from configparser import ConfigParser
from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=["="], interpolation=None)
cfg.read("settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
EXTRAS = ("dev", "dicom", "weights", "clinical", "teachers")

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], author=cfg["author"],
    license="Apache-2.0", python_requires=">=" + cfg["min_python"], packages=find_packages(include=["medvlp*"]),
    package_data={"medvlp.data": ["*.yaml"], "medvlp.generation": ["*.yaml"]},
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in EXTRAS},
)
