"""What the README shows is what runs."""

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_every_snippet_prints_the_result_shown_beneath_it():
    snippets = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == README.count("```python") > 0
    for code, shown in snippets:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        assert printed.getvalue() == shown


def test_every_file_that_the_readme_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links and all((Path(__file__).resolve().parents[1] / link).exists() for link in links)


def test_the_first_line_with_pytest_is_one_that_installs_and_then_tests():
    line = next(line for line in README.splitlines() if "-m pytest" in line)
    first, *_, last = line.split(" && ")
    assert (first, last) == ("python3 -m venv .venv", ".venv/bin/python -m pytest")


def test_no_table_has_more_than_six_columns():
    rows = [line for line in README.splitlines() if line.startswith("|")]
    assert rows and all(len(row.split("|")) - 2 <= 6 for row in rows)


def test_no_line_of_code_is_wider_than_a_screen():
    code = "".join(re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)).splitlines()
    pasted = [line for line in code if " && " in line]  # whole, for whoever copies one line
    assert len(pasted) == 2
    assert all(len(line) <= 90 for line in code if line not in pasted)
