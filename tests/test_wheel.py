"""What a wheel holds."""

import subprocess
import zipfile
from pathlib import Path

import hatchling.build
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ptq", "sparsity", "calibration", "cli")


def test_a_wheel_has_every_file_of_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / hatchling.build.build_wheel(str(tmp_path))) as wheel:
        held = set(wheel.namelist())
    listed = subprocess.run(["git", "ls-files", *PACKAGES], capture_output=True, text=True, check=False).stdout.split()
    kept = listed or [str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    data = {"ptq/formats/readers.json", "ptq/report/report.html.j2", "sparsity/kernels/int4.cpp", "ptq/py.typed"}
    assert {*kept, *data, "calibration/demo/model.safetensors", "calibration/demo/test.txt"} <= held
