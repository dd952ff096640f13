"""What a manifest says about how it was made."""

import shutil
import subprocess

import pytest

from memfree.folders import manifest


def git(folder, *words):
    """Run git in a folder with an identity of its own; what it prints."""
    done = subprocess.run(
        ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with one commit."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "project"
    root.mkdir()
    git(root, "init", "-q")
    git(root, "commit", "-q", "--allow-empty", "-m", "one")
    return root


def commit_of(monkeypatch, package):
    """The recorded commit if the package lay in the folder ``package``."""
    monkeypatch.setattr(manifest, "__file__", str(package / "folders" / "manifest.py"))
    return manifest.provenance()["git_commit"]


@pytest.mark.parametrize(
    ("place", "project", "is_recorded"),
    [
        (".venv/lib/python3/site-packages/memfree", "memfree", False),
        ("src/memfree", "somebody", False),
        ("src/memfree", None, False),
        ("third_party/src/memfree", "memfree", False),
        ("src/memfree", "memfree", True),
    ],
)
def test_the_commit_is_that_of_memfrees_own_checkout(
    repository, monkeypatch, place, project, is_recorded
):
    package = repository / place
    (package / "folders").mkdir(parents=True)
    if project is not None:
        (repository / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n')
    expected = git(repository, "rev-parse", "HEAD") if is_recorded else None
    assert commit_of(monkeypatch, package) == expected


def test_the_environment_names_no_other_repository(repository, tmp_path, monkeypatch):
    """Git sets GIT_DIR for its hooks, and whatever runs in one inherits it."""
    package = tmp_path / "elsewhere" / "src" / "memfree"
    (package / "folders").mkdir(parents=True)
    (tmp_path / "elsewhere" / "pyproject.toml").write_text('[project]\nname = "memfree"\n')
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "elsewhere"))
    assert commit_of(monkeypatch, package) is None
