"""Builds the training corpus of the embedded models: readable text of permissively licensed packages.

    python training/corpus.py download --into build/archives     # pip fetches what packages.txt pins
    python training/corpus.py build --archives build/archives --out build/corpus

`build` writes
    tokenizer.json          byte-level BPE, 4096 tokens, digits one by one
    train.bin, heldout.bin  uint16 token streams; every file is  <|begin|> text <|end|>
    heldout.txt             the held-out documents that the package may ship (see SHIPPED)
    manifest.json           every package with version, licence, files and bytes taken; figures of the tokenizer

Everything is decided by hashes of file names and contents: the same archives give the same corpus.
"""

from __future__ import annotations

import argparse
import email
import email.message
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
VOCABULARY = 4096
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
# Letters with their leading space, digits one by one (so that numbers are copied token by token), runs of signs, runs of spaces.
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|HPND|Zope|Repoze|RSTP|CMU)\b", re.I)
COPYLEFT = re.compile(r"\b(GPL|LGPL|AGPL|MPL|Mozilla|EUPL|CDDL)\b", re.I)
CODE, PROSE = (".py",), (".rst", ".md", ".txt")
# Tests repeat themselves, vendored trees have licences of their own, locale data is not text.
SKIP = re.compile(
    r"(^|/)(tests?|testing|benchmarks?|locale|locales|_?vendor(ed)?|extern(al)?|third_?party|typeshed|migrations|_generated|encodings|lib2to3)/|/test_|(^|/)(conftest|_version)\.py",
    re.I,
)
CODE_BYTES = {"CPython": 12_000_000}  # at most this much code of a package, so that no package rules
CODE_BYTES_ELSEWHERE = 1_800_000
FILE_BYTES = (400, 200_000)
HELDOUT_SHARE = 0.02
# Held-out files that go to heldout.txt, by package: a part of the path, and how many bytes. Their licences travel beside it.
SHIPPED = {"Django": ("/docs/", 160_000), "CPython": ("", 96_000)}


def archives(folder: Path) -> Iterator[Path]:
    yield from sorted(p for p in folder.iterdir() if p.name.endswith((".whl", ".tar.gz", ".zip")))


def members(archive: Path, wanted: Callable[[str, int], bool]) -> Iterator[tuple[str, bytes]]:
    """Yields (name, contents) of the wanted files of a wheel or source archive."""
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive) as tar:
            for item in tar:
                if item.isfile() and wanted(item.name, item.size):
                    yield item.name, tar.extractfile(item).read()  # type: ignore[union-attr]
    else:
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if wanted(info.filename, info.file_size):
                    yield info.filename, zipped.read(info)


def is_text(name: str, size: int) -> bool:
    return Path(name).suffix in CODE + PROSE and FILE_BYTES[0] <= size <= FILE_BYTES[1] and not SKIP.search(name)


def is_metadata(name: str, size: int) -> bool:
    return name.endswith(".dist-info/METADATA") or re.fullmatch(r"[^/]+/PKG-INFO", name) is not None


def metadata(archive: Path) -> email.message.Message:
    for _, data in members(archive, is_metadata):
        return email.message_from_bytes(data)
    raise SystemExit(f"{archive.name}: no METADATA or PKG-INFO")


def licence(meta: email.message.Message) -> str:
    """The declared licence; stops when it is not permissive, so that nothing enters the corpus unlooked at."""
    declared = [str(meta.get("License-Expression") or ""), *str(meta.get("License") or "").strip().splitlines()[:1]]
    classifiers = [str(c).split("::")[-1] for c in meta.get_all("Classifier") or [] if str(c).startswith("License")]
    text = " ".join(" ".join(declared + classifiers).split())
    if not PERMISSIVE.search(text) or COPYLEFT.search(text):
        raise SystemExit(f"{meta['Name']}: licence {text!r} is not in the permissive list; remove it from packages.txt")
    return text[:80]


def readable(data: bytes) -> str | None:
    """The text if it reads like English or code: UTF-8, nearly all ASCII, no tables of numbers, no very long lines."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    ascii_share = sum(c < 128 for c in data) / len(data)
    digits = sum(48 <= c < 58 for c in data) / len(data)
    letters = sum(65 <= (c & 0xDF) <= 90 for c in data) / len(data)
    longest = max(map(len, text.splitlines()), default=0)
    if ascii_share < 0.98 or digits > 0.12 or letters < 0.45 or longest > 1000:
        return None
    return text.replace("\r\n", "\n")


def rank(package: str, name: str) -> float:
    """A number in [0, 1) that depends on the file's name only: decides what is held out and what is taken first."""
    return int.from_bytes(hashlib.sha256(f"{package}/{name}".encode()).digest()[:6], "big") / 2**48


def collect(folder: Path) -> tuple[list[dict], dict[str, list[tuple[str, str, str]]]]:
    """Returns the manifest rows and, for 'train' and 'heldout', lists of (package, file, text)."""
    sources: list[tuple[str, str, str, list[tuple[str, bytes]]]] = []
    for archive in archives(folder):
        meta = metadata(archive)
        sources.append((str(meta["Name"]), str(meta["Version"]), licence(meta), list(members(archive, is_text))))
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(stdlib.rglob("*.py")) if "site-packages" not in p.parts]
    named = [(str(p.relative_to(stdlib)), p.read_bytes()) for p in files if is_text(str(p.relative_to(stdlib)), p.stat().st_size)]
    sources.append(("CPython", ".".join(map(str, sys.version_info[:3])), "Python Software Foundation License", named))

    seen: set[bytes] = set()
    rows: dict[str, dict] = {}
    documents: dict[str, list[tuple[str, str, str]]] = {"train": [], "heldout": []}
    for package, version, terms, items in sources:
        row = rows.setdefault(package, {"package": package, "version": version, "licence": terms, "files": 0, "bytes": 0})
        code = 0
        for name, data in sorted(items, key=lambda item: rank(package, item[0])):
            is_code = Path(name).suffix in CODE
            if is_code and code + len(data) > CODE_BYTES.get(package, CODE_BYTES_ELSEWHERE):
                continue
            digest = hashlib.sha256(data).digest()
            text = None if digest in seen else readable(data)
            seen.add(digest)
            if text is None:
                continue
            code += len(data) * is_code
            split = "heldout" if rank("heldout", f"{package}/{name}") < HELDOUT_SHARE else "train"
            documents[split].append((package, name, text))
            row["files"] += 1
            row["bytes"] += len(data)
    return sorted(rows.values(), key=lambda r: r["package"].lower()), documents


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 0)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[tuple[str, str, str]]) -> np.ndarray:
    """All documents in hash order (so that packages are mixed), as one uint16 stream of  <|begin|> text <|end|>."""
    ordered = sorted(documents, key=lambda d: rank("order", d[0] + d[1]))
    end = tokenizer.token_to_id(END)
    pieces: list[int] = []
    for start in range(0, len(ordered), 256):
        for encoding in tokenizer.encode_batch([d[2] for d in ordered[start : start + 256]]):
            pieces.extend(encoding.ids)  # starts with <|begin|>, by the post-processor
            pieces.append(end)
    return np.asarray(pieces, dtype=np.uint16)


def shipped_sample(documents: list[tuple[str, str, str]]) -> str:
    """Held-out documents of the SHIPPED packages, whole, up to the byte limits, with a line that names each."""
    parts = []
    for package, (part, left) in SHIPPED.items():
        for name, text in sorted((n, t) for p, n, t in documents if p.lower() == package.lower() and part in n):
            size = len(text.encode())
            if 2_000 <= size <= min(left, 60_000):
                left -= size
                parts.append(f"{text.rstrip()}\n")
                print(f"  ships {package}: {name} ({size} bytes)")
    return "\n".join(parts)


def build(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows, documents = collect(folder)
    sample = sorted(documents["train"], key=lambda d: rank("tokenizer", d[0] + d[1]))
    budget, texts = 40_000_000, []
    for _, _, text in sample:
        if budget > 0:
            texts.append(text)
            budget -= len(text)
    tokenizer = train_tokenizer(texts)
    tokenizer.save(str(out / "tokenizer.json"))
    figures = {}
    for split, docs in documents.items():
        tokens = encode(tokenizer, docs)
        tokens.tofile(out / f"{split}.bin")
        size = sum(len(text.encode()) for _, _, text in docs)
        figures[split] = {"files": len(docs), "bytes": size, "tokens": len(tokens), "bytes_per_token": round(size / len(tokens), 4)}
        print(split, figures[split])
    (out / "heldout.txt").write_text(shipped_sample(documents["heldout"]))
    manifest = {"vocabulary": VOCABULARY, "figures": figures, "packages": rows}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def download(into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for line in (HERE / "packages.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement, kind = line.split()
            form = {"wheel": "--only-binary=:all:", "source": "--no-binary=:all:"}[kind]
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "-q", "--no-deps", form, "-d", str(into), requirement], check=True
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    fetch = verbs.add_parser("download")
    fetch.add_argument("--into", type=Path, required=True)
    make = verbs.add_parser("build")
    make.add_argument("--archives", type=Path, required=True)
    make.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.verb == "download":
        download(options.into)
    else:
        build(options.archives, options.out)
