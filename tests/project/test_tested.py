"""`make test` notes the tree that passed as a whole, and `make tested` knows whether that is the one committed.

Run on a repository of two files, with programs in place of ruff, pyright and pytest that do nothing or fail.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = """#!/bin/sh
case "$0 $*" in {fails}) exit 1;; esac
{does}
"""
PROGRAMS = ("ruff", "pyright", "python")

pytestmark = pytest.mark.skipif(
    not (shutil.which("make") and shutil.which("git")), reason="needs make and git"
)


class Clone:
    """A repository with the Makefile, all of it committed, and an environment that is ready."""

    def __init__(self, root):
        self.root = root
        (root / ".ci").mkdir()
        shutil.copy(ROOT / ".ci" / "tested", root / ".ci")
        shutil.copy(ROOT / "Makefile", root)
        for name in ("setup.cfg", "setup.py", "pyproject.toml"):
            (root / name).touch()
        (root / ".gitignore").write_text(".venv/\n")
        (root / "code").write_text("1")
        (root / ".venv" / "bin").mkdir(parents=True)
        self.stub()
        for name in (".stamp-demo", ".stamp-dev"):
            (root / ".venv" / name).touch()
        self.git("init", "-q")
        self.commit()

    def stub(self, fails="nothing", does=""):
        """Puts the programs in place; `fails` is a shell pattern of the command lines that fail."""
        for name in PROGRAMS:
            path = self.root / ".venv" / "bin" / name
            path.write_text(STUB.format(fails=fails, does=does))
            path.chmod(0o755)

    def git(self, *arguments):
        who = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        subprocess.run(["git", *who, *arguments], cwd=self.root, env=self.environment(), check=True)

    def commit(self):
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "m")

    def environment(self, **more):
        # What a surrounding make or git tells the processes it starts is not for these.
        named = ("MAKE", "MFLAGS", "GIT_", "ARGS", "PYTEST_")
        return {name: value for name, value in os.environ.items() if not name.startswith(named)} | more

    def make(self, *arguments, **environment):
        done = subprocess.run(
            ["make", *arguments],
            cwd=self.root,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
        )
        return done.returncode == 0, done.stdout

    def tested(self):
        return self.make("tested")[0]


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def test_a_tree_that_passed_is_tested_until_another_is_committed(clone):
    assert not clone.tested()
    assert clone.make("test")[0]
    assert clone.tested()
    (clone.root / "code").write_text("2")
    clone.commit()
    passed, said = clone.make("tested")
    assert not passed
    assert "Run make test" in said
    # What was staged while it was tested may be committed afterwards.
    (clone.root / "code").write_text("3")
    clone.git("add", "code")
    assert clone.make("test")[0]
    assert not clone.tested()
    clone.commit()
    assert clone.tested()


@pytest.mark.parametrize(
    "part", ["*ruff*format*", "*pyright*", "*--ignore=tests/multi_device*", "*tests/multi_device"]
)
def test_a_part_that_fails_leaves_the_tree_untested(clone, part):
    clone.stub(fails=part)
    assert not clone.make("test")[0]
    assert not clone.tested()
    clone.make("test", "-i")
    assert not clone.tested()
    # A tree that passed once and then did not has to pass again.
    clone.stub()
    assert clone.make("test")[0]
    clone.stub(fails=part)
    assert not clone.make("test")[0]
    assert not clone.tested()


@pytest.mark.parametrize("given", ["ARGS=-k ema", "RUFF_PATHS=code", "PYTEST=true"])
def test_a_run_in_part_is_not_noted(clone, given):
    passed, said = clone.make("test", given)
    assert passed
    assert "not noted" in said
    assert not clone.tested()


@pytest.mark.parametrize("name", ["ARGS", "PYTEST_ADDOPTS"])
def test_nor_is_one_that_the_environment_restricts(clone, name):
    assert clone.make("test", **{name: "-x"})[0]
    assert not clone.tested()


@pytest.mark.parametrize("name", ["code", "new"])
def test_a_tree_that_git_does_not_hold_is_not_noted(clone, name):
    (clone.root / name).write_text("2")
    passed, said = clone.make("test")
    assert passed
    assert "not noted" in said
    # Neither as what is committed, nor as what it becomes.
    assert not clone.tested()
    clone.commit()
    assert not clone.tested()


def test_a_tree_that_changes_while_it_is_tested_is_not_noted(clone):
    clone.stub(does="echo 2 > code && git add code")
    passed, said = clone.make("test")
    assert passed
    assert "while the tests ran" in said
    clone.commit()
    assert not clone.tested()


def test_without_git_the_tests_pass_all_the_same(clone):
    shutil.rmtree(clone.root / ".git")
    passed, said = clone.make("test")
    assert passed
    assert "not noted" in said
    assert not clone.tested()
