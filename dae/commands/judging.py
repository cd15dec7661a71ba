"""`dae eval mt-bench` and `dae eval alpaca-eval`: parse, call, print."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from dae.commands.stopping import going_on
from kd.config.schema import LARGEST_SEED
from kd.errors import UserError

if TYPE_CHECKING:
    from dae_eval.judging.authors import Author
    from dae_eval.judging.judges import JudgeChoice
    from dae_eval.judging.mt_bench import Side

    from kd.served.connection import EndpointChoice

MODEL_KEY, JUDGE_KEY = "MODEL_API_KEY", "OPENAI_API_KEY"
KEPT = "replies so far are kept"
MOST_AT_ONCE = 64  # concurrent requests


class Mode(StrEnum):
    """How answers are judged."""

    SINGLE = "single"
    PAIRWISE = "pairwise"


class References(StrEnum):
    """The reference answers in a file."""

    ORIGINAL = "original"
    CORRECTED = "corrected"


class KindOfTask(StrEnum):
    """What a score counts in."""

    GENERAL = "general"
    DOMAIN = "domain"
    SHOWN = "shown"


@dataclass(frozen=True)
class Options:
    """The flags that both commands have."""

    model: Annotated[
        str | None,
        typer.Option(metavar="CKPT", help="checkpoint, run folder or adapter; with --model-url the model's name there"),
    ] = None
    model_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help=f"OpenAI-compatible endpoint of the model; its key is read from {MODEL_KEY}"),
    ] = None
    judge_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help=f"OpenAI-compatible endpoint of the judge; its key is read from {JUDGE_KEY}"),
    ] = None
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="the judge's name at --judge-url")] = None
    judge: Annotated[
        str | None, typer.Option(metavar="CKPT", help="a local checkpoint as judge, instead of --judge-url")
    ] = None
    judge_prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="FastChat's judge_prompts.jsonl, or hub:OWNER/NAME/FILE")
    ] = None
    judge_max_tokens: Annotated[int, typer.Option(min=1, help="longest judgment in tokens")] = 2048
    kind: Annotated[KindOfTask, typer.Option(help="what the score counts in: retention, gap closed, or neither")] = (
        KindOfTask.GENERAL
    )
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="folder for all results")] = None
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="of a checkpoint's answers and of the order of pairs")
    ] = 0
    batch_size: Annotated[int, typer.Option(min=1, help="answers that a checkpoint generates at a time")] = 8
    chat_template: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="instead of the checkpoint's own template: `plain` or a .jinja file"),
    ] = None
    requests_per_minute: Annotated[
        float | None, typer.Option(metavar="N", min=0.001, help="at most N requests a minute to each endpoint")
    ] = None
    concurrency: Annotated[int, typer.Option(min=1, max=MOST_AT_ONCE, help="concurrent requests to an endpoint")] = 4
    price_per_million_tokens: Annotated[
        str | None, typer.Option(metavar="IN,OUT", help="the judge's price per million tokens, for the estimate")
    ] = None
    estimate: Annotated[
        bool, typer.Option("--estimate", help="show calls, tokens and price without asking the judge")
    ] = False

    def author(self, max_new_tokens: int) -> Author | None:
        """The model that writes the answers, if there is one. Raises UserError."""
        from dae_eval.judging.authors import Author

        served = self._endpoint(self.model_url, self.model, "--model-url", MODEL_KEY)
        if self.model is None:
            return None
        return Author(self.model, served, max_new_tokens, self.seed, self.batch_size, self.chat_template)

    def judge_choice(self) -> JudgeChoice:
        """The judge. Raises UserError if the flags name none, or two."""
        from dae_eval.judging.judges import JudgeChoice

        url, name, checkpoint = self.judge_url, self.judge_model, self.judge
        if (url is None) == (checkpoint is None) or (url is None) != (name is None):
            raise UserError("the judge: give --judge-url URL with --judge-model NAME, or --judge CKPT for a local one")
        served = self._endpoint(url, name, "--judge-url", JUDGE_KEY)
        return JudgeChoice(served, checkpoint or "", self.judge_max_tokens, self.batch_size)

    def _endpoint(self, url: str | None, model: str | None, flag: str, key_name: str) -> EndpointChoice | None:
        """The endpoint of the flag, if given. Raises UserError without a model's name or with an invalid address."""
        if url is None:
            return None
        if model is None:
            raise UserError(f"{flag}: {flag.removesuffix('-url')} NAME, the model's name there, is required")
        from kd.served.connection import EndpointChoice, plain_url

        choice = EndpointChoice(url, model, flag, key_name, self.requests_per_minute, self.concurrency)
        plain_url(choice)
        return choice

    def price(self) -> tuple[float, float] | None:
        """IN,OUT as two numbers. Raises UserError."""
        text = self.price_per_million_tokens
        if text is None:
            return None
        try:
            prices = [float(part) for part in text.split(",")]
        except ValueError:
            prices = []
        if len(prices) != 2 or not all(0 <= price < float("inf") for price in prices):
            raise UserError(f"--price-per-million-tokens {text}: expected two numbers, such as 2.5,10")
        return prices[0], prices[1]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer reads it: with the fields of `Options`, its first parameter, as flags."""

    def run(**given: Any) -> None:
        command(Options(**{field.name: given.pop(field.name) for field in fields(Options)}), **given)

    hints, kind = get_type_hints(Options, include_extras=True), inspect.Parameter.KEYWORD_ONLY
    shared = [inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name]) for f in fields(Options)]
    _, *own = (p.replace(kind=kind) for p in inspect.signature(command, eval_str=True).parameters.values())
    run.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined] # what typer reads
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*shared, *own)}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


Answers = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="answers in FastChat's format; with --model, of that model"),
]
Judgments = Annotated[
    list[str] | None, typer.Option(metavar="FILE", help="existing judgments in FastChat's format, only scored; repeats")
]
ModelId = Annotated[
    str | None, typer.Option(metavar="NAME", help="the model of --judgments to score; either of a pair")
]
Questions = Annotated[
    str | None, typer.Option(metavar="FILE", help="FastChat's question.jsonl, or hub:OWNER/NAME/FILE")
]
ReferenceAnswers = Annotated[
    str | None, typer.Option(metavar="FILE", help="reference answers for math, reasoning and coding, in its format")
]
ReferencesKind = Annotated[References, typer.Option(help="FastChat's own reference answers or corrected; recorded")]
ModeOption = Annotated[Mode | None, typer.Option(help="rate each answer, or compare (default with --against)")]
Against = Annotated[
    str | None, typer.Option(metavar="FILE|DIR", help="answers, an mt-bench output or a checkpoint to compare with")
]
Repeat = Annotated[int, typer.Option(min=1, help="number of judgings, to measure their spread")]
Strict = Annotated[
    bool, typer.Option("--strict/--compatible", help="require every question and turn, or count as FastChat does")
]


def mt_bench(
    options: Options,
    answers: Answers = None,
    judgments: Judgments = None,
    model_id: ModelId = None,
    questions: Questions = None,
    references: ReferenceAnswers = None,
    references_kind: ReferencesKind = References.ORIGINAL,
    mode: ModeOption = None,
    against: Against = None,
    repeat: Repeat = 1,
    strict: Strict = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer to one turn in tokens")] = 1024,
) -> None:
    """Judge a model's answers to MT-Bench; the same command resumes an interrupted run."""
    output, judge_prompts = options.output, options.judge_prompts
    refuse_missing("mt-bench", ("--questions", questions), ("--output", output))
    assert questions is not None and output is not None
    from dae_eval.judging.mt_bench import FinishedJudgments, MtBench, run_mt_bench, score_judgments
    from dae_eval.judging.mt_bench_results import result_lines

    pairwise = mode is Mode.PAIRWISE or (mode is None and against is not None)
    author = options.author(max_new_tokens)
    side = side_of(author, answers)
    if judgments:
        way: Literal["pairwise", "single"] = "pairwise" if pairwise else "single"
        finished = FinishedJudgments(
            tuple(judgments), questions, output, way, model_id, side, strict, options.kind.value
        )
        with going_on(output, KEPT):
            result = score_judgments(finished)
        show(output, result_lines(result))
        return
    refuse_misfits(side, model_id, pairwise, against)
    refuse_missing("mt-bench", ("--judge-prompts", judge_prompts))
    assert side is not None and judge_prompts is not None
    job = MtBench(
        side=side,
        judge=options.judge_choice(),
        questions=questions,
        judge_prompts=judge_prompts,
        output=output,
        references=references,
        references_kind=references_kind.value,
        against=None if against is None else opponent(against, author, max_new_tokens, options),
        repeat=repeat,
        strict=strict,
        kind=options.kind.value,
        price=options.price(),
        only_estimate=options.estimate,
    )
    with going_on(output, KEPT):
        judged = run_mt_bench(job)
    if judged is not None:
        show(output, result_lines(judged))


def refuse_misfits(side: Side | None, model_id: str | None, pairwise: bool, against: str | None) -> None:
    """Raise UserError if the flags of mt-bench do not go together when a judge is asked."""
    if side is None:
        raise UserError("mt-bench: --model CKPT, --answers FILE or --judgments FILE is required")
    if model_id is not None:
        raise UserError("--model-id: only with --judgments")
    if pairwise != (against is not None):
        raise UserError("--mode pairwise and --against go together; give both or neither")


def alpaca_eval(
    options: Options,
    instructions: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="AlpacaEval's instructions, or hub:OWNER/NAME/FILE; for --gamed-file their order",
        ),
    ] = None,
    outputs: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="existing outputs in its format; with --model, of that model"),
    ] = None,
    annotations: Annotated[
        str | None, typer.Option(metavar="FILE", help="existing annotations in its format, only scored")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="FILE", help="outputs to compare with, in its format; without it: no judging")
    ] = None,
    gamed_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",  # Rich would read an unescaped [alpaca] as markup.
            help=r"df_gamed.csv, for the length-controlled rate (needs: pip install -e '.\[alpaca]')",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest output in tokens")] = 2048,
) -> None:
    """Write a model's AlpacaEval outputs, annotate them against a baseline's, and show the win rate."""
    output, judge_prompts = options.output, options.judge_prompts
    refuse_missing("alpaca-eval", ("--output", output))
    assert output is not None
    from dae_eval.judging.alpaca import AlpacaEval, Annotating, result_lines, run_alpaca_eval

    author = options.author(max_new_tokens)
    annotating = None
    if baseline is not None:
        refuse_missing("alpaca-eval --baseline", ("--judge-prompts", judge_prompts))
        assert judge_prompts is not None
        judge, price = options.judge_choice(), options.price()
        annotating = Annotating(judge, judge_prompts, baseline, options.seed, price, options.estimate)
    elif options.judge_url is not None or options.judge is not None:
        raise UserError("--judge-url, --judge: --baseline FILE, the outputs to compare with, is required")
    kind = options.kind
    job = AlpacaEval(output, author, instructions, outputs, annotations, annotating, gamed_file, kind.value)
    with going_on(output, KEPT):
        result = run_alpaca_eval(job)
    if result is not None:
        show(output, result_lines(result))


def show(output: Path, lines: Iterable[str]) -> None:
    """Print the folder of the result, and the result."""
    typer.echo("\n".join([str(output), *lines]))


def register(app: typer.Typer) -> None:
    """Add both commands to the `eval` sub-app."""
    app.command("mt-bench")(with_options(mt_bench))
    app.command("alpaca-eval")(with_options(alpaca_eval))


def refuse_missing(command: str, *flags: tuple[str, object]) -> None:
    """Raise UserError naming the flags that were not given."""
    missing = [name for name, value in flags if value is None]
    if missing:
        raise UserError(f"{command}: missing {', '.join(missing)} (see --help)")


def side_of(author: Author | None, answers: str | None) -> Side | None:
    """The author and the file of its answers; None if neither is given."""
    from dae_eval.judging.fastchat_files import local_file
    from dae_eval.judging.mt_bench import Side

    if author is None and answers is None:
        return None
    return Side(author, None if answers is None else local_file(answers, "--answers"))


def opponent(against: str, author: Author | None, max_new_tokens: int, options: Options) -> Side:
    """The side that --against names: a file of answers, the output of an earlier run, or a checkpoint."""
    from dae_eval.judging.authors import Author
    from dae_eval.judging.mt_bench import ANSWERS, Side

    for file in (Path(against), Path(against) / ANSWERS):
        if file.is_file():
            return Side(None, file)
    template = None if author is None else author.chat_template
    return Side(Author(against, None, max_new_tokens, options.seed, options.batch_size, template))
