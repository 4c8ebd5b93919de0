import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONDA = yaml.safe_load((ROOT / "env.yml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
CONDA_SPEC = re.compile(r"[a-z0-9_.-]+((==?|>=|<=|!=|<|>)\d[\w.*]*(,(==|>=|<=|!=|<|>)\d[\w.*]*)*)?")

PLATFORMS = [
    {"python_version": python, "platform_system": system, "sys_platform": name, "platform_machine": machine}
    for python in ("3.11", "3.12")
    for system, name, machine in (("Linux", "linux", "x86_64"), ("Darwin", "darwin", "arm64"))
]


def requirements() -> list[Requirement]:
    project = PROJECT["project"]
    return [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["test"]]


def locked() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    table = {canonicalize_name(pin.name): pin for pin in pins}
    assert len(table) == len(pins), "a package is locked twice"
    return table


def version(pin: Requirement) -> str:
    (clause,) = pin.specifier
    assert clause.operator == "==" and "*" not in clause.version, pin
    return clause.version


def applies(requirement: Requirement, platform: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(platform)


def conda_parts() -> tuple[list[str], list[str]]:
    plain = [part for part in CONDA["dependencies"] if isinstance(part, str)]
    (nested,) = [part for part in CONDA["dependencies"] if not isinstance(part, str)]
    assert set(nested) == {"pip"}
    return plain, nested["pip"]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):(?!=)", MAKEFILE, re.M))


def recipe(target: str) -> str:
    return re.search(rf"^{target}:(?!=).*\n((?:\t.*\n|(?:ifeq|endif).*\n)*)", MAKEFILE, re.M)[1]


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda p: f"{p['python_version']}-{p['sys_platform']}")
def test_lock_satisfies_every_dependency(platform):
    pins = locked()
    for requirement in requirements():
        if applies(requirement, platform):
            pin = pins[canonicalize_name(requirement.name)]
            assert applies(pin, platform), f"{pin} is not locked for {platform}"
            assert requirement.specifier.contains(version(pin)), f"{pin} is outside {requirement}"


def test_lock_names_exact_versions_only():
    pins = locked()
    assert not {"kvlib", "pip"} & set(pins)
    for pin in pins.values():
        assert version(pin) and pin.url is None


def test_triton_is_locked_to_what_torch_asks_for_and_free_elsewhere():
    pins = locked()
    assert (version(pins["torch"]), version(pins["triton"])) == ("2.13.0", "3.7.1")
    # A CPU build of torch asks for none.
    asked = [Requirement(text) for text in importlib.metadata.requires("torch")]
    if importlib.metadata.version("torch").split("+")[0] == version(pins["torch"]):
        for requirement in asked:
            if requirement.name == "triton":
                assert requirement.specifier.contains(version(pins["triton"]))
    assert [str(r) for r in requirements() if r.name == "triton"] == ['triton; platform_system == "Linux"']


def test_ranges_have_both_ends():
    for requirement in requirements():
        if requirement.name not in ("triton", "packaging"):
            operators = {clause.operator for clause in requirement.specifier}
            assert operators == {">=", "<"}, requirement


def test_env_yml_structure():
    assert set(CONDA) == {"name", "channels", "dependencies"}
    assert CONDA["name"] == "kvlib"
    assert CONDA["channels"] == ["conda-forge", "nodefaults"]
    plain, _ = conda_parts()
    assert plain == ["python=3.12", "pip"]


def test_env_yml_conda_specs_parse():
    plain, _ = conda_parts()
    try:
        from rattler import MatchSpec
    except ImportError:
        for spec in plain:
            assert CONDA_SPEC.fullmatch(spec), spec
    else:
        for spec in plain:
            MatchSpec(spec, strict=True)


@pytest.mark.parametrize("bad", ["python=>3.12", "jupyterlab >=4.4<5", "torch==", "pip install foo"])
def test_the_check_of_conda_specs_rejects(bad):
    assert not CONDA_SPEC.fullmatch(bad)


def test_env_yml_pip_part_is_pyproject():
    _, pip = conda_parts()
    assert pip[-1] == "-e .[test]"
    assert [Requirement(line) for line in pip[:-1]] == [
        Requirement(text) for text in PROJECT["project"]["dependencies"]
    ]


def test_env_yml_python_is_supported():
    (python,) = [part for part in conda_parts()[0] if part.startswith("python=")]
    supported = Requirement(f"python{PROJECT['project']['requires-python']}").specifier
    assert supported.contains(f"{python.removeprefix('python=')}.0")
    assert supported.contains("3.11.0") and not supported.contains("3.13.0")


def test_packages_list_is_the_tree():
    setuptools = PROJECT["tool"]["setuptools"]
    assert setuptools["package-dir"] == {"kvlib.kernels": "kernels"}
    found = {p.parent.relative_to(ROOT) for p in (ROOT / "kvlib").rglob("__init__.py")}
    found |= {"kvlib" / p.parent.relative_to(ROOT) for p in (ROOT / "kernels").rglob("__init__.py")}
    assert set(setuptools["packages"]) == {".".join(path.parts) for path in found}


def test_kvlib_and_kernels_import_from_any_folder(tmp_path):
    code = "import kvlib, kvlib.kernels as k, sys; print(kvlib.__file__, k.__file__, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [Path(line) for line in done.stdout.splitlines()] == [
        ROOT / "kvlib" / "__init__.py",
        ROOT / "kernels" / "__init__.py",
    ]


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"] == "Apache-2.0"
    for author in citation["authors"]:
        assert set(author) & {"name", "family-names"}, author


def test_licence_is_apache():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_help_lists_every_target():
    done = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("make ")}
    assert listed == targets()
    phony = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.M)[1]
    assert set(phony.split()) == targets()


def test_make_targets_run_the_right_commands():
    assert 'STUDY = "$(PY)" -m kvlib.study\n' in MAKEFILE
    assert "$(STUDY) charts --grid notebooks/tiny.yml --seed $(SEED)" in recipe("charts")
    assert "$(STUDY) charts $(OF)" in recipe("sweep")
    for verb in ("plan", "status", "report", "verify"):
        assert f"$(STUDY) {verb} $(OF)" in recipe(verb)
    assert "-m pytest" in recipe("test")
    assert "-m kvlib.train reasoner" in recipe("tiny-model")
    assert "-m kvlib.train predictor" in recipe("predictor")


def test_clean_keeps_results_and_environment():
    for kept in ("results", "runs", "figures", ".venv"):
        assert kept not in recipe("clean")


def test_readme_and_ci_agree_on_the_commands():
    readme = (ROOT / "README.md").read_text()
    script = ROOT / ".ci" / "run"
    assert "make test" in readme and "make charts" in readme
    assert script.stat().st_mode & 0o111
    commands = [line for line in script.read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make lint", "make test"]


@pytest.mark.slow
def test_env_yml_pip_part_resolves():
    _, pip = conda_parts()
    # torch alone is gigabytes on an index that serves no metadata, so the installed one stands for it.
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", *pip[:-1]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
