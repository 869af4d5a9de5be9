"""The command: headwise scan | view | plan | eval | generate | train | bench | list | check."""

from __future__ import annotations

import http.server
import inspect
import json
import sys
import time
import webbrowser
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer
from rich.console import Console
from rich.table import Table

from . import registry
from .errors import HeadwiseError, InputError, PlanError, RegistryError
from .training.command import train_command
from .version import __version__

app = typer.Typer(
    name="headwise",
    help="Every attention head, one table: see it, steer it, swap it, shrink it, scale it.\n\n"
    "MODEL is a folder, a Hugging Face hub id, or an embedded model (tiny, tiny-gqa); without it, tiny is used.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console()

Model = Annotated[Optional[str], typer.Argument(help="Folder, hub id, or embedded model. Default: tiny.", show_default=False)]  # noqa: UP045
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16 or float64. Default: float32 on cpu.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings along.")]
TextFile = Annotated[
    Path | None, typer.Option("--text", help="A text file to read. Default: embedded held-out text.", show_default=False)
]
PlanFolder = Annotated[str | None, typer.Option("--plan", help="A plan folder, as `headwise plan` writes it.", show_default=False)]


def main() -> NoReturn:
    """Runs the command; an error of ours is one line and exit code 2, an interruption exit code 130."""
    try:
        app()
    except HeadwiseError as error:
        print(f"headwise: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("headwise: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    sys.exit(0)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def scan(
    model: Model = None,
    out: Annotated[Path, typer.Option(help="Where report.html, heads.json and plan/ go.")] = Path("scan"),
    text: TextFile = None,
    probes: Annotated[
        str | None, typer.Option(help="Probes to run, separated by commas. Default: all.", show_default=False)
    ] = None,
    length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=8, help="Tokens of a row of running text, up to the context. Default: 512.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Probes and viewer only: no ablations of sets of heads, no plan.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of random tokens and random controls.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: Remote = False,
    json_: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """What every head does, which of them matter, and a plan that frees most of the cache; as a report."""
    from .report import scan as run

    subject = _open(model, device, dtype, trust_remote_code)
    chosen = _names(probes, "probe")
    try:
        found = run(subject, out, probes=chosen, text=_read(text), seed=seed, length=length, quick=quick, show_progress=not quiet)
    except KeyboardInterrupt:
        print(f"headwise: interrupted; what was finished is in {out}, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
    if json_:
        print(json.dumps(found.to_dict(), indent=1))
        return
    for finding in found.findings:
        console.print(f"[bold]{_escape(finding['title'])}[/bold]\n  {_escape(finding['text'])}", highlight=False)
    for (name, stack), why in found.measurement.skipped.items():
        console.print(f"[dim]{name} was not measured on {stack}: {why}[/dim]", highlight=False)
    console.print(f"\n{found.seconds:.0f} s. The report: {(out / 'report.html').resolve()}", highlight=False, soft_wrap=True)


@app.command()
def view(
    folder: Annotated[Path, typer.Argument(help="A folder that `headwise scan` wrote.")] = Path("scan"),
    port: Annotated[int, typer.Option(help="Port on this machine; 0 picks a free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Shows a report in the browser, served to this machine only, until interrupted."""
    if not (folder / "report.html").is_file():
        raise InputError(f"{folder} holds no report.html; make one with: headwise scan --out {folder}")
    handler = partial(_ReportOnly, directory=str(folder.resolve()))
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise InputError(f"port {port} cannot be used ({error.strerror}); choose another, or 0 for any free one") from error
    address = f"http://127.0.0.1:{server.server_address[1]}/report.html"
    print(address, flush=True)
    if browser:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


class _ReportOnly(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a scan and nothing else, to requests that name this machine."""

    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost") or self.path.split("?")[0] not in ("/report.html", "/heads.json"):
            self.send_error(404)
            return
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="duo, streaming, prune, ...; see `headwise list --kind recipe`.")],
    model: Model = None,
    out: Annotated[Path, typer.Option(help="The plan's folder.")] = Path("plan"),
    heads: Annotated[
        str | None,
        typer.Option(help="Heads that the recipe is about, such as L5H3,L6H0; or a file of published heads.", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the recipe, such as recent=128.", show_default=False)
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: Remote = False,
    json_: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Makes a plan for a model by a recipe and saves it."""
    make = registry.load("recipe", recipe)
    options = _recipe_options(make, recipe, set_ or [])
    subject = _open(model, device, dtype, trust_remote_code)
    if heads is not None:
        options["heads"] = _recipe_heads(make, recipe, heads, subject)
    made = make(subject, show_progress=not quiet, **options)
    made.save_pretrained(out)
    if json_:
        entries = [{"stage": str(e.stage), "stack": e.heads.stack, "heads": e.heads.names()} for e in made.entries]
        print(
            json.dumps(
                {"recipe": recipe, "model": subject.name, "folder": str(out), "about": made.about, "entries": entries}, indent=1
            )
        )
        return
    for entry in made.entries:
        names = entry.heads.names()
        console.print(
            f"{entry.stage} on {len(names)} heads of {entry.heads.stack}: "
            f"{', '.join(names[:16])}{' ...' if len(names) > 16 else ''}",
            highlight=False,
        )
    console.print(f"The plan: {out.resolve()}", highlight=False, soft_wrap=True)


@app.command(name="eval")
def eval_(
    model: Model = None,
    plan: PlanFolder = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks to run, separated by commas. Default: all.", show_default=False)] = None,
    text: TextFile = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: Remote = False,
    json_: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Judges a model, without and with a plan: text, needles, repeats, recall, cache bytes, speed."""
    from .plans import Plan
    from .tasks import evaluate

    chosen = _names(tasks, "task")
    loaded = None if plan is None else Plan.from_pretrained(plan)
    subject = _open(model, device, dtype, trust_remote_code)
    result = evaluate(subject, loaded, chosen, text=_read(text), show_progress=not quiet)
    if json_:
        print(json.dumps({**result.to_dict(), "plan": plan}, indent=1))
        return
    table = Table("metric", "without" if loaded else "value", *(["with", "change"] if loaded else []))
    for name, before in result.without.items():
        if not isinstance(before, int | float):
            continue
        row = [name, f"{before:,.4g}" if isinstance(before, float) else f"{before:,}"]
        if result.under_plan is not None:
            after = result.under_plan[name]
            row += [f"{after:,.4g}" if isinstance(after, float) else f"{after:,}", f"{(after / before - 1):+.1%}" if before else ""]
        table.add_row(*row)
    console.print(table)
    for name, why in result.skipped.items():
        console.print(f"[dim]{name} was not run: {why}[/dim]", highlight=False)


@app.command()
def generate(
    model: Model = None,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "def main(",
    plan: PlanFolder = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write at most.")] = 64,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: Remote = False,
    json_: AsJson = False,
) -> None:
    """Continues a prompt, under a plan if one is given, and says what the cache took."""
    import torch

    from .models.cache import cache_bytes, cache_of
    from .plans import Plan

    loaded = None if plan is None else Plan.from_pretrained(plan)
    subject = _open(model, device, dtype, trust_remote_code)
    if not subject.is_language_model:
        raise InputError(f"{type(subject.model).__name__} predicts no next token, so it cannot continue a prompt")
    ids = [*subject.begin, *subject.encode(prompt)]
    subject.check_length(len(ids) + max_new_tokens)
    rows = torch.tensor([ids], device=subject.device)
    torch.manual_seed(seed)
    applied = (loaded or Plan.empty(subject))(subject)
    started = time.perf_counter()
    with applied, torch.no_grad():
        out = subject.model.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=max_new_tokens, do_sample=sample,
            return_dict_in_generate=True, pad_token_id=subject.model.generation_config.pad_token_id or int(subject.vocabulary[0]),
        )  # fmt: skip
    seconds = time.perf_counter() - started
    new = out.sequences[0, len(ids) :]
    written = subject.tokenizer.decode(new, skip_special_tokens=True)  # type: ignore[union-attr]
    size = cache_bytes(cache_of(out))
    if json_:
        print(json.dumps({"prompt": prompt, "text": written, "new_tokens": len(new), "kv_bytes": size, "seconds": seconds}))
        return
    print(prompt + written)
    print(f"[{len(new)} tokens in {seconds:.2f} s, cache {size / 1024:,.0f} KiB]", file=sys.stderr)


app.command(name="train")(train_command)


@app.command(name="list")
def list_(
    kind: Annotated[Optional[str], typer.Option(help=f"One of: {', '.join(registry.kinds())}.", show_default=False)] = None,  # noqa: UP045
    json_: AsJson = False,
) -> None:
    """Everything in the inventory, with the paper that each idea comes from."""
    if kind is not None and kind not in registry.kinds():
        raise RegistryError(f"there is no kind {kind!r}; there are: {', '.join(registry.kinds())}")
    rows = [row for row in registry.entries() if kind in (None, row["kind"])]
    if json_:
        print(json.dumps(rows, indent=1))
        return
    table = Table("name", "kind", "what it does", "paper", "year")
    for row in rows:
        table.add_row(row["name"], row["kind"], _escape(row["about"]), _escape(row["paper"]), str(row["year"]))
    console.print(table)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="A benchmark; see `headwise list --kind benchmark`.")] = "statistics",
    device: Device = "cpu",
    quick: Annotated[bool, typer.Option(help="The shortest length only.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draws the result into this SVG, where the benchmark has a picture.")] = None,
    json_: AsJson = False,
) -> None:
    """Measures speed and memory with the peers beside us in the same run."""
    run = registry.load("benchmark", name)
    draw = getattr(sys.modules[run.__module__], "plot", None)
    if plot is not None and draw is None:
        raise InputError(f"the benchmark {name} has no picture; leave --plot out")
    from .models.subject import check_device

    def line(row: Any) -> None:
        ratio = "" if row.ratio is None else f"{row.ratio:6.2f} x"
        goal = "" if row.goal is None else f" (goal {row.goal:g} x)"
        took = "" if row.milliseconds is None else f"{row.milliseconds:,.1f} ms"
        extra = "" if row.extra_mib is None else f", {row.extra_mib:,.0f} MiB more"
        note = f"  {row.note}" if row.note else ""
        text = f"{row.tokens:>7,} tokens  {row.measure}: {row.what:<40} {took:>12} {ratio}{goal}{extra}{note}"
        print(text, file=sys.stderr if json_ else sys.stdout, flush=True)

    table = run(check_device(device), quick=quick, report=line)
    if plot is not None and draw is not None:
        draw(table, plot)
    if json_:
        print(json.dumps(table.to_dict(), indent=1))
        return
    print(table.shapes)
    print(", ".join(f"{key} {value}" for key, value in table.machine.items()))


@app.command()
def check(
    names: Annotated[
        list[str] | None, typer.Argument(help="Registered names, or your own as module:object.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Check the whole inventory.")] = False,
    json_: AsJson = False,
) -> None:
    """Runs the conformance checks and says in words what is wrong. Exit code 1 if something is."""
    from .testing import _check

    if bool(names) == everything:
        raise RegistryError("give names, or --all for everything; your own as module:object, such as a stage or an attention")
    sys.path.insert(0, "")  # so that module:object finds a file beside the user
    items = _check.everything() if everything else [item for name in names or [] for item in _check.find_all(name)]
    rows, wrong = [], 0
    for item in items:
        results = list(_check.check(item))
        wrong += sum(not result.ok for result in results)
        rows += [vars(result) for result in results]
        if not json_:
            bad = [result for result in results if not result.ok]
            exempt, skipped = (sum(result.outcome == outcome for result in results) for outcome in ("exempt", "skipped"))
            mark = f"[red]fails[/red] {len(bad)}" if bad else f"[green]passes[/green] {len(results) - skipped}"
            console.print(
                f"{item.kind} {item.name}: {mark} of {len(results)}"
                f"{f', {exempt} exempt' if exempt else ''}{f', {skipped} skipped' if skipped else ''}",
                highlight=False,
            )
            for result in bad:
                console.print(f"  {result.check}: {_escape(result.message)}", highlight=False, soft_wrap=True)
            for result in results if not everything else ():  # of all at once, the counts are enough
                if result.outcome == "skipped":
                    about = f"  [dim]{result.check} skipped: {_escape(result.message)}[/dim]"
                    console.print(about, highlight=False, soft_wrap=True)
    if json_:
        print(json.dumps(rows, indent=1))
    if wrong:
        raise SystemExit(1)


# ---- shared ----------------------------------------------------------------------------------------------------------


def _open(model: str | None, device: str, dtype: str | None, trust_remote_code: bool) -> Any:
    import transformers

    from .models.subject import open_model

    transformers.logging.set_verbosity_error()
    return open_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)


def _read(file: Path | None) -> str | None:
    if file is None:
        return None
    if not file.is_file():
        raise InputError(f"there is no file {file}; give a text file")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no UTF-8 text: {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise InputError(f"{file} is empty; give some words")
    return text


def _names(given: str | None, kind: str) -> list[str] | None:
    """Names from a list with commas, each looked up before any work is done."""
    if given is None:
        return None
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        registry.load(kind, name)
    if not names:
        raise RegistryError(f"--{kind}s names none; there are: {', '.join(registry.names(kind))}")
    return names


def _recipe_options(make: Any, recipe: str, given: list[str]) -> dict[str, Any]:
    """name=value pairs as keyword arguments of a recipe."""
    known = {n: p for n, p in inspect.signature(make).parameters.items() if n not in ("model", "heads", "show_progress")}
    options: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise PlanError(f"--set {pair}: the recipe {recipe} has {', '.join(f'{n}={p.default}' for n, p in known.items())}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError as error:
            raise PlanError(f"--set {pair}: {value!r} is no number, true, false, null or quoted text") from error
        default = known[name].default
        if isinstance(default, int | float) and not isinstance(options[name], int | float):
            raise PlanError(f"--set {pair}: a number is due, such as {name}={default}")
    return options


def _recipe_heads(make: Any, recipe: str, given: str, subject: Any) -> Any:
    """The heads of --heads: a selection, or the table in a file."""
    from .plans.imports import import_heads

    takes = inspect.signature(make).parameters.get("heads")
    if takes is None:
        raise PlanError(f"the recipe {recipe} chooses its heads itself; leave --heads out")
    if not Path(given).is_file() and Path(given).suffix not in (".tsv", ".json"):
        return subject.heads(given)
    if "HeadTable" not in str(takes.annotation):
        raise PlanError(f"the recipe {recipe} takes heads such as L5H3,L6H0, no table of them in a file")
    return import_heads(given, subject)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


if __name__ == "__main__":
    main()
