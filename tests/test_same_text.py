"""The five scripts differ where their algorithms do, and nowhere else: outside the ALGO blocks all is one text."""

import ast
import difflib
import re
import sys

import pytest
import tiny

SCRIPTS = ("dgpo", "hdpo", "dpl", "eps_dpo", "dpo_pg")
BLOCK = re.compile(r"^ *# ALGO: begin\n(.*?)^ *# ALGO: end\n", re.DOTALL | re.MULTILINE)
TEXTS = {name: (tiny.ROOT / f"{name}.py").read_text() for name in SCRIPTS}


FIELD = re.compile(r"^    (\w+): (.+?) = (.+?)  # (.+)$")


def args_fields(text):
    """(name, type, default, comment) of the fields of Args, and the lines that they take."""
    body = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == "Args").body
    fields, lines = [], {}
    for field in body:
        found = FIELD.match(text.splitlines()[field.lineno - 1])
        assert isinstance(field, ast.AnnAssign) and found, f"no comment beside {ast.unparse(field)}"
        name, kind, default, comment = found.groups()
        fields.append((name, kind, ast.literal_eval(default), comment))
        lines[field.lineno] = f"    {name}: {kind} = ..."
    return fields, lines


def imports(text):
    """What is imported, as module or module.name."""
    names = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def skeleton(text):
    """The text without ALGO blocks, module docstring, imports, and the defaults and comments of Args."""
    tree = ast.parse(text)
    replaced = args_fields(text)[1]
    for node in [tree.body[0], *(n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom))]:
        replaced |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), None)
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = replaced.get(number, line)
        if line is not None:
            lines.append(f"{line}\n")
    return BLOCK.sub("# ALGO\n", "".join(lines))


def difference(one, other):
    return "".join(difflib.unified_diff(one.splitlines(True), other.splitlines(True), n=0))


def blocks(text):
    return [match.group(1) for match in BLOCK.finditer(text)]


def block_with(text, part):
    (found,) = [block for block in blocks(text) if part in block]
    return found


def check(texts):
    """Raises AssertionError where a script's text differs outside what is the algorithm's."""
    for name, text in texts.items():
        assert text.count("# ALGO: begin\n") == text.count("# ALGO: end\n") == len(blocks(text)), name
        off = difference(skeleton(texts["hdpo"]).replace("# ALGO\n", ""), skeleton(text).replace("# ALGO\n", ""))
        assert not re.sub(r"^(---|\+\+\+|@@).*\n|^[+-]\s*\n", "", off, flags=re.MULTILINE), (
            f"hdpo.py, {name}.py:\n{off}"
        )
    loops = {name: block_with(texts[name], "in enumerate(plan)") for name in ("hdpo", "dpl", "eps_dpo", "dgpo")}
    for name, loop in loops.items():
        assert loop == loops["hdpo"], f"hdpo.py, {name}.py:\n{difference(loops['hdpo'], loop)}"


def test_same_text():
    check(TEXTS)


@pytest.mark.parametrize(
    "line, changed",
    [
        ("        optimizer.zero_grad()\n        schedule", "        schedule"),
        ("                (losses.sum() * weight).backward()\n", "                losses.sum().backward()\n"),
        ("manual_seed(args.seed + epoch)", "manual_seed(epoch)"),
        ("    lr: float =", "    lr: int ="),
        ("    # Optimisation\n", "    # Optimization\n"),
        ("        dropout.train()\n", ""),
        ('        shutil.rmtree(folder / "model", ignore_errors=True)\n', ""),
    ],
    ids=range(7),
)
@pytest.mark.parametrize("script", ["dgpo", "dpl", "eps_dpo"])
def test_a_changed_line_is_found(script, line, changed):
    """One line of one script changed, outside ALGO or in the loop that four of them share."""
    assert line in TEXTS[script]
    with pytest.raises(AssertionError, match=script):
        check({**TEXTS, script: TEXTS[script].replace(line, changed, 1)})


def test_defaults_and_comments_may_differ():
    check({**TEXTS, "dpl": re.sub(r"lr: float = .*", "lr: float = 7.0  # Why not", TEXTS["dpl"])})


@pytest.mark.parametrize("script", SCRIPTS)
def test_args_fields(script):
    """Outside ALGO: the same names and types in the same order in all scripts; every field has a comment."""

    def shared(text):
        algo = [f for block in blocks(text) for f in re.findall(r"^    (\w+): .* = .*$", block, re.MULTILINE)]
        return [field[:2] for field in args_fields(text)[0] if field[0] not in algo]

    assert shared(TEXTS[script]) == shared(TEXTS["dgpo"])
    assert all(text.strip() for *_, text in args_fields(TEXTS[script])[0])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_field_is_read(script):
    for name, *_ in args_fields(TEXTS[script])[0]:
        assert re.search(rf"\bargs\.{name}\b", TEXTS[script]), f"{script}.py: args.{name} is never read"


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports(script):
    """Libraries and common only; what other scripts do not import is used in ALGO lines, or they would differ."""
    installed = sys.stdlib_module_names | {"torch", "tyro", "accelerate", "peft", "tqdm", "transformers", "common"}
    installed |= {"look"}
    assert {name.split(".")[0] for name in imports(TEXTS[script])} <= installed
    shared = set.intersection(*(imports(text) for text in TEXTS.values()))
    algo = "".join(blocks(TEXTS[script]))
    for name in imports(TEXTS[script]) - shared:
        assert re.search(rf"\b{name.split('.')[-1]}\b", algo), f"{script}.py imports {name}"


def test_what_is_shared_imports_no_script():
    for name, allowed in {"common": {"preferences"}, "preferences": set(), "look": {"common"}}.items():
        names = {name.split(".")[0] for name in imports((tiny.ROOT / f"{name}.py").read_text())}
        assert names & {*SCRIPTS, "eval_passk", "common", "preferences", "look"} == allowed


def taken_from_common(text):
    """Names of common.py that a script uses."""
    imported = {name.removeprefix("common.") for name in imports(text) if name.startswith("common.")}
    return imported | set(re.findall(r"\bcommon\.(\w+)", text)) - {"py"}


def test_how_small_it_is():
    """Self-contained scripts, what they share small: lines, lines of a function, and what crosses between the two."""
    shared = [(tiny.ROOT / name).read_text() for name in ("common.py", "preferences.py", "look.py")]
    assert all(text.count("\n") <= most for text, most in zip(shared, (400, 430, 120)))
    assert not any(re.search(r"\bargs\b", text) for text in shared)
    assert TEXTS["dgpo"].count("\n") <= 400 and max(text.count("\n") for text in TEXTS.values()) <= 480
    assert all(len(taken_from_common(text)) <= 14 for text in TEXTS.values())
    for text in (*shared, *TEXTS.values()):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                assert node.end_lineno - node.lineno < 60, node.name


def test_top_level():
    """The card's list, README, LICENSE, pins and settings, and folders."""
    files = {path.name for path in tiny.ROOT.iterdir() if path.is_file() and not path.name.startswith(".")}
    scripts = {f"{name}.py" for name in (*SCRIPTS, "common", "preferences", "look", "eval_passk")}
    assert files == scripts | {"README.md", "LICENSE", "pyproject.toml", "requirements.txt"}
