"""What `make run` asks of pip, what the wheel carries, and which registries the pins name.

Nothing is downloaded: a stub answers for pip, so that a wheel on the machine's disk hides nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STUB = """#!/bin/sh
echo "$@" >> "$CALLS"
for allowed in $ALLOWED; do
  case "$* " in *"$allowed "*) exit 0;; esac
done
case "$*" in *" torch=="*) echo "ERROR: No matching distribution found" >&2; exit 1;; esac
"""
"""A Python whose pip has of PyTorch only what `ALLOWED` lists."""


def _constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}


VERSION = _constraints()["torch"]
CPU, PLAIN = f"torch=={VERSION}+cpu", f"torch=={VERSION}"


def _script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Checkout:
    """A copy of what `make` reads, with stubs for Python and for the machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("Makefile", "constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, root)
        shutil.copytree(ROOT / ".ci", root / ".ci")
        _script(root / ".venv" / "bin" / "python", STUB)
        _script(root / ".venv" / "bin" / "sensebatch", '#!/bin/sh\necho "ran $*"\n')
        # Only these programs: the machine may have an NVIDIA driver of its own.
        self.programs = root / "programs"
        self.programs.mkdir()
        for name in ("sh", "sed", "touch", "cat"):
            (self.programs / name).symlink_to(str(shutil.which(name)))
        _script(self.programs / "uname", "#!/bin/sh\necho Linux\n")

    def make(self, *args: str, allowed: str = "") -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": str(self.programs),
            "CALLS": str(self.root / "calls"),
            "ALLOWED": allowed,
        }
        command = [str(shutil.which("make")), "run", *args]
        return subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )

    @property
    def asked(self) -> list[str]:
        """What pip was asked of PyTorch, without the options that every call has."""
        calls = (self.root / "calls").read_text().splitlines()
        options = r"^-m pip install --quiet --quiet --constraint constraints.txt +"
        return [re.sub(options, "", call) for call in calls if " torch" in call]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def _from_pytorch(options: str = "") -> str:
    return f"--quiet --no-deps --retries 0 --timeout 10 --index-url {CPU_INDEX} {CPU}{options}"


def test_the_cpu_build_of_the_configured_indexes_is_taken_first(checkout: Checkout) -> None:
    ended = checkout.make(allowed=CPU)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert checkout.asked == [f"--quiet {CPU}"]
    assert "ran run manifests/catalog.yaml --redraw" in ended.stdout


def test_the_cpu_build_is_asked_of_pytorch_where_the_indexes_have_none(checkout: Checkout) -> None:
    ended = checkout.make(allowed=f"{CPU_INDEX}")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert checkout.asked == [f"--quiet {CPU}", _from_pytorch()]
    assert "GB" not in ended.stdout


def test_the_plain_build_is_taken_where_there_is_no_other_and_its_size_is_said(
    checkout: Checkout,
) -> None:
    ended = checkout.make(allowed=PLAIN)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert checkout.asked == [f"--quiet {CPU}", _from_pytorch(), PLAIN]
    (said,) = (line for line in ended.stdout.splitlines() if "GB" in line)
    assert "PyPI" in said


def test_where_pip_has_no_build_at_all_the_way_out_is_named(checkout: Checkout) -> None:
    ended = checkout.make()
    assert ended.returncode == 2
    assert checkout.asked[-1] == PLAIN
    assert "No matching distribution found" in ended.stderr
    assert "PIP_FLAGS=" in ended.stderr
    assert "ran run" not in ended.stdout


def test_a_machine_with_an_nvidia_driver_gets_the_plain_build(checkout: Checkout) -> None:
    _script(checkout.programs / "nvidia-smi", "#!/bin/sh\n")
    assert checkout.make(allowed=PLAIN).returncode == 0
    assert checkout.asked == [PLAIN]


def test_other_systems_get_the_plain_build_which_is_for_the_cpu_there(checkout: Checkout) -> None:
    _script(checkout.programs / "uname", "#!/bin/sh\necho Darwin\n")
    assert checkout.make(allowed=PLAIN).returncode == 0
    assert checkout.asked == [PLAIN]


def test_a_named_build_is_the_only_one_that_is_asked_for(checkout: Checkout) -> None:
    assert checkout.make("TORCH=torch==9.9", allowed="torch==9.9").returncode == 0
    assert checkout.asked == ["torch==9.9"]


def test_flags_of_the_user_reach_every_installation(checkout: Checkout) -> None:
    assert checkout.make("PIP_FLAGS=--proxy p", allowed=PLAIN).returncode == 0
    calls = (checkout.root / "calls").read_text().splitlines()
    assert len(calls) > len(checkout.asked) == 3
    assert all("--constraint constraints.txt --proxy p" in call for call in calls)


@pytest.mark.slow
def test_pip_itself_goes_through_all_three_without_a_network(tmp_path: Path) -> None:
    """An index that holds nothing, one that refuses, and no wheel folder of the machine."""
    pytest.importorskip("pip")
    environment = {name: value for name, value in os.environ.items() if "PIP_" not in name}
    pip = f"{sys.executable} -m pip install --ignore-installed --dry-run"
    environment |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP": f"{pip} --index-url {tmp_path.as_uri()}",
        "TORCH_INDEX": "http://127.0.0.1:9/whl/cpu",
    }
    ended = subprocess.run(
        ["sh", str(ROOT / ".ci/install_torch.sh"), VERSION],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    # Only the last one may complain: neither of the first two has to be there.
    assert ended.stderr.count("No matching distribution found") == 1
    assert f"No matching distribution found for {PLAIN}\n" in ended.stderr


def _built(folder: Path) -> Path:
    """Returns the wheel of a copy of the sources, after making sure that the copy is as it was."""
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("sensebatch", "manifests"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source)
    before = sorted(source.rglob("*"))
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    built = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True
    )
    assert sorted(source.rglob("*")) == before, "a build writes into its sources"
    return folder / built.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_wheel_carries_the_catalog_and_all_that_it_is_drawn_with(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(_built(tmp_path)) as wheel:
        wheel.extractall(installed)
    for folder in ("sensebatch", "manifests"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc" and path.stem != "sensenova-8b":
                below = path.relative_to(ROOT)
                place = below if folder == "sensebatch" else Path("sensebatch") / below
                assert (installed / place).read_bytes() == path.read_bytes()
    code = "from sensebatch.cli.demo import catalog; print(catalog())"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(installed / "sensebatch/manifests/catalog.yaml")


def test_pins_of_pip_and_uv_are_the_same_releases_of_pypi() -> None:
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    packages = [package for package in lock["package"] if "editable" not in package["source"]]
    assert {package["source"]["registry"] for package in packages} == {"https://pypi.org/simple"}
    files = [file for package in packages for file in package.get("wheels", [])]
    files += [package["sdist"] for package in packages if "sdist" in package]
    assert {file["url"].partition("/packages/")[0] for file in files} == {
        "https://files.pythonhosted.org"
    }
    locked = {package["name"]: package["version"] for package in packages}
    pinned = _constraints()
    assert {name: locked.get(name) for name in pinned} == pinned
