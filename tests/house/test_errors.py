"""Promises of the error codes: the same in the code, the documentation and the tests, and never one too many."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

from halfbyte import errors
from halfbyte.errors import CODES, FAULTS_SHOWN, HalfbyteError
from halfbyte.train.interrupt import TrainInterrupted

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
SECTION = re.compile(r"^## (HB\d{3}) (.+)\n((?:(?!^#).*\n?)*)", re.MULTILINE)
SECTIONS = {code: (title, body) for code, title, body in SECTION.findall(PAGE)}
EXAMPLE = re.compile(r"^```\n(HB\d{3} (?s:.+?))^```$", re.MULTILINE)
CODE = re.compile(r"HB\d{3}")
FAMILY_IN_TREE = re.compile(r"[├└]── (\w+Error)\s+(HB\d)xx .*exit (\d+)")
# A message's fixed words that are long enough not to be found by chance.
TELLING_CHARACTERS = 8


def error_classes(trees: list[ast.Module]) -> dict[str, str]:
    """Each exception class of the package by name, with the family it belongs to."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    families = {cls.__name__: cls.family for cls in HalfbyteError.__subclasses__()}
    while new := {
        n: families[b] for n, of in bases.items() if n not in families for b in of if b in families
    }:
        families |= new
    return families


def codes_in(node: ast.expr) -> set[str]:
    """Codes a first argument can be: a constant, or either side of a choice."""
    choices = [node.body, node.orelse] if isinstance(node, ast.IfExp) else [node]
    return {c.value for c in choices if isinstance(c, ast.Constant) and CODE.fullmatch(str(c.value))}


def called(node: ast.AST) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def raised_codes(trees: list[ast.Module]) -> dict[str, set[str]]:
    """Code → families of the exceptions made with it, also through a function that is handed the code."""
    families = error_classes(trees)
    raised: defaultdict[str, set[str]] = defaultdict(set)
    for tree in trees:
        relays = {}
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            for node in ast.walk(function):
                if called(node) in families and isinstance(node.args[0], ast.Name):
                    relays[function.name] = families[called(node)]
        for node in ast.walk(tree):
            if called(node) in families:
                for code in codes_in(node.args[0]):
                    raised[code].add(families[called(node)])
            elif called(node) in relays:
                for code in set().union(*map(codes_in, node.args)):
                    raised[code].add(relays[called(node)])
    return raised


@pytest.fixture(scope="module")
def trees() -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]


def test_every_code_has_its_section_in_the_documentation() -> None:
    assert [(code, title) for code, (title, _) in SECTIONS.items()] == list(CODES.items())
    assert len(SECTION.findall(PAGE)) == len(SECTIONS), "a code has two sections"


@pytest.mark.parametrize("code", CODES)
def test_every_section_says_more_than_its_title(code: str) -> None:
    prose = re.sub(r"^```.*?^```", "", SECTIONS[code][1], flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"[.;:](?=\s)", prose)) >= 2, f"{code}: what it means, why it comes, what to do"


def test_codes_stand_in_order_under_their_family() -> None:
    assert list(CODES) == sorted(CODES)
    headings = re.findall(r"^#{1,2} (HB\d)(?:xx: |\d\d )", PAGE, re.MULTILINE)
    assert headings == sorted(headings)
    families = re.findall(r"^# (HB\d)xx: ", PAGE, re.MULTILINE)
    assert families == sorted({code[:3] for code in CODES})


def test_every_code_is_raised_and_every_raised_code_is_known(trees: list[ast.Module]) -> None:
    raised = raised_codes(trees)
    assert sorted(raised) == sorted(CODES)


def test_every_code_is_raised_by_its_own_family(trees: list[ast.Module]) -> None:
    strange = {code: of for code, of in raised_codes(trees).items() if of != {code[:3]}}
    assert strange == {}


def test_the_search_sees_every_way_a_code_is_raised() -> None:
    source = '''
class Late(DataError): pass
def _refuse(code, what):
    raise ModelError(code, what)
def f(x):
    """Raises HB999."""
    if x.code != "HB998":
        raise DataError("HB201", "HB202")
    raise ConfigError("HB101" if x else "HB102", "")
    _refuse("HB301", "")
    raise Late("HB203", "")
'''
    found = raised_codes([ast.parse(source)])
    assert {code: family for code, (family,) in found.items()} == {
        "HB101": "HB1",
        "HB102": "HB1",
        "HB201": "HB2",
        "HB203": "HB2",
        "HB301": "HB3",
    }


def test_no_text_speaks_of_a_code_that_does_not_exist() -> None:
    pages = [*SOURCES, *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    strange = {
        f"{path.relative_to(ROOT)}: {code}"
        for path in pages
        for code in CODE.findall(path.read_text(encoding="utf-8"))
        if code not in CODES
    }
    assert strange == set()


def test_every_code_is_triggered_by_a_test() -> None:
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__).resolve()]
    tried = set(CODE.findall("\n".join(path.read_text(encoding="utf-8") for path in tests)))
    assert set(CODES) - tried == set()


def test_families_and_exit_codes_are_those_of_the_tree() -> None:
    drawn = {name: (family, int(code)) for name, family, code in FAMILY_IN_TREE.findall(errors.__doc__ or "")}
    classes = {cls.__name__: (cls.family, cls.exit_code) for cls in errors.HalfbyteError.__subclasses__()}
    assert drawn == classes
    table = re.findall(r"^\| (HB\d)xx \| `(\w+)` \| .*\| (\d+)(?:, .*)? \|$", PAGE, re.MULTILINE)
    assert {name: (family, int(code)) for family, name, code in table} == classes
    assert TrainInterrupted.exit_code == 130
    assert "and 130 for HB503" in PAGE


def test_a_code_of_another_family_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="HB101 is no code of DataError"):
        errors.DataError("HB101", "")


def test_the_page_says_how_many_faults_are_spelled_out() -> None:
    assert f"the first {FAULTS_SHOWN} of them spelled out" in PAGE
    assert errors.listed(["a"] * (FAULTS_SHOWN + 1)).endswith("  - a\n  - ... and 1 more")


def messages(trees: list[ast.Module]) -> list[re.Pattern[str]]:
    """The package's texts as patterns, values standing for anything, where their own words are telling."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    with_values = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
    pieces = {id(part) for parts in with_values for part in parts}
    plain = [[node] for node in nodes if isinstance(node, ast.Constant) and id(node) not in pieces]
    patterns = set()
    for parts in (*with_values, *plain):
        texts = [p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else None for p in parts]
        own = "".join(text for text in texts if text)
        if len(own) >= TELLING_CHARACTERS and " " in own:
            patterns.add(".+?".join(re.escape(run) for run in runs_of_text(texts)))
    return [re.compile(pattern) for pattern in patterns]


def runs_of_text(texts: list[str | None]) -> list[str]:
    """Texts between values, those at the ends that are empty left out."""
    runs = [""]
    for text in texts:
        if text is None:
            runs.append("")
        else:
            runs[-1] += text
    return [run for run in runs if run]


def test_printed_examples_are_what_the_code_prints(trees: list[ast.Module]) -> None:
    patterns = messages(trees)
    examples = EXAMPLE.findall(PAGE)
    assert len(examples) > 10
    strange = []
    for example in examples:
        first, *rest = example.splitlines()
        code, (title, _) = first[:5], SECTIONS[first[:5]]
        assert first.startswith(f"{code} {title}: "), first
        said = [first.partition(": ")[2], *(line for line in rest if not line.startswith("  where: "))]
        strange += [
            f"{code}: {line}" for line in said if not any(pattern.search(line) for pattern in patterns)
        ]
    assert strange == []


def test_examples_stand_under_their_own_code() -> None:
    misplaced = [
        f"{example[:5]} under {code}"
        for code, (_, body) in SECTIONS.items()
        for example in EXAMPLE.findall(body)
        if example[:5] != code
    ]
    assert misplaced == []
