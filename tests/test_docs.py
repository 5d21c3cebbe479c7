"""Every command that README.md and the configs' headers show runs, in a copy of the repository, cut short."""

import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
from pydoc_data.topics import topics

import pytest
from made_up import write_data

ROOT = pathlib.Path(__file__).resolve().parent.parent
INSTALL = re.compile(r"^python3 -m venv \.venv && \. \.venv/bin/activate && pip install -e (\S+) && ")
README = re.findall(r"```sh\n(.*?)\n```", (ROOT / "README.md").read_text(encoding="utf8"), re.DOTALL)
SNIPPETS = re.findall(r"```python\n(.*?)\n```", (ROOT / "README.md").read_text(encoding="utf8"), re.DOTALL)
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
BERT = "sentence-transformers/all-MiniLM-L6-v2"


def header(file: pathlib.Path) -> dict[str, str]:
    lines = [line for line in file.read_text(encoding="utf8").splitlines() if line.startswith("#")]
    return dict(m.groups() for line in lines if (m := re.match(r"#\s+(command|machine|time|score):\s+(.+)", line)))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what a clone would hold, with small texts to train on, made-up data sets, and a small BERT where the hub's
    is named."""
    place = tmp_path_factory.mktemp("clone") / "jaxlm"
    shutil.copytree(
        ROOT, place, ignore=shutil.ignore_patterns(".git", "runs", "exported", ".venv", "__pycache__", "*.egg-info", ".*_cache")
    )
    (place / "my-texts").mkdir()
    for name, text in topics.items():
        (place / "my-texts" / f"{name.replace('/', '-')}.txt").write_text(text, encoding="utf8")
    (place / "input.txt").write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 200)
    write_data(place / "made-up")
    shutil.copy(place / "made-up" / "sentiment-sst2" / "train.tsv", place / "my.tsv")
    small = "--model.width 32 --model.layers 1 --model.positions 512"
    for command in (
        "python benchmarks/prepare.py",
        f"python train.py configs/pretrain-masked.yaml --name bert {small}",
        f"jaxlm export runs/bert {BERT}",
    ):
        done = run(command, place)
        assert done.returncode == 0, done.stderr[-2000:]
    return place


def run(command: str, clone: pathlib.Path) -> subprocess.CompletedProcess:
    """The command as typed, but already installed, two steps of training and no tests run by a test."""
    command = INSTALL.sub("", command)
    if "train.py" in command:
        command += " --train.steps 2"
    if command == "pytest":
        command += " --collect-only -q"
    bin_folder = pathlib.Path(sys.executable).parent
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTEST"))}
    env |= {
        "PATH": f"{bin_folder}:{env['PATH']}", "PYTHONPATH": str(clone), "JAXLM_CACHE": str(clone / "cache"),
        "JAX_PLATFORMS": "cpu", "JAXLM_DATA": str(clone / "made-up"),
    }  # fmt: skip
    if command.startswith("jaxlm serve"):
        return serve(command, clone, env)
    return subprocess.run(command, shell=True, cwd=clone, env=env, capture_output=True, text=True, timeout=400)


def serve(command: str, clone: pathlib.Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """A server that is started, asked as README's snippet asks it, and told to stop."""
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command.split(), cwd=clone, env=env, **pipe)
    listens = any("http://" in line for line in iter(process.stdout.readline, ""))
    asked = [subprocess.run([sys.executable, "-c", code], cwd=clone, env=env, timeout=300, **pipe) for code in SNIPPETS if listens]
    process.terminate()
    out, err = process.communicate(timeout=60)
    failed = [done.stderr for done in asked if done.returncode or not done.stdout.strip()]
    return subprocess.CompletedProcess(command, process.returncode or len(failed), out, err + "".join(failed))


@pytest.mark.slow
def test_every_readme_command_runs_in_order(clone):
    assert len(README) >= 8 and sum(bool(INSTALL.match(command)) for command in README) == 2
    for command in README:
        assert "\n" not in command, f"one line a command: {command}"
        done = run(command, clone)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_the_commands_on_parallelism_run(clone):
    """The last two together: they are two processes of one run."""
    text = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf8")
    *alone, first, second = re.findall(r"```sh\n(.*?)\n```", text, re.DOTALL)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        together = list(pool.map(lambda command: run(command, clone), (first, second)))
    for command, done in [*((command, run(command, clone)) for command in alone), *zip((first, second), together, strict=True)]:
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "devices: 2 × cpu of 2 processes (data 2)" in together[0].stdout
    assert not [line for line in together[1].stdout.splitlines() if not line.startswith("[Gloo]")]


@pytest.mark.slow
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_headers_command_starts(file, clone):
    if "runs/tiny" in file.read_text(encoding="utf8") and not (clone / "runs" / "tiny").is_dir():
        assert run("python train.py", clone).returncode == 0
    done = run(header(file)["command"] + f" --name header-{file.stem}", clone)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (clone / "runs" / f"header-{file.stem}" / "report.html").is_file()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_headers_say_command_machine_time_and_score(file):
    assert set(header(file)) == {"command", "machine", "time", "score"}
    command = header(file)["command"]
    assert command == "python train.py" if file.stem == "tiny" else command.startswith(f"python train.py configs/{file.name}")


def test_readme_installs_only_what_pyproject_offers():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / "README.md").read_text(encoding="utf8")
    for named in re.findall(r"'\.\[([\w,]+)\]'", text):
        assert set(named.split(",")) <= set(extras)


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_shown_diff_is_what_stands_in_the_code():
    text = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf8")
    (shown,) = re.findall(r"```diff\n(.*?)\n```", text, re.DOTALL)
    source = ""
    for line in shown.splitlines():
        if line.startswith("--- "):
            source = (ROOT / line[4:]).read_text(encoding="utf8")
        elif line.startswith("+"):
            assert line[1:] in source.splitlines(), line
        else:
            assert line[1:] not in source.splitlines(), line
