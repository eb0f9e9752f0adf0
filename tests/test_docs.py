"""README.md and docs/ agree with the scripts: defaults, flags, links and files."""

import dataclasses
import importlib
import re

import pytest
import tiny

SCRIPTS = ("dgpo", "hdpo", "dpl", "eps_dpo", "dpo_pg")
PAGES = [path for path in (tiny.ROOT / "README.md", *sorted((tiny.ROOT / "docs").glob("*.md"))) if path.exists()]
BESIDE = re.compile(r"`(?:--)?([a-z][a-z0-9_-]*)`")  # a field, as a table's first column names it
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9_-]*)")


def fields(script):
    """Name -> default, read from Args of the script."""
    args = importlib.import_module(script).Args
    missing = dataclasses.MISSING
    return {f.name: f.default_factory() if f.default is missing and f.default_factory is not missing else f.default
            for f in dataclasses.fields(args)}  # fmt: skip


def flags(script):
    """As tyro takes them."""
    return {name for field in fields(script) for name in (field.replace("_", "-"), "no-" + field.replace("_", "-"))}


def same(shown, default):
    """Whether a table's cell shows this default; numbers as numbers, so 5,000 is 5000 and 5e-7 is 5e-07."""
    shown = shown.replace("`", "").replace("**", "").replace('"', "").strip()
    if isinstance(default, bool):
        return shown.lower() in {str(default).lower(), "on" if default else "off", "yes" if default else "no"}
    if isinstance(default, int | float):
        number = re.match(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?", shown)
        return bool(number) and float(number[0].replace(",", "")) == float(default)
    if isinstance(default, str):
        return default in shown.split() + [shown] if default else shown in ("", "-", "empty", "none", "''")
    return True


def tables(text):
    """Rows of the text's tables as lists of cells, each with its table's header."""
    header = None
    for line in text.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if header is None:
            header = [cell.lower() for cell in cells]
        elif not set(line) <= set("|-: "):
            yield header, cells


def shown_defaults(page):
    """(field, cell) of all tables with a column of defaults; a row may name several fields as `a`, `b`."""
    for header, cells in tables(page.read_text()):
        column = next((i for i, name in enumerate(header) if "default" in name), None)
        names = BESIDE.findall(cells[0])
        if column and names and len(cells) > column:
            values = [cells[column]] if len(names) == 1 else [x.strip() for x in cells[column].split(",")]
            yield from zip(names, values) if len(names) == len(values) else ()


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults(script):
    """Every default that docs/NAME.md shows in a table is the script's."""
    page = tiny.ROOT / "docs" / f"{script}.md"
    if not page.exists():
        pytest.skip(f"no docs/{script}.md")
    there, seen = fields(script), 0
    for name, cell in shown_defaults(page):
        name = name.replace("-", "_")
        assert name in there, f"docs/{script}.md: {script}.py has no --{name}"
        assert same(cell, there[name]), f"docs/{script}.md: {name} is {there[name]!r}, not {cell}"
        seen += 1
    assert seen, f"docs/{script}.md: no table with a column of defaults"


def flags_with_a_result(script):
    """Fields of Args above `# The run`: what the result of a run depends on."""
    args = (tiny.ROOT / f"{script}.py").read_text().split("class Args:\n")[1]
    return re.findall(r"^    (\w+): .+ = ", args[: args.index("    # The run\n")], re.MULTILINE)


def check_papers_words(script, text):
    """A row for each of them, with its default, and where the paper has no word on it with what we took."""
    parts = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    rows = [cells for part in ("All five", f"{script}.py") for _, cells in tables(parts[part])]
    named, there = [BESIDE.findall(cells[0])[0].replace("-", "_") for cells in rows], fields(script)
    assert sorted(named) == sorted(flags_with_a_result(script)), f"{script}.py: flags and rows"
    for name, (_, default, said, where, taken) in zip(named, rows):
        assert same(default, there[name]), f"{script}.py: {name} is {there[name]!r}, not {default}"
        assert (said == "-") == (where == "-"), f"{script}.py: {name}: what the paper says, and where"
        assert said != "-" or taken, f"{script}.py: {name}: the paper is silent, so what is it from?"


WORDS = tiny.ROOT / "docs" / "defaults.md"


@pytest.mark.parametrize("script", SCRIPTS)
def test_papers_words(script):
    check_papers_words(script, WORDS.read_text())


@pytest.mark.parametrize(
    "row, changed",
    [
        ("| `--lr` | 3e-7 |", "| `--lr` | 5e-7 |"),
        ("| `--step-epsilon` | 0 |", "| `--epsilon-step` | 0 |"),
        ("| `--train-split` | train | - | - | the authors' configuration |\n", ""),
        ("| `--train-split` | train | - | - | the authors' configuration |", "| `--train-split` | train | - | - | |"),
        ("| `--lora-dropout` | 0 | - | - | no adapters |", "| `--lora-dropout` | 0 | - | App. B.1 | no adapters |"),
    ],
)
def test_other_words_are_seen(row, changed):
    before, section, after = WORDS.read_text().partition("\n## eps_dpo.py\n")
    assert row in after
    with pytest.raises(AssertionError, match=r"eps_dpo\.py: "):
        check_papers_words("eps_dpo", before + section + after.replace(row, changed, 1))


def commands(text):
    """(script, flags) of every command in the text, continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        found = re.search(r"\b(dgpo|hdpo|dpl|eps_dpo|dpo_pg|eval_passk)\.py\b(.*)", line)
        if found and re.search(r"\b(python|accelerate launch|torchrun)\b.*" + found[1], line):
            yield found[1], FLAG.findall(re.split(r"[`#|;&]", found[2])[0])


def files():
    return [*PAGES, *(tiny.ROOT / f"{name}.py" for name in SCRIPTS)]


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_flags_of_commands(path):
    """Every flag of every command line in a page or a script's docstring."""
    for script, used in commands(path.read_text()):
        for flag in used:
            assert flag.replace("_", "-") in flags(script) | {"help"}, f"{path.name}: {script}.py has no --{flag}"


ELSEWHERE = {"config-file", "num-processes", "nproc-per-node", "standalone", "index-url", "extra-index-url", "help",
             "num-machines", "machine-rank", "main-process-ip", "main-process-port", "cpu", "nnodes"}  # fmt: skip


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_flags_in_text(path):
    """Every `--flag` in the text of a script's page is its own or eval_passk's; in the README, any script's."""
    if path.stem not in (*SCRIPTS, "eval_passk", "README"):
        pytest.skip("no script's page")
    named = [s for s in SCRIPTS if path.stem == "README" or s == path.stem]
    known = set().union(*(flags(script) for script in (*named, "eval_passk"))) | ELSEWHERE
    for line in path.read_text().splitlines():
        others = set().union(*(flags(s) for s in SCRIPTS if re.search(rf"\b{s}\.(py|md)\b", line)))
        for code in re.findall(r"`([^`]+)`", line):
            for flag in FLAG.findall(code):
                assert flag.replace("_", "-") in known | others, f"{path.name}: who has --{flag}? {line.strip()[:80]}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_files(path):
    """Relative links lead to files; files named with a folder of this repo, and its scripts, exist."""
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|mailto:|#", target):
            assert (path.parent / target.split("#")[0]).exists(), f"{path.name} links to {target}"
    folders = "grading|toy|docs|configs|tests|benchmarks|experiments"
    for name in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w|\w+\.py)\b", text):
        made = name.startswith("benchmarks/results") or not (tiny.ROOT / name.split("/")[0]).exists()
        assert made and "/" in name or (tiny.ROOT / name).exists(), f"{path.name} names {name}"


def test_same():
    """The comparison itself: numbers in any notation, text whole, and differences are seen."""
    assert same("`5e-7`", 5e-07) and same("5,000", 5000) and same("0.1 (10%)", 0.1) and same("`test`", "test")
    assert not same("5e-6", 5e-7) and not same("512", 1024) and not same("test", "train") and not same("on", False)


def test_sizes_in_the_readme():
    """As `wc -l` counts them."""
    text = (tiny.ROOT / "README.md").read_text().partition("`wc -l`:")[2].partition("\n")[0]
    counts = {name: int(count) for name, count in re.findall(r"`(\w+\.py)` (\d+)", text)}
    assert len(counts) == 8
    assert counts == {name: (tiny.ROOT / name).read_text().count("\n") for name in counts}
