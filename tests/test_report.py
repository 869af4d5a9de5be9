"""The scan and its report: the output contract, one self-contained page, text that stays text, work that is not lost."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import families
import pytest
import torch

from headwise import Plan, registry, scan
from headwise.errors import InputError, RegistryError
from headwise.models.subject import Subject
from headwise.probes import _measure as measuring
from headwise.report import experiments
from headwise.report.viewer import TEXT, capture_view

CHEAP = ["entropy", "induction", "previous_token", "sink_mass", "local_mass"]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self._script = [], None, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._script = tag == "script" and dict(attrs).get("type") == "application/json"

    def handle_data(self, text):
        if self._script:
            self.data = json.loads(text)
            self._script = False


def test_output_contract(scanned, tiny):
    out, found = scanned
    assert sorted(p.name for p in out.iterdir()) == ["heads.json", "plan", "report.html"]
    data = json.loads((out / "heads.json").read_text())
    assert data["model"] == "tiny"
    assert (data["num_layers"], data["num_heads"]) == (8, 8)
    assert set(data["probes"]) == set(registry.names("probe"))
    for table in data["probes"].values():
        assert len(table) == 8
        assert all(len(row) == 8 and all(isinstance(v, int | float) for v in row) for row in table)
    assert len(data["roles"]) == 64
    assert "retrieval" in data["roles"]["L7H3"]
    assert all({"title", "text", "numbers", "heads"} <= finding.keys() for finding in data["findings"])
    plan = data["plan"]
    assert plan["recipe"] == "duo"
    assert plan["with"]["kv_bytes"] < 0.4 * plan["without"]["kv_bytes"]
    assert data["causality"]["closed"] < 0.2 < 0.9 < data["causality"]["random_median"]
    assert data["pruning"]["removable"]["10%"] >= 1
    again = Plan.from_pretrained(out / "plan")
    assert repr(again) == repr(found.plan)
    again.check(tiny)


def test_findings_carry_their_numbers(scanned):
    _, found = scanned
    titles = [finding["title"] for finding in found.findings]
    assert titles[0] == "6 of 64 heads do the retrieval (9%)"
    assert any(t.startswith("duo frees") for t in titles)
    plan = next(f for f in found.findings if f["title"].startswith("duo frees"))
    freed = 1 - found.evaluation.under_plan["kv_bytes"] / found.evaluation.without["kv_bytes"]
    assert plan["numbers"]["freed"] == freed
    assert f"{freed:.0%}" in plan["title"]
    agree = next(f for f in found.findings if "importance" in f["title"])
    assert agree["numbers"]["spearman"] == found.tables["gate_importance"].spearman(found.tables["ablation_importance"])


def test_one_self_contained_page(scanned):
    out, _ = scanned
    text = (out / "report.html").read_text()
    assert len(text.encode()) < 5_000_000
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed")
        assert not {"src", "href", "srcset", "action"} & attributes.keys(), (tag, attributes)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "@import" not in text
    assert "url(" not in text
    assert page.data["view"]["rows"] == len(page.data["view"]["tokens"])
    assert len(page.data["view"]["weights"]) == 64


def test_text_stays_text(tiny, tmp_path):
    """A model's name, its tokens and a probe's findings may hold anything; none of it becomes markup."""
    evil = '</script><script>alert("x")</script><b>&amp;'
    subject = Subject(tiny.model, tiny.tokenizer, evil)
    found = scan(subject, probes=["entropy"], quick=True, show_progress=False)
    found.findings.append({"title": evil, "text": evil, "heads": [evil], "numbers": {}})
    found.view = capture_view(subject, text=evil * 3)
    text = found.html()
    assert text.count("<script") == 2
    assert text.count("</script>") == 2
    assert "<b>" not in text
    page = Page(text)
    assert page.data["model"] == evil
    assert page.data["findings"][-1]["title"] == evil
    assert evil in "".join(page.data["view"]["tokens"])


def test_the_view_holds_the_models_weights(exact):
    view = capture_view(exact, tokens=40)
    exact.model.set_attn_implementation("eager")
    try:
        ids = torch.tensor([(list(exact.begin) + exact.encode(TEXT))[:40]])
        with torch.no_grad():
            eager = exact.model(ids, output_attentions=True).attentions
    finally:
        exact.model.set_attn_implementation("sdpa")
    rows, columns = torch.tril_indices(40, 40)
    for name in ("L0H0", "L7H3"):
        layer, head = int(name[1]), int(name[3])
        data = torch.tensor(list(base64.b64decode(view["weights"][name]))) / 255
        assert (data**2 - eager[layer][0, head, rows, columns]).abs().max() < 0.005
    assert view["tokens"][1:4] == ["The", " pass", "word"]


@pytest.mark.parametrize("name", ["bert", "t5", "vit", "clip", "llava", "gpt2", "whisper"])
def test_any_model_gets_a_report(name, tmp_path):
    """Encoders, encoder-decoders, vision and vision-language models: probes that make sense, a word for the others, no crash."""
    family = next(f for f in families.ALL if f.name == name)
    found = scan(family.model(), tmp_path, show_progress=False)
    data = json.loads((tmp_path / "heads.json").read_text())
    assert {data["stack"], *data["stacks"]} == set(family.stacks)
    assert "entropy" in data["probes"]
    assert data["skipped"] or name == "gpt2"
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert (found.plan is not None) == (tmp_path / "plan").exists() == (name in ("gpt2", "llava"))


def test_an_interrupted_scan_goes_on(tiny, tmp_path, monkeypatch):
    """Parts that were finished are not measured again, and the result is that of a scan in one go."""
    calls = []
    own = measuring.observe_calls

    def watched(probes, *rest):
        calls.append([p.name for p in probes])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(probes, *rest)

    monkeypatch.setattr(measuring, "observe_calls", watched)
    options = {"probes": CHEAP[::-1], "quick": True, "show_progress": False}
    with pytest.raises(KeyboardInterrupt):
        scan(tiny, tmp_path, **options)
    assert list((tmp_path / "parts").iterdir())
    assert not (tmp_path / "heads.json").exists()
    first = len(calls)
    resumed = scan(tiny, tmp_path, **options)
    assert len(calls) - first == 1  # only the part that was interrupted
    assert not (tmp_path / "parts").exists()
    whole = scan(tiny, **options)
    assert resumed.to_dict()["probes"] == whole.to_dict()["probes"]


def test_parts_of_another_scan_are_not_used(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "retrieval_causality", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    options = {"probes": ["retrieval", "duo_gate"], "show_progress": False}
    with pytest.raises(KeyboardInterrupt):
        scan(tiny, tmp_path, seed=0, **options)
    kept = {p.name for p in (tmp_path / "parts").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        scan(tiny, tmp_path, seed=1, **options)
    assert len({p.name for p in (tmp_path / "parts").iterdir()} - kept) == 2


def test_what_cannot_be_scanned(tiny):
    with pytest.raises(InputError, match="the text is empty"):
        scan(tiny, text="  \n", show_progress=False)
    with pytest.raises(RegistryError, match="no probe 'nonsense'"):
        scan(tiny, probes=["nonsense"], show_progress=False)
