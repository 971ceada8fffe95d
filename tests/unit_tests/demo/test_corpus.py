import json
from pathlib import Path

import pyarrow.parquet as pq
from corpus import CorpusBudget, build_corpus
from documents import SourceFile, docstring_documents, find_files, parse_python

PROSE = "This sentence is long enough to be kept as a document of the corpus, number {n}. " * 4
MODULE = '''"""{prose}"""


def function_{n}(value: int) -> int:
    """{prose}"""
    return value + {n}
'''


def write_environment(root: Path) -> list[SourceFile]:
    """Twelve Python files of which two are equal, three descriptions of which two are equal, and one plain text."""
    files = []
    for number in range(12):
        text = MODULE.format(n=number % 11, prose=PROSE.format(n=number % 11))
        files.append(add(root, f"package/module_{number}.py", text, "python"))
    for number in range(3):
        text = f"Name: package\n\n{PROSE.format(n=100 + number // 2)}"
        files.append(add(root, f"p{number}.dist-info/METADATA", text, "package"))
    files.append(add(root, "package/notes.rst", PROSE.format(n=200), "prose"))
    return files


def add(root: Path, relative: str, text: str, kind: str) -> SourceFile:
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return SourceFile(path, relative, kind)


def read_rows(folder: Path) -> dict[str, list[dict[str, object]]]:
    texts = {name: (folder / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("code", "packages")}
    rows = {name: [json.loads(line) for line in text.split("\n") if line] for name, text in texts.items()}
    return {**rows, "reference": pq.read_table(folder / "reference.parquet").to_pylist()}


def test_the_same_environment_gives_the_same_corpus_wherever_it_lies(tmp_path: Path) -> None:
    for place in ("one", "other"):
        build_corpus(tmp_path / f"corpus_{place}", CorpusBudget(), write_environment(tmp_path / place))
    assert read_rows(tmp_path / "corpus_one") == read_rows(tmp_path / "corpus_other")


def test_an_exact_duplicate_is_kept_once_and_counted(tmp_path: Path) -> None:
    # all twelve modules are in the half that feeds `code`, the two equal ones included
    files = write_environment(tmp_path)
    more = [add(tmp_path, f"package/short_{number}.py", "x = 1\n", "python") for number in range(12)]
    reports = build_corpus(tmp_path / "corpus", CorpusBudget(), files + more)
    rows = read_rows(tmp_path / "corpus")
    assert [report.left_out.get("exact duplicate", 0) for report in reports] == [1, 0, 1]
    for domain in rows.values():
        texts = [row["text"] for row in domain]
        assert len(texts) == len(set(texts))
    assert len(rows["code"]) == 11
    assert len(rows["packages"]) == 2


def test_no_file_feeds_both_code_and_reference(tmp_path: Path) -> None:
    build_corpus(tmp_path / "corpus", CorpusBudget(), write_environment(tmp_path))
    rows = read_rows(tmp_path / "corpus")
    code = {str(row["origin"]) for row in rows["code"]}
    reference = {str(row["origin"]).partition(":")[0] for row in rows["reference"]}
    assert code
    assert reference > {"package/notes.rst"}
    assert not code & reference


def test_a_domain_ends_with_the_document_that_fills_its_budget(tmp_path: Path) -> None:
    files = write_environment(tmp_path)
    size = len(files[0].path.read_bytes())
    report = build_corpus(tmp_path / "corpus", CorpusBudget(code=2 * size), files)[0]
    assert 2 * size <= report.bytes < 3 * size + 10


def test_unparsable_files_are_left_out_and_counted(tmp_path: Path) -> None:
    broken = [add(tmp_path, f"broken_{number}.py", "def broken(:\n" * 40, "python") for number in range(2)]
    reports = build_corpus(tmp_path / "corpus", CorpusBudget(), broken)
    assert sum(sum(report.left_out.values()) for report in reports) == 2


def test_every_score_lies_between_0_and_1(tmp_path: Path) -> None:
    build_corpus(tmp_path / "corpus", CorpusBudget(), write_environment(tmp_path))
    scores = [row["score"] for rows in read_rows(tmp_path / "corpus").values() for row in rows]
    assert all(isinstance(score, float) and 0.0 <= score <= 1.0 for score in scores)


def test_a_docstring_document_begins_with_what_it_describes() -> None:
    tree = parse_python(MODULE.format(n=3, prose=PROSE.format(n=3)))
    assert tree is not None
    heads = [document.text.splitlines()[0] for document in docstring_documents(tree, "package/module.py")]
    assert heads == ["module package.module", "function_3(value: int) -> int"]


def test_the_environment_has_files_of_all_three_kinds_in_a_fixed_order() -> None:
    files = find_files()
    assert {file.kind for file in files} == {"python", "package", "prose"}
    assert [file.order_key for file in files] == sorted(file.order_key for file in files)
    assert len({file.relative for file in files}) == len(files)
